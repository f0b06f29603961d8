"""Batch renormalization, and the schedules of its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st

import optax_ghm
from optax_ghm import RunningMoments
from tests.support import oracles_batch_norm as oracle
from tests.support.oracles_batch_norm import (
  EPSILON,
  a_case,
  assert_close,
  assert_same,
  averages,
  expected,
  found,
)

RUNNING = averages([2.0, 5.0, 3.5], [2.0, 40.0, 0.1])


def renormed(case, running, r_max, d_max):
  traced = {'running': running, 'r_max': r_max, 'd_max': d_max}
  return found(case, 'batch_renorm', case.mask is None, traced)


def held(case, running, r_max, d_max):
  """The definition with r and d of a batch, and these."""
  moments = expected(case).moments
  constants = oracle.renorm_constants(moments, running, r_max, d_max)
  return functools.partial(oracle.definition, constants=constants), constants


@pytest.mark.device
@pytest.mark.parametrize(
  ('r_max', 'd_max'), [(3.0, 5.0), (1.5, 0.3), (1.0, 0.3), (1.5, 0.0)]
)
@pytest.mark.parametrize(
  'masked', [False, True], ids=['dense, twice', 'masked']
)
def test_is_the_definition_with_r_and_d_held(masked, r_max, d_max):
  """Value, gradient, and the gradient of that."""
  case = a_case((4, 3, 2), 1, (4, 1, 1)) if masked else a_case((7, 3))
  norm, (r, d) = held(case, RUNNING, r_max, d_max)
  if (r_max, d_max) == (1.5, 0.3):  # some are at each limit, some within
    assert np.unique(r).size > 1
    assert set(np.sign(d)) == {-1, 1}
  actual = renormed(case, RUNNING, r_max, d_max)
  assert_same(actual, expected(case, not masked, norm))


@pytest.mark.device
def test_closed_limits_are_batch_norm():
  case = a_case((7, 3))
  running = averages([1.0, -50.0, 3.0], [1e-3, 1e3, 7.0])
  assert_same(renormed(case, running, 1.0, 0.0), expected(case, second=True))


@pytest.mark.device
def test_open_limits_are_inference():
  case = a_case((7, 3))
  running = averages([2.0, -50.0, 3.0], [0.1, 1e2, 7.0])
  actual = renormed(case, running, 1e6, 1e6)
  std = np.sqrt(running.var + EPSILON)
  wanted = (case.x - running.mean) / std * case.scale + case.bias
  assert_close(actual.y, wanted)
  # The batch still has its part in the gradient: sums of it vanish.
  assert_close(actual.grads[0].sum(0), np.zeros(3))


@pytest.mark.device
def test_the_default_limits_are_3_and_5():
  case = a_case((7, 3), mean=0.0)
  running = averages([9.0, -9.0, 0.0], [1.0, 0.01, 1e3])
  actual = found(case, 'batch_renorm', traced={'running': running})
  norm, (r, d) = held(case, running, 3.0, 5.0)
  assert_same(actual, expected(case, norm=norm))
  _, (r, d) = held(case, running, np.inf, np.inf)
  assert (r > 3).any() and (r < 1 / 3).any()
  assert (d > 5).any() and (d < -5).any()


@pytest.mark.device
def test_no_gradient_of_the_averages_and_the_limits():
  case = a_case((7, 3))

  def loss(running, limits):
    y, _ = optax_ghm.batch_renorm(
      case.x, running, case.scale, r_max=limits[0], d_max=limits[1]
    )
    return jnp.sum(y * case.dy)

  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(RUNNING, (1.5, 0.3))
  for grad in jax.tree.leaves(grads):
    assert not np.any(grad)


@pytest.mark.device
def test_far_from_zero_rounding_is_no_difference_to_the_averages():
  case = a_case((7, 3), mean=1e4, std=1.0)
  running = averages([9999.5, 1e4, 1e4 + 1], [2.0, 1.0, 0.5])
  norm, _ = held(case, running, 3.0, 5.0)
  actual, wanted = renormed(case, running, 3.0, 5.0), expected(case, norm=norm)
  # d is of the difference of two means that are themselves rounded.
  assert_close(actual.y, wanted.y, 1e-3)
  assert_close(actual.grads[0], wanted.grads[0], 1e-5)
  values = np.linspace(1e4, 9e4, 16, dtype=np.float32)
  running = RunningMoments(values, np.ones(16, np.float32), None)
  norm = jax.jit(optax_ghm.batch_renorm, static_argnames='epsilon')
  y, _ = norm(np.tile(values, (7, 1)), running, d_max=1e9, epsilon=EPSILON)
  assert_close(y, np.zeros((7, 16)), 1e-6)


def values_of(schedules, steps):
  return [np.asarray(jax.vmap(f)(np.asarray(steps))) for f in schedules]


@pytest.mark.device
def test_schedules_at_their_knots():
  steps = [0, 5_000, 15_000, 25_000, 40_000, 10**6]
  r, d = values_of(optax_ghm.renorm_schedules(), steps)
  np.testing.assert_allclose(
    r, [1, 1, 1 + 2 * 10 / 35, 1 + 2 * 20 / 35, 3, 3], rtol=1e-6
  )
  np.testing.assert_allclose(d, [0, 0, 2.5, 5, 5, 5], rtol=1e-6)
  schedules = optax_ghm.renorm_schedules(2.0, 1.0, start=10, r_end=20, d_end=30)
  r, d = values_of(schedules, [10, 15, 20, 30])
  np.testing.assert_allclose(r, [1, 1.5, 2, 2])
  np.testing.assert_allclose(d, [0, 0.25, 0.5, 1])


@pytest.mark.device
@given(
  start=st.integers(0, 20),
  r_after=st.integers(0, 20),
  d_after=st.integers(0, 20),
)
@example(start=5, r_after=0, d_after=0)
def test_limits_widen_from_start_to_end(start, r_after, d_after):
  schedules = optax_ghm.renorm_schedules(
    start=start, r_end=start + r_after, d_end=start + d_after
  )
  found = values_of(schedules, range(50))
  for values, first, last, after in zip(
    found, (1.0, 0.0), (3.0, 5.0), (r_after, d_after), strict=True
  ):
    np.testing.assert_array_equal(values[: start + 1], first)
    np.testing.assert_array_equal(values[start + max(after, 1) :], last)
    assert (np.diff(values) >= 0).all()
