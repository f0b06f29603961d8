"""Flax Linen faces: modules whose state lives with the model's variables."""

from optax_ghm.linen.batch_norm import (
  BatchNorm,
  BatchRenorm,
  DomainBatchNorm,
)
from optax_ghm.linen.mounts import GradientReversal, Harmonize, InBackward
from optax_ghm.linen.recalibration import recalibrate
from optax_ghm.linen.tapped import Tapped

__all__ = [
  'BatchNorm',
  'BatchRenorm',
  'DomainBatchNorm',
  'GradientReversal',
  'Harmonize',
  'InBackward',
  'Tapped',
  'recalibrate',
]
