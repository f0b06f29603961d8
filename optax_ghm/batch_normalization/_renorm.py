"""Batch renormalisation, and how its limits are opened."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import (
  _moments,
  _normalize,
  _pool,
  _running_moments,
)


def batch_renorm(
  x: jax.Array,
  running: _running_moments.RunningMoments,
  scale: jax.Array | None = None,
  bias: jax.Array | None = None,
  *,
  r_max: ArrayLike = 3.0,
  d_max: ArrayLike = 5.0,
  axis: int | tuple[int, ...] = -1,
  epsilon: float = 1e-5,
  mask: jax.Array | None = None,
  axis_name: arrays.AxisName = None,
  dtype: Any = None,
) -> tuple[jax.Array, _moments.Moments]:
  r"""Batch renormalisation: what training sees is what evaluation will see.

  .. math::
    y_i = \gamma (r\, \hat x_i + d) + \beta, \qquad
    r = \operatorname{clip}_{[1/r_{\max},\, r_{\max}]}
    \frac{\sigma_B}{\sigma}, \quad
    d = \operatorname{clip}_{[-d_{\max},\, d_{\max}]}
    \frac{\mu_B - \mu}{\sigma}

  r and d are constants to the gradient. Within their limits y is that of the
  running averages, so batches may be small or not independent; with r_max = 1
  and d_max = 0 it is :func:`batch_norm`. Start so, and open the limits when the
  averages have settled (:func:`renorm_schedules`).

  Args:
    x: real floating array.
    running: averages so far, from before this batch.
    scale: see :func:`batch_norm`, as are all that are not named here.
    bias: the same.
    r_max: limit of r, at least 1.
    d_max: limit of d, at least 0.
    axis: the same.
    epsilon: the same.
    mask: the same.
    axis_name: the same.
    dtype: the same.

  Returns:
    y and the moments of the batch.

  Raises:
    ValueError: if ``running`` does not fit ``x``, and as :func:`batch_norm`
      does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> running = optax_ghm.RunningMoments.init((1,))
    >>> x = jnp.array([[1.0], [3.0]])
    >>> y, _ = optax_ghm.batch_renorm(x, running, epsilon=0.0)
    >>> y[:, 0]
    Array([1., 3.], dtype=float32)

  References:
    Ioffe, `Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models <https://arxiv.org/abs/1702.03275>`_, 2017
  """
  x = jnp.asarray(x)
  pool = _pool.Pool.of(x, axis, axis_name)
  running_mean, running_var = (
    _normalize.fit_statistics(pool, x, u, n)
    for u, n in ((running.mean, 'running.mean'), (running.var, 'running.var'))
  )
  y, moments = _normalize.normalize(
    pool,
    epsilon,
    dtype or x.dtype,
    x,
    *_normalize.fit_parameters(pool, x, scale, bias),
    _pool.fit_mask(x, mask),
    None,
    _normalize.Renorm(
      running_mean,
      running_var,
      *(jnp.asarray(u, running_mean.dtype) for u in (r_max, d_max)),
    ),
  )
  return y, pool.squeezed(moments)


def renorm_schedules(
  r_max: float = 3.0,
  d_max: float = 5.0,
  *,
  start: int = 5_000,
  r_end: int = 40_000,
  d_end: int = 25_000,
) -> tuple[optax.Schedule, optax.Schedule]:
  """How Ioffe opens the limits of :func:`batch_renorm`, linearly.

  Args:
    r_max: limit of r from step ``r_end`` on; it is 1 up to ``start``.
    d_max: limit of d from step ``d_end`` on; it is 0 up to ``start``.
    start: step until which this is plain batch normalisation.
    r_end: step at which r is open.
    d_end: step at which d is open.

  Returns:
    Schedules of ``r_max`` and ``d_max``.

  Examples:
    >>> import optax_ghm
    >>> r_max, d_max = optax_ghm.renorm_schedules()
    >>> float(r_max(5_000)), float(r_max(40_000)), float(d_max(15_000))
    (1.0, 3.0, 2.5)
  """
  return (
    optax.linear_schedule(1.0, r_max, max(r_end - start, 1), start),
    optax.linear_schedule(0.0, d_max, max(d_end - start, 1), start),
  )
