"""How gradients flow: measured, judged and shown.

Taps tell what the gradient is at the layers' outputs, :func:`watch` what the
optimizer makes of it; a :class:`Record` keeps both, :func:`diagnose` says what
is wrong, and :func:`print_report`, :func:`write_page` and :func:`figure` show
it. ``optax_ghm.linen.Tapped`` and ``optax_ghm.nnx.Tapped`` tap unmodified
models of Flax.
"""

from optax_ghm.batch_normalization import BatchNormStats, batch_norm_stats
from optax_ghm.flow._diagnose import diagnose
from optax_ghm.flow._page import write_page
from optax_ghm.flow._plot import figure
from optax_ghm.flow._record import Leaf, Record
from optax_ghm.flow._report import print_report
from optax_ghm.flow._rules_depth import DepthProfile, depth_profile
from optax_ghm.flow._tap import TapStats, sink, tap
from optax_ghm.flow._taps import Layer, Taps
from optax_ghm.flow._verdict import Verdict
from optax_ghm.flow._watch import WatchState, leaf_names, watch
from optax_ghm.flow._writers import json_lines, mlflow, tensorboard, wandb

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
