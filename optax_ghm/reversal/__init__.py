"""Gradient reversal, and what domain-adversarial training needs around it."""

from optax_ghm.reversal._conditioning import (
  entropy_weights,
  multilinear_map,
  multilinear_projections,
  randomized_multilinear_map,
)
from optax_ghm.reversal._domain_loss import domain_loss
from optax_ghm.reversal._importance_weighting import (
  deep_embedded_validation,
  density_ratios,
  importance_weighted_risk,
)
from optax_ghm.reversal._mixval import MixedExamples, mix_examples, mixval
from optax_ghm.reversal._predictions import (
  PredictionSums,
  mano,
  mutual_information,
  prediction_entropy,
  prediction_sums,
)
from optax_ghm.reversal._reverse_gradient import reverse_gradient
from optax_ghm.reversal._schedules import (
  dann_learning_rate_schedule,
  dann_reversal_schedule,
)
from optax_ghm.reversal._soft_neighborhood_density import (
  soft_neighborhood_density,
)

__all__ = [
  'MixedExamples',
  'PredictionSums',
  'dann_learning_rate_schedule',
  'dann_reversal_schedule',
  'deep_embedded_validation',
  'density_ratios',
  'domain_loss',
  'entropy_weights',
  'importance_weighted_risk',
  'mano',
  'mix_examples',
  'mixval',
  'multilinear_map',
  'multilinear_projections',
  'mutual_information',
  'prediction_entropy',
  'prediction_sums',
  'randomized_multilinear_map',
  'reverse_gradient',
  'soft_neighborhood_density',
]
