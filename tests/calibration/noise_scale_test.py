"""The noise scale of gradients whose mean and variance are known."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from tests.support import oracles_calibration as by_hand
from tests.support.strategies_trees import STRUCTURES, batched, trees, wide

pytestmark = pytest.mark.device

SIGNAL, DEVIATION = np.array([3.0, -1.0, 0.5]), np.array([1.0, 2.0, 4.0])
TRUTH = np.square(SIGNAL).sum(), np.square(DEVIATION).sum()
gradient_noise = jax.jit(optax_ghm.calibration.gradient_noise)


def micro_gradients(seed, count, batch_size):
  """Means of normal examples, one per micro-batch."""
  rng = np.random.default_rng(seed)
  examples = rng.normal(SIGNAL, DEVIATION, (count, batch_size, 3))
  return examples.mean(axis=1).astype(np.float32)


def squares_of_examples(tree):
  """Of the norm of every example."""
  return sum(
    np.sum(np.abs(x) ** 2, tuple(range(1, x.ndim))) for x in wide(tree)
  )


# One step.


@given(
  norms=hnp.arrays(
    np.float32, st.integers(2, 4), elements=st.floats(0, 8, width=16)
  ),
  of_mean=st.floats(0, 8, width=16),
  batch_size=st.sampled_from([1, 64]),
  power=st.sampled_from([0, 50, -50]),
)
def test_gradient_noise(norms, of_mean, batch_size, power):
  """Signal and variance are squares of the scale, and their ratio has none."""
  norms, of_mean = np.ldexp(norms, power), np.ldexp(np.float32(of_mean), power)
  noise = jax.device_get(gradient_noise(norms, of_mean, np.float32(batch_size)))
  signal, variance = by_hand.noise(
    np.float64(norms) ** 2, np.float64(of_mean) ** 2, batch_size
  )
  largest = float(max(norms.max(), of_mean, 1e-15)) ** 2
  options = {'rtol': 1e-5, 'atol': 1e-5 * largest}
  np.testing.assert_allclose(noise.signal, signal, **options)
  options['atol'] *= batch_size
  np.testing.assert_allclose(noise.variance, variance, **options)
  if signal > 1e-3 * largest:
    ratio = variance / signal
    np.testing.assert_allclose(
      noise.noise_scale, ratio, rtol=0.1, atol=0.1 * batch_size
    )
  elif signal < -1e-3 * largest:
    assert noise.noise_scale == np.inf


PER_EXAMPLE = batched(STRUCTURES['nested'], 4)
ONES = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), PER_EXAMPLE)
TX = optax_ghm.noise_scale_aggregate(2, decay=0.5)


@jax.jit
def first_step(tree, mask):
  return TX.update(tree, TX.init(None), None, mask=mask)


@given(
  tree=trees(PER_EXAMPLE, (0, 0.3, -0.3), bad=True), mask=hnp.arrays(bool, 4)
)
@example(tree=ONES, mask=np.array([False, True, False, False]))
@example(tree=ONES, mask=np.zeros(4, bool))
def test_a_step_is_a_mean_of_what_is_good(tree, mask):
  """One gradient has no noise to see."""
  updates, state = jax.device_get(first_step(tree, mask))
  good = mask & np.isfinite(squares_of_examples(tree))
  kept = [x[good] for x in wide(tree)]
  count = max(good.sum(), 1)
  for u, x in zip(wide(updates), kept, strict=True):
    size = np.abs(x).max(initial=0)
    np.testing.assert_allclose(
      u, x.sum(0) / count, rtol=1e-5, atol=1e-6 * size + 1e-37
    )
  recorded = int(good.sum() > 1)
  assert (state.recorded, state.skipped) == (recorded, 1 - recorded)
  expected = (0, 0)
  if recorded:
    squares = squares_of_examples(kept)
    of_mean = sum(np.sum(np.square(x.mean(0))) for x in kept)
    expected = by_hand.noise(squares, of_mean, 2)
  size = 1e-5 * squares.max() + 1e-37 if recorded else 0
  np.testing.assert_allclose(state.noise, expected, rtol=1e-4, atol=size)


# Many steps.


@functools.cache
def scanned(batch_size=1, decay=0.9999):
  tx = optax_ghm.noise_scale_aggregate(batch_size, decay=decay)

  @jax.jit
  def run(steps, weights=None):
    def step(state, grads):
      return tx.update(grads, state, weights=weights)[::-1]

    state, means = jax.lax.scan(step, tx.init(steps[0, 0]), steps)
    return state, state.noise.noise_scale, means

  return lambda *args: jax.device_get(run(*args))


@pytest.mark.parametrize('batch_size', [1, 8])
def test_many_steps_find_the_truth_whatever_the_micro_batch(batch_size):
  steps = micro_gradients(0, 400 * 8, batch_size).reshape(400, 8, 3)
  state, noise_scale, means = scanned(batch_size)(steps)
  np.testing.assert_allclose(means, steps.mean(1), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(state.noise, TRUTH, rtol=0.05)
  np.testing.assert_allclose(noise_scale, TRUTH[1] / TRUTH[0], rtol=0.07)
  assert state.recorded == 400


def test_weights_are_the_sizes_of_micro_batches():
  """The update is the mean of all examples, and the noise that of one."""
  rng = np.random.default_rng(0)
  sizes = np.array([1, 3, 8], np.float32)
  examples = rng.normal(SIGNAL, DEVIATION, (4000, 12, 3))
  grads = [each.mean(1) for each in np.split(examples, [1, 4], axis=1)]
  state, _, means = scanned()(np.float32(np.stack(grads, 1)), sizes)
  np.testing.assert_allclose(means, examples.mean(1), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(state.noise, TRUTH, rtol=0.05)


def test_the_average_is_first_plain_and_then_forgets():
  steps, expected = [micro_gradients(seed, 8, 1) for seed in range(3)], 0.0
  for grads, share in zip(steps, (1.0, 0.5, 0.5), strict=True):
    squares = np.square(np.float64(grads)).sum(1)
    of_mean = np.square(np.float64(grads).mean(0)).sum()
    noise = np.array(by_hand.noise(squares, of_mean, 1))
    expected += share * (noise - expected)
  state, *_ = scanned(decay=0.5)(np.stack(steps))
  np.testing.assert_allclose(state.noise, expected, rtol=1e-4)


# Arguments.


@jax.jit
def equal_weights(grads, weight, mask):
  def noise(batch_size, weights):
    tx = optax_ghm.noise_scale_aggregate(batch_size)
    return tx.update(grads, tx.init(grads[0]), mask=mask, weights=weights)

  return noise(2, weight * jnp.float32([1, 1, 9, 1])), noise(2 * weight, None)


@pytest.mark.parametrize('weight', [0.5, 4.0])
def test_equal_weights_are_a_batch_size(weight):
  mask = np.array([True, True, False, True])
  grads = micro_gradients(0, 4, 2)
  actual, expected = equal_weights(grads, np.float32(weight), mask)
  chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(
  'extra, word',
  [
    ({'mask': np.ones(4)}, 'mask'),
    ({'mask': np.ones(3, bool)}, 'mask'),
    ({'weights': np.ones(4, bool)}, 'weights'),
    ({'weights': np.ones(3, np.float32)}, 'weights'),
  ],
)
def test_a_mask_is_bool_and_weights_are_numbers(extra, word):
  tx = optax_ghm.noise_scale_aggregate()
  grads = jax.ShapeDtypeStruct((4, 3), jnp.float32)
  state = jax.eval_shape(tx.init, grads)
  with pytest.raises((TypeError, ValueError), match=word):
    jax.eval_shape(functools.partial(tx.update, **extra), grads, state)


@pytest.mark.parametrize('norms', [1.0, [1.0], [[1.0, 2.0]]])
def test_too_few_norms_are_named(norms):
  with pytest.raises(ValueError, match='norms'):
    optax_ghm.calibration.gradient_noise(np.float32(norms), 1.0, 1)
