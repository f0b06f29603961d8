"""Normalization by given statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ghm
from tests.support import oracles_batch_norm as oracle
from tests.support.oracles_batch_norm import EPSILON, assert_close, averages

inference = jax.jit(
  optax_ghm.batch_norm_inference, static_argnames=('axis', 'epsilon', 'dtype')
)


@pytest.mark.device
def test_inference_is_the_formula_along_any_axes_and_far_from_zero(rng):
  x = rng.normal(size=(4, 5, 3)).astype(np.float32)
  mean, var, scale, bias = (
    rng.uniform(1, 2, size=(4, 3)).astype(np.float32) for _ in range(4)
  )
  for far in (np.float32(0), np.float32(1e4)):
    moved = averages(mean + far, var)
    y = inference(x + far, moved, scale, bias, axis=(0, 2), epsilon=EPSILON)
    center = moved.mean.astype(np.float64)[:, None]
    wide = ((x + far) - center) / np.sqrt(var + EPSILON)[:, None]
    assert_close(y, scale[:, None] * wide + bias[:, None], 1e-6)


@pytest.mark.device
def test_inference_by_domain(rng):
  x = rng.normal(size=(6, 2, 3)).astype(np.float32)
  mean, var, scale = rng.uniform(1, 2, size=(3, 4, 3)).astype(np.float32)
  domain = np.array([0, 3, 1, 4, -1, 3])
  x[4, 0] = np.nan, np.inf, -np.inf  # of no domain, and so 0
  bias = np.float32([1, 2, 3])  # of all domains
  of_each = averages(mean, var)
  y = inference(x, of_each, scale, bias, domain=domain, epsilon=EPSILON)
  for i, d in enumerate(domain):
    wanted = np.zeros((2, 3))
    if 0 <= d < 4:
      wanted = (x[i] - mean[d]) / np.sqrt(var[d] + EPSILON) * scale[d] + bias
    assert_close(y[i], wanted, 1e-6)
  x = x[:4]
  one = inference(x, of_each, domain=np.array(3), epsilon=EPSILON)
  assert_close(one, (x - mean[3]) / np.sqrt(var[3] + EPSILON), 1e-6)


@pytest.mark.device
def test_inference_is_in_float32_and_then_rounded(rng):
  x = (3 + rng.normal(size=(6, 3))).astype(jnp.bfloat16)
  mean, var, scale = rng.uniform(1, 2, size=(3, 3)).astype(np.float32)
  wide = x.astype(np.float64)
  wanted = (wide - mean) / np.sqrt(var + 1e-5) * scale
  for dtype in (jnp.float32, jnp.bfloat16, None):
    y = inference(x, averages(mean, var), scale, dtype=dtype)
    assert y.dtype == (dtype or jnp.bfloat16)
    rounding = float(jnp.finfo(y.dtype).eps) / 2
    assert_close(y, wanted, 1e-6, rounding=rounding)
  half = np.ones(3, jnp.bfloat16)  # statistics of another precision
  running = optax_ghm.RunningMoments(half, half, half)
  y = inference(np.full((2, 3), 2, np.float32), running, half, half)
  assert y.dtype == np.float32
  np.testing.assert_allclose(y, 2, rtol=1e-5)


@pytest.mark.device
def test_inference_is_differentiable_in_everything(rng):
  x = rng.normal(size=(4, 3)).astype(np.float32)
  args = [x, *(u.astype(np.float32) for u in rng.uniform(1, 2, size=(4, 3)))]
  dy = rng.normal(size=(4, 3)).astype(np.float32)

  def formula(x, mean, var, scale, bias):
    mean, var, scale, bias = (u[..., None, :] for u in (mean, var, scale, bias))
    return (x - mean) / np.sqrt(var + EPSILON) * scale + bias

  def f(x, mean, var, scale, bias):
    running = optax_ghm.RunningMoments(mean, var, jnp.ones_like(mean))
    return optax_ghm.batch_norm_inference(
      x, running, scale, bias, epsilon=EPSILON
    )

  found = jax.jit(lambda *args: jax.vjp(f, *args)[1](dy))(*args)
  wide = [u.astype(np.float64) for u in args]
  wanted, _ = oracle.derivatives(formula, wide, dy.astype(np.float64))
  for a, b in zip(found, wanted, strict=True):
    assert_close(a, b, 1e-6)
