"""Batch normalisation with its gradient derived by hand."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import _moments, _pool


class Renorm(NamedTuple):
  """Running statistics and limits of renormalisation."""

  mean: jax.Array
  var: jax.Array
  r_max: ArrayLike
  d_max: ArrayLike


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def normalize(
  pool, epsilon, dtype, x, scale, bias, mask, members=None, renorm=None
):
  """Y and its moments: what every kind of batch norm here comes to.

  All arguments after ``dtype`` are as the functions around prepare them:
  statistics of the ``pool``.
  """
  return _fwd(pool, epsilon, dtype, x, scale, bias, mask, members, renorm)[0]


def _fwd(pool, epsilon, dtype, x, scale, bias, mask, members=None, renorm=None):
  count, mean, rest, variance = pool.measure(x, mask, members)
  spread = variance + epsilon  # 0 of what is constant, if epsilon is
  known = (count > 0) & (spread != 0)
  rstd = jnp.where(known, jax.lax.rsqrt(jnp.where(known, spread, 1)), 0)
  r, d = 1.0, 0.0
  if renorm is not None:
    running_std = jnp.sqrt(renorm.var + epsilon)
    r = jnp.sqrt(variance + epsilon) / running_std
    r = jnp.clip(r, 1 / renorm.r_max, renorm.r_max)
    d = (mean - renorm.mean + rest) / running_std
    d = jnp.clip(d, -renorm.d_max, renorm.d_max)
    r, d = jax.lax.stop_gradient((r, d))
  gain = scale * r * rstd
  offset = bias + scale * d - rest * gain
  center, *affine = (pool.spread(u, members) for u in (mean, gain, offset))

  def normalized(x, center, gain, offset, known):
    return kept(known, (x - center) * gain + offset)

  known = pool.known(x, members)
  y = pool.each(normalized, x, center, *affine, known, spelling=4)
  moments = _moments.Moments(count, mean + rest, count * variance)
  residuals = x, mask, members, count, mean, rest, rstd, r, d, gain
  return (y.astype(dtype), jax.lax.stop_gradient(moments)), residuals


def _bwd(pool, epsilon, dtype, residuals, cotangents):
  del epsilon, dtype
  x, mask, members, count, mean, rest, rstd, r, d, gain = residuals
  dy, _ = cotangents
  center = pool.spread(mean, members)
  total = functools.partial(pool.total, members=members)

  def product(dy, x, center, mask):
    felt = None if mask is None else mask | (dy != 0)
    return kept(felt, dy * (kept(felt, x) - center))

  sum_dy = total(lambda dy: dy, dy)
  sum_dy_x = total(product, dy, x, center, mask, spelling=3) - rest * sum_dy
  d_scale = r * rstd * sum_dy_x + d * sum_dy

  divisor = jnp.maximum(count, 1)
  all_dy, all_dy_x = pool.everywhere(sum_dy, sum_dy_x)
  slope = gain * jnp.square(rstd) * all_dy_x / divisor
  shift = gain * all_dy / divisor - rest * slope

  def through(dy, x, center, gain, shift, slope, mask, known):
    by_statistics = shift + (kept(mask, x) - center) * slope
    return kept(known, gain * dy - kept(mask, by_statistics))

  gain, shift, slope = (pool.spread(u, members) for u in (gain, shift, slope))
  known = pool.known(x, members)
  dx = pool.each(
    through, dy, x, center, gain, shift, slope, mask, known, spelling=5
  )
  return dx.astype(x.dtype), d_scale, sum_dy, None, None, None


normalize.defvjp(_fwd, _bwd)


def kept(mask, u):
  """0 in the place of what is not in the mask, if there is one."""
  return u if mask is None else jnp.where(mask, u, 0)


def fit_parameters(
  pool: _pool.Pool,
  x: jax.Array,
  scale: jax.Array | None,
  bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Scale and bias as statistics of the pool, 1 and 0 if None."""
  dtype = arrays.at_least_float32(x.dtype)
  # A device that has its own part of x has its own copy of these: what the
  # devices find for them is then summed by the gradient of pcast.
  varying = arrays.varying_axes(x)

  def fit(u, name, default):
    if u is None:
      u = jnp.full(pool.shape(x), default, dtype)
    else:
      u = fit_statistics(pool, x, u, name, shared=True)
    u = _split_as(u, pool, x)
    own = tuple(sorted(varying - arrays.varying_axes(u)))
    return jax.lax.pcast(u, own, to='varying') if own else u

  return fit(scale, 'scale', 1), fit(bias, 'bias', 0)


def fit_statistics(
  pool: _pool.Pool,
  x: jax.Array,
  u: jax.Array,
  name: str,
  shared: bool = False,
) -> jax.Array:
  """Numbers per feature as statistics; ``shared`` by the rows, if these are."""
  shape, u = pool.shape(x), jnp.asarray(u)
  u = u.astype(arrays.at_least_float32(x.dtype))
  features = tuple(n for a, n in enumerate(shape) if a not in pool.idle)
  if u.shape == features:
    return jnp.expand_dims(u, pool.idle)
  by_row = pool.ghosts or pool.groups is not None
  if shared and by_row and u.shape == features[1:]:
    return jnp.broadcast_to(jnp.expand_dims(u[None], pool.idle), shape)
  raise ValueError(
    f'{name} must have the shape of the features, {features}, got {u.shape}.'
  )


def _split_as(u, pool, x):
  """Explicitly sharded as ``x`` is along the axes that they share."""
  spec = jax.sharding.PartitionSpec(
    *(
      None if a in pool.axes else along
      for a, along in enumerate(jax.typeof(x).sharding.spec)
    )
  )
  return u if jax.typeof(u).sharding.spec == spec else jax.reshard(u, spec)
