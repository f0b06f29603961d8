"""The density by the rules of mmdetection's ``ghm_loss.py``."""

import dataclasses

import jax.numpy as jnp

from optax_ghm._core import masks
from optax_ghm.harmonization import _binned, _density


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMDetectionDensity(_binned.BinnedDensity):
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
    mask = None if mask is None else masks.counts(jnp.asarray(mask))
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
    return _density.Crowd(cell, mass, density, jnp.sum(mass)), state
