"""Flax NNX faces: modules that keep their state themselves."""

from optax_ghm.nnx._attention import dot_product_attention
from optax_ghm.nnx._batch_norm import (
  BatchNorm,
  BatchNormStats,
  BatchRenorm,
  DomainBatchNorm,
)
from optax_ghm.nnx._gradient_reversal import GradientReversal
from optax_ghm.nnx._harmonize import Harmonize
from optax_ghm.nnx._in_backward import InBackward
from optax_ghm.nnx._overwrite import (
  OverwriteWithGradient,
  apply_gradients,
  differentiable,
)
from optax_ghm.nnx._recalibrate import recalibrate
from optax_ghm.nnx._tapped import Tapped
from optax_ghm.nnx._value_and_grad import value_and_grad

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
  'differentiable',
  'dot_product_attention',
  'recalibrate',
  'value_and_grad',
]
