"""The density without a histogram, by sort and search."""

import dataclasses

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays, masks
from optax_ghm.harmonization import _density


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
    _density.check_range(self.low, self.high, log=False)
    _density.check_width(self.width, self.high - self.low)

  def init(self) -> _density.DensityState:
    """A state that only counts non-finite norms; its one cell stays empty."""
    return _density.empty_state(1)

  def update(
    self,
    norms: jax.Array,
    state: _density.DensityState,
    mask: jax.Array | None = None,
    axis_name: arrays.AxisName = None,
  ) -> tuple[jax.Array, _density.DensityState]:
    """As :meth:`WindowedDensity.update`; ``axis_name`` must be None."""
    crowd, state = self.observe(norms, state, mask, axis_name)
    return crowd.at_examples(crowd.density), state

  def observe(
    self,
    norms: jax.Array,
    state: _density.DensityState,
    mask: jax.Array | None = None,
    axis_name: arrays.AxisName = None,
    train: bool = True,
  ) -> tuple[_density.Crowd, _density.DensityState]:
    """As :meth:`WindowedDensity.observe`; every example is its own region."""
    if axis_name is not None:
      raise ValueError(
        'ExactDensity sorts the whole batch and works on one device: use'
        f' WindowedDensity with axis_name={axis_name!r}.'
      )
    norms, mask = _density.check_batch(norms, mask)
    _density.check_state(state, 1)
    state = _density.settled(state)
    asked = jnp.ones(norms.shape, bool) if mask is None else masks.counts(mask)
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
    return _density.Crowd(None, mass, density, jnp.sum(mass)), state
