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
import functools
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from optax_ghm import norms as _norms


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
    value = _lookup(table, jnp.minimum(self.cell, last))
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
    axis_name: _norms.AxisName = None,
    train: bool = True,
  ) -> tuple[Crowd, DensityState]:
    """The batch's regions and their densities, and the next state."""
    ...

  def update(
    self,
    norms: jax.Array,
    state: DensityState,
    mask: jax.Array | None = None,
    axis_name: _norms.AxisName = None,
  ) -> tuple[jax.Array, DensityState]:
    """The density at every norm, and the next state."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Histogram:
  """A density read off a histogram: one scatter-add, one all-reduce of it."""

  low: float = 0.0
  high: float = 1.0
  log: bool = False
  momentum: float = 0.0
  normalize: bool = True

  def __post_init__(self):
    _check_range(self.low, self.high, self.log)
    if not 0 <= self.momentum < 1:
      raise ValueError(f'momentum must be in [0, 1), got {self.momentum}.')

  @property
  def _cells(self) -> int:
    """Number of regions; each family has its own."""
    raise NotImplementedError

  def _density(self, histogram: jax.Array) -> jax.Array:
    """Examples per unit of norm (per decade if ``log``) in every region."""
    raise NotImplementedError

  @property
  def _length(self) -> float:
    """Length of the whole range, in norm or in decades."""
    low, high = _coordinate_range(self.low, self.high, self.log)
    return high - low

  def init(self) -> DensityState:
    """The state before the first batch: an empty histogram."""
    return _empty_state(self._cells)

  def update(
    self,
    norms: jax.Array,
    state: DensityState,
    mask: jax.Array | None = None,
    axis_name: _norms.AxisName = None,
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
    axis_name: _norms.AxisName = None,
    train: bool = True,
  ) -> tuple[Crowd, DensityState]:
    """The batch's regions and their densities, and the next state.

    With ``train=False`` the densities are those of the running histogram, and
    the state comes back as it was; where no example was ever seen, a region
    counts as crowded as the least crowded one that was.
    """
    norms, mask = _check_batch(norms, mask)
    _check_state(state, self._cells)
    cell = self._cell(norms, mask)
    state = _settled(state)
    if not train:
      return self._remembered(cell, state), state
    histogram = _count(cell, mask, self._cells + 2)
    if axis_name is not None:
      histogram = lax.psum(histogram, axis_name)
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
    running = state.histogram / _nonzero(state.evidence)
    density = self._density(running)
    return Crowd(cell, mass, density, jnp.sum(running)), state

  def _remembered(self, cell, state):
    mass = state.histogram / _nonzero(state.evidence)
    density = self._density(mass)
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
    return jnp.where(counts(mask), cell, self._cells + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinnedDensity(_Histogram):
  r"""Unit-region density: the count of the bin that a norm falls in.

  .. math::
    GD(g) = \frac{\bar R_{ind(g)}}{\epsilon}, \qquad
    \bar R_j = \frac{\sum_s m^{t-s} R_j^{(s)}}{\sum_s m^{t-s}}

  with :math:`R_j` the number of examples in bin j, ε the width of a bin and m
  the momentum of the moving average over batches. It is the approximation of
  the paper, with a moving average that is unbiased from the first batch on and
  decays in every bin. One example that crosses the edge into an empty bin
  changes the weight of all others at once; :class:`WindowedDensity` has no
  edges.

  Attributes:
    low: smallest norm of the range.
    high: largest norm of the range; norms outside count in the outermost bin.
    log: whether bins have equal width in log10(norm), for norms without a known
      bound; the density is then per decade.
    momentum: of the moving average over batches, in [0, 1); 0 forgets.
    normalize: whether harmony weights are scaled to average 1 over the batch;
      False gives the paper's raw weights.
    bins: number of bins M, at least 1.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> density = optax_ghm.BinnedDensity(bins=10)
    >>> gd, state = density.update(
    ...   jnp.array([0.01, 0.02, 0.93]), density.init()
    ... )
    >>> gd
    Array([20., 20., 10.], dtype=float32)

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, section 3, 2019
  """

  bins: int = 30

  def __post_init__(self):
    super().__post_init__()
    _check_positive_int('bins', self.bins)

  @property
  def _cells(self) -> int:
    return self.bins

  def _density(self, histogram):
    return histogram * (self.bins / self._length)

  def _cell(self, norms, mask):
    cell = super()._cell(norms, mask)
    if self.log:
      return cell
    # floor(g * M) and g >= i / M disagree for some g; the edges decide.
    edges = np.arange(self.bins + 1, dtype=np.float32) / np.float32(self.bins)
    edges = np.float32(self.low) + np.float32(self._length) * edges
    edges[0], edges[-1] = -np.inf, np.inf
    inside = jnp.minimum(cell, self.bins - 1)
    below = norms < _lookup(jnp.asarray(edges), inside)
    above = norms >= _lookup(jnp.asarray(edges), inside + 1)
    corrected = inside + above.astype(jnp.int32) - below.astype(jnp.int32)
    return jnp.where(cell < self.bins, corrected, cell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMDetectionDensity(BinnedDensity):
  r"""The unit-region density by the rules of mmdetection's ``ghm_loss.py``.

  For comparison with models trained there, to the letter: the moving average
  starts at zero without correction, the running count of a bin that is empty in
  a batch stays where it was, a batch's weights spread over its n non-empty bins
  (:math:`\beta = N / (n \bar R_j)`) and are not normalised further, and the
  size of a mask's entries does not matter, only whether they are above 0. With
  momentum 0 the loss is the mean over non-empty bins of the mean loss inside
  the bin, and the state stays zero.

  Attributes:
    low: smallest norm of the range.
    high: largest norm of the range.
    log: as in :class:`BinnedDensity`.
    momentum: of the moving average over batches, in [0, 1).
    normalize: False here.
    bins: number of bins M; 10 there.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> density = optax_ghm.MMDetectionDensity(bins=10, momentum=0.75)
    >>> weights, _ = optax_ghm.harmony_weights(
    ...   jnp.array([0.01, 0.02, 0.93]), density=density
    ... )
    >>> weights  # the start at zero inflates the first batch fourfold
    Array([3., 3., 6.], dtype=float32)

  References:
    Chen et al., `MMDetection <https://arxiv.org/abs/1906.07155>`_, 2019
  """

  normalize: bool = False
  bins: int = 10

  def observe(self, norms, state, mask=None, axis_name=None, train=True):
    """As :meth:`BinnedDensity.observe`, every mask above 0 counting as 1."""
    mask = None if mask is None else counts(jnp.asarray(mask))
    return super().observe(norms, state, mask, axis_name, train)

  def _learn(self, cell, mass, state):
    occupied = mass > 0
    running = mass
    if self.momentum > 0:
      decayed = self.momentum * state.histogram + (1 - self.momentum) * mass
      running = jnp.where(occupied, decayed, state.histogram)
      state = state._replace(
        histogram=running,
        evidence=jnp.where(jnp.any(occupied), 1.0, state.evidence),
      )
    # n non-empty bins share the range: each is a region of length 1 / n.
    density = jnp.where(occupied, running, 0.0) * jnp.sum(
      occupied, dtype=jnp.float32
    )
    return Crowd(cell, mass, density, jnp.sum(mass)), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowedDensity(_Histogram):
  r"""The paper's own definition: a window of width ε centred on each norm.

  .. math::
    GD(g) = \frac{1}{l_\epsilon(g)} \sum_k
      \mathbb 1\left[g_k \in [g - \tfrac\epsilon2, g + \tfrac\epsilon2)\right],
    \quad
    l_\epsilon(g) = \min(g + \tfrac\epsilon2, high)
      - \max(g - \tfrac\epsilon2, low)

  computed on a fine histogram: a norm counts as the centre of its cell, and a
  cell that a window cuts counts in proportion. There are no bin edges, so an
  example that moves a little changes the weights a little.

  Attributes:
    low: smallest norm of the range.
    high: largest norm of the range; norms outside count in the outermost cell.
    log: whether windows have equal width in log10(norm), for norms without a
      known bound; ``width`` and the density are then in decades.
    momentum: of the moving average over batches (see :class:`BinnedDensity`).
    normalize: whether harmony weights are scaled to average 1 over the batch;
      False gives the paper's raw weights.
    width: ε, in norm or in decades, at most the length of the range.
    cells: of the fine histogram; the cost hardly depends on it.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> density = optax_ghm.WindowedDensity(width=0.1)
    >>> gd, state = density.update(
    ...   jnp.array([0.41, 0.43, 0.93]), density.init()
    ... )
    >>> [round(float(x), 3) for x in gd]
    [20.0, 20.0, 10.0]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, equations 4 and 5, 2019
  """

  width: float = 0.1
  cells: int = 4096

  def __post_init__(self):
    super().__post_init__()
    _check_positive_int('cells', self.cells)
    _check_width(self.width, self._length)

  @property
  def _cells(self) -> int:
    return self.cells

  def _density(self, histogram):
    cell_length = self._length / self.cells
    half = self.width / cell_length / 2
    centre = np.arange(self.cells) + 0.5
    valid = np.minimum(centre + half, self.cells) - np.maximum(centre - half, 0)
    # Whole cells each side of one's own, and the part of the next one.
    whole = max(int(half - 0.5), 0)
    part = max(half - 0.5 - whole, 0.0)
    padded = jnp.pad(histogram, whole + 1)
    outer = padded[: self.cells] + padded[2 * whole + 2 :]
    inner = _sliding_sum(padded[1:-1], 2 * whole + 1)
    length = np.maximum(valid, 1.0) * cell_length
    return (inner + part * outer) / length.astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactDensity:
  r"""The definition without approximation, by sort and search, on one device.

  The window of :class:`WindowedDensity` with every norm at its own place:
  O(N log N). It is the oracle for tests, and fit for batches small enough that
  a sort does not matter. It remembers nothing: evaluation, too, weighs the
  batch by itself.

  Attributes:
    width: ε, at most ``high - low``.
    low: smallest norm of the range; norms below count as ``low``.
    high: largest norm of the range; norms above count as ``high``.
    normalize: whether harmony weights are scaled to average 1 over the batch.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> density = optax_ghm.ExactDensity(width=0.1)
    >>> gd, state = density.update(
    ...   jnp.array([0.41, 0.43, 0.93]), density.init()
    ... )
    >>> [round(float(x), 3) for x in gd]
    [20.0, 20.0, 10.0]
  """

  width: float = 0.1
  low: float = 0.0
  high: float = 1.0
  normalize: bool = True

  def __post_init__(self):
    _check_range(self.low, self.high, log=False)
    _check_width(self.width, self.high - self.low)

  def init(self) -> DensityState:
    """A state that only counts non-finite norms; its one cell stays empty."""
    return _empty_state(1)

  def update(
    self,
    norms: jax.Array,
    state: DensityState,
    mask: jax.Array | None = None,
    axis_name: _norms.AxisName = None,
  ) -> tuple[jax.Array, DensityState]:
    """As :meth:`WindowedDensity.update`; ``axis_name`` must be None."""
    crowd, state = self.observe(norms, state, mask, axis_name)
    return crowd.at_examples(crowd.density), state

  def observe(
    self,
    norms: jax.Array,
    state: DensityState,
    mask: jax.Array | None = None,
    axis_name: _norms.AxisName = None,
    train: bool = True,
  ) -> tuple[Crowd, DensityState]:
    """As :meth:`WindowedDensity.observe`; every example is its own region."""
    if axis_name is not None:
      raise ValueError(
        'ExactDensity sorts the whole batch and works on one device: use'
        f' WindowedDensity with axis_name={axis_name!r}.'
      )
    norms, mask = _check_batch(norms, mask)
    _check_state(state, 1)
    state = _settled(state)
    asked = jnp.ones(norms.shape, bool) if mask is None else counts(mask)
    valid = asked & jnp.isfinite(norms)
    amount = asked if mask is None else mask
    mass = jnp.where(valid, amount.astype(jnp.float32), 0.0)
    g = jnp.clip(norms, self.low, self.high)
    # Examples left out sort to the end, where no window reaches.
    order = jnp.argsort(jnp.where(valid, g, jnp.inf), axis=None)
    sorted_g = jnp.where(valid, g, jnp.inf).reshape(-1)[order]
    below = jnp.pad(jnp.cumsum(mass.reshape(-1)[order]), (1, 0))
    half = self.width / 2
    # A window holds its own norm, however narrow it is by rounding.
    rim = jnp.maximum(g + half, jnp.nextafter(g, jnp.inf))
    first = jnp.searchsorted(sorted_g, g - half, side='left')
    last = jnp.searchsorted(sorted_g, rim, side='left')
    count = jnp.maximum(below[last] - below[first], mass)
    length = jnp.minimum(half, self.high - g) + jnp.minimum(half, g - self.low)
    density = jnp.where(valid, count / length, 0.0)
    if train:
      bad = jnp.sum(asked & ~valid, dtype=jnp.float32)
      state = state._replace(non_finite=state.non_finite + bad)
    return Crowd(None, mass, density, jnp.sum(mass)), state


def broadcast_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The mask of examples of this shape, as bool or float32.

  Args:
    mask: bool or real, broadcastable to ``shape``.
    shape: of the examples.

  Returns:
    The mask, of shape ``shape``.

  Raises:
    TypeError: if ``mask`` is complex.
    ValueError: if it does not broadcast.
  """
  mask = jnp.asarray(mask)
  if jnp.issubdtype(mask.dtype, jnp.complexfloating):
    raise TypeError(f'mask must be bool or real, got dtype {mask.dtype}.')
  if mask.dtype != bool:
    mask = mask.astype(jnp.float32)
  try:
    return jnp.broadcast_to(mask, shape)
  except ValueError:
    raise ValueError(
      f'mask of shape {mask.shape} does not broadcast to the examples of'
      f' shape {shape}.'
    ) from None


