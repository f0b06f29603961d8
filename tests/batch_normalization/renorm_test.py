import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ghm
from optax_ghm import RunningMoments
from tests.batch_normalization.batch_norm_test import (
  EPSILON,
  a_case,
  assert_close,
  assert_same,
  defined,
  definition,
  differentiated,
)


@functools.partial(jax.jit, static_argnames=('axis', 'second'))
def _renormed(
  x, scale, bias, mask, dy, u, running, r_max, d_max, *, axis, second
):
  def norm(x, scale, bias):
    return optax_ghm.batch_renorm(
      x,
      running,
      scale,
      bias,
      r_max=r_max,
      d_max=d_max,
      axis=axis,
      mask=mask,
      epsilon=EPSILON,
    )

  return differentiated(norm, x, scale, bias, dy, u, second)


def renormed(case, running, r_max, d_max, second=False):
  return jax.device_get(
    _renormed(
      case.x,
      case.scale,
      case.bias,
      case.mask,
      case.dy,
      case.u,
      running,
      r_max,
      d_max,
      axis=case.axis,
      second=second,
    )
  )


def averages(mean, var):
  mean, var = np.float32(mean), np.float32(var)
  return RunningMoments(mean, var, np.ones_like(mean))


RUNNING = averages([2.0, 5.0, 3.5], [2.0, 40.0, 0.1])


def constants(case, running, r_max, d_max):
  """r and d of a batch, in NumPy."""
  mean, var = defined(case, second=False).moments
  std = np.sqrt(running.var.astype(np.float64) + EPSILON)
  r = np.clip(np.sqrt(var + EPSILON) / std, 1 / r_max, r_max)
  d = np.clip((mean - running.mean) / std, -d_max, d_max)
  return r, d


@pytest.mark.parametrize(
  ('r_max', 'd_max'), [(3.0, 5.0), (1.5, 0.3), (1.0, 0.3), (1.5, 0.0)]
)
@pytest.mark.parametrize(
  'case',
  [a_case((7, 3)), a_case((4, 3, 2), 1, (4, 1, 1))],
  ids=['dense', 'masked'],
)
def test_is_the_definition_with_r_and_d_held(case, r_max, d_max):
  """Value, gradient, and the gradient of that."""
  held = constants(case, RUNNING, r_max, d_max)
  if (r_max, d_max) == (1.5, 0.3):  # some are at each limit, some within
    assert np.unique(held[0]).size > 1
    assert set(np.sign(held[1])) == {-1, 1}
  second = case.mask is None
  norm = functools.partial(definition, constants=held)
  expected = defined(case, second, norm)
  assert_same(renormed(case, RUNNING, r_max, d_max, second), expected)


def test_closed_limits_are_batch_norm():
  case = a_case((7, 3), mask=(7, 1))
  running = averages([1.0, -50.0, 3.0], [1e-3, 1e3, 7.0])
  assert_same(renormed(case, running, 1.0, 0.0), defined(case, False))


def test_open_limits_are_inference():
  case = a_case((7, 3))
  running = averages([2.0, -50.0, 3.0], [0.1, 1e2, 7.0])
  found = renormed(case, running, 1e6, 1e6)
  std = np.sqrt(running.var + EPSILON)
  expected = (case.x - running.mean) / std * case.scale + case.bias
  assert_close(found.y, expected)
  # The batch still has its part in the gradient: sums of it vanish.
  assert_close(found.grads[0].sum(0), np.zeros(3))


def test_the_default_limits_are_3_and_5():
  case = a_case((7, 3), mean=0.0)
  running = averages([9.0, -9.0, 0.0], [1.0, 0.01, 1e3])
  norm = jax.jit(functools.partial(optax_ghm.batch_renorm, epsilon=EPSILON))
  y, _ = norm(case.x, running, case.scale, case.bias)
  assert_close(y, renormed(case, running, 3.0, 5.0).y)
  held = constants(case, running, np.inf, np.inf)
  assert (held[0] > 3).any() and (held[0] < 1 / 3).any()
  assert (held[1] > 5).any() and (held[1] < -5).any()


def test_no_gradient_of_the_averages_and_the_limits():
  case = a_case((7, 3))

  def loss(running, limits):
    y, _ = optax_ghm.batch_renorm(
      case.x, running, case.scale, r_max=limits[0], d_max=limits[1]
    )
    return jnp.sum(y * case.dy)

  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(RUNNING, (1.5, 0.3))
  for grad in jax.tree.leaves(grads):
    assert not grad.any()


def test_a_mean_of_many_standard_deviations():
  case = a_case((60, 3), mean=1e4, std=1.0)
  running = averages([9999.5, 1e4, 1e4 + 1], [2.0, 1.0, 0.5])
  held = constants(case, running, 3.0, 5.0)
  norm = functools.partial(definition, constants=held)
  expected = defined(case, second=False, norm=norm)
  # d is of the difference of two means that are themselves rounded.
  assert_close(renormed(case, running, 3.0, 5.0).y, expected.y, 1e-3)
  assert_close(
    renormed(case, running, 3.0, 5.0).grads[0], expected.grads[0], 1e-5
  )


def test_the_mean_s_own_rounding_is_no_difference_to_the_averages():
  values = np.linspace(1e4, 9e4, 16, dtype=np.float32)
  running = RunningMoments.init((16,))._replace(mean=values)
  norm = jax.jit(optax_ghm.batch_renorm, static_argnames=('d_max', 'epsilon'))
  y, _ = norm(np.tile(values, (7, 1)), running, d_max=1e9, epsilon=EPSILON)
  assert_close(y, np.zeros((7, 16)), 1e-6)


