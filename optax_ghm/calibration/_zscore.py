"""Clips whose limits follow what the norms have been doing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, scopes
from optax_ghm.calibration import _clip


class NormMoments(NamedTuple):
  """Statistics of :func:`clip_by_zscore`.

  Attributes:
    mean: of the norms, 0 before the first good step.
    deviation: of the norms, σ and not its square, which float32 could not hold.
    recorded: int32, how many good steps there were.
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
) -> optax.GradientTransformationExtraArgs:
  r"""Clips norms that stand out from their running mean: ZClip.

  .. math::
    z = \frac{\lVert g \rVert - \mu}{\sigma}, \qquad
    \lVert g \rVert \leftarrow \mu + \frac{z_\theta^2}{z} \sigma
    \quad \text{where } z > z_\theta

  and the norm so clipped goes into the moving averages
  :math:`\mu \leftarrow \alpha \mu + (1 - \alpha) \lVert g \rVert`,
  :math:`\sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha)
  (\lVert g \rVert - \mu)^2`. The further out a norm is, the closer to the mean
  it is brought. In the first steps nothing is clipped; their mean and variance
  start the averages.

  What is clipped enters the averages as clipped, so that a lasting rise of the
  norms, of three times or more, is clipped for as long as it lasts: this is the
  paper's rule. Where that may happen, take :func:`clip_by_percentile` with a
  percentile of 50.

  Args:
    z_threshold: :math:`z_\theta`.
    decay: α.
    warmup_steps: how many steps the averages are started with, one at least;
      with two or more there is a deviation to begin with.
    scope: see :func:`clip_by_norm`.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`ClipState`; bad steps
    are as for :func:`clip_by_percentile`.

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
  counters.check_range('decay', decay, 0, 1)

  def init(shape):
    zero = jnp.zeros(shape, jnp.float32)
    return NormMoments(zero, jnp.copy(zero), jnp.zeros(shape, jnp.int32))

  def judge(step, statistics):
    norm = step.norm
    mean, deviation, recorded = statistics
    count = recorded.astype(jnp.float32)
    warm = count < jnp.maximum(jnp.asarray(warmup_steps, jnp.float32), 1)
    # Equal norms differ by rounding: that is no deviation.
    spread = jnp.maximum(deviation, 1e-6 * mean)
    reach = jnp.asarray(z_threshold, jnp.float32) * spread
    threshold = mean + reach
    above = jnp.where(norm > threshold, norm - mean, 1)
    target = mean + reach * (reach / above)
    threshold = jnp.where(warm, jnp.inf, threshold)
    seen = jnp.where(norm > threshold, target, norm)

    alpha = jnp.asarray(decay, jnp.float32)
    share = jnp.where(warm, 1 / (count + 1), 1 - alpha)
    next_mean = mean + share * (seen - mean)
    # The first steps by Welford's rule, whose product of the distances to the
    # old mean and to the new one keeps the plain variance.
    to_new = jnp.abs(seen - next_mean)
    distance = jnp.where(warm, jnp.abs(seen - mean), to_new)
    moved = jnp.sqrt(distance) * jnp.sqrt(to_new)
    # Not 0: the hypotenuse of two zeros is NaN on the way, in some of JAX.
    moved = jnp.maximum(jnp.sqrt(share) * moved, jnp.finfo(jnp.float32).tiny)
    following = NormMoments(
      next_mean,
      jnp.hypot(jnp.sqrt(1 - share) * deviation, moved),
      counters.count_if(True, recorded),
    )
    usual = jnp.where(recorded > 0, mean, jnp.inf)
    return _clip.Verdict(threshold, target, usual, following)

  return _clip.clip_by_rule(judge, init, scope=scope, axis_name=axis_name)