def counts(mask: jax.Array) -> jax.Array:
  """Which examples count at all: the mask is above 0 (or True)."""
  return mask > jnp.zeros_like(mask)


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


def _lookup(table, cell):
  """``table[cell]``, laid out over devices as ``cell`` is."""
  return table.at[cell].get(
    mode='promise_in_bounds', out_sharding=jax.typeof(cell).sharding
  )


@functools.partial(jax.jit, static_argnames='width')
def _sliding_sum(x, width):
  """Sums of ``width`` neighbours, by doubling: nothing cancels."""
  length = x.shape[0] - width + 1
  total, start, power = jnp.zeros((length,), x.dtype), 0, 1
  while power <= width:
    if width & power:
      total, start = total + x[start : start + length], start + power
    x, power = x[:-power] + x[power:], 2 * power
  return total


def _settled(state):
  """The mean of the updates that were added up in this state."""
  return state._replace(
    **{
      name: getattr(state, name) / _nonzero(state.calls)
      for name in ('histogram', 'evidence', 'non_finite')
    },
    calls=jnp.ones_like(state.calls),
  )


def _empty_state(cells):
  # Buffers of their own, so that a state can be donated.
  return DensityState(
    histogram=jnp.zeros((cells,), jnp.float32),
    evidence=jnp.zeros((), jnp.float32),
    calls=jnp.ones((), jnp.float32),
    non_finite=jnp.zeros((), jnp.float32),
  )


