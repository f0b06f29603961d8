"""Batch normalization as in the papers, in NumPy's float64.

Arrays may have axes in front of those of the batch: the derivatives take all
their steps at once.
"""

import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optax_ghm

EPSILON = 1e-3


class Moments(NamedTuple):
  """As those of the library."""

  count: Any
  mean: Any
  m2: Any

  @property
  def var(self):
    return self.m2 / np.maximum(self.count, 1)


def moments_of(x, axis=-1, counts=None, largest=np.inf, keepdims=False):
  """Count, mean and squared deviations, infinite beyond ``largest``."""
  counts = np.ones(x.shape, bool) if counts is None else counts
  ndim = counts.ndim
  features = {a % ndim for a in np.atleast_1d(axis).astype(int)}
  over = tuple(a - ndim for a in range(ndim) if a not in features)
  n = np.sum(counts, over, keepdims=True)
  kept = np.where(counts, x, 0)
  mean = np.sum(kept, over, keepdims=True) / np.maximum(n, 1)
  mean = np.where(np.isfinite(mean), mean, np.nan)
  m2 = np.where(counts, (kept - mean) ** 2, 0)
  m2 = np.sum(m2, over, keepdims=True)
  m2 = np.where(m2.real > largest, np.inf, m2)
  found = Moments(n, mean, m2)
  if keepdims:
    return found, over
  return Moments(*(np.squeeze(u, over) for u in found))


def definition(x, scale, bias, counts, axis=-1, constants=None, largest=np.inf):
  """Y and the moments; ``constants`` is renormalization's r and d."""
  moments, over = moments_of(x, axis, counts, largest, keepdims=True)
  r, d = (1.0, 0.0) if constants is None else constants
  r, d, scale, bias = (
    np.expand_dims(u, over) if np.ndim(u) else u for u in (r, d, scale, bias)
  )
  x_hat = (x - moments.mean) / np.sqrt(moments.var + EPSILON)
  x_hat = x_hat * (moments.count > 0)
  y = (x_hat * r + d) * scale + bias
  return y, Moments(*(np.squeeze(u, over) for u in moments))


def by_slices(size):
  """The definition of ghosts: a loop over slices."""

  def norm(x, scale, bias, counts, axis, **options):
    at = -counts.ndim  # of the examples
    x = np.moveaxis(x, at, 0)
    y = np.zeros(x.shape, x.dtype)
    for i in range(0, len(x), size):
      own = slice(i, i + size)
      part = np.moveaxis(x[own], 0, at)
      part, _ = definition(part, scale, bias, counts[own], axis, **options)
      y[own] = np.moveaxis(part, at, 0)
    x, y = (np.moveaxis(u, 0, at) for u in (x, y))
    return y, moments_of(x, axis, counts, **options)

  return norm


def by_subsets(domain, rows=False, count=3):
  """The definition of domains, with a row of parameters each: a loop."""

  def norm(x, scale, bias, counts, axis, **options):
    at = -counts.ndim
    x = np.moveaxis(x, at, 0)
    y, moments = np.zeros(x.shape, x.dtype), []
    for g in range(count):
      own = np.broadcast_to(domain, len(x)) == g
      affine = (scale, bias)
      if rows:
        affine = (np.take(u, g, -1 - np.size(axis)) for u in affine)
      part = np.moveaxis(x[own], 0, at)
      part, of_part = definition(part, *affine, counts[own], axis, **options)
      y[own] = np.moveaxis(part, at, 0)
      moments.append(of_part)
    stacked = (np.stack(u) for u in zip(*moments, strict=True))
    return np.moveaxis(y, 0, at), Moments(*stacked)

  return norm


def renorm_constants(moments, running, r_max, d_max):
  """Renormalization's r and d, which its gradient holds."""
  with np.errstate(all='ignore'):
    std = np.sqrt(np.float64(running.var) + EPSILON)
    r = np.sqrt(moments.var + EPSILON) / std
    d = (moments.mean - running.mean) / std
  return np.clip(r, 1 / r_max, r_max), np.clip(d, -d_max, d_max)


