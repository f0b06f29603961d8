"""Batch normalization by the batch, and by given statistics."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import _moments, _normalize, _pool


def batch_norm(
  x: jax.Array,
  scale: jax.Array | None = None,
  bias: jax.Array | None = None,
  *,
  axis: int | tuple[int, ...] = -1,
  epsilon: float = 1e-5,
  mask: jax.Array | None = None,
  axis_name: arrays.AxisName = None,
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
  pool = _pool.Pool.of(x, axis, axis_name)
  y, moments = _normalize.normalize(
    pool,
    epsilon,
    dtype or x.dtype,
    x,
    *_normalize.fit_parameters(pool, x, scale, bias),
    _pool.fit_mask(x, mask),
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
  pool = _pool.Pool.of(x, axis, groups=groups)
  members = None if domain is None else _pool.fit_members(x, domain)
  scale, bias = _normalize.fit_parameters(pool, x, scale, bias)
  mean = _normalize.fit_statistics(pool, x, mean, 'mean')
  gain = scale * jax.lax.rsqrt(
    _normalize.fit_statistics(pool, x, var, 'var') + epsilon
  )
  mean, gain, bias = (pool.spread(u, members) for u in (mean, gain, bias))
  y = _normalize.kept(
    pool.known(x, members), (x.astype(mean.dtype) - mean) * gain + bias
  )
  return y.astype(dtype or x.dtype)
