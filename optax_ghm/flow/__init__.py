"""How gradients flow: measured, judged and shown.

Taps tell what the gradient is at the layers' outputs, :func:`watch` what the
optimizer makes of it; a :class:`Record` keeps both, :func:`diagnose` says what
is wrong, and :func:`print_report`, :func:`write_page` and :func:`figure` show
it. ``optax_ghm.linen.Tapped`` and ``optax_ghm.nnx.Tapped`` tap unmodified
models of Flax.
"""

from optax_ghm.flow.batch_statistics import BatchNormStats, batch_norm_stats
from optax_ghm.flow.depth import DepthProfile, depth_profile
from optax_ghm.flow.diagnosis import diagnose
from optax_ghm.flow.page import write_page
from optax_ghm.flow.plot import figure
from optax_ghm.flow.record import Leaf, Record
from optax_ghm.flow.report import print_report
from optax_ghm.flow.tapping import (
  Layer,
  Taps,
  TapStats,
  sink,
  tap,
)
from optax_ghm.flow.verdicts import Verdict
from optax_ghm.flow.watching import WatchState, leaf_names, watch
from optax_ghm.flow.writers import json_lines, mlflow, tensorboard, wandb

__all__ = [
  'BatchNormStats',
  'DepthProfile',
  'Layer',
  'Leaf',
  'Record',
  'TapStats',
  'Taps',
  'Verdict',
  'WatchState',
  'batch_norm_stats',
  'depth_profile',
  'diagnose',
  'figure',
  'json_lines',
  'leaf_names',
  'mlflow',
  'print_report',
  'sink',
  'tap',
  'tensorboard',
  'wandb',
  'watch',
  'write_page',
]
