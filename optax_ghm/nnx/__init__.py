"""Flax NNX faces: modules that keep their state themselves."""

from optax_ghm.nnx.batch_norm import (
  BatchNorm,
  BatchNormStats,
  BatchRenorm,
  DomainBatchNorm,
)
from optax_ghm.nnx.mounts import (
  GradientReversal,
  Harmonize,
  InBackward,
  OverwriteWithGradient,
  apply_gradients,
  trained,
)
from optax_ghm.nnx.recalibration import recalibrate
from optax_ghm.nnx.tapped import Tapped

__all__ = [
  'BatchNorm',
  'BatchNormStats',
  'BatchRenorm',
  'DomainBatchNorm',
  'GradientReversal',
  'Harmonize',
  'InBackward',
  'OverwriteWithGradient',
  'Tapped',
  'apply_gradients',
  'recalibrate',
  'trained',
]
