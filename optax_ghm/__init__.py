"""optax_ghm: shape and watch gradients, with Optax and JAX.

A package in it is loaded when one of its names is first used, so that importing
this one takes no time.
"""

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from optax_ghm.backward import (
    apply_gradients,
    in_backward,
    overwrite_with_gradient,
  )
  from optax_ghm.batch_normalization import (
    Moments,
    RunningMoments,
    batch_norm,
    batch_norm_inference,
    batch_renorm,
    domain_batch_norm,
    fold_batch_norm,
    ghost_batch_norm,
    renorm_schedules,
  )
  from optax_ghm.calibration import (
    GeometricQuantile,
    Groups,
    SpikeWindow,
    Units,
    WindowPercentile,
    calibrated,
    centralize,
    clip_by_norm,
    clip_by_norm_ema,
    clip_by_parameter_norm,
    clip_by_percentile,
    clip_by_rms,
    clip_by_zscore,
    learning_rate_range_test,
    noise_scale_aggregate,
    normalize_by_norm,
    skip_spikes,
    standardize,
  )
  from optax_ghm.harmonization import (
    GHM,
    BinnedDensity,
    ClassCounts,
    HarmonyWeighting,
    RunningPositives,
    WindowedDensity,
    adjust_logits,
    adjust_sigmoid_logits,
    authentic_smooth_l1_loss,
    harmonize,
    harmonized_aggregate,
    harmony_weights,
    loss_per_positive,
    prior_bias,
    sigmoid_ghm_loss,
    sigmoid_ghm_loss_with_integer_labels,
    sigmoid_ghm_loss_with_integer_labels_with_state,
    sigmoid_ghm_loss_with_state,
    smooth_l1_ghm_loss,
    smooth_l1_ghm_loss_with_state,
    softmax_ghm_loss_with_integer_labels,
    softmax_ghm_loss_with_integer_labels_with_state,
  )
  from optax_ghm.reversal import (
    dann_learning_rate_schedule,
    dann_reversal_schedule,
    domain_loss,
    entropy_weights,
    multilinear_map,
    randomized_multilinear_map,
    reverse_gradient,
  )

__version__ = '0.1.0'

__all__ = [
  'GHM',
  'BinnedDensity',
  'ClassCounts',
  'GeometricQuantile',
  'Groups',
  'HarmonyWeighting',
  'Moments',
  'RunningMoments',
  'RunningPositives',
  'SpikeWindow',
  'Units',
  'WindowPercentile',
  'WindowedDensity',
  'adjust_logits',
  'adjust_sigmoid_logits',
  'apply_gradients',
  'authentic_smooth_l1_loss',
  'batch_norm',
  'batch_norm_inference',
  'batch_renorm',
  'calibrated',
  'centralize',
  'clip_by_norm',
  'clip_by_norm_ema',
  'clip_by_parameter_norm',
  'clip_by_percentile',
  'clip_by_rms',
  'clip_by_zscore',
  'dann_learning_rate_schedule',
  'dann_reversal_schedule',
  'domain_batch_norm',
  'domain_loss',
  'entropy_weights',
  'fold_batch_norm',
  'ghost_batch_norm',
  'harmonize',
  'harmonized_aggregate',
  'harmony_weights',
  'in_backward',
  'learning_rate_range_test',
  'loss_per_positive',
  'multilinear_map',
  'noise_scale_aggregate',
  'normalize_by_norm',
  'overwrite_with_gradient',
  'prior_bias',
  'randomized_multilinear_map',
  'renorm_schedules',
  'reverse_gradient',
  'sigmoid_ghm_loss',
  'sigmoid_ghm_loss_with_integer_labels',
  'sigmoid_ghm_loss_with_integer_labels_with_state',
  'sigmoid_ghm_loss_with_state',
  'skip_spikes',
  'smooth_l1_ghm_loss',
  'smooth_l1_ghm_loss_with_state',
  'softmax_ghm_loss_with_integer_labels',
  'softmax_ghm_loss_with_integer_labels_with_state',
  'standardize',
]

_PACKAGES = (
  'backward',
  'reversal',
  'harmonization',
  'calibration',
  'batch_normalization',
  'conflict',
  'flow',
  'linen',
  'nnx',
)

if not TYPE_CHECKING:  # a checker would take any name for one of these

  def __getattr__(name):
    """Finds a name in its package, which may have to be loaded (PEP 562)."""
    if name in _PACKAGES:
      return importlib.import_module(f'{__name__}.{name}')
    if name in __all__:
      for package in map(__getattr__, _PACKAGES):
        if name in package.__all__:
          return globals().setdefault(name, getattr(package, name))
    raise AttributeError(
      f'module {__name__!r} has no attribute {name!r}',
      name=name,
      obj=sys.modules[__name__],  # for Python to say what may be meant
    )

  def __dir__():
    return {*globals(), *__all__, *_PACKAGES}
