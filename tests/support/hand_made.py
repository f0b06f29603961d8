"""Statistics that are made by hand."""

import jax.numpy as jnp
import numpy as np

from optax_ghm import flow

NUMBERS = (
  'calls',
  'elements',
  'sum',
  'small_squares',
  'squares',
  'large_squares',
  'zeros',
  'non_finite',
  'largest',
)
MEASURED = (
  'gradient_norm',
  'update_norm',
  'parameter_norm',
  'elements',
  'zeros',
  'non_finite',
  'units',
  'dead_units',
  'signal_to_noise',
  'cosine',
)


def stats(norm=1.0, histogram=None, **columns):
  """The statistics of a tap with 100 elements."""
  size = float(norm)
  columns = {
    'calls': 1,
    'elements': 100,
    'squares': 0 if abs(size) >= 1e15 or abs(size) < 1e-15 else size**2,
    'small_squares': (size * 2.0**80) ** 2 if abs(size) < 1e-15 else 0,
    'large_squares': (size / 2.0**96) ** 2 if abs(size) >= 1e15 else 0,
    'zeros': 100 if size == 0 else 0,
    'non_finite': 0 if np.isfinite(size) else 1,
    'largest': size,
    **columns,
  }
  if np.isnan(size):
    columns['squares'] = np.nan
  numbers = np.array([columns.get(name, 0) for name in NUMBERS], np.float32)
  return flow.TapStats(jnp.asarray(numbers), histogram)


def silent(histogram=None):
  """The statistics of a tap that no gradient reached."""
  return stats(
    0.0,
    None if histogram is None else jnp.zeros_like(histogram),
    **dict.fromkeys(NUMBERS, 0),
  )


def taps(norms, names=None, kernels=None, histogram=None):
  """Taps of layers with these norms; None where no gradient arrives."""
  names = [f'layer {i}' for i in range(len(norms))] if names is None else names
  kernels = [True] * len(names) if kernels is None else kernels
  made = [
    n
    if isinstance(n, flow.TapStats)
    else silent(histogram)
    if n is None
    else stats(n, histogram)
    for n in norms
  ]
  return flow.Taps(
    dict(zip(names, made, strict=True)),
    tuple(
      flow.Layer(name, 'Dense', kernel)
      for name, kernel in zip(names, kernels, strict=True)
    ),
  )


def watched(*rows):
  """The state of a watched optimizer, a dictionary of columns per leaf."""
  healthy = {
    'gradient_norm': 1.0,
    'update_norm': 1e-3,
    'parameter_norm': 1.0,
    'elements': 100,
    'units': 10,
  }
  measured = [
    [{**healthy, **row}.get(name, 0) for name in MEASURED] for row in rows
  ]
  return flow.WatchState(
    jnp.asarray(np.array(measured, np.float32)), jnp.zeros(1), ()
  )
