"""Several losses whose gradients pull apart, reconciled."""

from optax_ghm.conflict._two_losses import Rule, conflict_weights, fork

__all__ = [
  'Rule',
  'conflict_weights',
  'fork',
]