def derivatives(f, args, dy, u=None):
  """The gradient of ``f`` for dy, and the gradient of that along u, in NumPy.

  By complex steps, exact to rounding; twice by differences of these, to 1e-10.
  What is not finite has no part.
  """
  sizes = np.cumsum([a.size for a in args])

  def parts(flat):
    pieces = np.split(flat, sizes[:-1], -1)
    return [
      p.reshape((*flat.shape[:-1], *a.shape))
      for p, a in zip(pieces, args, strict=True)
    ]

  def slopes(flat):
    y = f(*parts(flat))
    return np.where(np.isfinite(y.real), y.imag * 1e30, 0)

  def gradient(flat):
    y = slopes(flat + 1e-30j * np.eye(flat.size))
    return np.sum(dy * y, tuple(range(1, y.ndim)))

  flat = np.concatenate([np.ravel(a) for a in args])
  grads = parts(gradient(flat))
  if u is None:
    return grads, None
  along = np.concatenate([np.ravel(a) for a in u])
  h = 1e-3
  near, far = (
    gradient(flat + k * h * along) - gradient(flat - k * h * along)
    for k in (1, 2)
  )
  twice = parts((8 * near - far) / (12 * h))
  return grads, [*twice, slopes(flat + 1e-30j * along)]


class Found(NamedTuple):
  """Results of a batch norm: gradients are of x, scale, bias (and dy)."""

  y: Any
  moments: Any
  grads: Any
  second: Any = None


def expected(case, second=False, norm=definition, **options):
  """Results of the definition, with 0 for masked NaN and infinities."""
  mask = True if case.mask is None else np.asarray(case.mask)
  counts = np.broadcast_to(mask, case.x.shape)
  x, scale, bias, dy, *u = (
    np.asarray(a).astype(np.float64)
    for a in (case.x, case.scale, case.bias, case.dy, *case.u)
  )
  x = np.where(counts | np.isfinite(x), x, 0)
  f = functools.partial(norm, counts=counts, axis=case.axis, **options)
  with np.errstate(all='ignore'):
    y, moments = f(x, scale, bias)
    grads, twice = derivatives(
      lambda *args: f(*args)[0], (x, scale, bias), dy, u if second else None
    )
  return Found(y, moments, grads, twice)


def differentiate(norm, x, scale, bias, dy, u=None):
  """Results of a batch norm in JAX; the gradient along u, if it is given."""

  def first(x, scale, bias, dy):
    y, vjp, moments = jax.vjp(norm, x, scale, bias, has_aux=True)
    return Found(y, moments, vjp(dy))

  def along(*args):
    grads = first(*args).grads
    return sum(
      jnp.sum(g.astype(v.dtype) * v) for g, v in zip(grads, u, strict=True)
    )

  args = x, scale, bias, dy
  second = None if u is None else jax.grad(along, argnums=(0, 1, 2, 3))(*args)
  return first(*args)._replace(second=second)


def norm_of(name, traced, static=()):
  """A batch norm of this library, as a function of x, scale and bias."""
  f = getattr(optax_ghm, name)

  def norm(x, scale, bias):
    return f(
      x, scale=scale, bias=bias, epsilon=EPSILON, **traced, **dict(static)
    )

  return norm


@functools.partial(jax.jit, static_argnames=('name', 'static'))
def _found(name, x, scale, bias, dy, u, traced, static):
  return differentiate(norm_of(name, traced, static), x, scale, bias, dy, u)


def found(case, name='batch_norm', second=False, traced=None, **static):
  """Results of the batch norm ``name``, compiled."""
  traced = {'mask': case.mask, **(traced or {})}
  static = tuple(sorted({'axis': case.axis, **static}.items()))
  dy = np.asarray(case.dy).astype(dict(static).get('dtype') or case.x.dtype)
  u = case.u if second else None
  args = case.x, case.scale, case.bias, dy, u, traced
  return jax.device_get(_found(name, *args, static))


