r"""Gradient density: how crowded a gradient norm is, and what that weighs.

The gradient density at a norm g is the number of examples per unit of norm,

.. math::
  GD(g) = \frac{1}{l_\epsilon(g)} \sum_{k=1}^N \delta_\epsilon(g_k, g),

where δ counts the examples in a region of width ε around g and l is the length
of the part of that region that is a valid norm. The harmony weight of an
example is :math:`\beta = N / GD(g)`: the crowd of easy examples and the crowd
of outliers each come to weigh what a sparse region weighs.

References:
  Li, Liu and Wang, `Gradient Harmonized Single-stage Detector
  <https://arxiv.org/abs/1811.05181>`_, AAAI 2019
"""

import dataclasses
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from optax_ghm._core import arrays, masks


class DensityState(NamedTuple):
  """What a density estimator remembers between batches; all leaves float32.

  The state may ride the backward pass, where cotangents of one state that is
  used several times in a step (a shared module, micro-batches, devices) add up,
  and are scaled by whatever scales gradients. ``calls`` counts them, and the
  next read divides by it.

  Attributes:
    histogram: shape (cells,), the decayed sum of the batches' histograms.
    evidence: shape (), the decayed sum of 1 per batch. The running histogram is
      ``histogram / evidence``: its start at zero leaves no bias.
    calls: shape (), how many updates this state is the sum of.
    non_finite: shape (), how many NaN and infinite norms were left out so far
      (their mean over the calls where there were several).
  """

  histogram: jax.Array
  evidence: jax.Array
  calls: jax.Array
  non_finite: jax.Array


class Crowd(NamedTuple):
  """The density of one batch, region by region.

  Attributes:
    cell: int32, the shape of the norms: the region of each example; two more
      regions than there are hold the non-finite and the masked-out examples.
      None where every example is its own region.
    mass: float32 (cells,), the examples in each region over which the harmony
      weights average to 1.
    density: float32 (cells,), examples per unit of norm; 0 in a region where no
      example can be.
    total: float32 (), the number of examples N that ``density`` counts.
  """

  cell: jax.Array | None
  mass: jax.Array
  density: jax.Array
  total: jax.Array

  def at_examples(self, table: jax.Array) -> jax.Array:
    """Brings a value per region to the examples; 0 for those left out."""
    if self.cell is None:
      return table
    last = table.shape[0] - 1
    # Looked up in bounds, then chosen: twice as fast as a padded table.
    value = lookup(table, jnp.minimum(self.cell, last))
    return jnp.where(self.cell <= last, value, 0.0)


