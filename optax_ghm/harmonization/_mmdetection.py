"""The density by the rules of mmdetection's ``ghm_loss.py``."""

import dataclasses

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.harmonization import _binned, _density


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMDetectionDensity(_binned.BinnedDensity):
  r"""Unit-region density by the rules of mmdetection's ``ghm_loss.py``.

  The estimator is for comparison with models trained there:

  - The moving average starts at zero and is not corrected for that.
  - The running count of a bin that is empty in a batch stays where it was.
  - A batch's weights are divided among its n non-empty bins,
    :math:`\beta = N / (n \bar R_j)`, and are not normalized further, by a
    weighting with ``normalize=False``. With momentum 0 the loss is the mean
    over non-empty bins of the mean loss inside the bin, and the state stays
    zero.
  - An example of any weight above 0 counts as one in the density.

  Attributes:
    low: smallest norm of the range.
    high: largest norm of the range; norms outside count in the outermost bin.
    log: whether bins have equal width in log10(norm).
    momentum: share of the past in the moving average over batches, in [0, 1).
    bins: number of bins M, at least 1; 10 there.

  Examples:
    >>> import dataclasses
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> from optax_ghm.harmonization import MMDetectionDensity
    >>> weighting = dataclasses.replace(
    ...   optax_ghm.GHM,
    ...   density=MMDetectionDensity(bins=10, momentum=0.75),
    ...   normalize=False,
    ... )
    >>> weights, state = optax_ghm.harmony_weights(
    ...   jnp.array([0.01, 0.02, 0.93]), weighting=weighting
    ... )
    >>> weights  # the start at zero inflates the first batch fourfold
    Array([3., 3., 6.], dtype=float32)

  References:
    Chen et al., `MMDetection <https://arxiv.org/abs/1906.07155>`_, 2019
  """

  bins: int = 10

  def update(
    self,
    norms: jax.Array,
    state: _density.DensityState,
    amounts: jax.Array | None = None,
    axis_name: arrays.AxisName = None,
    train: bool = True,
  ) -> tuple[_density.RegionDensity, _density.DensityState]:
    """The gradient density of a batch, where any weight above 0 counts as 1."""
    amounts = None if amounts is None else amounts.astype(bool)
    return super().update(norms, state, amounts, axis_name, train)

  def _learn(self, count, state):
    occupied = count > 0
    running = count
    if self.momentum > 0:
      decayed = self.momentum * state.histogram + (1 - self.momentum) * count
      running = jnp.where(occupied, decayed, state.histogram)
      state = state._replace(
        histogram=running,
        evidence=jnp.where(jnp.any(occupied), 1.0, state.evidence),
      )
    # The n non-empty bins share a range of length 1.
    bins = jnp.sum(occupied, dtype=jnp.float32)
    return jnp.where(occupied, running, 0.0) * bins, state
