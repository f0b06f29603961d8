import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from optax_ghm import Moments, RunningMoments

measured = jax.jit(Moments.of, static_argnames='axis')
update = jax.jit(RunningMoments.update, static_argnames='unbiased')


def batches(n, rng, shape=(5, 3)):
  """Moments of batches that are not alike, by NumPy."""
  for i in range(n):
    x = rng.normal(size=shape) * (1 + i) + i
    m2 = np.sum((x - x.mean(0)) ** 2, 0)
    yield Moments(*map(np.float32, (np.full(3, len(x)), x.mean(0), m2)))


def test_init():
  for debias, weight in ((False, 1), (True, 0)):
    running = RunningMoments.init((2, 3), debias=debias)
    for u, value in zip(running, (0, 1, weight), strict=True):
      assert u.dtype == np.float32
      np.testing.assert_array_equal(u, np.full((2, 3), value))


@pytest.mark.parametrize('unbiased', [False, True])
def test_flax_s_average_counts_the_start(unbiased, rng):
  running = RunningMoments.init((3,))
  mean, var = np.zeros(3), np.ones(3)
  for moments in batches(5, rng):
    running = update(running, moments, momentum=0.8, unbiased=unbiased)
    mean = 0.8 * mean + 0.2 * moments.mean
    var = 0.8 * var + 0.2 * moments.m2 / (4 if unbiased else 5)
    np.testing.assert_allclose(running.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(running.var, var, rtol=1e-5)
    np.testing.assert_allclose(running.weight, np.ones(3), rtol=1e-6)


@pytest.mark.parametrize('unbiased', [False, True])
def test_debiased_averages_are_of_the_batches_alone(unbiased, rng):
  """With k batches the sum is divided by 1 - momentum ** k, as in Adam."""
  running = RunningMoments.init((3,), debias=True)
  mean, var = np.zeros(3), np.zeros(3)
  for k, moments in enumerate(batches(6, rng), 1):
    running = update(running, moments, momentum=0.9, unbiased=unbiased)
    mean = 0.9 * mean + 0.1 * moments.mean
    var = 0.9 * var + 0.1 * moments.m2 / (4 if unbiased else 5)
    weight = 1 - 0.9**k
    np.testing.assert_allclose(running.mean, mean / weight, rtol=2e-5)
    np.testing.assert_allclose(running.var, var / weight, rtol=2e-5)
    np.testing.assert_allclose(running.weight, np.full(3, weight), rtol=1e-5)


def test_pytorch_s_momentum_is_1_minus_ours(rng):
  """Its formulas: running = (1 - momentum) * running + momentum * new."""
  running = RunningMoments.init((3,))
  running_mean, running_var = np.zeros(3), np.ones(3)
  momentum = 0.1
  for _ in range(4):
    x = 2 + rng.normal(size=(8, 3, 2, 2)).astype(np.float32)
    moments = measured(x, axis=1)
    running = update(running, moments, momentum=1 - momentum, unbiased=True)
    flat = x.astype(np.float64).swapaxes(0, 1).reshape(3, -1)
    running_mean = (1 - momentum) * running_mean + momentum * flat.mean(1)
    running_var = (1 - momentum) * running_var + momentum * flat.var(1, ddof=1)
  np.testing.assert_allclose(running.mean, running_mean, rtol=1e-5)
  np.testing.assert_allclose(running.var, running_var, rtol=1e-5)


@pytest.mark.parametrize('debias', [False, True])
@pytest.mark.parametrize(
  'bad',
  [
    {'count': 0.0},
    {'mean': np.nan},
    {'mean': np.inf},
    {'mean': -np.inf},
    {'m2': np.nan},
    {'m2': np.inf},
  ],
  ids=str,
)
def test_features_of_bad_batches_stay_as_they_are(bad, debias, rng):
  running = RunningMoments.init((3,), debias=debias)
  good, other = batches(2, rng)
  for before in (running, update(running, good)):
    after = update(before, other)
    changed = {k: getattr(other, k).copy() for k in bad}
    for k, value in bad.items():
      changed[k][1] = value
    found = update(before, other._replace(**changed))
    for u, old, new in zip(found, before, after, strict=True):
      np.testing.assert_array_equal(u[1], old[1])
      np.testing.assert_array_equal(u[::2], new[::2])


def test_empty_and_bad_batches_change_nothing(rng):
  running = update(RunningMoments.init((3,), debias=True), *batches(1, rng))
  x = rng.normal(size=(4, 3)).astype(np.float32)
  nothing = measured(x, mask=np.zeros((4, 1), bool))
  for moments in (
    nothing,
    Moments.init((3,)),
    measured(x * np.float32(np.nan)),
    measured(x + np.float32(np.inf)),
    measured(np.zeros((0, 3), np.float32)),
  ):
    for a, b in zip(update(running, moments), running, strict=True):
      np.testing.assert_array_equal(a, b)


def test_no_gradient_flows_through(rng):
  running = RunningMoments.init((3,))
  x = rng.normal(size=(4, 3)).astype(np.float32)

  def loss(x):
    return sum(jnp.sum(u) for u in running.update(Moments.of(x)))

  assert not jax.jit(jax.grad(loss))(x).any()


def test_micro_batches_merged_first_are_one_batch(rng):
  x = (3 + rng.normal(size=(12, 3))).astype(np.float32)
  merged = functools.reduce(
    Moments.merge,
    [measured(x[i : i + 4]) for i in (0, 4, 8)],
  )
  running = RunningMoments.init((3,))
  once = update(running, measured(x), unbiased=True)
  for a, b in zip(update(running, merged, unbiased=True), once, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_momentum_may_be_traced_and_at_its_limits(rng):
  (moments,) = batches(1, rng)
  for debias in (False, True):
    running = RunningMoments.init((3,), debias=debias)
    kept = update(running, moments, momentum=1.0)
    for a, b in zip(kept, running, strict=True):
      np.testing.assert_array_equal(a, b)
    new = update(running, moments, momentum=0.0)
    np.testing.assert_allclose(new.mean, moments.mean, rtol=1e-6)
    np.testing.assert_allclose(new.var, moments.variance(), rtol=1e-6)
    np.testing.assert_array_equal(new.weight, np.ones(3))
  start = RunningMoments.init((3,))
  np.testing.assert_allclose(
    update(start, moments).mean, 0.01 * moments.mean, rtol=1e-5
  )


NUMBERS = st.floats(width=32)


@given(
  st.lists(st.tuples(st.floats(0, 4, width=32), NUMBERS, NUMBERS), min_size=1),
  st.sampled_from([0.5, 0.9, 0.99]),
  st.booleans(),
)
def test_stays_finite_whatever_comes(stream, momentum, debias):
  running = RunningMoments.init((1,), debias=debias)
  for numbers in stream[:8]:
    moments = Moments(*(np.array([u], np.float32) for u in numbers))
    running = update(running, moments, momentum=momentum)
    assert running.mean.dtype == running.weight.dtype == np.float32
    for u in running:
      assert np.isfinite(u).all()
    assert 0 <= running.weight[0] <= 1.000001


def test_other_shapes_are_refused():
  running = RunningMoments.init((1,))
  moments = Moments.of(jnp.ones((3, 2)))
  with pytest.raises(ValueError, match=r'moments, of shape \(2,\)'):
    running.update(moments)
