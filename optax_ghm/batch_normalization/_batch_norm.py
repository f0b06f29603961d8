"""Batch normalization by the batch, and by given statistics."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import (
  _moments,
  _normalize,
  _pool,
  _running_moments,
)


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
  r"""Normalizes every feature by its mean and variance over the batch.

  .. math::
    y_i = \gamma\, \hat x_i + \beta, \qquad
    \hat x_i = \frac{x_i - \mu}{\sqrt{\sigma^2 + \epsilon}}, \qquad
    \bar x_i = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \Big(\bar y_i
    - \frac{w_i}{n} \sum_j \bar y_j
    - \hat x_i \frac{w_i}{n} \sum_j \bar y_j \hat x_j \Big)

  Mean and variance are taken over the n elements that the mask w counts, along
  all axes but the feature axes and over the devices of ``axis_name``. The last
  formula is the gradient; the backward pass keeps ``x`` and a few numbers per
  feature. All sums are in at least float32 and take two passes, so that a mean
  of 1e4 standard deviations does no harm.

  Elements that are masked out are normalized by the statistics of the others.
  NaN among them stays in its place, as long as its cotangent is 0. To get
  there, mask in front of any function f that would return NaN, and behind it:
  ``where(mask, f(where(mask, y, 0)), 0)``. The gradient of ``where(mask, f(y),
  0)`` is 0 times the derivative of f, which is NaN.

  Where nothing counts, y is the bias, and a device on which nothing counts
  contributes nothing. A constant feature becomes the bias. A feature with NaN
  or infinities among the elements that count becomes NaN. Deviations beyond
  1e19, whose squares float32 cannot hold, make y the bias.

  The gradient can be differentiated again. Forward mode (``jax.jvp``) raises an
  error; ``batch_norm_inference(x, Moments.of(x))`` has the same value and
  supports it.

  Args:
    x: real floating array.
    scale: γ, shaped like the features; None is 1.
    bias: β, shaped like the features; None is 0.
    axis: the feature axes; all others are normalized over.
    epsilon: ε, added to the variance.
    mask: bool, broadcastable to ``x``: which elements count.
    axis_name: mapped axes (of ``shard_map``, ``vmap``) over which the batch is
      split. A ``jit`` of a sharded batch needs none.
    dtype: of the result; None is that of ``x``.

  Returns:
    y, shaped like ``x``, and the moments of the batch (of all devices), through
    which no gradient flows.

  Raises:
    TypeError: if ``x`` is not real and floating, or ``mask`` not bool.
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
  pool = _pool.Pool.of(x, axis, axis_name, mask)
  return _normalize.by_batch(pool, x, scale, bias, epsilon=epsilon, dtype=dtype)


def batch_norm_inference(
  x: jax.Array,
  running: _running_moments.RunningMoments | _moments.Moments,
  scale: jax.Array | None = None,
  bias: jax.Array | None = None,
  *,
  axis: int | tuple[int, ...] = -1,
  epsilon: float = 1e-5,
  domain: jax.Array | None = None,
  dtype: Any = None,
) -> jax.Array:
  r"""Normalizes by given statistics, in evaluation or where they are frozen.

  .. math::
    y = \gamma\, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

  Args:
    x: real floating array.
    running: μ and σ², the attributes ``mean`` and ``var``, shaped like the
      features; with ``domain``, one row for each domain.
    scale: γ, shaped like the features or, with ``domain``, like the mean; None
      is 1.
    bias: β, shaped like the features or, with ``domain``, like the mean; None
      is 0.
    axis: the feature axes.
    epsilon: ε, added to the variance.
    domain: integers or bool, one for each example along axis 0, or one for all.
      An example of another domain than those of ``running`` becomes 0.
    dtype: of the result; None is that of ``x``.

  Returns:
    y, shaped like ``x`` and differentiable in all arguments, in both modes.

  Raises:
    TypeError: if ``x`` is not real and floating, or ``domain`` neither integer
      nor bool.
    ValueError: if an argument does not fit ``x``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> running = optax_ghm.RunningMoments(
    ...   mean=jnp.array([1.0]), var=jnp.array([4.0]), weight=jnp.ones(1)
    ... )
    >>> optax_ghm.batch_norm_inference(jnp.array([[5.0]]), running, epsilon=0.0)
    Array([[2.]], dtype=float32)
  """
  x = jnp.asarray(x)
  num_domains = 0 if domain is None else len(running.mean)
  pool = _pool.Pool.of(x, axis, domain=domain, num_domains=num_domains)
  scale, bias = _normalize.fit_parameters(pool, x, scale, bias)
  mean, var = _normalize.fit_running(pool, x, running)
  gain = scale * jax.lax.rsqrt(var + epsilon)
  mean, gain, bias = map(pool.broadcast, (mean, gain, bias))
  y = (x.astype(mean.dtype) - mean) * gain + bias
  return _pool.masked(pool.has_group(x.ndim), y).astype(dtype or x.dtype)
