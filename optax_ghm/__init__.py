"""optax_ghm: shape and watch gradients, with Optax and JAX."""

from optax_ghm.adaptation import (
  domain_loss,
  entropy_weights,
  multilinear_map,
  multilinear_projections,
  randomized_multilinear_map,
)
from optax_ghm.adaptive_clipping import (
  SecondMomentState,
  clip_by_norm_ema,
  clip_by_percentile,
  clip_by_second_moment,
  clip_by_zscore,
)
from optax_ghm.backward import (
  OVERWRITE_WITH_GRADIENT,
  InBackward,
  InBackwardState,
  apply_gradients,
  in_backward,
  overwrite_with_gradient,
)
from optax_ghm.batch_normalizing import (
  batch_norm,
  batch_norm_inference,
  fold_batch_norm,
)
from optax_ghm.batch_subsets import domain_batch_norm, ghost_batch_norm
from optax_ghm.calibrating import CalibratedState, calibrated
from optax_ghm.clipping import (
  ClipState,
  clip_by_norm,
  clip_by_parameter_norm,
  clip_update_rms,
)
from optax_ghm.conflict import conflict_weights, harmonized_fork
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
from optax_ghm.moments import (
  Moments,
  batch_moments,
  merge_moments,
  pool_moments,
)
from optax_ghm.noise_scale import (
  GradientNoise,
  NoiseScaleState,
  gradient_noise,
  noise_scale_aggregate,
)
from optax_ghm.normalizing import (
  NormalizeState,
  centralize,
  normalize_by_norm,
  standardize,
)
from optax_ghm.percentiles import (
  GeometricQuantile,
  PercentileEstimator,
  WindowPercentile,
)
from optax_ghm.range_test import RangeTest, learning_rate_range_test
from optax_ghm.renormalizing import batch_renorm, renorm_schedules
from optax_ghm.reversal import (
  ReverseState,
  dann_learning_rate_schedule,
  dann_reversal_schedule,
  reverse,
  reverse_gradient,
)
from optax_ghm.running_moments import RunningMoments, update_running_moments
from optax_ghm.scopes import Groups, Units, flax_unit_axes
from optax_ghm.skipping import SkipState, SpikeWindow, skip_spikes

__version__ = '0.1.0'

__all__ = [
  'DEFAULT_DENSITY',
  'OVERWRITE_WITH_GRADIENT',
  'PARAMETER_DENSITY',
  'BinnedDensity',
  'CalibratedState',
  'ClipState',
  'Crowd',
  'DensityEstimator',
  'DensityState',
  'ExactDensity',
  'GeometricQuantile',
  'GradientNoise',
  'Groups',
  'HarmonizedAggregateState',
  'InBackward',
  'InBackwardState',
  'MMDetectionDensity',
  'Moments',
  'NoiseScaleState',
  'NormalizeState',
  'PercentileEstimator',
  'RangeTest',
  'ReverseState',
  'RunningMoments',
  'SecondMomentState',
  'SkipState',
  'SpikeWindow',
  'Units',
  'WindowPercentile',
  'WindowedDensity',
  'apply_gradients',
  'batch_moments',
  'batch_norm',
  'batch_norm_inference',
  'batch_renorm',
  'calibrated',
  'centralize',
  'clip_by_norm',
  'clip_by_norm_ema',
  'clip_by_parameter_norm',
  'clip_by_percentile',
  'clip_by_second_moment',
  'clip_by_zscore',
  'clip_update_rms',
  'conflict_weights',
  'dann_learning_rate_schedule',
  'dann_reversal_schedule',
  'domain_batch_norm',
  'domain_loss',
  'entropy_weights',
  'flax_unit_axes',
  'fold_batch_norm',
  'ghost_batch_norm',
  'gradient_noise',
  'harmonize',
  'harmonized_aggregate',
  'harmonized_fork',
  'harmony_weights',
  'in_backward',
  'learning_rate_range_test',
  'merge_moments',
  'multilinear_map',
  'multilinear_projections',
  'noise_scale_aggregate',
  'normalize_by_norm',
  'overwrite_with_gradient',
  'pool_moments',
  'randomized_multilinear_map',
  'renorm_schedules',
  'reverse',
  'reverse_gradient',
  'sigmoid_ghm_loss',
  'sigmoid_ghm_loss_with_integer_labels',
  'skip_spikes',
  'smooth_l1_ghm_loss',
  'softmax_ghm_loss_with_integer_labels',
  'standardize',
  'update_running_moments',
]
