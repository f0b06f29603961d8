"""The noise scale of gradients whose mean and variance are known."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import optax_ghm

SIGNAL, DEVIATION = np.array([3.0, -1.0, 0.5]), np.array([1.0, 2.0, 4.0])


def micro_gradients(seed, count, batch_size):
  """Returns means of normal examples, one per micro-batch."""
  rng = np.random.default_rng(seed)
  examples = rng.normal(SIGNAL, DEVIATION, (count, batch_size, 3))
  return examples.mean(axis=1).astype(np.float32)


def by_hand(grads, batch_size):
  """Uses the two batch sizes of the paper's appendix A, in float64."""
  grads = np.float64(grads)
  small, big = batch_size, batch_size * len(grads)
  of_small = np.square(grads).sum(1).mean()
  of_big = np.square(grads.mean(0)).sum()
  signal = (big * of_big - small * of_small) / (big - small)
  return signal, (of_small - of_big) / (1 / small - 1 / big)


@pytest.mark.parametrize('count, batch_size', [(2, 1), (7, 4), (64, 32)])
def test_the_formula(count, batch_size):
  grads = micro_gradients(0, count, batch_size)
  noise = optax_ghm.calibration.gradient_noise(
    np.linalg.norm(grads, axis=1), np.linalg.norm(grads.mean(0)), batch_size
  )
  signal, variance = by_hand(grads, batch_size)
  np.testing.assert_allclose(noise.signal, signal, rtol=1e-4)
  np.testing.assert_allclose(noise.variance, variance, rtol=1e-4)
  np.testing.assert_allclose(noise.noise_scale, variance / signal, rtol=1e-4)


@pytest.mark.parametrize('batch_size', [1, 8])
def test_many_steps_find_the_truth_whatever_the_micro_batch(batch_size):
  tx = optax_ghm.noise_scale_aggregate(batch_size, decay=0.9999)
  steps = micro_gradients(0, 400 * 8, batch_size).reshape(400, 8, 3)
  state, means = jax.lax.scan(
    lambda state, grads: tx.update(grads, state)[::-1],
    tx.init(jnp.zeros(3)),
    jnp.asarray(steps),
  )
  np.testing.assert_allclose(means, steps.mean(1), rtol=1e-4, atol=1e-6)
  truth = np.square(DEVIATION).sum(), np.square(SIGNAL).sum()
  np.testing.assert_allclose(state.noise.variance, truth[0], rtol=0.05)
  np.testing.assert_allclose(state.noise.signal, truth[1], rtol=0.05)
  np.testing.assert_allclose(
    state.noise.noise_scale, truth[0] / truth[1], rtol=0.07
  )
  assert state.recorded == 400


def test_the_average_is_first_plain_and_then_forgets():
  tx = optax_ghm.noise_scale_aggregate(decay=0.5)
  each = [micro_gradients(seed, 8, 1) for seed in range(3)]
  state, expected = tx.init(jnp.zeros(3)), 0.0
  for grads, share in zip(each, (1.0, 0.5, 0.5), strict=True):
    _, state = tx.update(jnp.asarray(grads), state)
    expected += share * (by_hand(grads, 1)[1] - expected)
  np.testing.assert_allclose(state.noise.variance, expected, rtol=1e-4)


def test_bad_and_masked_gradients_are_left_out():
  tx = optax_ghm.noise_scale_aggregate(2)
  grads = micro_gradients(0, 6, 2)
  bad = grads.copy()
  bad[1, 2], bad[4] = np.nan, np.inf
  mask = np.arange(6) != 5
  mean, state = tx.update(jnp.asarray(bad), tx.init(jnp.zeros(3)), mask=mask)
  np.testing.assert_allclose(mean, grads[[0, 2, 3]].mean(0), rtol=1e-6)
  expected = by_hand(grads[[0, 2, 3]], 2)
  np.testing.assert_allclose(state.noise, expected, rtol=1e-4)


