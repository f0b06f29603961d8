"""Batch normalisation with its gradient derived by hand."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_ghm import (
  backward as _backward,
  moments as _moments,
  norms as _norms,
)


def batch_norm(
  x: jax.Array,
  scale: jax.Array | None = None,
  bias: jax.Array | None = None,
  *,
  axis: int | tuple[int, ...] = -1,
  epsilon: float = 1e-5,
  mask: jax.Array | None = None,
  axis_name: _norms.AxisName = None,
  dtype: Any = None,
) -> tuple[jax.Array, _moments.Moments]:
  r"""Normalises every feature by its mean and variance over the batch.

  .. math::
    y_i = \gamma\, \hat x_i + \beta, \qquad
    \hat x_i = \frac{x_i - \mu}{\sqrt{\sigma^2 + \epsilon}}, \qquad
    \bar x_i = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \Big(\bar y_i
    - \frac{w_i}{n} \sum_j \bar y_j
    - \hat x_i \frac{w_i}{n} \sum_j \bar y_j \hat x_j \Big)

  with the mean and the variance of what the mask w counts, n elements, over all
  axes but the feature axes and over the devices of ``axis_name``; the second
  formula is the gradient. The backward pass keeps ``x`` and a few numbers per
  feature. All sums are in at least float32 and by two passes, so a mean of 1e4
  standard deviations does no harm.

  What is masked out is normalised by the others' statistics and has no part in
  them: NaN there stays there, as long as the cotangent there is 0. A shard
  without any element that counts contributes nothing. Where nothing counts at
  all, y is the bias. A feature that is constant becomes the bias, and one with
  NaN or infinities among what counts becomes NaN. Deviations beyond 1e19 have a
  variance beyond float32: y is the bias there, too.

  Let the loss leave out what is masked before anything that makes NaN of it:
  ``where(mask, f(where(mask, y, 0)), 0)``, for the cotangent of ``where(mask,
  f(y), 0)`` is 0 times the derivative of f.

  The gradient can be differentiated again. Forward mode (``jax.jvp``) raises;
  there, :func:`batch_norm_inference` with :func:`batch_moments` is the same.

  Args:
    x: real floating array.
    scale: γ, shaped like the features; None is 1.
    bias: β, shaped like the features; None is 0.
    axis: the feature axes; all others are normalised over.
    epsilon: added to the variance.
    mask: broadcastable to ``x``, not 0 for what counts.
    axis_name: mapped axes (of ``shard_map``, ``vmap``) over which the batch is
      split. In a ``jit`` of a sharded batch there is nothing to say.
    dtype: of the result; None is that of ``x``.

  Returns:
    y, shaped as ``x``, and the moments of the batch (of all devices), through
    which no gradient flows.

  Raises:
    TypeError: if ``x`` is not real and floating.
    ValueError: if ``axis``, ``mask``, ``scale`` or ``bias`` does not fit ``x``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> x = jnp.array([[1.0], [3.0], [jnp.nan]])
    >>> mask = jnp.array([[True], [True], [False]])
    >>> y, moments = optax_ghm.batch_norm(x, mask=mask, epsilon=0.0)
    >>> y[:2, 0]
    Array([-1.,  1.], dtype=float32)
    >>> moments.mean
    Array([2.], dtype=float32)

  References:
    Ioffe, Szegedy, `Batch Normalization: Accelerating Deep Network Training by
    Reducing Internal Covariate Shift <https://arxiv.org/abs/1502.03167>`_, 2015
  """
  x = jnp.asarray(x)
  pool = _moments.Pool.of(x, axis, axis_name)
  y, moments = normalize(
    pool,
    epsilon,
    dtype or x.dtype,
    x,
    *fit_parameters(pool, x, scale, bias),
    _moments.fit_mask(x, mask),
  )
  return y, pool.squeezed(moments)


def batch_norm_inference(
  x: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  scale: jax.Array | None = None,
  bias: jax.Array | None = None,
  *,
  axis: int | tuple[int, ...] = -1,
  epsilon: float = 1e-5,
  domain: jax.Array | None = None,
  dtype: Any = None,
) -> jax.Array:
  r"""Normalises by given statistics, in evaluation or where they are frozen.

  .. math::
    y = \gamma\, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

  Args:
    x: real floating array.
    mean: μ, shaped like the features; with ``domain``, one row per domain.
    var: σ², the same.
    scale: γ, shaped like the features or, with ``domain``, like ``mean``.
    bias: β, the same.
    axis: the feature axes.
    epsilon: added to the variance.
    domain: see :func:`domain_batch_norm`.
    dtype: of the result; None is that of ``x``.

  Returns:
    y, shaped as ``x``. Differentiable in all arguments, both ways.

  Raises:
    TypeError: if ``x`` is not real and floating.
    ValueError: if an argument does not fit ``x``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> optax_ghm.batch_norm_inference(
    ...   jnp.array([[5.0]]), jnp.array([1.0]), jnp.array([4.0]), epsilon=0.0
    ... )
    Array([[2.]], dtype=float32)
  """
  x = jnp.asarray(x)
  groups = None if domain is None else len(mean)
  pool = _moments.Pool.of(x, axis, groups=groups)
  members = None if domain is None else _moments.fit_members(x, domain)
  scale, bias = fit_parameters(pool, x, scale, bias)
  mean = fit_statistics(pool, x, mean, 'mean')
  gain = scale * jax.lax.rsqrt(fit_statistics(pool, x, var, 'var') + epsilon)
  mean, gain, bias = (pool.spread(u, members) for u in (mean, gain, bias))
  y = _kept(pool.known(x, members), (x.astype(mean.dtype) - mean) * gain + bias)
  return y.astype(dtype or x.dtype)


def fold_batch_norm(
  kernel: jax.Array,
  bias: jax.Array | None,
  mean: jax.Array,
  var: jax.Array,
  scale: jax.Array | None = None,
  offset: jax.Array | None = None,
  *,
  epsilon: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
  r"""The dense or convolutional layer that does the batch norm after it, too.

  .. math::
    W' = W\, \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad
    b' = (b - \mu)\, \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} + \beta

  Args:
    kernel: W, of a Flax ``Dense`` or ``Conv``: output features last.
    bias: b, or None.
    mean: μ, the running average.
    var: σ², the same.
    scale: γ, or None.
    offset: β, the bias of the batch norm, or None.
    epsilon: of the batch norm.

  Returns:
    W' and b', in the dtype of ``kernel``: their layer has, in evaluation, the
    output that both layers had.

  Raises:
    ValueError: if the last axis of the kernel is not that of the statistics.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> optax_ghm.fold_batch_norm(
    ...   jnp.eye(1), None, jnp.array([1.0]), jnp.array([4.0]), epsilon=0.0
    ... )
    (Array([[0.5]], dtype=float32), Array([-0.5], dtype=float32))
  """
  kernel, mean = jnp.asarray(kernel), jnp.asarray(mean)
  if kernel.shape[-1:] != mean.shape:
    raise ValueError(
      f'kernel, of shape {kernel.shape}, must have the {mean.shape} features'
      ' of the statistics last.'
    )
  dtype = _norms.at_least_float32(kernel.dtype)
  mean, var, scale, offset, bias = (
    jnp.full(mean.shape, default, dtype)
    if u is None
    else jnp.asarray(u).astype(dtype)
    for u, default in (
      (mean, 0),
      (var, 1),
      (scale, 1),
      (offset, 0),
      (bias, 0),
    )
  )
  gain = jax.lax.rsqrt(var + epsilon) * scale
  shift = (bias - mean) * gain + offset
  over_inputs = tuple(range(kernel.ndim - 1))
  folded = kernel.astype(dtype) * jnp.expand_dims(gain, over_inputs)
  return folded.astype(kernel.dtype), shift.astype(kernel.dtype)


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
    return _kept(known, (x - center) * gain + offset)

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
    return _kept(felt, dy * (_kept(felt, x) - center))

  sum_dy = total(lambda dy: dy, dy)
  sum_dy_x = total(product, dy, x, center, mask, spelling=3) - rest * sum_dy
  d_scale = r * rstd * sum_dy_x + d * sum_dy

  divisor = jnp.maximum(count, 1)
  all_dy, all_dy_x = pool.everywhere(sum_dy, sum_dy_x)
  slope = gain * jnp.square(rstd) * all_dy_x / divisor
  shift = gain * all_dy / divisor - rest * slope

  def through(dy, x, center, gain, shift, slope, mask, known):
    by_statistics = shift + (_kept(mask, x) - center) * slope
    return _kept(known, gain * dy - _kept(mask, by_statistics))

  gain, shift, slope = (pool.spread(u, members) for u in (gain, shift, slope))
  known = pool.known(x, members)
  dx = pool.each(
    through, dy, x, center, gain, shift, slope, mask, known, spelling=5
  )
  return dx.astype(x.dtype), d_scale, sum_dy, None, None, None


normalize.defvjp(_fwd, _bwd)


def _kept(mask, u):
  """0 in the place of what is not in the mask, if there is one."""
  return u if mask is None else jnp.where(mask, u, 0)


def fit_parameters(
  pool: _moments.Pool,
  x: jax.Array,
  scale: jax.Array | None,
  bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Scale and bias as statistics of the pool, 1 and 0 if None."""
  dtype = _norms.at_least_float32(x.dtype)
  # A device that has its own part of x has its own copy of these: what the
  # devices find for them is then summed by the gradient of pcast.
  varying = _backward.varying_axes(x)

  def fit(u, name, default):
    if u is None:
      u = jnp.full(pool.shape(x), default, dtype)
    else:
      u = fit_statistics(pool, x, u, name, shared=True)
    u = _split_as(u, pool, x)
    own = tuple(sorted(varying - _backward.varying_axes(u)))
    return jax.lax.pcast(u, own, to='varying') if own else u

  return fit(scale, 'scale', 1), fit(bias, 'bias', 0)


def fit_statistics(
  pool: _moments.Pool,
  x: jax.Array,
  u: jax.Array,
  name: str,
  shared: bool = False,
) -> jax.Array:
  """Numbers per feature as statistics; ``shared`` by the rows, if these are."""
  shape, u = pool.shape(x), jnp.asarray(u)
  u = u.astype(_norms.at_least_float32(x.dtype))
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
