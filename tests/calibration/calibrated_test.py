"""The safe default: the optimizer, without its bad steps."""

import functools

import chex
import jax
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import optax_ghm
from tests.support.strategies_trees import NOT_SMALL, STRUCTURES, trees

NESTED = STRUCTURES['nested']
ZEROS = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), NESTED)
pytestmark = pytest.mark.device


def momentum():
  return optax.sgd(1.0, momentum=0.5)


def adamw():
  """Its moments, counts and decay of weights do not know of bad steps."""
  return optax.adamw(0.1)


@functools.cache
def compiled(make, guard):
  inner, clip = make(), optax_ghm.clip_by_norm(1.0)
  tx = {
    'calibrated': lambda: optax_ghm.calibrated(inner, clip),
    'calibrated, leaves': lambda: optax_ghm.calibrated(
      inner, optax_ghm.clip_by_norm(1.0, scope='leaf')
    ),
    'chain': lambda: optax.chain(clip, inner),
    'chain, leaves': lambda: optax.chain(
      optax_ghm.clip_by_norm(1.0, scope='leaf'), inner
    ),
    'skip_spikes': lambda: optax_ghm.skip_spikes(
      inner, sigmas=1e30, window=optax_ghm.SpikeWindow(length=3)
    ),
    'plain': lambda: inner,
  }[guard]()
  return jax.jit(tx.init), jax.jit(tx.update)


@pytest.mark.parametrize('make', [momentum, adamw])
@pytest.mark.parametrize(
  ('guarded', 'plain'),
  [
    ('calibrated', 'chain'),
    ('calibrated, leaves', 'chain, leaves'),
    ('skip_spikes', 'plain'),
  ],
)
@given(
  st.lists(
    st.tuples(
      trees(NESTED, (0,), mantissas=NOT_SMALL),
      st.sampled_from([0, 0, np.nan, np.inf]),
    ),
    min_size=3,
    max_size=4,
  )
)
def test_bad_steps_are_left_out_whole(make, guarded, plain, steps):
  """One bad number in one leaf, and the optimizer does not see the step."""
  init, update = compiled(make, guarded)
  other_init, other_update = compiled(make, plain)
  with jax.numpy_dtype_promotion('standard'):  # Optax mixes ints and floats
    state, other_state = init(ZEROS), other_init(ZEROS)
    for gradients, bad in steps:
      kernel = gradients['dense'].kernel.copy()
      if bad:
        kernel[1, 1] = bad
      spoilt = gradients | {'dense': gradients['dense']._replace(kernel=kernel)}
      updates, state = update(spoilt, state, ZEROS)
      expected = ZEROS
      if not bad:
        expected, other_state = other_update(gradients, other_state, ZEROS)
      chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)


def test_nothing_is_learned_from_a_step_that_one_leaf_spoils():
  tx = optax_ghm.calibrated(
    optax.sgd(1.0), optax_ghm.clip_by_zscore(scope='leaf')
  )
  good = {'a': np.float32([3.0, 4.0]), 'b': np.float32([6.0, 8.0])}
  bad = good | {'a': np.float32([np.nan, 1.0])}

  @jax.jit
  def two_steps(first, second):
    _, one = tx.update(first, tx.init(first), first)
    return one.clip, tx.update(second, one, first)[1].clip

  one, other = two_steps(bad, good)
  np.testing.assert_array_equal(one.statistics.recorded, [0, 0])
  np.testing.assert_array_equal(one.skipped, [1, 0])
  np.testing.assert_array_equal(other.statistics.recorded, [1, 1])
  np.testing.assert_allclose(other.norm, [5, 10])


HALF = {'w': np.ones(3, np.float16), 'none': None}


@pytest.mark.parametrize(
  ('guard', 'make'),
  [
    ('calibrated', optax.adam),
    ('calibrated, leaves', optax.adamw),
    ('skip_spikes', optax.rmsprop),
  ],
)
def test_nan_that_the_optimizer_makes_of_float16_is_left_out(guard, make):
  """A second moment of 1e-11 and an eps of 1e-8 are both 0 in float16."""
  small = np.float16([1e-4, 0.5, 0])
  init, update = compiled(functools.partial(make, 2.0), guard)
  plain = make(2.0)
  with jax.numpy_dtype_promotion('standard'):
    made, _ = plain.update({'w': small, 'none': None}, plain.init(HALF), HALF)
    assert not np.isfinite(made['w']).all()
    state = init(HALF)
    updates, after = update({'w': small, 'none': None}, state, HALF)
  assert (updates['w'] == 0).all()
  chex.assert_trees_all_equal(after.optimizer, state.optimizer)
  skipped = after.skipped if guard == 'skip_spikes' else after.clip.skipped
  assert (skipped == 1).all()


def test_a_clip_that_keeps_no_clip_state_is_named():
  with pytest.raises(TypeError, match='clip'):
    optax_ghm.calibrated(optax.sgd(1.0), optax.clip(1.0)).init(ZEROS)
