"""optax_ghm: shape and watch gradients, with Optax and JAX."""

from optax_ghm.backward import (
  OVERWRITE_WITH_GRADIENT,
  apply_gradients,
  overwrite_with_gradient,
)
from optax_ghm.density import (
  DEFAULT_DENSITY,
  BinnedDensity,
  Crowd,
  DensityEstimator,
  DensityState,
  ExactDensity,
  MMDetectionDensity,
  WindowedDensity,
  harmony_weights,
)
from optax_ghm.harmonizing import (
  PARAMETER_DENSITY,
  HarmonizedAggregateState,
  harmonize,
  harmonized_aggregate,
)
from optax_ghm.losses import (
  sigmoid_ghm_loss,
  sigmoid_ghm_loss_with_integer_labels,
  smooth_l1_ghm_loss,
  softmax_ghm_loss_with_integer_labels,
)

__version__ = '0.1.0'

__all__ = [
  'DEFAULT_DENSITY',
  'OVERWRITE_WITH_GRADIENT',
  'PARAMETER_DENSITY',
  'BinnedDensity',
  'Crowd',
  'DensityEstimator',
  'DensityState',
  'ExactDensity',
  'HarmonizedAggregateState',
  'MMDetectionDensity',
  'WindowedDensity',
  'apply_gradients',
  'harmonize',
  'harmonized_aggregate',
  'harmony_weights',
  'overwrite_with_gradient',
  'sigmoid_ghm_loss',
  'sigmoid_ghm_loss_with_integer_labels',
  'smooth_l1_ghm_loss',
  'softmax_ghm_loss_with_integer_labels',
]