def _nonzero(x):
  return jnp.where(x == 0, 1.0, x)


def _coordinate(norms, log):
  return jnp.log10(norms) if log else norms


def _coordinate_range(low, high, log):
  return (math.log10(low), math.log10(high)) if log else (low, high)


def _check_batch(norms, mask):
  norms = jnp.asarray(norms)
  if not jnp.issubdtype(norms.dtype, jnp.floating):
    raise TypeError(f'norms must be real floats, got dtype {norms.dtype}.')
  if jnp.finfo(norms.dtype).bits > 32:  # the largest are not infinite, either
    largest = float(jnp.finfo(jnp.float32).max)
    inside = jnp.clip(norms, -largest, largest)
    norms = jnp.where(jnp.isfinite(norms), inside, norms)
  norms = norms.astype(jnp.float32)
  return norms, None if mask is None else broadcast_mask(mask, norms.shape)


def _check_state(state, cells):
  if not isinstance(state, DensityState) or state.histogram.shape != (cells,):
    raise ValueError(
      f'state must come from init() of the same estimator, with {cells}'
      f' cells; got {jax.tree.map(jnp.shape, state)}.'
    )


def _check_range(low, high, log):
  if not (np.isfinite(low) and np.isfinite(high) and low < high):
    raise ValueError(f'low must be below high, got {low} and {high}.')
  if log and low <= 0:
    raise ValueError(f'low must be above 0 if log, got {low}.')