def a_case(
  shape, axis=-1, mask=None, dtype=np.float32, mean=3.0, std=2.0, seed=0
):
  """Numbers of a shape; ``mask`` is the shape of one, with some of each."""
  rng = np.random.default_rng(seed)
  features = sorted(a % len(shape) for a in np.atleast_1d(axis).astype(int))
  of_features = tuple(shape[a] for a in features)
  if mask is not None:
    mask = np.arange(np.prod(mask, dtype=int)).reshape(mask) % 3 != 1
  wide = np.float64 if dtype == np.float64 else np.float32
  x = mean + std * rng.normal(size=shape)
  scale, bias, u_scale, u_bias = (
    rng.normal(size=of_features).astype(wide) for _ in range(4)
  )
  u = (rng.normal(size=shape).astype(wide), u_scale, u_bias)
  dy = rng.normal(size=shape)
  return types.SimpleNamespace(
    x=np.asarray(x, dtype),
    scale=scale,
    bias=bias,
    mask=mask,
    dy=np.asarray(dy, dtype),
    u=u,
    axis=axis,
  )


def with_rows(case, count=3):
  """With a row of parameters for each of so many domains."""
  factors = np.arange(1, count + 1, dtype=np.float32)

  def rows(u):
    return factors.reshape(-1, *[1] * u.ndim) * u

  case.scale, case.bias = rows(case.scale), rows(case.bias)
  case.u = (case.u[0], rows(case.u[1]), -rows(case.u[2]))
  return case


def averages(mean, var):
  mean, var = np.float32(mean), np.float32(var)
  return optax_ghm.RunningMoments(mean, var, np.ones_like(mean))


def half_a_digit(dtype):
  """What rounding to 16 bits changes, at most; nothing for wider dtypes."""
  info = jnp.finfo(dtype)
  return float(info.eps) / 2 if info.bits == 16 else 0.0


def assert_close(actual, expected, rtol=1e-5, rounding=0.0):
  """Relative to the largest (or 1), and to each by its own rounding."""
  actual = np.asarray(actual, np.float64)
  expected = np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  largest = np.max(np.abs(expected), initial=1)
  np.testing.assert_allclose(
    actual, expected, rtol=rounding, atol=rtol * largest
  )


def assert_moments(actual, expected, rtol=1e-6):
  """The mean to rounding, the squares to ``rtol``, the count exactly."""
  assert {u.shape for u in actual} == {np.shape(expected.mean)}
  np.testing.assert_array_equal(actual.count, expected.count)
  np.testing.assert_allclose(actual.mean, expected.mean, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(actual.m2, expected.m2, rtol=rtol, atol=1e-6)


def assert_same(actual, expected, rtol=1e-5, second=1e-4, rounding=0.0):
  """Of everything in a ``Found``, as much as was expected."""
  assert_close(actual.y, expected.y, rtol, rounding)
  count, mean, _ = expected.moments
  np.testing.assert_array_equal(actual.moments.count, count)
  assert_close(actual.moments.mean, mean, 1e-6)
  assert_close(actual.moments.var, expected.moments.var)
  for i, grad in enumerate(expected.grads):
    assert_close(actual.grads[i], grad, rtol, rounding if i == 0 else 0)
  for i, grad in enumerate(expected.second or ()):
    own = rounding if i in (0, 3) else 0
    assert_close(actual.second[i], grad, second, own)


# Statistics of whole data sets.


def by_numpy(batches, masks=None):
  """Mean and variance of everything."""
  counts = np.ones((sum(map(len, batches)), 1), bool)
  counts = counts if masks is None else np.concatenate(masks)
  x = np.concatenate(batches).astype(np.float64)
  of = moments_of(x, counts=np.broadcast_to(counts, x.shape))
  return {'mean': of.mean, 'var': of.var}


def normalized(x):
  """X by its own mean and variance."""
  return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def seen_in_turn(batches, kernels, biases, activation=np.asarray):
  """The statistics of what the norms of two layers see, one upon another."""
  seen = [], []
  w, b = (list(map(np.float64, u)) for u in (kernels, biases))
  for x in batches:
    h = np.float64(x) @ w[0] + b[0]
    seen[0].append(h)
    seen[1].append(activation(normalized(h)) @ w[1] + b[1])
  return [by_numpy(of) for of in seen]


def assert_is(stats, expected, rtol=2e-5):
  for name, value in expected.items():
    assert stats[name].dtype == jnp.float32
    np.testing.assert_allclose(stats[name], value, rtol=rtol, atol=rtol / 10)
