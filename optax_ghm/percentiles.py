"""Percentiles of norms as they come, one step after the other."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


class PercentileEstimator(Protocol):
  """How a percentile of the norms so far is estimated."""

  def init(self, shape: tuple[int, ...]) -> Any:
    """The statistics at the start, arrays whose first axes are ``shape``."""

  def judge(
    self, norm: jax.Array, percentile: ArrayLike, memory: Any
  ) -> tuple[jax.Array, jax.Array, Any]:
    """The percentile for this step, what was usual, and the next statistics."""


class PastNorms(NamedTuple):
  """Statistics of :class:`WindowPercentile`.

  Attributes:
    past: the norms of the last good steps, 0 where there are none yet.
    recorded: int32, how many good steps there were.
  """

  past: jax.Array
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
    return PastNorms(
      past=jnp.zeros((*shape, self.length), jnp.float32),
      recorded=jnp.zeros(shape, jnp.int32),
    )

  def judge(self, norm, percentile, memory):
    """See :class:`PercentileEstimator`."""
    slots = jnp.arange(self.length, dtype=jnp.int32)
    slots = slots.reshape((1,) * norm.ndim + (-1,))
    here = slots == jnp.expand_dims(memory.recorded % self.length, -1)
    past = jnp.where(here, jnp.expand_dims(norm, -1), memory.past)
    recorded = jnp.asarray(optax.safe_increment(memory.recorded))
    kept = slots < jnp.expand_dims(recorded, -1)
    ranked = jnp.sort(jnp.where(kept, past, jnp.inf), axis=-1)
    last = jnp.minimum(recorded, self.length).astype(jnp.float32) - 1
    rank = jnp.asarray(percentile, jnp.float32) / 100 * last
    low = jnp.floor(rank)
    below, above = (
      jnp.take_along_axis(
        ranked, jnp.expand_dims(i.astype(jnp.int32), -1), axis=-1
      )[..., 0]
      for i in (low, jnp.ceil(rank))
    )
    threshold = below + (rank - low) * (above - below)
    largest = jnp.max(memory.past, axis=-1)
    usual = jnp.where(memory.recorded > 0, largest, jnp.inf)
    return threshold, usual, PastNorms(past, recorded)


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