def uneven_gradients(seed, steps):
  """Returns means of 1, 3 and 8 examples, and those of all 12."""
  rng = np.random.default_rng(seed)
  sizes = np.array([1, 3, 8], np.float32)
  examples = rng.normal(SIGNAL, DEVIATION, (steps, 12, 3))
  means = [each.mean(1) for each in np.split(examples, [1, 4], axis=1)]
  return np.stack(means, 1).astype(np.float32), sizes, examples.mean(1)


def test_weights_are_the_sizes_of_micro_batches():
  """The update is the mean of all examples, and the noise that of one."""
  tx = optax_ghm.noise_scale_aggregate(decay=0.9999)
  grads, sizes, expected = uneven_gradients(0, 4000)
  state, means = jax.jit(
    lambda grads: jax.lax.scan(
      lambda state, g: tx.update(g, state, weights=sizes)[::-1],
      tx.init(jnp.zeros(3)),
      grads,
    )
  )(grads)
  np.testing.assert_allclose(means, expected, rtol=1e-4, atol=1e-5)
  truth = np.square(SIGNAL).sum(), np.square(DEVIATION).sum()
  np.testing.assert_allclose(state.noise, truth, rtol=0.05)


@pytest.mark.parametrize('weight', [0.5, 4.0])
def test_equal_weights_are_a_batch_size(weight):
  grads = jnp.asarray(micro_gradients(0, 4, 2))
  mask = jnp.array([True, True, False, True])

  def noise(batch_size, weights):
    tx = optax_ghm.noise_scale_aggregate(batch_size)
    state = tx.init(jnp.zeros(3))
    return jax.jit(tx.update)(grads, state, mask=mask, weights=weights)

  chex.assert_trees_all_close(
    noise(2, jnp.array([weight, weight, 9.0, weight])),
    noise(2 * weight, None),
    rtol=1e-6,
  )


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
  state = tx.init(jnp.zeros(3))
  with pytest.raises((TypeError, ValueError), match=word):
    jax.eval_shape(lambda grads: tx.update(grads, state, **extra), grads)


@pytest.mark.parametrize('good', [0, 1])
def test_one_gradient_has_no_noise_to_see(good):
  tx = optax_ghm.noise_scale_aggregate()
  grads = jnp.asarray(micro_gradients(0, 4, 1))
  mean, state = tx.update(
    grads, tx.init(jnp.zeros(3)), mask=jnp.arange(4) < good
  )
  np.testing.assert_allclose(mean, good * grads[0], rtol=1e-6)
  assert (state.recorded, state.skipped) == (0, 1)
  np.testing.assert_array_equal(state.noise, [0, 0])


def test_no_signal_is_an_infinite_scale():
  grads = jnp.array([[1.0], [-1.0]])
  _, state = optax_ghm.noise_scale_aggregate().update(
    grads, optax_ghm.noise_scale_aggregate().init(jnp.zeros(1))
  )
  assert state.noise.signal < 0
  assert state.noise.noise_scale == np.inf


def test_split_over_devices():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  grads = jnp.asarray(micro_gradients(0, 16, 2))
  whole, local = (
    optax_ghm.noise_scale_aggregate(2, axis_name=name)
    for name in (None, 'data')
  )
  state = whole.init(jnp.zeros(3))
  mapped = jax.jit(
    jax.shard_map(
      local.update, mesh=mesh, in_specs=(P('data'), P()), out_specs=P()
    )
  )
  actual, expected = mapped(grads, state), whole.update(grads, state)
  for one, other in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.parametrize('norms', [1.0, [1.0], [[1.0, 2.0]]])
def test_too_few_norms_are_named(norms):
  with pytest.raises(ValueError, match='norms'):
    optax_ghm.calibration.gradient_noise(jnp.asarray(norms), 1.0, 1)


def test_in_a_chain():
  tx = optax.chain(optax_ghm.noise_scale_aggregate(), optax.sgd(0.5))
  params = {'w': jnp.zeros(3)}
  grads = {'w': jnp.asarray(micro_gradients(0, 5, 1))}
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates['w'], -0.5 * grads['w'].mean(0), rtol=1e-6)
