"""Batch normalization: right under masks, devices, small batches, domains."""

from optax_ghm.batch_normalization._batch_norm import (
  batch_norm,
  batch_norm_inference,
)
from optax_ghm.batch_normalization._domain import domain_batch_norm
from optax_ghm.batch_normalization._fold import fold_batch_norm
from optax_ghm.batch_normalization._ghost import ghost_batch_norm
from optax_ghm.batch_normalization._moments import Moments
from optax_ghm.batch_normalization._renorm import batch_renorm, renorm_schedules
from optax_ghm.batch_normalization._running_moments import RunningMoments
from optax_ghm.batch_normalization._stats import (
  BatchNormStats,
  batch_norm_stats,
)

__all__ = [
  'BatchNormStats',
  'Moments',
  'RunningMoments',
  'batch_norm',
  'batch_norm_inference',
  'batch_norm_stats',
  'batch_renorm',
  'domain_batch_norm',
  'fold_batch_norm',
  'ghost_batch_norm',
  'renorm_schedules',
]
