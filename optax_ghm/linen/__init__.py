"""Flax Linen faces: modules whose state lives with the model's variables."""

from optax_ghm.linen._attention import dot_product_attention
from optax_ghm.linen._batch_norm import (
  BatchNorm,
  BatchRenorm,
  DomainBatchNorm,
)
from optax_ghm.linen._gradient_reversal import GradientReversal
from optax_ghm.linen._harmonize import Harmonize
from optax_ghm.linen._in_backward import InBackward
from optax_ghm.linen._recalibrate import recalibrate
from optax_ghm.linen._tapped import Tapped

__all__ = [
  'BatchNorm',
  'BatchRenorm',
  'DomainBatchNorm',
  'GradientReversal',
  'Harmonize',
  'InBackward',
  'Tapped',
  'dot_product_attention',
  'recalibrate',
]