class DensityEstimator(Protocol):
  """What an estimator of the gradient density offers.

  Estimators are frozen dataclasses: hashable, closed over by jitted functions,
  and none of their numbers is traced.
  """

  @property
  def normalize(self) -> bool:
    """Whether harmony weights are scaled to average 1 over the batch."""
    ...

  def init(self) -> DensityState:
    """The state before the first batch."""
    ...

  def observe(
    self,
    norms: jax.Array,
    state: DensityState,
    mask: jax.Array | None = None,
    axis_name: arrays.AxisName = None,
    train: bool = True,
  ) -> tuple[Crowd, DensityState]:
    """The batch's regions and their densities, and the next state."""
    ...

  def update(
    self,
    norms: jax.Array,
    state: DensityState,
    mask: jax.Array | None = None,
    axis_name: arrays.AxisName = None,
  ) -> tuple[jax.Array, DensityState]:
    """The density at every norm, and the next state."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Histogram:
  """A density read off a histogram: one scatter-add, one all-reduce of it."""

  low: float = 0.0
  high: float = 1.0
  log: bool = False
  momentum: float = 0.0
  normalize: bool = True

  def __post_init__(self):
    check_range(self.low, self.high, self.log)
    if not 0 <= self.momentum < 1:
      raise ValueError(f'momentum must be in [0, 1), got {self.momentum}.')

  @property
  def _cells(self) -> int:
    """Number of regions; each family has its own."""
    raise NotImplementedError

  def _density_of(self, histogram: jax.Array) -> jax.Array:
    """Examples per unit of norm (per decade if ``log``) in every region."""
    raise NotImplementedError

  @property
  def _length(self) -> float:
    """Length of the whole range, in norm or in decades."""
    low, high = _coordinate_range(self.low, self.high, self.log)
    return high - low

  def init(self) -> DensityState:
    """The state before the first batch: an empty histogram."""
    return empty_state(self._cells)

  def update(
    self,
    norms: jax.Array,
    state: DensityState,
    mask: jax.Array | None = None,
    axis_name: arrays.AxisName = None,
  ) -> tuple[jax.Array, DensityState]:
    """The density at every norm, and the next state.

    Args:
      norms: non-negative gradient norms, any shape and floating dtype. Norms
        outside of ``[low, high]`` count in the outermost region.
      state: from :meth:`init` or the last update.
      mask: broadcastable to ``norms``: which examples count (bool), or how much
        (float; 0 and below leaves an example out).
      axis_name: mapped axis, or axes, over which the batch is split.

    Returns:
      The density, float32 with the shape of ``norms``, 0 for examples left out,
      and the next state.
    """
    crowd, state = self.observe(norms, state, mask, axis_name)
    return crowd.at_examples(crowd.density), state

  def observe(
    self,
    norms: jax.Array,
    state: DensityState,
    mask: jax.Array | None = None,
    axis_name: arrays.AxisName = None,
    train: bool = True,
  ) -> tuple[Crowd, DensityState]:
    """The batch's regions and their densities, and the next state.

    With ``train=False`` the densities are those of the running histogram, and
    the state comes back as it was; where no example was ever seen, a region
    counts as crowded as the least crowded one that was.
    """
    norms, mask = check_batch(norms, mask)
    check_state(state, self._cells)
    cell = self._cell(norms, mask)
    state = settled(state)
    if not train:
      return self._remembered(cell, state), state
    histogram = arrays.psum(_count(cell, mask, self._cells + 2), axis_name)
    histogram = histogram.astype(jnp.float32)
    mass, non_finite = histogram[:-2], histogram[-2]
    state = state._replace(non_finite=state.non_finite + non_finite)
    return self._learn(cell, mass, state)

  def _learn(self, cell, mass, state):
    """The running density that this batch is part of; empty batches pass."""
    keep = jnp.where(jnp.sum(mass) > 0, self.momentum, 1.0)
    state = state._replace(
      histogram=keep * state.histogram + (1 - keep) * mass,
      evidence=keep * state.evidence + (1 - keep),
    )
    running = state.histogram / nonzero(state.evidence)
    density = self._density_of(running)
    return Crowd(cell, mass, density, jnp.sum(running)), state

  def _remembered(self, cell, state):
    mass = state.histogram / nonzero(state.evidence)
    density = self._density_of(mass)
    least = jnp.min(jnp.where(density > 0, density, jnp.inf))
    # Nothing seen yet: everywhere equally crowded.
    least = jnp.where(jnp.isfinite(least), least, 1.0)
    total = jnp.where(state.evidence > 0, jnp.sum(mass), 1.0)
    return Crowd(cell, mass, jnp.maximum(density, least), total)

  def _cell(self, norms, mask):
    low, _ = _coordinate_range(self.low, self.high, self.log)
    position = (_coordinate(norms, self.log) - low) * (
      self._cells / self._length
    )
    cell = jnp.clip(position.astype(jnp.int32), 0, self._cells - 1)
    cell = jnp.where(jnp.isfinite(norms), cell, self._cells)
    if mask is None:
      return cell
    return jnp.where(masks.counts(mask), cell, self._cells + 1)


def _count(cell, mask, cells):
  """Histogram by scatter-add; integers where examples count as wholes."""
  if mask is None or mask.dtype == bool:
    zeros, amount = jnp.zeros((cells,), jnp.int32), 1
  else:
    zeros = jnp.zeros((cells,), jnp.float32)
    # The non-finite, in the last cell but one, are counted by heads.
    amount = jnp.where(cell < cells - 2, mask, 1.0)
  replicated = NamedSharding(jax.typeof(cell).sharding.mesh, PartitionSpec())
  return zeros.at[cell].add(
    amount, mode='promise_in_bounds', out_sharding=replicated
  )


def lookup(table, cell):
  """``table[cell]``, laid out over devices as ``cell`` is."""
  return table.at[cell].get(
    mode='promise_in_bounds', out_sharding=jax.typeof(cell).sharding
  )


def settled(state):
  """The mean of the updates that were added up in this state."""
  return state._replace(
    **{
      name: getattr(state, name) / nonzero(state.calls)
      for name in ('histogram', 'evidence', 'non_finite')
    },
    calls=jnp.ones_like(state.calls),
  )


def empty_state(cells):
  # Buffers of their own, so that a state can be donated.
  return DensityState(
    histogram=jnp.zeros((cells,), jnp.float32),
    evidence=jnp.zeros((), jnp.float32),
    calls=jnp.ones((), jnp.float32),
    non_finite=jnp.zeros((), jnp.float32),
  )


def nonzero(x):
  return jnp.where(x == 0, 1.0, x)


def _coordinate(norms, log):
  return jnp.log10(norms) if log else norms


def _coordinate_range(low, high, log):
  return (math.log10(low), math.log10(high)) if log else (low, high)


def check_batch(norms, mask):
  norms = jnp.asarray(norms)
  if not jnp.issubdtype(norms.dtype, jnp.floating):
    raise TypeError(f'norms must be real floats, got dtype {norms.dtype}.')
  if jnp.finfo(norms.dtype).bits > 32:  # the largest are not infinite, either
    largest = float(jnp.finfo(jnp.float32).max)
    inside = jnp.clip(norms, -largest, largest)
    norms = jnp.where(jnp.isfinite(norms), inside, norms)
  norms = norms.astype(jnp.float32)
  return norms, None if mask is None else masks.broadcast_mask(
    mask, norms.shape
  )


def check_state(state, cells):
  if not isinstance(state, DensityState) or state.histogram.shape != (cells,):
    raise ValueError(
      f'state must come from init() of the same estimator, with {cells}'
      f' cells; got {jax.tree.map(jnp.shape, state)}.'
    )


def check_range(low, high, log):
  if not (np.isfinite(low) and np.isfinite(high) and low < high):
    raise ValueError(f'low must be below high, got {low} and {high}.')
  if log and low <= 0:
    raise ValueError(f'low must be above 0 if log, got {low}.')


def check_width(width, length):
  if not 0 < width <= length:
    raise ValueError(f'width must be in (0, {length}], got {width}.')


def check_positive_int(name, value):
  if not isinstance(value, int) or value < 1:
    raise ValueError(f'{name} must be a positive int, got {value!r}.')
