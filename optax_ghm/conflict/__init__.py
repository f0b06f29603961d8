"""Several losses whose gradients pull apart, reconciled."""

from optax_ghm.conflict._two_losses import conflict_weights, harmonized_fork

__all__ = [
  'conflict_weights',
  'harmonized_fork',
]
