"""How gradients flow: measured, judged and shown."""

from optax_ghm.flow.tap import Layer, leading_axes as leading_axes, Taps, TapStats, sink, tap

__all__ = ['Layer', 'TapStats', 'Taps', 'sink', 'tap']
