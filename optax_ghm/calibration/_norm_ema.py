"""Clipping to a multiple of the average clipped norm: AdaGC."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, scopes
from optax_ghm.calibration import _clip


class NormAverage(NamedTuple):
  """Statistics of :func:`clip_by_norm_ema`.

  Attributes:
    average: γ, of the clipped norms; inf before the first good step.
    recorded: int32, how many good steps there were.
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
) -> optax.GradientTransformationExtraArgs:
  r"""Clips every leaf to a multiple of its average clipped norm: AdaGC.

  .. math::
    \hat g_t = g_t \min\left(1,
      \frac{\lambda \gamma_{t - 1}}{\lVert g_t \rVert}\right), \qquad
    \gamma_t = \beta \gamma_{t - 1} + (1 - \beta) \lVert \hat g_t \rVert

  In the first steps the whole tree is clipped to one norm,
  :math:`\hat g_t = g_t \min(1, c / \lVert g_t \rVert_{\text{global}})`, and γ
  is the smallest clipped norm so far.

  Args:
    ratio: λ.
    decay: β.
    max_norm: c, in the first steps.
    warmup_steps: how many steps those are.
    scope: see :func:`clip_by_norm`; the paper's is ``'leaf'``.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`ClipState`; bad steps
    are as for :func:`clip_by_percentile`.

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
  counters.check_range('decay', decay, 0, 1)

  def init(shape):
    return NormAverage(
      jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
    )

  def judge(step, statistics):
    norm, total = step.norm, step.total
    average, recorded = statistics
    warm = recorded.astype(jnp.float32) < jnp.asarray(warmup_steps, jnp.float32)
    limit = jnp.asarray(max_norm, jnp.float32) / jnp.where(total > 0, total, 1)
    threshold = jnp.where(
      warm,
      norm * jnp.minimum(limit, 1),
      jnp.asarray(ratio, jnp.float32) * average,
    )
    seen = jnp.minimum(norm, threshold)
    beta = jnp.asarray(decay, jnp.float32)
    following = jnp.where(
      warm, jnp.minimum(average, seen), beta * average + (1 - beta) * seen
    )
    # The least of a few norms is not what is usual.
    usual = jnp.where(
      warm,
      jnp.maximum(average, jnp.asarray(max_norm, jnp.float32)),
      average,
    )
    recorded = counters.count_if(True, recorded)
    return _clip.Verdict(
      threshold, threshold, usual, NormAverage(following, recorded)
    )

  return _clip.clip_by_rule(judge, init, scope=scope, axis_name=axis_name)