def test_bad_numbers_among_what_counts_reach_their_feature_only():
  case = a_case((7, 3))
  expected = renormed(case, RUNNING, 3.0, 5.0)
  case.x[2, 1] = np.nan
  found = renormed(case, RUNNING, 3.0, 5.0)
  assert np.isnan(found.y[:, 1]).all()
  assert_close(found.y[:, ::2], expected.y[:, ::2])
  assert_close(found.grads[0][:, ::2], expected.grads[0][:, ::2])


def test_what_is_masked_out_makes_no_difference():
  case = a_case((7, 3), mask=(7, 1))
  out = ~case.mask[:, 0]
  case.dy[out] = 0
  expected = renormed(case, RUNNING, 3.0, 5.0)
  case.x[out] = np.nan
  found = renormed(case, RUNNING, 3.0, 5.0)
  np.testing.assert_array_equal(found.y[~out], expected.y[~out])
  for a, b in zip(found.grads, expected.grads, strict=True):
    np.testing.assert_array_equal(a, b)


def test_devices_are_one_batch():
  case = a_case((16, 3), mask=(16, 1))
  case.mask[:2] = False

  def step(x, mask, dy, scale, bias):
    norm = functools.partial(
      optax_ghm.batch_renorm, axis_name='d', mask=mask, epsilon=EPSILON
    )
    y, vjp, moments = jax.vjp(
      lambda x: norm(x, RUNNING, scale, bias), x, has_aux=True
    )
    return y, vjp(dy)[0], moments

  parts = (u.reshape(8, 2, -1) for u in (case.x, case.mask, case.dy))
  named = jax.vmap(step, (0, 0, 0, None, None), (0, 0, None), axis_name='d')
  y, dx, moments = jax.jit(named)(*parts, case.scale, case.bias)
  held = constants(case, RUNNING, 3.0, 5.0)
  norm = functools.partial(definition, constants=held)
  expected = defined(case, second=False, norm=norm)
  assert_close(y.reshape(16, 3), expected.y, 1e-6)
  assert_close(dx.reshape(16, 3), expected.grads[0], 1e-6)
  assert_close(moments.variance(), expected.moments[1], 1e-6)


def test_dtypes():
  x = jnp.asarray(a_case((7, 3)).x, jnp.bfloat16)
  norm = jax.jit(optax_ghm.batch_renorm, static_argnames='dtype')
  y, _ = norm(x, RUNNING)
  assert y.dtype == jnp.bfloat16
  wide, moments = norm(x, RUNNING, dtype=jnp.float32)
  assert wide.dtype == moments.mean.dtype == jnp.float32
  np.testing.assert_allclose(
    y.astype(np.float32), wide, rtol=2.0**-8, atol=1e-6
  )


def test_schedules_at_their_knots():
  r_max, d_max = optax_ghm.renorm_schedules()
  for step, r, d in (
    (0, 1, 0),
    (5_000, 1, 0),
    (15_000, 1 + 2 * 10 / 35, 2.5),
    (25_000, 1 + 2 * 20 / 35, 5),
    (40_000, 3, 5),
    (10**6, 3, 5),
  ):
    np.testing.assert_allclose(r_max(step), r, rtol=1e-6)
    np.testing.assert_allclose(d_max(step), d, rtol=1e-6)
  r_max, d_max = optax_ghm.renorm_schedules(
    2.0, 1.0, start=10, r_end=20, d_end=30
  )
  np.testing.assert_allclose([r_max(t) for t in (10, 15, 20)], [1, 1.5, 2])
  np.testing.assert_allclose([d_max(t) for t in (10, 20, 30)], [0, 0.5, 1])


def test_schedules_drive_a_compiled_step():
  case = a_case((7, 3))
  r_max, d_max = optax_ghm.renorm_schedules(start=10, r_end=20, d_end=20)

  @jax.jit
  def step(t):
    y, _ = optax_ghm.batch_renorm(
      case.x,
      RUNNING,
      case.scale,
      case.bias,
      r_max=r_max(t),
      d_max=d_max(t),
      epsilon=EPSILON,
    )
    return y

  assert_close(step(5), renormed(case, RUNNING, 1.0, 0.0).y)
  assert_close(step(15), renormed(case, RUNNING, 2.0, 2.5).y)


# Errors.


@pytest.mark.parametrize(
  ('kwargs', 'error', 'match'),
  [
    ({'running': RunningMoments.init((4,))}, ValueError, 'running.mean must'),
    (
      {'running': RUNNING._replace(var=np.ones(2, np.float32))},
      ValueError,
      'running.var must',
    ),
    ({'scale': np.ones(2, np.float32)}, ValueError, 'scale must'),
    ({'bias': np.ones(2, np.float32)}, ValueError, 'bias must'),
    ({'axis': 4}, ValueError, 'axis must'),
    ({'mask': np.ones((2, 1), bool)}, ValueError, 'mask of shape'),
    ({'x': np.ones((7, 3), np.int32)}, TypeError, 'x must be a real'),
  ],
  ids=str,
)
def test_arguments_that_do_not_fit(kwargs, error, match):
  kwargs = {'x': np.ones((7, 3), np.float32), 'running': RUNNING, **kwargs}
  with pytest.raises(error, match=match):
    optax_ghm.batch_renorm(**kwargs)
