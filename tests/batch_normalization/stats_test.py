"""The statistics of a batch for the record: every number by its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ghm
from optax_ghm import flow

EPSILON = 0.25
NAMES = ['mean_to_std', 'mean_drift', 'std_drift', 'clipped', 'constant']


def by_formula(moments, running, r_max=np.inf, d_max=np.inf):
  count, mean, m2, running_mean, running_var = (
    np.asarray(u, np.float64) for u in (*moments, *running[:2])
  )
  seen = count > 0
  var = m2[seen] / count[seen]
  std, running_std = (
    np.sqrt(var + EPSILON),
    np.sqrt(running_var[seen] + EPSILON),
  )
  d = (mean[seen] - running_mean[seen]) / running_std
  r = std / running_std
  clipped = (np.abs(d) > d_max) | (r > r_max) | (r < 1 / r_max)
  return [
    np.max(np.abs(mean[seen]) / std),
    np.sqrt(np.mean(d**2)),
    np.sqrt(np.mean(np.log(r) ** 2)),
    np.mean(clipped),
    np.mean(var < EPSILON),
  ]


def some(rng, shape):
  """Moments, one feature constant and one without any count, and averages."""

  def draw(low, high):
    return rng.uniform(low, high, size=shape)

  arrays = [np.round(draw(2, 9)), draw(-5, 3), draw(2, 40)]
  for u, nothing, constant in zip(arrays, (0, 0, 0), (4, -7, 0), strict=True):
    u[..., 0], u[..., 1] = nothing, constant
  running = [draw(-2, 2), draw(0, 4), np.ones(shape)]
  moments, running = jax.tree.map(
    lambda u: jnp.asarray(u, jnp.float32), (arrays, running)
  )
  running[0] = running[0].at[..., 0].set(1e6)  # far off, and it does not count
  return optax_ghm.Moments(*moments), optax_ghm.RunningMoments(*running)


def moments_of(x):
  x = np.float64(x)
  count, mean = np.full(x.shape[1:], len(x)), x.mean(0)
  return optax_ghm.Moments(
    *(jnp.asarray(u, jnp.float32) for u in (count, mean, len(x) * x.var(0)))
  )


def assert_numbers(stats, expected):
  assert stats.numbers.shape == (5,) and stats.numbers.dtype == jnp.float32
  found = [getattr(stats, name) for name in NAMES]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


measure = jax.jit(
  lambda *args: flow.batch_norm_stats(*args[:2], epsilon=EPSILON, **args[2])
)


@pytest.mark.parametrize('shape', [(9,), (3, 7)], ids=str)
@pytest.mark.parametrize(
  'limits',
  [
    {},
    {'r_max': 1.5},
    {'d_max': 0.8},
    {'r_max': 2.5, 'd_max': 3.0},
    {'r_max': 1.0, 'd_max': 0.0},
  ],
  ids=str,
)
def test_every_number_is_that_of_its_formula(shape, limits, rng):
  moments, running = some(rng, shape)
  expected = by_formula(moments, running, **limits)
  assert_numbers(measure(moments, running, limits), expected)
  if limits and limits['r_max' if 'r_max' in limits else 'd_max'] > 1:
    assert 0 < expected[3] < 1


def test_features_of_which_nothing_counted_are_ignored(rng):
  moments, running = some(rng, (9,))
  kept = jax.tree.map(lambda u: u[1:], (moments, running))
  expected = measure(*kept, {}).numbers
  np.testing.assert_allclose(
    measure(moments, running, {}).numbers, expected, rtol=1e-6
  )
  spoilt = jax.tree.map(lambda u: u.at[0].set(jnp.nan), (moments, running))
  spoilt = spoilt[0]._replace(count=moments.count), spoilt[1]
  np.testing.assert_allclose(measure(*spoilt, {}).numbers, expected, rtol=1e-6)


def test_of_nothing_all_are_0():
  """A mask may leave nothing on a device."""
  moments = optax_ghm.Moments.init((3,))
  stats = measure(moments, optax_ghm.RunningMoments.init((3,)), {})
  assert_numbers(stats, np.zeros(5))
  stats = measure(
    optax_ghm.Moments.init((0,)), optax_ghm.RunningMoments.init((0,)), {}
  )
  assert_numbers(stats, np.zeros(5))


def test_a_feature_that_is_not_finite_shows():
  x = np.array([[1.0, np.nan], [3.0, 2.0]])
  stats = flow.batch_norm_stats(
    moments_of(x), optax_ghm.RunningMoments.init((2,))
  )
  assert np.isnan([stats.mean_to_std, stats.mean_drift, stats.std_drift]).all()
  assert (stats.clipped, stats.constant) == (0, 0)


def test_of_independent_examples_drifts_are_as_the_docstring_says(rng):
  n, x = 50, rng.normal(size=(50, 4000)).astype(np.float32)
  stats = flow.batch_norm_stats(
    moments_of(x), optax_ghm.RunningMoments.init((4000,))
  )
  np.testing.assert_allclose(stats.mean_drift, n**-0.5, rtol=0.1)
  np.testing.assert_allclose(stats.std_drift, (2 * n) ** -0.5, rtol=0.1)


def test_the_default_epsilon_is_that_of_batch_norm():
  x = np.array([[0.0, 0.0], [4e-3, 8e-3]])  # variances 4e-6 and 1.6e-5
  stats = flow.batch_norm_stats(
    moments_of(x), optax_ghm.RunningMoments.init((2,))
  )
  assert stats.constant == 0.5
  np.testing.assert_allclose(
    stats.mean_to_std, 4e-3 / np.sqrt(1.6e-5 + 1e-5), rtol=1e-5
  )


def test_no_gradient_flows_through(rng):
  moments, running = some(rng, (9,))

  def total(moments, running, x, r_max):
    stats = flow.batch_norm_stats(moments, running, epsilon=EPSILON)
    of_x = flow.batch_norm_stats(optax_ghm.Moments.of(x), running, r_max=r_max)
    return stats.numbers.sum() + of_x.numbers.sum()

  x = jnp.asarray(rng.normal(size=(4, 9)), jnp.float32)
  args = (moments, running, x, jnp.array(1.5))
  for u in jax.tree.leaves(jax.jit(jax.grad(total, (0, 1, 2, 3)))(*args)):
    np.testing.assert_array_equal(u, np.zeros_like(u))


def test_the_properties_read_stacks():
  numbers = jnp.arange(15.0).reshape(3, 5)
  stats = flow.BatchNormStats(numbers)
  for i, name in enumerate(NAMES):
    np.testing.assert_array_equal(getattr(stats, name), numbers[:, i])
