"""Records on disk: npz files of plain arrays, which are checked when read."""

import json
import os
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_ghm.flow import _leaf, _losses, _tap, _taps, _watch

FORMAT = 'optax_ghm.flow 1'
"""The first entry of every file. A change of any entry needs a new number;
an entry more, without which a file can be read, does not."""


class Step(NamedTuple):
  """What was measured at one step.

  Attributes:
    number: of the step.
    index: of the step among those with, or those without measurements.
    tapped: (layers, 9), as ``numbers`` of :class:`TapStats`, or None.
    histogram: (layers, 64), or None.
    watched: (leaves, 10), as ``measured`` of :class:`WatchState`, or None.
    scalars: numbers by name.
    losses: (losses, 3 + losses), as ``rows`` of ``_losses``, or None.
  """

  number: int
  index: int
  tapped: Any
  histogram: Any
  watched: Any
  scalars: dict[str, Any]
  losses: Any = None

  @property
  def is_measured(self) -> bool:
    """Whether it has more than scalars."""
    measured = self.tapped, self.watched, self.losses
    return any(numbers is not None for numbers in measured)


class Content(NamedTuple):
  """The content of a file."""

  capacity: int
  layers: tuple[_taps.Layer, ...]
  leaves: tuple[_leaf.Leaf, ...]
  steps: list[Step]


def stacked(
  steps: Sequence[Step], field: str, shape: tuple[int, ...]
) -> np.ndarray:
  """A field of all steps, float32, NaN at steps without it."""
  missing = np.full(shape, np.nan, np.float32)
  values = [getattr(step, field) for step in steps]
  values = [missing if value is None else value for value in values]
  return np.array(values, np.float32).reshape(len(values), *shape)


def shapes(layers: int, leaves: int, losses: int) -> dict[str, tuple[int, ...]]:
  """The shapes of the fields of a step."""
  return {
    'tapped': (layers, len(_tap.COLUMNS)),
    'histogram': (layers, _tap.HISTOGRAM_CELLS),
    'watched': (leaves, len(_watch.COLUMNS)),
    'losses': (losses, len(_losses.COLUMNS) + losses),
  }


def write(path: str | os.PathLike[str], content: Content) -> None:
  """Writes a file without pickles."""
  capacity, layers, leaves, steps = content
  names = list(dict.fromkeys(name for step in steps for name in step.scalars))
  losses = next((len(s.losses) for s in steps if s.losses is not None), 0)
  about = {
    'format': FORMAT,
    'capacity': capacity,
    'layers': layers,
    'leaves': leaves,
    'losses': losses,
    'scalars': names,
  }
  arrays = {
    'about': np.array(json.dumps(about)),
    'steps': np.array([step.number for step in steps], np.int64),
  }
  for name, shape in shapes(len(layers), len(leaves), losses).items():
    has = [getattr(step, name) is not None for step in steps]
    arrays[f'has_{name}'] = np.array(has, bool)
    if any(has):
      arrays[name] = stacked(steps, name, shape)
  for i, name in enumerate(names):
    values = [float(step.scalars.get(name, np.nan)) for step in steps]
    arrays[f'scalar_{i}'] = np.array(values)
    has = [name in step.scalars for step in steps]
    arrays[f'has_scalar_{i}'] = np.array(has, bool)
  with open(path, 'wb') as file:
    np.savez_compressed(file, **arrays)


def read(path: str | os.PathLike[str]) -> Content:
  """Reads a file.

  Raises:
    OSError: if the file cannot be opened.
    ValueError: if it is no such file, is damaged, or of another format.
  """
  with open(path, 'rb') as file:
    try:
      with zipfile.ZipFile(file) as archive:
        about = json.loads(str(_array(archive, 'about', 'U', ())))
        written = about['format']
        if written == FORMAT:
          return _content(about, archive)
    except Exception as error:  # the bytes may be anything
      reason = f'{error}' or type(error).__name__
      reason = repr(reason)[1:-1][:200].rstrip('.')  # in one line
      raise ValueError(
        f'{path} is not a record of optax_ghm.flow: {reason}.'
      ) from error
  raise ValueError(
    f'{path} is of the format {written!r:.80}, this is {FORMAT!r}.'
  )


def _content(about, archive):
  capacity, layers, leaves, names = (
    about[name] for name in ('capacity', 'layers', 'leaves', 'scalars')
  )
  layers = tuple(_taps.Layer(*layer) for layer in layers)
  leaves = tuple(_leaf.Leaf(*leaf) for leaf in leaves)
  texts = [*names, *(layer.name for layer in layers)]
  texts += [leaf.name for leaf in leaves]
  if not all(isinstance(text, str) for text in texts):
    raise ValueError('a name is not text')
  if not isinstance(capacity, int) or capacity < 4:
    raise ValueError(f'the capacity is {capacity!r:.80}')
  steps = _array(archive, 'steps', 'i', (None,))
  if (np.diff(steps) <= 0).any():
    raise ValueError('steps do not increase')

  def column(name, kind, shape=()):
    return _array(archive, name, kind, (len(steps), *shape))

  fields = {}
  losses = about.get('losses')  # which older files do not have
  for name, shape in shapes(len(layers), len(leaves), losses or 0).items():
    if name == 'losses' and losses is None:
      continue
    has = column(f'has_{name}', 'b')
    values = column(name, 'f', shape) if has.any() else has
    fields[name] = [v if h else None for v, h in zip(values, has, strict=True)]
  scalars = [
    (name, column(f'scalar_{i}', 'f'), column(f'has_scalar_{i}', 'b'))
    for i, name in enumerate(names)
  ]
  steps = [
    Step(
      number=int(number),
      index=0,
      scalars={name: values[i] for name, values, has in scalars if has[i]},
      **{name: values[i] for name, values in fields.items()},
    )
    for i, number in enumerate(steps)
  ]
  return Content(capacity, layers, leaves, steps)


def _array(archive, name, kind, shape):
  """An array of the archive, if it has this kind of dtype and this shape."""
  with archive.open(f'{name}.npy') as file:
    array = np.lib.format.read_array(file, allow_pickle=False)
  fits = array.ndim == len(shape) and all(
    n in (None, m) for n, m in zip(shape, array.shape, strict=True)
  )
  if array.dtype.kind != kind or not fits:
    raise ValueError(f'{name} is {array.dtype}{list(array.shape)}')
  return array
