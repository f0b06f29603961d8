"""What a transformation owes by itself: types, odd leaves, bad numbers.

Wrappers of Optax, transformations of JAX, and training loops have a file each.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.trial import (
  BATCH,
  assert_close,
  assert_same,
  bad_number,
  every,
  jitted,
  make_gradients,
  make_params,
  make_steps,
  own,
  per_example,
  run,
  types,
  whole,
)

pytestmark = pytest.mark.device
PROGRAMS = 120


@every
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'float64'])
def test_types_are_kept(entry, dtype):
  """The state has those of init for ever, the updates have the gradients'.

  Statistics are float32 always.
  """
  assert isinstance(entry.tx, optax.GradientTransformationExtraArgs)
  expected = types(jax.eval_shape(entry.tx.init, make_params()))
  with jax.enable_x64(dtype == 'float64'):
    same = make_params(jnp.dtype(dtype))
    for params in (same, same | {'bias': make_params()['bias']}):
      gradients = make_gradients(entry, 0, params)
      others = make_params() if entry.own and dtype != 'float64' else params
      init = jax.eval_shape(entry.tx.init, others)
      for extra in ({}, {'not_ours': 1.0}):
        updates, state = jax.eval_shape(
          entry.tx.update, gradients, init, others, **extra
        )
        assert types(updates) == types(params)
        assert types(state) == types(init)
      if entry.own:
        assert types(state) == expected


@own
def test_state_has_field_names_of_its_own(entry):
  tx = optax.chain(entry.tx, optax.adam(1e-3), optax.trace(0.9))
  state = jax.eval_shape(tx.init, make_params())
  for name, value in state[0]._asdict().items():
    assert optax.tree.get(state, name) is value


@every
@pytest.mark.parametrize('empty', [{}, (), None, {'none': None}], ids=str)
def test_trees_without_leaves(entry, empty):
  state = jax.eval_shape(entry.tx.init, empty)
  updates, next_state = jax.eval_shape(entry.tx.update, empty, state, empty)
  assert updates == empty
  assert types(next_state) == types(state)


@every
def test_leaves_of_every_kind(entry):
  batch = (BATCH,) if entry.per_example else ()
  inexact = {
    'bfloat16': np.ones((2,), jnp.bfloat16),
    'complex64': np.ones((2,), np.complex64),
    'float16': np.ones((2,), np.float16),
    'matrix': np.ones((3, 2), np.float32),
    'no elements': np.ones((0, 3), np.float32),
    'scalar': np.ones((), np.float32),
  }
  others = {
    'bool': np.ones((*batch, 2), bool),
    'int32': np.ones((*batch, 2), np.int32),
    'masked': optax.MaskedNode(),
    'none': None,
  }
  float0 = np.zeros((*batch, 2), jax.dtypes.float0)
  gradients = make_gradients(entry, 0, inexact)
  gradients['complex64'] *= np.complex64(1 - 2j)

  @jax.jit
  def first_steps(gradients, in_full, params):
    def first(updates, params):
      return entry.tx.update(updates, entry.tx.init(params), params)[0]

    of_inexact = {name: params[name] for name in in_full}
    return first(gradients, params), first(in_full, _in_full(of_inexact))

  updates, expected = first_steps(
    gradients | others | {'float0': float0},
    _in_full(gradients),
    inexact | others | {'float0': np.ones((2,), np.int32)},
  )
  assert types(updates.pop('float0')) == types(float0)
  assert_same({name: updates.pop(name) for name in others}, others)
  assert types(updates) == types(inexact)
  for name, update in updates.items():
    rtol = max(2 * float(jnp.finfo(update.dtype).eps), 1e-5)
    wide = _in_full(np.asarray(update))
    assert_close(wide, np.asarray(expected[name]), rtol)


def _in_full(tree):
  """Floats of 16 bits in 32."""
  return jax.tree.map(
    lambda x: x.astype(np.float32) if x.dtype.itemsize == 2 else x, tree
  )


@every
def test_float64(entry):
  expected, _ = run(entry.tx, make_steps(entry))
  with jax.enable_x64(True):
    params = make_params(np.float64)
    updates, _ = run(entry.tx, make_steps(entry, params), params)
  # What differs is float32's rounding of sums that cancel.
  for update, narrow in zip(updates, expected, strict=True):
    assert_close(jax.tree.map(np.float32, update), narrow, rtol=1e-3)


@every
@bad_number
def test_a_bad_step_leaves_no_trace(entry, bad):
  first, second, third = make_steps(entry)
  spoilt = jax.tree.map(lambda x: np.full_like(x, bad), second)
  updates, state = run(entry.tx, [first, spoilt, third])
  chex.assert_tree_all_finite(state)
  expected, _ = run(entry.tx, [first, third, third])
  assert_close(updates[2], expected[1])


@whole
@bad_number
def test_one_bad_element_makes_a_bad_step_of_its_leaf(entry, bad):
  first, second, third = make_steps(entry)
  second['kernel'][1, 1] = bad
  updates, state = run(entry.tx, [first, second, third])
  chex.assert_tree_all_finite(state)
  expected, _ = run(entry.tx, [first, third, third])
  assert_close(updates[2]['kernel'], expected[1]['kernel'])


@per_example
@bad_number
@pytest.mark.parametrize(
  'examples', [(2,), (0, 5), tuple(range(BATCH))], ids=str
)
def test_bad_examples_are_left_out(entry, bad, examples):
  good, later = make_steps(entry)[:2]
  spoilt = good | {'bias': good['bias'].copy()}
  spoilt['bias'][list(examples), 0] = bad
  mask = ~np.isin(np.arange(BATCH), examples)
  init, update = jitted(entry.tx)
  params, first = make_params(), init(make_params())
  expected, masked_state = update(good, first, params, mask=mask)
  updates, state = update(spoilt, first, params)
  chex.assert_tree_all_finite((updates, state))
  assert_close(updates, expected)
  assert_close(
    update(later, state, params)[0],
    update(later, masked_state, params)[0],
  )
  assert_same(
    update(spoilt, first, params, mask=mask), (expected, masked_state)
  )
