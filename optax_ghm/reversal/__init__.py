"""Gradient reversal, and what domain-adversarial training needs around it."""

from optax_ghm.reversal._conditioning import (
  entropy_weights,
  multilinear_map,
  multilinear_projections,
  randomized_multilinear_map,
)
from optax_ghm.reversal._domain_loss import domain_loss
from optax_ghm.reversal._reverse_gradient import reverse_gradient
from optax_ghm.reversal._schedules import (
  dann_learning_rate_schedule,
  dann_reversal_schedule,
)

__all__ = [
  'dann_learning_rate_schedule',
  'dann_reversal_schedule',
  'domain_loss',
  'entropy_weights',
  'multilinear_map',
  'multilinear_projections',
  'randomized_multilinear_map',
  'reverse_gradient',
]