def _check_width(width, length):
  if not 0 < width <= length:
    raise ValueError(f'width must be in (0, {length}], got {width}.')


def _check_positive_int(name, value):
  if not isinstance(value, int) or value < 1:
    raise ValueError(f'{name} must be a positive int, got {value!r}.')


DEFAULT_DENSITY = WindowedDensity()


@functools.partial(jax.jit, static_argnames=('density', 'axis_name', 'train'))
def harmony_weights(
  norms: jax.Array,
  state: DensityState | None = None,
  *,
  density: DensityEstimator = DEFAULT_DENSITY,
  mask: jax.Array | None = None,
  axis_name: _norms.AxisName = None,
  train: bool = True,
) -> tuple[jax.Array, DensityState]:
  r"""Weighs every example by how sparse its gradient norm is.

  .. math::
    \beta_i = \frac{N}{GD(g_i)}, \qquad \text{by default divided by }
    \frac{\sum_k m_k \beta_k}{\sum_k m_k}

  so that the weights average to 1 over the batch and the learning rate keeps
  its meaning; ``density.normalize=False`` gives the raw weights. Weights are
  constants to differentiation.

  Args:
    norms: gradient norms of the examples, any shape and floating dtype.
    state: of ``density``; None starts afresh.
    density: the estimator.
    mask: broadcastable to ``norms``: which examples count (bool), or as how
      many examples each counts in the density (float). It decides who has a
      weight, and does not multiply it. Floats are added up in float32, so that
      a million of them in one region still count to 1 %.
    axis_name: mapped axis, or axes, over which the batch is split: one
      all-reduce of the estimator's histogram.
    train: False reads the density of the state alone and leaves the state as it
      is, so that an example's weight does not depend on its batch; weights then
      average to 1 over the examples remembered.

  Returns:
    The weights, float32 with the shape of ``norms``: finite, non-negative, 0
    for examples that are masked out or whose norm is NaN or infinite (which
    ``state.non_finite`` counts); and the next state. An empty or wholly masked
    batch gives weights 0 and leaves the running density as it is.

  Raises:
    TypeError: if ``norms`` are not real and floating, or ``mask`` not real.
    ValueError: if ``mask`` does not broadcast to ``norms``, or ``state`` is of
      another estimator.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> weights, state = optax_ghm.harmony_weights(jnp.array([0.5] * 3 + [0.9]))
    >>> [round(float(w), 3) for w in weights]
    [0.667, 0.667, 0.667, 2.0]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, 2019
  """
  if state is None:
    state = density.init()
  norms, state, mask = lax.stop_gradient((norms, state, mask))
  crowd, state = density.observe(norms, state, mask, axis_name, train)
  known = crowd.density > 0
  beta = jnp.where(known, crowd.total / _nonzero(crowd.density), 0.0)
  if density.normalize:
    weighed = jnp.sum(crowd.mass * beta)
    beta = beta * jnp.where(
      weighed > 0, jnp.sum(crowd.mass) / _nonzero(weighed), 1.0
    )
  return crowd.at_examples(beta), state
