"""Several losses whose gradients pull apart, reconciled."""

from optax_ghm.conflict._aggregate import (
  ReconciledAggregateState,
  reconciled_aggregate,
)
from optax_ghm.conflict._aligned_mtl import aligned_mtl_weights
from optax_ghm.conflict._cagrad import cagrad_weights
from optax_ghm.conflict._config import config_weights
from optax_ghm.conflict._dualproj import dualproj_weights
from optax_ghm.conflict._fork import fork
from optax_ghm.conflict._gh import gh_plus_plus_weights, gh_weights
from optax_ghm.conflict._gramian import Weights, gramian
from optax_ghm.conflict._imtl_g import imtl_g_weights
from optax_ghm.conflict._mean import mean_weights
from optax_ghm.conflict._mgda import mgda_weights
from optax_ghm.conflict._nash_mtl import nash_mtl_weights
from optax_ghm.conflict._pcgrad import pcgrad_weights
from optax_ghm.conflict._scalarizers import (
  famo_logits_gradient,
  famo_loss,
  geometric_mean,
  smooth_tchebycheff,
  uncertainty_weighted,
)
from optax_ghm.conflict._unit_gradients import of_unit_gradients
from optax_ghm.conflict._upgrad import upgrad_weights
from optax_ghm.conflict._value_and_grad import (
  Reconciliation,
  reconciled_value_and_grad,
)

__all__ = [
  'ReconciledAggregateState',
  'Reconciliation',
  'Weights',
  'aligned_mtl_weights',
  'cagrad_weights',
  'config_weights',
  'dualproj_weights',
  'famo_logits_gradient',
  'famo_loss',
  'fork',
  'geometric_mean',
  'gh_plus_plus_weights',
  'gh_weights',
  'gramian',
  'imtl_g_weights',
  'mean_weights',
  'mgda_weights',
  'nash_mtl_weights',
  'of_unit_gradients',
  'pcgrad_weights',
  'reconciled_aggregate',
  'reconciled_value_and_grad',
  'smooth_tchebycheff',
  'uncertainty_weighted',
  'upgrad_weights',
]
