"""Clipping norms that stand out from their running mean: ZClip."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, scopes, stateful
from optax_ghm.calibration import _clip


class NormMoments(NamedTuple):
  """Statistics of :func:`~optax_ghm.clip_by_zscore`.

  Attributes:
    mean: μ, the mean of the norms; 0 before the first good step.
    deviation: σ, their standard deviation; float32 could not hold its square.
    recorded: int32, number of good steps.
  """

  mean: jax.Array
  deviation: jax.Array
  recorded: jax.Array


def clip_by_zscore(
  z_threshold: ArrayLike = 2.5,
  *,
  decay: ArrayLike = 0.97,
  warmup_steps: ArrayLike = 25,
  scope: scopes.Scope = 'global',
  axis_name: arrays.AxisName = None,
) -> stateful.StatefulTransformation[_clip.ClipState]:
  r"""Clips norms that stand out from their running mean: ZClip.

  .. math::
    z = \frac{\lVert g \rVert - \mu}{\sigma}, \qquad
    \lVert g \rVert \leftarrow \mu + \frac{z_\theta^2}{z} \sigma
    \quad \text{where } z > z_\theta

  The further out a norm is, the closer to the mean it is clipped. The clipped
  norm then enters the moving averages
  :math:`\mu \leftarrow \alpha \mu + (1 - \alpha) \lVert g \rVert` and
  :math:`\sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha)
  (\lVert g \rVert - \mu)^2`. The first steps are not clipped; their mean and
  variance start the averages.

  Since the averages see clipped norms, a lasting rise of the norms to three
  times their level, or more, is clipped for as long as it lasts. This is the
  paper's rule. Where norms may rise like that, use :func:`clip_by_percentile`
  with a percentile of 50.

  Args:
    z_threshold: :math:`z_\theta`, the largest z-score that is not clipped.
    decay: α, the decay rate of the moving averages, from 0 to 1.
    warmup_steps: number of first steps, at least 1; there is a deviation to
      compare with from 2 on.
    scope: what is clipped together; see :func:`clip_by_norm`.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`~optax_ghm.calibration.ClipState`. A step with NaN or inf becomes 0.
    It leaves the statistics as they were, as does a step that is all zero, or
    whose norm is more than 10,000 times the mean.

  Raises:
    ValueError: if ``decay`` is not from 0 to 1, or ``z_threshold`` or
      ``warmup_steps`` is negative.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.clip_by_zscore(warmup_steps=2)
    >>> state = tx.init(jnp.zeros(1))
    >>> for size in (1.0, 3.0, 100.0):
    ...   update, state = tx.update(jnp.array([size]), state)
    >>> print(update, state.threshold)  # 2 + 2.5² / 98
    [2.0637755] 4.5

  References:
    Kumar et al., `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
    <https://arxiv.org/abs/2504.02507>`_, 2025
  """
  counters.check_range('z_threshold', z_threshold, 0, np.inf)
  counters.check_range('decay', decay, 0, 1)
  counters.check_range('warmup_steps', warmup_steps, 0, np.inf)

  def init(shape):
    mean, deviation = jnp.zeros((2, *shape), jnp.float32)
    return NormMoments(mean, deviation, jnp.zeros(shape, jnp.int32))

  def rule(step, statistics):
    norm = step.norm
    mean, deviation, recorded = statistics
    count = recorded.astype(jnp.float32)
    warm = count < jnp.maximum(jnp.asarray(warmup_steps, jnp.float32), 1)
    # Equal norms differ by rounding, which is no deviation.
    reach = jnp.asarray(z_threshold, jnp.float32)
    reach *= jnp.maximum(deviation, 1e-6 * mean)
    threshold = mean + reach
    above = jnp.where(norm > threshold, norm - mean, 1)
    target = mean + reach * (reach / above)
    threshold = jnp.where(warm, jnp.inf, threshold)
    clipped = jnp.where(norm > threshold, target, norm)

    alpha = jnp.asarray(decay, jnp.float32)
    weight = jnp.where(warm, 1 / (count + 1), 1 - alpha)
    next_mean = mean + weight * (clipped - mean)
    # In the first steps, Welford's rule: the product of the distances to the
    # old and to the new mean makes the variance that of these steps.
    to_new = jnp.abs(clipped - next_mean)
    distance = jnp.where(warm, jnp.abs(clipped - mean), to_new)
    moved = jnp.sqrt(weight) * (jnp.sqrt(distance) * jnp.sqrt(to_new))
    # Not 0: some versions of JAX divide 0 by 0 in the hypotenuse of two zeros.
    moved = jnp.maximum(moved, jnp.finfo(jnp.float32).tiny)
    next_deviation = jnp.hypot(jnp.sqrt(1 - weight) * deviation, moved)
    return _clip.Limit(
      threshold,
      NormMoments(next_mean, next_deviation, counters.count_if(True, recorded)),
      target,
      jnp.where(recorded > 0, mean, jnp.inf),
    )

  return _clip.clip_by_rule(rule, init, scope=scope, axis_name=axis_name)
