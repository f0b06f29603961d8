r"""The gradient density, and what the estimators of it have in common.

The gradient density at a norm g is the number of examples per unit of norm,

.. math::
  GD(g) = \frac{1}{l_\epsilon(g)} \sum_{k=1}^N \delta_\epsilon(g_k, g),

where δ counts the examples in a region of width ε around g and l is the length
of the part of that region that is a valid norm.

References:
  Li, Liu and Wang, `Gradient Harmonized Single-stage Detector
  <https://arxiv.org/abs/1811.05181>`_, AAAI 2019
"""

import dataclasses
import functools
import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from optax_ghm._core import arrays

MOST_COMPARED = 128  # cells that a GPU compares each example with
COPIES = 32  # of a larger histogram on a GPU: one per thread of a warp


class DensityState(NamedTuple):
  """What a density estimator remembers between batches; all leaves float32.

  Where one state serves several calls in a step (a shared module,
  micro-batches, devices), JAX adds up the next states, and loss scaling scales
  them. The next update divides by ``calls``, which takes part in both.

  Attributes:
    histogram: shape (regions,), the decayed sum of the batches' histograms.
    evidence: shape (), the decayed sum of 1 per batch. The running histogram is
      ``histogram / evidence``, which has no bias towards its start at zero.
    calls: shape (), how many updates this state is the sum of.
    non_finite: shape (), how many examples were left out so far because their
      norm was NaN or infinite. An example counts as its weight here.
    above_range: shape (), how many examples so far had a norm above the range
      of the estimator by more than a region. They count in the last region. A
      number that grows with every step says that the range does not fit the
      norms, or that ``reduction`` does not fit the loss.
  """

  histogram: jax.Array
  evidence: jax.Array
  calls: jax.Array
  non_finite: jax.Array
  above_range: jax.Array


class RegionDensity(NamedTuple):
  """The gradient density of a batch, region by region.

  Attributes:
    region: int32, the shape of the norms: the region of each example, -1 for
      an example that is left out.
    norm: float32 of shape (regions,), the norm that each region stands for.
    count: float32 of shape (regions,), the examples in each region. Their sum
      is N, and the harmony weights average to 1 over them.
    density: float32 of shape (regions,), GD: examples per unit of norm.
  """

  region: jax.Array
  norm: jax.Array
  count: jax.Array
  density: jax.Array

  def at_examples(self, values: jax.Array) -> jax.Array:
    """The value of each example's region; 0 for examples left out."""
    value = lookup(values, jnp.maximum(self.region, 0))
    return jnp.where(self.region >= 0, value, 0.0)


