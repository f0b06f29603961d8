"""Clipping to a multiple of the average clipped norm: AdaGC."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, scopes, stateful
from optax_ghm.calibration import _clip


class NormAverage(NamedTuple):
  """Statistics of :func:`~optax_ghm.clip_by_norm_ema`.

  Attributes:
    average: γ, the average of the clipped norms; inf before the first good
      step.
    recorded: int32, number of good steps.
  """

  average: jax.Array
  recorded: jax.Array


def clip_by_norm_ema(
  ratio: ArrayLike = 1.05,
  *,
  decay: ArrayLike = 0.98,
  max_norm: ArrayLike = 1.0,
  warmup_steps: ArrayLike = 100,
  scope: scopes.Scope = 'leaf',
  axis_name: arrays.AxisName = None,
) -> stateful.StatefulTransformation[_clip.ClipState]:
  r"""Clips every leaf to a multiple of its average clipped norm: AdaGC.

  .. math::
    \hat g_t = g_t \min\left(1,
      \frac{\lambda \gamma_{t - 1}}{\lVert g_t \rVert}\right), \qquad
    \gamma_t = \beta \gamma_{t - 1} + (1 - \beta) \lVert \hat g_t \rVert

  In the first steps the whole tree is clipped to one norm,
  :math:`\hat g_t = g_t \min(1, c / \lVert g_t \rVert_{\text{global}})`, and γ
  is the smallest clipped norm so far.

  The authors' program of 2026 has the same rule, with a ratio of 1.04 and a
  decay of 0.99. There a leaf whose gradient is all 0 once in the first steps
  has a γ of 0, and never moves; here such a step does not count.

  Args:
    ratio: λ, the largest ratio of a norm to its average that is not clipped.
    decay: β, the decay rate of the average, from 0 to 1.
    max_norm: c, the largest norm of the whole tree in the first steps.
    warmup_steps: number of first steps.
    scope: what is clipped together; see :func:`clip_by_norm`. The paper clips
      every ``'leaf'``.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`~optax_ghm.calibration.ClipState`. A step with NaN or inf becomes 0.
    It leaves the statistics as they were, as does a step that is all zero, or
    whose norm is more than 10,000 times the average.

  Raises:
    ValueError: if ``decay`` is not from 0 to 1, or another number is negative.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.clip_by_norm_ema(warmup_steps=1, max_norm=10.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for size in (1.0, 1.04, 100.0):
    ...   update, state = tx.update(jnp.array([size]), state)
    >>> print(update)  # 1.05 (0.98 + 0.02 * 1.04)
    [1.05084]

  References:
    Wang et al., `AdaGC: Improving Training Stability for Large Language Model
    Pretraining <https://arxiv.org/abs/2502.11034>`_, 2025
  """
  counters.check_range('ratio', ratio, 0, np.inf)
  counters.check_range('decay', decay, 0, 1)
  counters.check_range('max_norm', max_norm, 0, np.inf)
  counters.check_range('warmup_steps', warmup_steps, 0, np.inf)

  def init(shape):
    return NormAverage(
      jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
    )

  def rule(step, statistics):
    norm, total = step.norm, step.total
    average, recorded = statistics
    warm = recorded.astype(jnp.float32) < jnp.asarray(warmup_steps, jnp.float32)
    first = jnp.asarray(max_norm, jnp.float32)
    threshold = jnp.where(
      warm,
      norm * jnp.minimum(first / jnp.where(total > 0, total, 1), 1),
      jnp.asarray(ratio, jnp.float32) * average,
    )
    clipped = jnp.minimum(norm, threshold)
    beta = jnp.asarray(decay, jnp.float32)
    next_average = jnp.where(
      warm,
      jnp.minimum(average, clipped),
      beta * average + (1 - beta) * clipped,
    )
    # The least of a few norms says little about what is too large.
    reference = jnp.where(warm, jnp.maximum(average, first), average)
    return _clip.Limit(
      threshold,
      NormAverage(next_average, counters.count_if(True, recorded)),
      reference_norm=reference,
    )

  return _clip.clip_by_rule(rule, init, scope=scope, axis_name=axis_name)
