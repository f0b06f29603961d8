"""Clipping to a percentile of the norms so far: AutoClip."""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, scopes, stateful
from optax_ghm.calibration import _clip


@runtime_checkable
class PercentileEstimator(Protocol):
  """How ``clip_by_percentile`` estimates a percentile of the norms."""

  def init(self, shape: tuple[int, ...]) -> Any:
    """Returns the first statistics: arrays whose first axes are ``shape``."""

  def update(
    self, norm: jax.Array, percentile: ArrayLike, statistics: Any
  ) -> tuple[jax.Array, jax.Array, Any]:
    """Takes in the norms of one step.

    Args:
      norm: float32, the norms.
      percentile: from 0 to 100.
      statistics: what is known of earlier norms.

    Returns:
      The percentile for this step; a reference norm to recognize outliers by,
      inf or the largest float32 while none is known; and the next statistics.
    """


class PastNorms(NamedTuple):
  """Statistics of :class:`~optax_ghm.WindowPercentile`.

  Attributes:
    past: norms of the last good steps, the newest in the place of the oldest;
      the largest float32 in places that are still empty.
    ranked: the norms of ``past``, from the smallest to the largest.
    recorded: int32, number of good steps.
  """

  past: jax.Array
  ranked: jax.Array
  recorded: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowPercentile:
  """The exact percentile of the last norms, with that of the current step.

  It interpolates linearly between neighbors, as ``numpy.percentile`` does.

  Attributes:
    length: number of norms to keep.

  Raises:
    ValueError: if ``length`` is less than 1.

  Examples:
    >>> import optax_ghm
    >>> estimator = optax_ghm.WindowPercentile(length=100)
    >>> tx = optax_ghm.clip_by_percentile(50.0, estimator=estimator)
  """

  length: int = 1000

  def __post_init__(self) -> None:
    if self.length < 1:
      raise ValueError(f'length must be at least 1, got {self.length}.')

  def init(self, shape: tuple[int, ...]) -> PastNorms:
    """Returns an empty window; see ``PercentileEstimator``."""
    empty = jnp.full((*shape, self.length), arrays.LARGEST, jnp.float32)
    return PastNorms(empty, jnp.copy(empty), jnp.zeros(shape, jnp.int32))

  def update(
    self, norm: jax.Array, percentile: ArrayLike, statistics: PastNorms
  ) -> tuple[jax.Array, jax.Array, PastNorms]:
    """Returns the percentile; see ``PercentileEstimator``."""
    new = _slide(statistics, norm)
    last = jnp.minimum(new.recorded, self.length).astype(jnp.float32) - 1
    rank = jnp.asarray(percentile, jnp.float32) / 100 * last
    low = jnp.floor(rank)
    below = _at(new.ranked, low.astype(jnp.int32))
    above = _at(new.ranked, jnp.ceil(rank).astype(jnp.int32))
    known = jnp.minimum(statistics.recorded, self.length)
    largest = _at(statistics.ranked, jnp.maximum(known - 1, 0))
    return below + (rank - low) * (above - below), largest, new


def _slide(statistics, norm):
  """Takes the oldest norm out of the window, and the new one in.

  Two shifts keep the ranking: one over the oldest norm, and one that makes
  room for the new norm. They are far cheaper than a sort.
  """
  past, ranked, recorded = statistics
  norm = jnp.expand_dims(norm, -1)
  slots = jnp.arange(past.shape[-1], dtype=jnp.int32)
  slots = slots.reshape((1,) * (norm.ndim - 1) + (-1,))
  slot = jnp.expand_dims(recorded % past.shape[-1], -1)
  oldest = jnp.take_along_axis(past, slot, axis=-1)
  empty = jnp.full_like(norm, arrays.LARGEST)

  out = jnp.sum(ranked < oldest, axis=-1, keepdims=True, dtype=jnp.int32)
  shifted = jnp.concatenate([ranked[..., 1:], empty], axis=-1)
  ranked = jnp.where(slots < out, ranked, shifted)

  into = jnp.sum(ranked < norm, axis=-1, keepdims=True, dtype=jnp.int32)
  shifted = jnp.concatenate([empty, ranked[..., :-1]], axis=-1)
  shifted = jnp.where(slots == into, norm, shifted)
  ranked = jnp.where(slots < into, ranked, shifted)
  return PastNorms(
    past=jnp.where(slots == slot, norm, past),
    ranked=ranked,
    recorded=counters.count_if(True, recorded),
  )


def _at(ranked, index):
  return jnp.take_along_axis(ranked, jnp.expand_dims(index, -1), -1)[..., 0]


class QuantileEstimate(NamedTuple):
  """Statistics of :class:`~optax_ghm.GeometricQuantile`.

  Attributes:
    estimate: estimate of the percentile; inf before the first good step.
  """

  estimate: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeometricQuantile:
  r"""A percentile tracked by one number, moved up or down at each step.

  .. math::
    C \leftarrow C \exp\left(-\eta
      (\mathbb 1[\lVert g \rVert \le C] - \gamma)\right)

  On average C stays where a fraction γ of the norms is below it. It starts at
  the first norm.

  Attributes:
    learning_rate: η, the step size.

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

  def init(self, shape: tuple[int, ...]) -> QuantileEstimate:
    """Returns no estimate yet; see ``PercentileEstimator``."""
    return QuantileEstimate(jnp.full(shape, jnp.inf, jnp.float32))

  def update(
    self, norm: jax.Array, percentile: ArrayLike, statistics: QuantileEstimate
  ) -> tuple[jax.Array, jax.Array, QuantileEstimate]:
    """Returns the estimate; see ``PercentileEstimator``."""
    estimate = statistics.estimate
    threshold = jnp.where(jnp.isinf(estimate), norm, estimate)
    below = (norm <= threshold).astype(jnp.float32)
    fraction = jnp.asarray(percentile, jnp.float32) / 100
    moved = threshold * jnp.exp(-self.learning_rate * (below - fraction))
    return threshold, estimate, QuantileEstimate(moved)


DEFAULT_PERCENTILE = WindowPercentile()


def clip_by_percentile(
  percentile: ArrayLike = 10.0,
  *,
  estimator: PercentileEstimator = DEFAULT_PERCENTILE,
  scope: scopes.Scope = 'global',
  axis_name: arrays.AxisName = None,
) -> stateful.StatefulTransformation[_clip.ClipState]:
  r"""Clips to a percentile of the norms so far: AutoClip.

  .. math::
    g_t \leftarrow g_t \min\left(1,
      \frac{P_p(\lVert g_1 \rVert, \dots, \lVert g_t \rVert)}
      {\lVert g_t \rVert}\right)

  Args:
    percentile: p, from 0 to 100. The paper's 10 clips nine steps of ten.
    estimator: how the percentile is estimated: :class:`WindowPercentile` is
      exact over a window, :class:`GeometricQuantile` keeps one number.
    scope: what is clipped together; see :func:`clip_by_norm`.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`~optax_ghm.calibration.ClipState`. A step with NaN or inf becomes 0.
    It leaves the statistics as they were, as does a step that is all zero, or
    whose norm is more than 10,000 times the largest of the window (or the
    estimate).

  Raises:
    TypeError: if ``estimator`` is no estimator.
    ValueError: if ``percentile`` is not from 0 to 100.

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
  counters.check_type('estimator', estimator, PercentileEstimator)

  def rule(step, statistics):
    threshold, reference, new = estimator.update(
      step.norm, percentile, statistics
    )
    return _clip.Limit(threshold, new, reference_norm=reference)

  return _clip.clip_by_rule(
    rule, estimator.init, scope=scope, axis_name=axis_name
  )
