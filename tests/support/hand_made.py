"""Statistics and records that are made by hand, without a device."""

import numpy as np

from optax_ghm import flow
from optax_ghm.flow import _batch_norms, _record_file

NUMBERS = (
  *('calls', 'elements', 'sum', 'small_squares', 'squares', 'large_squares'),
  *('zeros', 'non_finite', 'largest'),
)
MEASURED = (
  *('gradient_norm', 'update_norm', 'parameter_norm', 'elements', 'zeros'),
  *('non_finite', 'units', 'dead_units', 'signal_to_noise', 'cosine'),
)
ONES = np.ones(64, np.float32)
"""A histogram."""

KERNEL = {'w': np.ones((2, 2), np.float32)}


def kernel(*shape):
  return np.ones(shape or (2, 2), np.float32)


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
  numbers = [columns.get(name, 0) for name in NUMBERS]
  return flow.TapStats(np.array(numbers, np.float32), histogram)


def silent(histogram=None):
  """The statistics of a tap that no gradient reached."""
  histogram = None if histogram is None else np.zeros_like(histogram)
  return stats(0.0, histogram, **dict.fromkeys(NUMBERS, 0))


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
    np.array(measured, np.float32), np.zeros(1, np.float32), ()
  )


def losses(cosine, weights=(0.5, 0.5), norms=(1.0, 1.0), non_finite=(0, 0)):
  """Rows of losses; ``cosine`` is of all pairs, or a matrix."""
  cosines = np.full((len(weights),) * 2, cosine)
  np.fill_diagonal(cosines, 1)
  columns = np.stack([weights, norms, non_finite], axis=1)
  return np.concatenate([columns, cosines], axis=1).astype(np.float32)


def add(
  record,
  number,
  *,
  taps=None,
  opt_state=None,
  batch_norm=None,
  losses=None,
  **scalars,
):
  """``record.add``, without a program that copies from the device."""
  tapped = histogram = None
  if taps is not None:
    record.layers, rows = taps.layers, list(taps.values())
    tapped = np.stack([row.numbers for row in rows])
    if all(row.histogram is not None for row in rows):
      histogram = np.stack([row.histogram for row in rows])
  watched = None if opt_state is None else opt_state.measured
  scalars |= _batch_norms.by_name(batch_norm)
  numbers = tapped, histogram, watched, scalars, losses
  step = _record_file.Step(number, 0, *numbers)
  record._append(record._pending, step)
  record._receive(wait=False)


def record_of(*steps, params=None, start=0, **options):
  """A record of what is added at its steps."""
  record = flow.Record(params, **options)
  for i, step in enumerate(steps, start):
    add(record, i, **step)
  return record


def kinds(record):
  return [verdict.kind for verdict in flow.diagnose(record)]


def only(record, kind):
  """The one verdict, which is of this kind."""
  (verdict,) = flow.diagnose(record)
  assert verdict.kind == kind
  assert verdict.evidence and verdict.suggestion and verdict.source
  return verdict


def verdict_of(record, kind):
  (verdict,) = [v for v in flow.diagnose(record) if v.kind == kind]
  return verdict


def tapped(*norms, **kwargs):
  """What is added at a step of these norms."""
  return {'taps': taps(norms, **kwargs)}


def watching(*rows, params=KERNEL):
  """A record of one parameter, with a row per step."""
  return record_of(
    *[{'opt_state': watched(row)} for row in rows], params=params
  )
