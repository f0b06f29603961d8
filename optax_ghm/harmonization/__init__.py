"""Gradient harmonization: weights by how crowded a gradient norm is."""

from optax_ghm.harmonization._adjust_logits import (
  adjust_logits,
  adjust_sigmoid_logits,
)
from optax_ghm.harmonization._aggregate import (
  PARAMETER_DENSITY,
  HarmonizedAggregateState,
  harmonized_aggregate,
)
from optax_ghm.harmonization._authentic_smooth_l1_loss import (
  authentic_smooth_l1_loss,
)
from optax_ghm.harmonization._binned import BinnedDensity
from optax_ghm.harmonization._class_counts import ClassCounts
from optax_ghm.harmonization._density import (
  DensityEstimator,
  DensityState,
  RegionDensity,
)
from optax_ghm.harmonization._exact import ExactDensity
from optax_ghm.harmonization._harmonize import harmonize
from optax_ghm.harmonization._loss_per_positive import (
  RunningPositives,
  loss_per_positive,
)
from optax_ghm.harmonization._mmdetection import MMDetectionDensity
from optax_ghm.harmonization._prior_bias import prior_bias
from optax_ghm.harmonization._sigmoid_loss import (
  sigmoid_ghm_loss,
  sigmoid_ghm_loss_with_integer_labels,
  sigmoid_ghm_loss_with_integer_labels_with_state,
  sigmoid_ghm_loss_with_state,
)
from optax_ghm.harmonization._smooth_l1_loss import (
  smooth_l1_ghm_loss,
  smooth_l1_ghm_loss_with_state,
)
from optax_ghm.harmonization._softmax_loss import (
  softmax_ghm_loss_with_integer_labels,
  softmax_ghm_loss_with_integer_labels_with_state,
)
from optax_ghm.harmonization._weighting import GHM, HarmonyWeighting
from optax_ghm.harmonization._weights import harmony_weights
from optax_ghm.harmonization._windowed import WindowedDensity

__all__ = [
  'GHM',
  'PARAMETER_DENSITY',
  'BinnedDensity',
  'ClassCounts',
  'DensityEstimator',
  'DensityState',
  'ExactDensity',
  'HarmonizedAggregateState',
  'HarmonyWeighting',
  'MMDetectionDensity',
  'RegionDensity',
  'RunningPositives',
  'WindowedDensity',
  'adjust_logits',
  'adjust_sigmoid_logits',
  'authentic_smooth_l1_loss',
  'harmonize',
  'harmonized_aggregate',
  'harmony_weights',
  'loss_per_positive',
  'prior_bias',
  'sigmoid_ghm_loss',
  'sigmoid_ghm_loss_with_integer_labels',
  'sigmoid_ghm_loss_with_integer_labels_with_state',
  'sigmoid_ghm_loss_with_state',
  'smooth_l1_ghm_loss',
  'smooth_l1_ghm_loss_with_state',
  'softmax_ghm_loss_with_integer_labels',
  'softmax_ghm_loss_with_integer_labels_with_state',
]
