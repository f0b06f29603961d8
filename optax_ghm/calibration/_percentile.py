"""Percentiles of norms as they come, one step after the other."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, scopes
from optax_ghm.calibration import _clip


class PercentileEstimator(Protocol):
  """How a percentile of the norms so far is estimated."""

  def init(self, shape: tuple[int, ...]) -> Any:
    """The statistics at the start, arrays whose first axes are ``shape``."""

  def judge(
    self, norm: jax.Array, percentile: ArrayLike, memory: Any
  ) -> tuple[jax.Array, jax.Array, Any]:
    """The percentile for this step, what was usual, and the next statistics."""


_NONE_YET = float(np.finfo(np.float32).max)


class PastNorms(NamedTuple):
  """Statistics of :class:`WindowPercentile`.

  Attributes:
    past: the norms of the last good steps, one after the other around the
      window; the largest float32 where there are none yet.
    ranked: the same, from the smallest to the largest.
    recorded: int32, how many good steps there were.
  """

  past: jax.Array
  ranked: jax.Array
  recorded: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowPercentile:
  """The exact percentile of the last norms, this step's among them.

  Linear between neighbours, as ``numpy.percentile``.

  Attributes:
    length: how many norms are kept.

  Examples:
    >>> import optax_ghm
    >>> estimator = optax_ghm.WindowPercentile(length=100)
    >>> tx = optax_ghm.clip_by_percentile(50.0, estimator=estimator)
  """

  length: int = 1000

  def __post_init__(self):
    if self.length < 1:
      raise ValueError(f'length must be at least 1, got {self.length}.')

  def init(self, shape):
    """See :class:`PercentileEstimator`."""
    empty = jnp.full((*shape, self.length), _NONE_YET, jnp.float32)
    return PastNorms(
      past=empty,
      ranked=jnp.copy(empty),
      recorded=jnp.zeros(shape, jnp.int32),
    )

  def judge(self, norm, percentile, memory):
    """See :class:`PercentileEstimator`."""
    following = slide(memory, norm)
    last = jnp.minimum(following.recorded, self.length).astype(jnp.float32) - 1
    rank = jnp.asarray(percentile, jnp.float32) / 100 * last
    low = jnp.floor(rank)
    below = _at(following.ranked, low.astype(jnp.int32))
    above = _at(following.ranked, jnp.ceil(rank).astype(jnp.int32))
    threshold = below + (rank - low) * (above - below)
    newest = jnp.minimum(memory.recorded, self.length) - 1
    largest = _at(memory.ranked, jnp.maximum(newest, 0))
    usual = jnp.where(memory.recorded > 0, largest, jnp.inf)
    return threshold, usual, following


def slide(memory: PastNorms, norm: jax.Array) -> PastNorms:
  """The window one step on: the oldest norm out, this one in.

  The ranking is kept up to date by two shifts, which is far cheaper than to
  sort it anew.
  """
  length = memory.past.shape[-1]
  norm = jnp.expand_dims(norm, -1)
  slots = jnp.arange(length, dtype=jnp.int32)
  slots = slots.reshape((1,) * (norm.ndim - 1) + (-1,))
  slot = jnp.expand_dims(memory.recorded % length, -1)
  oldest = jnp.take_along_axis(memory.past, slot, axis=-1)
  end = jnp.full_like(norm, _NONE_YET)

  ranked = memory.ranked
  out = jnp.sum(ranked < oldest, axis=-1, keepdims=True, dtype=jnp.int32)
  later = jnp.concatenate([ranked[..., 1:], end], axis=-1)
  ranked = jnp.where(slots < out, ranked, later)
  into = jnp.sum(ranked < norm, axis=-1, keepdims=True, dtype=jnp.int32)
  earlier = jnp.concatenate([end, ranked[..., :-1]], axis=-1)
  ranked = jnp.where(
    slots < into, ranked, jnp.where(slots == into, norm, earlier)
  )
  return PastNorms(
    past=jnp.where(slots == slot, norm, memory.past),
    ranked=ranked,
    recorded=jnp.asarray(optax.safe_increment(memory.recorded)),
  )


def _at(ranked, index):
  return jnp.take_along_axis(ranked, jnp.expand_dims(index, -1), -1)[..., 0]


class QuantileEstimate(NamedTuple):
  """Statistics of :class:`GeometricQuantile`.

  Attributes:
    estimate: of the percentile, inf before the first good step.
  """

  estimate: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeometricQuantile:
  r"""A percentile tracked by one number, moved up or down at each step.

  .. math::
    C \leftarrow C \exp\left(-\eta
      (\mathbb 1[\lVert g \rVert \le C] - \gamma)\right)

  which rests where a share γ of the norms is below C. It starts at the first
  norm.

  Attributes:
    learning_rate: η.

  Examples:
    >>> import optax_ghm
    >>> tx = optax_ghm.clip_by_percentile(
    ...   50.0, estimator=optax_ghm.GeometricQuantile()
    ... )

  References:
    Andrew et al., `Differentially Private Learning with Adaptive Clipping
    <https://arxiv.org/abs/1905.03871>`_, 2021
  """

  learning_rate: float = 0.2

  def init(self, shape):
    """See :class:`PercentileEstimator`."""
    return QuantileEstimate(jnp.full(shape, jnp.inf, jnp.float32))

  def judge(self, norm, percentile, memory):
    """See :class:`PercentileEstimator`."""
    threshold = jnp.where(jnp.isinf(memory.estimate), norm, memory.estimate)
    below = (norm <= threshold).astype(jnp.float32)
    share = jnp.asarray(percentile, jnp.float32) / 100
    moved = threshold * jnp.exp(-self.learning_rate * (below - share))
    return threshold, memory.estimate, QuantileEstimate(moved)


DEFAULT_PERCENTILE = WindowPercentile()


def clip_by_percentile(
  percentile: ArrayLike = 10.0,
  *,
  estimator: PercentileEstimator = DEFAULT_PERCENTILE,
  scope: scopes.Scope = 'global',
  axis_name: arrays.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Clips to a percentile of the norms so far: AutoClip.

  .. math::
    g_t \leftarrow g_t \min\left(1,
      \frac{P_p(\lVert g_1 \rVert, \dots, \lVert g_t \rVert)}
      {\lVert g_t \rVert}\right)

  Args:
    percentile: p, from 0 to 100. The paper's 10 clips nine steps of ten.
    estimator: :class:`WindowPercentile`, exact over a window, or
      :class:`GeometricQuantile`, one number.
    scope: see :func:`clip_by_norm`.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`ClipState`. A step with
    NaN or inf becomes 0; like one that is all zero, or beyond 10,000 times what
    is usual, it leaves the statistics as they were.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.clip_by_percentile(50.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for size in (1.0, 2.0, 30.0):
    ...   update, state = tx.update(jnp.array([size]), state)
    >>> print(update, state.threshold)
    [2.] 2.0

  References:
    Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source
    Separation Networks <https://arxiv.org/abs/2007.14469>`_, 2020
  """
  counters.check_range('percentile', percentile, 0, 100)

  def judge(step, statistics):
    threshold, usual, following = estimator.judge(
      step.norm, percentile, statistics
    )
    return _clip.Verdict(threshold, threshold, usual, following)

  return _clip.clip_by_rule(
    judge, estimator.init, scope=scope, axis_name=axis_name
  )
