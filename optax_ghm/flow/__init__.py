"""How gradients flow: measured, judged and shown."""

from optax_ghm.flow.record import Leaf, Record
from optax_ghm.flow.tapping import (
  Layer,
  Taps,
  TapStats,
  leading_axes as leading_axes,
  sink,
  tap,
)
from optax_ghm.flow.watching import WatchState, leaf_names, watch

__all__ = [
  'Layer',
  'Leaf',
  'Record',
  'TapStats',
  'Taps',
  'WatchState',
  'leaf_names',
  'sink',
  'tap',
  'watch',
]
