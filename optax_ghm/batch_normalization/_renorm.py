"""Batch renormalization, and schedules for its limits."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters
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
  r"""Normalizes a batch as evaluation will, within limits.

  .. math::
    y_i = \gamma (r\, \hat x_i + d) + \beta, \qquad
    r = \operatorname{clip}_{[1/r_{\max},\, r_{\max}]}
    \frac{\sigma_B}{\sigma}, \quad
    d = \operatorname{clip}_{[-d_{\max},\, d_{\max}]}
    \frac{\mu_B - \mu}{\sigma}

  r and d are constants to the gradient. Within their limits y is what
  :func:`batch_norm_inference` returns for the running averages, so that batches
  may be small or dependent. With r_max = 1 and d_max = 0 this is
  :func:`batch_norm`. Begin with these limits, and widen them once the averages
  have settled (:func:`renorm_schedules`).

  Args:
    x: real floating array.
    running: μ and σ², the averages before this batch.
    scale: γ, shaped like the features; None is 1.
    bias: β, shaped like the features; None is 0.
    r_max: limit of r, at least 1.
    d_max: limit of d, at least 0.
    axis: the feature axes; all others are normalized over.
    epsilon: added to the variances.
    mask: bool, broadcastable to ``x``: which elements count.
    axis_name: mapped axes over which the batch is split.
    dtype: of the result; None is that of ``x``.

  Returns:
    y, shaped like ``x``, and the moments of the batch, through which no
    gradient flows.

  Raises:
    TypeError: if ``x`` is not real and floating, or ``mask`` not bool.
    ValueError: if an argument does not fit ``x``, or a limit is out of range.

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
  check_limits(r_max, d_max)
  x = jnp.asarray(x)
  pool = _pool.Pool.of(x, axis, axis_name, mask)
  mean, var = _normalize.fit_running(pool, x, running)
  limits = (jnp.asarray(u, mean.dtype) for u in (r_max, d_max))
  renorm = _normalize.Renorm(mean, var, *limits)
  return _normalize.by_batch(pool, x, scale, bias, epsilon, dtype, renorm)


def check_limits(r_max: Any, d_max: Any) -> None:
  """Raises a ``ValueError`` if a limit is a number out of its range."""
  counters.check_range('r_max', r_max, 1, math.inf)
  counters.check_range('d_max', d_max, 0, math.inf)


def renorm_schedules(
  r_max: float = 3.0,
  d_max: float = 5.0,
  *,
  start: int = 5_000,
  r_end: int = 40_000,
  d_end: int = 25_000,
) -> tuple[optax.Schedule, optax.Schedule]:
  """Schedules that widen the limits of :func:`batch_renorm` as Ioffe does.

  Args:
    r_max: limit of r from step ``r_end`` on.
    d_max: limit of d from step ``d_end`` on.
    start: the step up to which the limits are 1 and 0, as in plain batch
      normalization; from then on they grow linearly.
    r_end: the step at which the limit of r is ``r_max``.
    d_end: the step at which the limit of d is ``d_max``.

  Returns:
    Schedules of ``r_max`` and ``d_max``.

  Raises:
    ValueError: if a limit is out of range, or a step is negative.

  Examples:
    >>> import optax_ghm
    >>> r_max, d_max = optax_ghm.renorm_schedules()
    >>> float(r_max(5_000)), float(r_max(40_000)), float(d_max(15_000))
    (1.0, 3.0, 2.5)
  """
  check_limits(r_max, d_max)
  for name, step in (('start', start), ('r_end', r_end), ('d_end', d_end)):
    counters.check_range(name, step, 0, math.inf)
  return (
    optax.linear_schedule(1.0, r_max, max(r_end - start, 1), start),
    optax.linear_schedule(0.0, d_max, max(d_end - start, 1), start),
  )
