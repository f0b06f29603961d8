"""Calibrated gradients: clips, guards, normalizations and the learning rate."""

from optax_ghm._core.scopes import Groups, Units, flax_unit_axes
from optax_ghm.calibration._attention import (
  dot_product_attention_with_max_logits,
)
from optax_ghm.calibration._calibrated import CalibratedState, calibrated
from optax_ghm.calibration._clip import ClipState
from optax_ghm.calibration._fixed_clips import (
  clip_by_norm,
  clip_by_parameter_norm,
  clip_by_rms,
)
from optax_ghm.calibration._noise_scale import (
  GradientNoise,
  NoiseScaleState,
  gradient_noise,
  noise_scale_aggregate,
)
from optax_ghm.calibration._norm_ema import NormAverage, clip_by_norm_ema
from optax_ghm.calibration._normalize import (
  NormalizeState,
  centralize,
  normalize_by_norm,
  standardize,
)
from optax_ghm.calibration._percentile import (
  GeometricQuantile,
  PastNorms,
  PercentileEstimator,
  QuantileEstimate,
  WindowPercentile,
  clip_by_percentile,
)
from optax_ghm.calibration._qk_clip import (
  QKClipState,
  flax_qk_powers,
  qk_clip,
)
from optax_ghm.calibration._range_test import (
  RangeTest,
  learning_rate_range_test,
)
from optax_ghm.calibration._skip_spikes import (
  RecentSteps,
  SkipState,
  SpikeWindow,
  skip_spikes,
)
from optax_ghm.calibration._zscore import NormMoments, clip_by_zscore

__all__ = [
  'CalibratedState',
  'ClipState',
  'GeometricQuantile',
  'GradientNoise',
  'Groups',
  'NoiseScaleState',
  'NormAverage',
  'NormMoments',
  'NormalizeState',
  'PastNorms',
  'PercentileEstimator',
  'QKClipState',
  'QuantileEstimate',
  'RangeTest',
  'RecentSteps',
  'SkipState',
  'SpikeWindow',
  'Units',
  'WindowPercentile',
  'calibrated',
  'centralize',
  'clip_by_norm',
  'clip_by_norm_ema',
  'clip_by_parameter_norm',
  'clip_by_percentile',
  'clip_by_rms',
  'clip_by_zscore',
  'dot_product_attention_with_max_logits',
  'flax_qk_powers',
  'flax_unit_axes',
  'gradient_noise',
  'learning_rate_range_test',
  'noise_scale_aggregate',
  'normalize_by_norm',
  'qk_clip',
  'skip_spikes',
  'standardize',
]
