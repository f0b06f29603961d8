"""The authentic smooth L1 loss is its formula, with two derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ghm
from tests.support import (
  oracles_harmonization as oracles,
  strategies_arrays as arrays_of,
)

pytestmark = pytest.mark.device

SIZES = 10.0 ** np.arange(-30, 31)
D = np.concatenate([-SIZES[::-1], [0], SIZES, np.geomspace(1e-9, 1e5, 200)])
MU = 10.0 ** np.arange(-6, 4)[:, None]
EPS = float(np.finfo(np.float32).eps)


def loss(d, mu):
  return optax_ghm.authentic_smooth_l1_loss(d, jnp.zeros_like(d), mu=mu)


@jax.jit
def derivatives(d, mu):
  """Backward, forward, and forward over backward."""
  ones, zeros = jnp.ones_like(d), jnp.zeros_like(d)
  slopes = jax.grad(lambda d, mu: loss(d, mu).sum(), (0, 1))
  value, forward = jax.jvp(lambda d: loss(d, mu), (d,), (ones,))
  by, second_by_d = jax.jvp(slopes, (d, mu), (ones, zeros))
  _, second_by_mu = jax.jvp(slopes, (d, mu), (zeros, ones))
  return (value, forward, *by), (*second_by_d, *second_by_mu)


def test_it_is_right_to_rounding_over_all_sizes():
  d, mu = np.broadcast_arrays(D.astype('f'), MU.astype('f'))
  first, second = jax.device_get(derivatives(d, mu))
  d, mu = d.astype(float), mu.astype(float)
  value, slope, norm = oracles.smooth_l1(d, 0.0, mu=mu)
  root = np.hypot(d, mu)
  half = d / (root + mu)  # the derivative by mu is mu / root - 1
  for found, expected in zip(
    first, (value, slope, slope, -slope * half), strict=True
  ):
    arrays_of.assert_close(found, expected, 4 * EPS)
  both = -slope * mu / root / root
  curved = (mu / root) ** 2 / root, both, both, norm**2 / root
  for found, expected in zip(second, curved, strict=True):
    arrays_of.assert_close(found, expected, 6 * EPS)
  assert (first[0][d == 0] == 0).all()


def test_infinite_and_undefined_numbers():
  """An infinite difference counts as the largest number."""
  most = np.finfo(np.float32).max
  d = np.float32([np.inf, -np.inf, most, -most, np.nan])
  first, second = jax.device_get(derivatives(d, np.full_like(d, 0.1)))
  value, _, slope, by_mu = first
  np.testing.assert_array_equal(value, [most] * 4 + [np.nan])
  np.testing.assert_array_equal(slope, [1, -1, 1, -1, np.nan])
  np.testing.assert_array_equal(by_mu, [-1] * 4 + [np.nan])
  assert all((np.abs(u[:4]) < 1e-30).all() for u in second)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_16_bits_are_computed_in_float32(dtype):
  x, y = np.linspace(-2, 2, 50).astype(dtype), np.float32(1e-3)
  found = jax.jit(optax_ghm.authentic_smooth_l1_loss)(x, y)
  expected, *_ = oracles.smooth_l1(x.astype(float), float(y), mu=0.1)
  assert found.dtype == np.float32 and found.shape == x.shape
  arrays_of.assert_close(found, expected, 1e-6)


@pytest.mark.parametrize(
  ('error', 'match', 'args', 'options'),
  [
    (TypeError, 'predictions must be floating', (np.ones(3, int), 0), {}),
    (ValueError, 'targets of shape', (np.ones(3, 'f'), np.ones(2)), {}),
    (ValueError, 'mu must be above 0', (np.ones(3, 'f'), 0), {'mu': 0}),
  ],
)
def test_wrong_arguments_are_named(error, match, args, options):
  call = functools.partial(optax_ghm.authentic_smooth_l1_loss, **options)
  with pytest.raises(error, match=match):
    jax.eval_shape(call, *args)
