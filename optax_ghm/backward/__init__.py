"""Any Optax transformation inside the backward pass, and its state there."""

from optax_ghm.backward._in_backward import (
  InBackward,
  InBackwardState,
  in_backward,
)
from optax_ghm.backward._overwrite import (
  OVERWRITE_WITH_GRADIENT,
  apply_gradients,
  overwrite_with_gradient,
)

__all__ = [
  'OVERWRITE_WITH_GRADIENT',
  'InBackward',
  'InBackwardState',
  'apply_gradients',
  'in_backward',
  'overwrite_with_gradient',
]
