"""The statistics of a batch for the record: every number by its formula."""

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm import flow
from tests.support import oracles_batch_norm as oracle

NAMES = ['mean_to_std', 'mean_drift', 'std_drift', 'clipped', 'constant']
measure = jax.jit(flow.batch_norm_stats, static_argnames='epsilon')


def by_formula(moments, running, epsilon, r_max=np.inf, d_max=np.inf):
  count, mean, m2, running_mean, running_var = (
    np.asarray(u, np.float64) for u in (*moments, *running[:2])
  )
  seen = count > 0
  if not seen.any():
    return [0] * 5
  mean, running_mean = mean[seen], running_mean[seen]
  var = m2[seen] / count[seen]
  std = np.sqrt(var + epsilon)
  running_std = np.sqrt(running_var[seen] + epsilon)
  d, r = (mean - running_mean) / running_std, std / running_std
  clipped = (np.abs(d) > d_max) | (r > r_max) | (r < 1 / r_max)
  return [
    np.max(np.abs(mean) / std),
    np.sqrt(np.mean(d**2)),
    np.sqrt(np.mean(np.log(r) ** 2)),
    np.mean(clipped),
    np.mean(var < epsilon),
  ]


def moments_of(x):
  found = oracle.moments_of(np.float64(x))
  return optax_ghm.Moments(*map(np.float32, found))


def assert_numbers(stats, expected):
  assert stats.numbers.shape == (5,) and stats.numbers.dtype == np.float32
  found = [getattr(stats, name) for name in NAMES]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def features(shape, low, high):
  return hnp.arrays(np.float32, shape, elements=st.integers(low, high))


@pytest.mark.device
@pytest.mark.parametrize('shape', [(7,), (2, 4)], ids=str)
@given(
  epsilon=st.sampled_from([0.25, 1e-3]),
  limits=st.sampled_from(
    [(1.5, np.inf), (np.inf, 0.8), (2.5, 3.0), (1.0, 0.0)]
  ),
  x64=st.booleans(),
  data=st.data(),
)
def test_every_number_is_that_of_its_formula(shape, epsilon, limits, x64, data):
  """Features of which nothing counted are ignored, whatever else they are."""
  counts = data.draw(features(shape, 0, 3))
  means, m2 = (
    data.draw(features(shape, -9, 9)),
    data.draw(features(shape, 0, 9)),
  )
  mean, var = (
    data.draw(features(shape, -3, 3)),
    data.draw(features(shape, 0, 4)),
  )
  limits = {'r_max': limits[0] + 1e-3, 'd_max': limits[1] + 1e-3}
  running = oracle.averages(mean, var)
  wanted = by_formula((counts, means, m2), running, epsilon, **limits)
  means, m2 = (np.where(counts > 0, u, np.nan) for u in (means, m2))
  with jax.enable_x64(x64):
    wide = np.float64 if x64 else np.float32
    moments = optax_ghm.Moments(*(u.astype(wide) for u in (counts, means, m2)))
    stats = jax.device_get(measure(moments, running, epsilon=epsilon, **limits))
    assert_numbers(stats, wanted)


@pytest.mark.device
def test_of_no_features_all_are_0():
  nothing = np.zeros(0, np.float32)
  stats = measure(
    optax_ghm.Moments(*[nothing] * 3), optax_ghm.RunningMoments(*[nothing] * 3)
  )
  assert_numbers(stats, np.zeros(5))


@pytest.mark.device
def test_a_feature_that_is_not_finite_shows():
  x = np.array([[1.0, np.nan], [3.0, 2.0]])
  stats = measure(moments_of(x), oracle.averages(np.zeros(2), np.ones(2)))
  assert np.isnan([stats.mean_to_std, stats.mean_drift, stats.std_drift]).all()
  assert (stats.clipped, stats.constant) == (0, 0)


@pytest.mark.device
def test_of_independent_examples_drifts_are_as_the_docstring_says(rng):
  n, x = 50, rng.normal(size=(50, 4000)).astype(np.float32)
  running = oracle.averages(np.zeros(4000), np.ones(4000))
  stats = measure(moments_of(x), running)
  np.testing.assert_allclose(stats.mean_drift, n**-0.5, rtol=0.1)
  np.testing.assert_allclose(stats.std_drift, (2 * n) ** -0.5, rtol=0.1)
  assert stats.clipped == 0


@pytest.mark.device
def test_the_default_epsilon_is_that_of_batch_norm():
  x = np.array([[0.0, 0.0], [4e-3, 8e-3]])  # variances 4e-6 and 1.6e-5
  stats = measure(moments_of(x), oracle.averages(np.zeros(2), np.ones(2)))
  assert stats.constant == 0.5
  np.testing.assert_allclose(
    stats.mean_to_std, 4e-3 / np.sqrt(1.6e-5 + 1e-5), rtol=1e-5
  )


@pytest.mark.device
def test_no_gradient_flows_through(rng):
  x = rng.normal(size=(4, 9)).astype(np.float32)
  moments = moments_of(2 * x)
  running = oracle.averages(np.zeros(9), np.full(9, 2))

  def total(moments, running, x, r_max):
    stats = flow.batch_norm_stats(moments, running, epsilon=0.25)
    of_x = flow.batch_norm_stats(optax_ghm.Moments.of(x), running, r_max=r_max)
    return stats.numbers.sum() + of_x.numbers.sum()

  args = (moments, running, x, np.float32(1.5))
  for u in jax.tree.leaves(jax.jit(jax.grad(total, (0, 1, 2, 3)))(*args)):
    np.testing.assert_array_equal(u, np.zeros_like(u))


@pytest.mark.device
def test_the_properties_read_stacks():
  numbers = np.arange(15, dtype=np.float32).reshape(3, 5)
  stats = flow.BatchNormStats(numbers)
  for i, name in enumerate(NAMES):
    np.testing.assert_array_equal(getattr(stats, name), numbers[:, i])
