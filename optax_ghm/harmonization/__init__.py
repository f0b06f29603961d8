"""Gradient harmonization: weights by how crowded a gradient norm is."""

from optax_ghm.harmonization._aggregate import (
  PARAMETER_DENSITY,
  HarmonizedAggregateState,
  harmonized_aggregate,
)
from optax_ghm.harmonization._binned import BinnedDensity
from optax_ghm.harmonization._density import (
  Crowd,
  DensityEstimator,
  DensityState,
)
from optax_ghm.harmonization._exact import ExactDensity
from optax_ghm.harmonization._harmonize import harmonize
from optax_ghm.harmonization._losses import (
  sigmoid_ghm_loss,
  sigmoid_ghm_loss_with_integer_labels,
  smooth_l1_ghm_loss,
  softmax_ghm_loss_with_integer_labels,
)
from optax_ghm.harmonization._mmdetection import MMDetectionDensity
from optax_ghm.harmonization._weights import DEFAULT_DENSITY, harmony_weights
from optax_ghm.harmonization._windowed import WindowedDensity

__all__ = [
  'DEFAULT_DENSITY',
  'PARAMETER_DENSITY',
  'BinnedDensity',
  'Crowd',
  'DensityEstimator',
  'DensityState',
  'ExactDensity',
  'HarmonizedAggregateState',
  'MMDetectionDensity',
  'WindowedDensity',
  'harmonize',
  'harmonized_aggregate',
  'harmony_weights',
  'sigmoid_ghm_loss',
  'sigmoid_ghm_loss_with_integer_labels',
  'smooth_l1_ghm_loss',
  'softmax_ghm_loss_with_integer_labels',
]
