"""Normalization by the batch, with its gradient derived by hand."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import _loops, _moments, _pool


class Renorm(NamedTuple):
  """Running statistics and limits of batch renormalization.

  Attributes:
    mean: the running mean, a statistic of the pool.
    var: the running variance, a statistic of the pool.
    r_max: the limit of r, a scalar.
    d_max: the limit of d, a scalar.
  """

  mean: jax.Array
  var: jax.Array
  r_max: jax.Array
  d_max: jax.Array


def by_batch(pool, x, scale, bias, epsilon, dtype, renorm=None):
  """Calls :func:`normalize` with parameters shaped like the features, or None.

  Returns:
    y, and the moments shaped like the features.
  """
  args = x, *fit_parameters(pool, x, scale, bias), renorm
  y, moments = normalize(epsilon, dtype or x.dtype, pool, *args)
  return y, pool.squeeze(moments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normalize(epsilon, dtype, pool, x, scale, bias, renorm):
  r"""Normalizes ``x`` by the statistics of the pool.

  .. math::
    y_i = \gamma \Big(r\, \frac{x_i - \mu}{\sqrt{\sigma^2 + \epsilon}}
    + d\Big) + \beta

  with r = 1 and d = 0 unless ``renorm`` is given.

  Args:
    epsilon: added to the variance.
    dtype: of y.
    pool: what is normalized together.
    x: real floating array.
    scale: γ, a statistic of the pool.
    bias: β, a statistic of the pool.
    renorm: what limits r and d.

  Returns:
    y, and the moments as statistics of the pool.
  """
  return _forward(epsilon, dtype, pool, x, scale, bias, renorm)[0]


def _forward(epsilon, dtype, pool, x, scale, bias, renorm):
  count, mean, mean_error, var = pool.measure(x)
  varies = (count > 0) & (var + epsilon != 0)
  divisor = jnp.where(varies, var + epsilon, 1)
  rstd = jnp.where(varies, jax.lax.rsqrt(divisor), 0)
  r, d = 1.0, 0.0
  if renorm is not None:
    running_std = jnp.sqrt(renorm.var + epsilon)
    r = jnp.sqrt(var + epsilon) / running_std
    r = jnp.clip(r, 1 / renorm.r_max, renorm.r_max)
    d = (mean - renorm.mean + mean_error) / running_std
    d = jnp.clip(d, -renorm.d_max, renorm.d_max)
    r, d = jax.lax.stop_gradient((r, d))
  gain = scale * r * rstd
  offset = bias + scale * d - mean_error * gain

  def output(x, mean, gain, offset, has_group):
    return _pool.masked(has_group, (x - mean) * gain + offset)

  args = x, *map(pool.broadcast, (mean, gain, offset)), pool.has_group(x.ndim)
  y = _loops.distinct_producers('output', output, *args)
  moments = _moments.Moments(count, mean + mean_error, count * var)
  residuals = pool, x, count, mean, mean_error, rstd, r, d, gain
  return (y.astype(dtype), jax.lax.stop_gradient(moments)), residuals


def _backward(epsilon, dtype, residuals, cotangents):
  r"""The gradient, with the mask w and the gain g of the forward pass.

  .. math::
    \bar x_i = g \bar y_i - w_i (a + b\, (x_i - \mu)), \qquad
    a = \frac{g}{n} \sum_j \bar y_j, \qquad
    b = \frac{g}{n\, (\sigma^2 + \epsilon)} \sum_j \bar y_j (x_j - \mu)
  """
  del epsilon, dtype
  pool, x, count, mean, mean_error, rstd, r, d, gain = residuals
  dy, _ = cotangents
  center = pool.broadcast(mean)

  def products(dy, x, mean, mask):
    # NaN that is masked out and has no cotangent has no part in the sum.
    used = None if mask is None else mask | (dy != 0)
    return _pool.masked(used, dy * (_pool.masked(used, x) - mean))

  sum_dy = pool.total('sum', lambda dy: dy, dy)
  sum_dy_x = pool.total('products', products, dy, x, center, pool.mask)
  sum_dy_x = sum_dy_x - mean_error * sum_dy
  d_scale = r * rstd * sum_dy_x + d * sum_dy

  divisor = jnp.maximum(count, 1)
  all_dy, all_dy_x = pool.all_reduce(sum_dy, sum_dy_x)
  b = gain * jnp.square(rstd) * all_dy_x / divisor
  a = gain * all_dy / divisor - mean_error * b

  def gradient(dy, x, mean, gain, a, b, mask, has_group):
    dx = gain * dy - _pool.masked(mask, a + (_pool.masked(mask, x) - mean) * b)
    return _pool.masked(has_group, dx)

  args = dy, x, center, *map(pool.broadcast, (gain, a, b))
  args = *args, pool.mask, pool.has_group(x.ndim)
  dx = _loops.distinct_producers('gradient', gradient, *args)
  return None, dx.astype(x.dtype), d_scale, sum_dy, None


normalize.defvjp(_forward, _backward)


def fit_parameters(pool, x, scale, bias):
  """Scale and bias as statistics of the pool, 1 and 0 if None."""
  # A device that has its own part of x gets its own copy of the parameters. The
  # gradient of pcast then adds the gradients of all devices.
  varying = arrays.varying_axes(x)
  sharding = enumerate(jax.typeof(x).sharding.spec)
  spec = PartitionSpec(*(None if a in pool.axes else s for a, s in sharding))

  def fit(u, name, default):
    if u is None:
      u = jnp.full(pool.shape(x), default, arrays.at_least_float32(x.dtype))
    else:
      u = fit_statistics(pool, x, u, name, shared=True)
    if jax.typeof(u).sharding.spec != spec:
      u = jax.reshard(u, spec)
    own = tuple(sorted(varying - arrays.varying_axes(u)))
    return jax.lax.pcast(u, own, to='varying') if own else u

  return fit(scale, 'scale', 1), fit(bias, 'bias', 0)


def fit_statistics(pool, x, u, name, shared=False):
  """Numbers per feature as statistics of the pool.

  Args:
    pool: of ``x``.
    x: the array to normalize.
    u: shaped like the features, one row per group if there are groups.
    name: of the argument, for the error.
    shared: whether all groups may share one row.

  Raises:
    ValueError: if the shape of ``u`` does not fit.
  """
  shape, u = pool.shape(x), jnp.asarray(u)
  u = u.astype(arrays.at_least_float32(x.dtype))
  features = tuple(n for a, n in enumerate(shape) if a not in pool.unit_axes)
  if u.shape == features:
    return jnp.expand_dims(u, pool.unit_axes)
  if shared and pool.groups and u.shape == features[1:]:
    return jnp.broadcast_to(jnp.expand_dims(u[None], pool.unit_axes), shape)
  raise ValueError(
    f'{name} must have the shape of the features, {features}, got {u.shape}.'
  )


def fit_running(pool, x, running):
  """Mean and variance of ``running`` as statistics of the pool."""
  return (
    fit_statistics(pool, x, running.mean, 'running.mean'),
    fit_statistics(pool, x, running.var, 'running.var'),
  )
