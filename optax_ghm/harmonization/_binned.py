"""The density of equal bins: the approximation of the GHM paper."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from optax_ghm.harmonization import _density


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinnedDensity(_density.Histogram):
  r"""Unit-region density: the count of the bin that a norm falls in.

  .. math::
    GD(g) = \frac{\bar R_{ind(g)}}{\epsilon}, \qquad
    \bar R_j = \frac{\sum_s m^{t-s} R_j^{(s)}}{\sum_s m^{t-s}}

  with :math:`R_j` the number of examples in bin j, ε the width of a bin and m
  the momentum of the moving average over batches. This is the approximation of
  the paper, with a moving average that is unbiased from the first batch on and
  decays in every bin. One example that crosses the edge into an empty bin
  changes the weight of all others at once; :class:`WindowedDensity` has no
  edges.

  Attributes:
    low: smallest norm of the range.
    high: largest norm of the range; norms outside count in the outermost bin.
    log: whether bins have equal width in log10(norm), for norms without a known
      bound. The density is then per decade.
    momentum: share of the past in the moving average over batches, in [0, 1);
      with 0 every batch stands alone.
    bins: number of bins M, at least 1.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> density = optax_ghm.BinnedDensity(bins=10)
    >>> regions, state = density.update(
    ...   jnp.array([0.01, 0.02, 0.93]), density.init()
    ... )
    >>> regions.at_examples(regions.density)
    Array([20., 20., 10.], dtype=float32)

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, section 3, 2019
  """

  bins: int = 30

  def __post_init__(self) -> None:
    super().__post_init__()
    _density.check_positive_int('bins', self.bins)

  @property
  def _regions(self):
    return self.bins

  def _density(self, count):
    return count * (self.bins / self._length)

  def _cell(self, norms):
    cell = super()._cell(norms)
    if self.log:
      return cell
    # floor(g * M) and g >= i / M disagree for some g. The edges decide.
    edges = np.arange(self.bins + 1, dtype=np.float32) / np.float32(self.bins)
    edges = np.float32(self.low) + np.float32(self._length) * edges
    edges[0], edges[-1] = -np.inf, np.inf
    inside = jnp.clip(cell, 0, self.bins - 1)
    below = norms < _density.lookup(jnp.asarray(edges), inside)
    above = norms >= _density.lookup(jnp.asarray(edges), inside + 1)
    corrected = inside + above.astype(jnp.int32) - below.astype(jnp.int32)
    return jnp.where(cell < self.bins, corrected, cell)
