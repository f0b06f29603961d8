"""Measures, records, diagnoses and shows how gradients flow.

A *tap* measures the gradient at the output of a layer. It is empty before the
backward pass (:func:`empty_tap`, :meth:`Taps.empty`). Its gradient is the same
tap, filled with the statistics of the cotangent (:class:`TapStats`). Models of
Flax need no change to be tapped: see :class:`optax_ghm.linen.Tapped` and
:class:`optax_ghm.nnx.Tapped`.

:func:`watch` measures gradients, updates and parameters in the optimizer. A
:class:`Record` keeps the history of both, :func:`diagnose` says what is wrong,
and :func:`print_report`, :func:`write_page`, :func:`write_markdown` and
:func:`figure` show it.
"""

from optax_ghm.batch_normalization import BatchNormStats, batch_norm_stats
from optax_ghm.flow._diagnose import diagnose
from optax_ghm.flow._leaf import Leaf, leaf_names
from optax_ghm.flow._markdown import write_markdown
from optax_ghm.flow._page import write_page
from optax_ghm.flow._plot import figure
from optax_ghm.flow._record import Record
from optax_ghm.flow._report import print_report
from optax_ghm.flow._rules_depth import DepthProfile, depth_profile
from optax_ghm.flow._tap import TapStats, empty_tap, tap
from optax_ghm.flow._taps import Layer, Taps
from optax_ghm.flow._verdict import Verdict
from optax_ghm.flow._watch import WatchState, watch
from optax_ghm.flow._writers import (
  json_lines_writer,
  mlflow_writer,
  tensorboard_writer,
  wandb_writer,
)

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
  'empty_tap',
  'figure',
  'json_lines_writer',
  'leaf_names',
  'mlflow_writer',
  'print_report',
  'tap',
  'tensorboard_writer',
  'wandb_writer',
  'watch',
  'write_markdown',
  'write_page',
]