@runtime_checkable
class DensityEstimator(Protocol):
  """An estimator of the gradient density.

  Estimators are frozen dataclasses: jitted functions close over them, and none
  of their numbers is traced.
  """

  @property
  def high(self) -> float:
    """The largest norm."""
    ...

  def init(self) -> DensityState:
    """The state before the first batch."""
    ...

  def update(
    self,
    norms: jax.Array,
    state: DensityState,
    amounts: jax.Array | None = None,
    axis_name: arrays.AxisName = None,
    train: bool = True,
  ) -> tuple[RegionDensity, DensityState]:
    """The gradient density of a batch, and the next state.

    Args:
      norms: gradient norms, float32 of any shape.
      state: from :meth:`init` or the last update.
      amounts: as how many examples each example counts, bool or float32 of the
        shape of ``norms``; None is 1 for each. False and 0 leave it out.
      axis_name: mapped axis, or axes, over which the batch is split.
      train: False gives the density of the batches before, and leaves the
        state as it is.

    Returns:
      The density and the next state.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Histogram:
  """A density from a histogram: one scatter-add, and one all-reduce of it."""

  low: float = 0.0
  high: float = 1.0
  log: bool = False
  momentum: float = 0.0

  def __post_init__(self) -> None:
    check_bounds(self.low, self.high)
    if self.log and self.low <= 0:
      raise ValueError(f'low must be above 0 if log, got {self.low}.')
    if not 0 <= self.momentum < 1:
      raise ValueError(f'momentum must be in [0, 1), got {self.momentum}.')

  @property
  def _regions(self) -> int:
    """The number of regions."""
    raise NotImplementedError

  def _density(self, count: jax.Array) -> jax.Array:
    """Examples per unit of norm (per decade if ``log``) in every region."""
    raise NotImplementedError

  @property
  def _length(self) -> float:
    """The length of the range, in norm or in decades."""
    if self.log:
      return math.log10(self.high) - math.log10(self.low)
    return self.high - self.low

  @property
  def _norms(self) -> jax.Array:
    """The center of every region."""
    share = (np.arange(self._regions) + 0.5) / self._regions
    if self.log:
      centers = self.low * 10 ** (self._length * share)
    else:
      centers = self.low + self._length * share
    return jnp.asarray(centers, jnp.float32)

  def init(self) -> DensityState:
    """The state before the first batch: an empty histogram."""
    return initial_state(self._regions)

  def update(
    self,
    norms: jax.Array,
    state: DensityState,
    amounts: jax.Array | None = None,
    axis_name: arrays.AxisName = None,
    train: bool = True,
  ) -> tuple[RegionDensity, DensityState]:
    """The gradient density of a batch, and the next state.

    Args:
      norms: gradient norms, float32 of any shape. Norms outside of
        ``[low, high]`` count in the first or the last region.
      state: from :meth:`init` or the last update.
      amounts: as how many examples each example counts, bool or float32 of the
        shape of ``norms``; None is 1 for each. False and 0 leave it out.
      axis_name: mapped axis, or axes, over which the batch is split.
      train: False gives the density of the batches before, and leaves the
        state as it is. A region without examples then counts as crowded as the
        sparsest of the others.

    Returns:
      The density and the next state.
    """
    last = self._regions - 1
    state = mean_of_calls(state)
    # Behind the regions are four more cells: norms at the end of the range,
    # norms above it, norms that are not finite, and examples left out.
    cell = jnp.clip(self._cell(norms), 0, last + 2)
    cell = jnp.where(jnp.isfinite(norms), cell, last + 3)
    if amounts is not None:
      cell = jnp.where(amounts.astype(bool), cell, last + 4)
    region = jnp.where(cell < last + 3, jnp.minimum(cell, last), -1)
    if not train:
      return RegionDensity(region, self._norms, *self._remembered(state)), state
    cells = arrays.psum(_count(cell, amounts, last + 5), axis_name)
    cells = cells.astype(jnp.float32)
    count = jnp.append(cells[:last], jnp.sum(cells[last : last + 3]))
    state = state._replace(
      above_range=state.above_range + cells[last + 2],
      non_finite=state.non_finite + cells[last + 3],
    )
    density, state = self._learn(count, state)
    return RegionDensity(region, self._norms, count, density), state

  def _cell(self, norms):
    """The region of each norm, an integer; any integer outside of the range."""
    position = jnp.log10(norms) if self.log else norms
    low = math.log10(self.low) if self.log else self.low
    scale = self._regions / self._length
    return ((position - low) * scale).astype(jnp.int32)

  def _learn(self, count, state):
    """The density with this batch in it, and the state; empty batches pass."""
    total = jnp.sum(count)
    keep = jnp.where(total > 0, self.momentum, 1.0)
    histogram = keep * state.histogram + (1 - keep) * count
    # The past of a region that is left decays to numbers so small that N / GD
    # overflows, and 0 examples times infinity would be NaN: then it is empty.
    least = 1e-12 * jnp.sum(histogram)
    state = state._replace(
      histogram=jnp.where(histogram > least, histogram, 0.0),
      evidence=keep * state.evidence + (1 - keep),
    )
    running = state.histogram / nonzero(state.evidence)
    # The density of a batch as large as this one.
    scale = total / nonzero(jnp.sum(running))
    return scale * self._density(running), state

  def _remembered(self, state):
    """Counts and density of the batches before; equal if there were none."""
    running = state.histogram / nonzero(state.evidence)
    count = jnp.where(state.evidence > 0, running, 1.0)
    density = self._density(count)
    seen = density > 0
    least = jnp.min(jnp.where(seen, density, jnp.inf))
    return count, jnp.where(seen, density, least)


def _count(cell, amounts, cells):
  """Histogram; of integers where every example counts as 1.

  A processor adds each example to its cell. A GPU would add those that crowd
  one cell one after the other. With few cells it compares each example with
  each cell, which XLA does without writing anything; with many it adds
  neighbors to different copies of the histogram. At 10 million crowded examples
  that takes 1/24 (35 cells) and 1/7 (4,100 cells) of the time.
  """
  if amounts is None or amounts.dtype == bool:
    amounts = jnp.ones((), jnp.int32)
  parallel = _compare if cells <= MOST_COMPARED else _add_to_copies
  return jax.lax.platform_dependent(
    cell,
    amounts,
    cpu=functools.partial(_add, cells=cells),
    default=functools.partial(parallel, cells=cells),
  )


def _add(cell, amounts, cells):
  replicated = NamedSharding(jax.typeof(cell).sharding.mesh, PartitionSpec())
  zeros = jnp.zeros((cells,), amounts.dtype)
  return zeros.at[cell].add(
    amounts, mode='promise_in_bounds', out_sharding=replicated
  )


def _compare(cell, amounts, cells):
  every = jnp.arange(cells, dtype=cell.dtype).reshape(-1, *[1] * cell.ndim)
  amounts = jnp.broadcast_to(amounts, cell.shape)
  inside = jnp.where(cell[None] == every, amounts[None], 0)
  return jnp.sum(inside, range(1, inside.ndim), dtype=amounts.dtype)


def _add_to_copies(cell, amounts, cells):
  place = 0
  for axis in range(cell.ndim):
    along = jax.lax.broadcasted_iota(
      jnp.int32, cell.shape, axis, out_sharding=jax.typeof(cell).sharding
    )
    place = place + along * (math.prod(cell.shape[axis + 1 :]) % COPIES)
  every = _add(cell + cells * (place % COPIES), amounts, cells * COPIES)
  return every.reshape(COPIES, cells).sum(0, dtype=amounts.dtype)


def lookup(table, index):
  """``table[index]``, laid out over devices as ``index`` is."""
  return table.at[index].get(
    mode='promise_in_bounds', out_sharding=jax.typeof(index).sharding
  )


def initial_state(regions):
  # Every leaf has a buffer of its own, so that the state can be donated.
  return DensityState(
    jnp.zeros((regions,), jnp.float32),
    evidence=jnp.zeros((), jnp.float32),
    calls=jnp.ones((), jnp.float32),
    non_finite=jnp.zeros((), jnp.float32),
    above_range=jnp.zeros((), jnp.float32),
  )


def mean_of_calls(state):
  """The mean of the updates that were added up in this state."""
  return DensityState(
    *(leaf / nonzero(state.calls) for leaf in state)
  )._replace(calls=jnp.ones_like(state.calls))


def nonzero(x):
  return jnp.where(x == 0, 1.0, x)


def check_bounds(low, high):
  if not (math.isfinite(low) and math.isfinite(high) and low < high):
    raise ValueError(f'low must be below high, got {low} and {high}.')


def check_width(width, length):
  if not 0 < width <= length:
    raise ValueError(f'width must be in (0, {length}], got {width}.')


def check_positive_int(name, value):
  if not isinstance(value, int) or value < 1:
    raise ValueError(f'{name} must be a positive int, got {value!r}.')
