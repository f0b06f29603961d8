"""The density without a histogram, by sort and search."""

import dataclasses

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.harmonization import _density


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactDensity:
  r"""The paper's definition without approximation, by sort and search.

  Every norm has a window of width ε around it, as in
  :class:`optax_ghm.WindowedDensity`, and counts at its own place. The cost is
  O(N log N), on one device. The estimator is the oracle for tests, and fit for
  batches so small that a sort does not matter. It remembers nothing: in
  evaluation, too, a batch stands alone.

  Attributes:
    width: ε, at most ``high - low``.
    low: smallest norm of the range; norms below count as ``low``.
    high: largest norm of the range; norms above count as ``high``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm.harmonization import ExactDensity
    >>> density = ExactDensity(width=0.1)
    >>> regions, state = density.update(
    ...   jnp.array([0.41, 0.43, 0.93]), density.init()
    ... )
    >>> [round(float(x), 3) for x in regions.at_examples(regions.density)]
    [20.0, 20.0, 10.0]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, equations 4 and 5, 2019
  """

  width: float = 0.1
  low: float = 0.0
  high: float = 1.0

  def __post_init__(self) -> None:
    _density.check_bounds(self.low, self.high)
    _density.check_width(self.width, self.high - self.low)

  def init(self) -> _density.DensityState:
    """A state that counts non-finite norms; its one region stays empty."""
    return _density.initial_state(1)

  def update(
    self,
    norms: jax.Array,
    state: _density.DensityState,
    amounts: jax.Array | None = None,
    axis_name: arrays.AxisName = None,
    train: bool = True,
  ) -> tuple[_density.RegionDensity, _density.DensityState]:
    """The gradient density of a batch, and the next state.

    Args:
      norms: gradient norms, float32 of any shape. Every norm is a region.
      state: from :meth:`init` or the last update.
      amounts: as how many examples each example counts, bool or float32 of the
        shape of ``norms``; None is 1 for each. False and 0 leave it out.
      axis_name: None; the batch cannot be split.
      train: False leaves the state as it is.

    Returns:
      The density and the next state.
    """
    if axis_name is not None:
      raise ValueError(
        'ExactDensity sorts the whole batch and works on one device: use'
        f' WindowedDensity with axis_name={axis_name!r}.'
      )
    if not isinstance(norms.size, int):
      raise ValueError(
        'ExactDensity searches the sorted batch, whose size must be known: use'
        f' WindowedDensity to export norms of shape {norms.shape}.'
      )
    state = _density.mean_of_calls(state)
    if amounts is None:
      amounts = jnp.ones(norms.shape, bool)
    amount, norm = amounts.astype(jnp.float32).ravel(), norms.ravel()
    valid = (amount > 0) & jnp.isfinite(norm)
    count = jnp.where(valid, amount, 0)
    # Examples left out sort to the end, where no window reaches.
    g = jnp.where(valid, jnp.clip(norm, self.low, self.high), jnp.inf)
    order = jnp.argsort(g)
    below = jnp.pad(jnp.cumsum(count[order]), (1, 0))
    half = self.width / 2
    # A window holds its own norm, however narrow it is by rounding.
    end = jnp.maximum(g + half, jnp.nextafter(g, jnp.inf))
    first, last = jnp.searchsorted(g[order], jnp.stack([g - half, end]))
    inside = jnp.maximum(below[last] - below[first], count)
    length = jnp.minimum(half, self.high - g) + jnp.minimum(half, g - self.low)
    if train:
      bad, above = (amount > 0) & ~valid, norm - half > self.high
      state = state._replace(
        non_finite=state.non_finite + jnp.sum(jnp.where(bad, amount, 0)),
        above_range=state.above_range + jnp.sum(jnp.where(above, count, 0)),
      )
    region = jnp.where(
      valid, jnp.arange(norm.size, dtype=jnp.int32), -1
    ).reshape(norms.shape)
    norm = jnp.where(valid, g, self.low)
    return _density.RegionDensity(region, norm, count, inside / length), state
