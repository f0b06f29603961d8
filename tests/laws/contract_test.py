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
  STEPS,
  assert_close,
  assert_same,
  bad_number,
  every,
  make_gradients,
  make_params,
  make_steps,
  own,
  per_example,
  run,
  types,
  whole,
)


@every
def test_takes_any_keyword_argument(entry):
  assert isinstance(entry.tx, optax.GradientTransformationExtraArgs)
  args = make_gradients(entry), entry.tx.init(make_params()), make_params()
  expected = jax.eval_shape(entry.tx.update, *args)
  actual = jax.eval_shape(entry.tx.update, *args, not_ours=1.0)
  assert types(actual) == types(expected)


@every
@pytest.mark.parametrize('steps', [1, STEPS])
def test_state_has_the_types_of_init(entry, steps):
  expected = types(entry.tx.init(make_params()))
  _, state = run(entry.tx, make_steps(entry)[:steps])
  assert types(state) == expected


@own
def test_state_has_field_names_of_its_own(entry):
  tx = optax.chain(entry.tx, optax.adam(1e-3), optax.trace(0.9))
  state = tx.init(make_params())
  for name, value in state[0]._asdict().items():
    assert_same(optax.tree.get(state, name), value)


@every
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_updates_have_the_dtype_of_the_gradients(entry, dtype):
  params = make_params(dtype)
  gradients = make_gradients(entry, 0, params)
  others = make_params() if entry.own else params
  updates, _ = jax.eval_shape(
    entry.tx.update, gradients, entry.tx.init(others), others
  )
  assert types(updates) == types(params)


@every
def test_leaves_of_every_kind(entry):
  batch = (BATCH,) if entry.per_example else ()
  inexact = {
    'bfloat16': jnp.ones((2,), jnp.bfloat16),
    'complex64': jnp.ones((2,), jnp.complex64),
    'float16': jnp.ones((2,), jnp.float16),
    'matrix': jnp.ones((3, 2)),
    'no elements': jnp.ones((0, 3)),
    'scalar': jnp.ones(()),
  }
  others = {
    'bool': jnp.ones((*batch, 2), bool),
    'int32': jnp.ones((*batch, 2), jnp.int32),
    'masked': optax.MaskedNode(),
    'none': None,
  }
  float0 = np.zeros((*batch, 2), jax.dtypes.float0)
  gradients = make_gradients(entry, 0, inexact)
  gradients['complex64'] *= 1 - 2j

  params = inexact | others | {'float0': jnp.ones((2,), jnp.int32)}
  (updates,), _ = run(
    entry.tx, [gradients | others | {'float0': float0}], params
  )
  assert types(updates.pop('float0')) == types(float0)
  assert_same({name: updates.pop(name) for name in others}, others)
  assert types(updates) == types(inexact)

  (expected,), _ = run(entry.tx, [_in_full(gradients)], _in_full(inexact))
  for name, update in updates.items():
    rtol = max(2 * float(jnp.finfo(update.dtype).eps), 1e-5)
    assert_close(_in_full(update), expected[name], rtol)


def _in_full(tree):
  """Floats of 16 bits in 32."""
  return jax.tree.map(
    lambda x: x.astype(jnp.float32) if x.dtype.itemsize == 2 else x, tree
  )


@every
def test_float64(entry):
  expected, _ = run(entry.tx, make_steps(entry))
  with jax.enable_x64(True):
    params = make_params(jnp.float64)
    updates, _ = run(entry.tx, make_steps(entry, params), params)
    assert types(updates[-1]) == types(params)
    mixed = params | {'bias': make_params()['bias']}
    shapes, _ = jax.eval_shape(
      entry.tx.update,
      make_gradients(entry, 0, mixed),
      entry.tx.init(mixed),
      mixed,
    )
    assert types(shapes) == types(mixed)
  # What differs is float32's rounding of sums that cancel.
  assert_close(optax.tree.cast(updates, np.float32), expected, rtol=1e-3)


@own
def test_statistics_of_float64_are_float32(entry):
  expected = types(entry.tx.init(make_params()))
  with jax.enable_x64(True):
    params = make_params(jnp.float64)
    state = entry.tx.init(params)
    assert types(state) == expected
    _, state = run(entry.tx, make_steps(entry, params), params)
    assert types(state) == expected


@every
@pytest.mark.parametrize('empty', [{}, (), None, {'none': None}], ids=str)
def test_trees_without_leaves(entry, empty):
  state = entry.tx.init(empty)
  updates, next_state = entry.tx.update(empty, state, empty)
  assert updates == empty
  assert types(next_state) == types(state)


@every
@bad_number
def test_a_bad_step_leaves_no_trace(entry, bad):
  first, second, third = make_steps(entry)
  spoilt = jax.tree.map(lambda x: jnp.full_like(x, bad), second)
  updates, state = run(entry.tx, [first, spoilt, third])
  chex.assert_tree_all_finite(state)
  expected, _ = run(entry.tx, [first, third])
  assert_close(updates[2], expected[1])


@whole
@bad_number
def test_one_bad_element_makes_a_bad_step_of_its_leaf(entry, bad):
  first, second, third = make_steps(entry)
  second['kernel'] = second['kernel'].at[1, 1].set(bad)
  updates, state = run(entry.tx, [first, second, third])
  chex.assert_tree_all_finite(state)
  expected, _ = run(entry.tx, [first, third])
  assert_close(updates[2]['kernel'], expected[1]['kernel'])


@per_example
@bad_number
@pytest.mark.parametrize(
  'examples', [(2,), (0, 5), tuple(range(BATCH))], ids=str
)
def test_bad_examples_are_left_out(entry, bad, examples):
  good, later = make_steps(entry)[:2]
  bias = good['bias'].at[jnp.array(examples), 0].set(bad)
  spoilt = good | {'bias': bias}
  mask = ~np.isin(np.arange(BATCH), examples)
  update = jax.jit(entry.tx.update)
  params, init = make_params(), entry.tx.init(make_params())

  expected, masked_state = update(good, init, params, mask=mask)
  updates, state = update(spoilt, init, params)
  chex.assert_tree_all_finite((updates, state))
  assert_close(updates, expected)
  assert_close(
    update(later, state, params)[0],
    update(later, masked_state, params)[0],
  )
  assert_same(update(spoilt, init, params, mask=mask), (expected, masked_state))
