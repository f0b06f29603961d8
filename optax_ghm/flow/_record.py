"""What taps and watched optimizers measured, kept on the host over time."""

import collections
import functools
import itertools
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ghm._core import trees
from optax_ghm.batch_normalization import _stats
from optax_ghm.flow import _tap, _taps, _watch

FORMAT = 'optax_ghm.flow 1'
"""What saved records begin with."""


PENDING = 64
"""Steps that may be on their way to the host; more make ``add`` wait."""


class _Step(NamedTuple):
  number: int
  index: int  # among those with measurements, or those without
  tapped: Any  # (layers, 9), or None
  histogram: Any  # (layers, 64), or None
  watched: Any  # (leaves, 10), or None
  scalars: dict[str, Any]


_RESULTS = _Step._fields[2:]


class Record:
  """The history of a training: what came of its taps and its watched optimizer.

  :meth:`add` does not wait for the device: it starts the copy of the small
  results and goes on; they are read when they have arrived. The history is
  bounded: of what is older than the last quarter of it, every second step is
  kept, later every fourth, and so on; and the first step with a number that is
  not finite in any case.

  Args:
    params: the parameters, to name the rows of a watched optimizer; not kept.
    capacity: most steps to keep.
    writers: called with (step, numbers by name) as steps arrive, before
      anything is dropped: :func:`optax_ghm.flow.json_lines` and the like.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax_ghm import flow
    >>> def loss(params, taps):
    ...   return jnp.sum(jnp.square(flow.tap(2 * params['w'], taps['hidden'])))
    >>> params = {'w': jnp.ones(3)}
    >>> tx = flow.watch(optax.sgd(0.1))
    >>> state, record = tx.init(params), flow.Record(params)
    >>> for step in range(3):
    ...   value, (grads, taps) = jax.value_and_grad(loss, argnums=(0, 1))(
    ...     params, flow.Taps.of(['hidden'])
    ...   )
    ...   updates, state = tx.update(grads, state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   record.add(step, taps=taps, opt_state=state, loss=value)
    >>> record.layer_stats['norm'][:, 0].round(3).tolist()
    [6.928, 1.386, 0.277]
    >>> record.leaf_stats['update_ratio'][:, 0].round(3).tolist()
    [0.8, 0.8, 0.8]
    >>> record.scalars['loss'].round(3).tolist()
    [12.0, 0.48, 0.019]
  """

  def __init__(
    self,
    params: Any = None,
    *,
    capacity: int = 1000,
    writers: Sequence[Callable[[int, dict[str, float]], None]] = (),
  ):
    if capacity < 4:
      raise ValueError(f'capacity must be at least 4, got {capacity}.')
    self.leaves: tuple[Leaf, ...] = () if params is None else _leaves(params)
    self.layers: tuple[_taps.Layer, ...] = ()
    self._knows_params = params is not None
    self._capacity = capacity
    # Of the steps with (True) and without (False) measurements:
    self._stride, self._added = {True: 1, False: 1}, {True: 0, False: 0}
    self._writers = tuple(writers)
    self._pending: collections.deque[_Step] = collections.deque()
    self._steps: list[_Step] = []

  def __len__(self) -> int:
    self._arrive(wait=True)
    return len(self._steps)

  def add(
    self,
    step: int,
    *,
    taps: _taps.Taps | None = None,
    opt_state: optax.OptState | None = None,
    batch_norm: Any = None,
    **scalars: Any,
  ) -> None:
    """Adds one step, without waiting for it to be computed.

    Args:
      step: its number, larger than those before.
      taps: what came of the sinks.
      opt_state: anything that holds one state of :func:`optax_ghm.flow.watch`.
        It is copied, so the next step may have it donated. Only at steps that
        measured: of the others it still holds the last measurement.
      batch_norm: a tree of :class:`optax_ghm.flow.BatchNormStats`: what a call
        left in the collection ``batch_norm_stats`` of Linen, or
        ``nnx.state(model, optax_ghm.nnx.BatchNormStats)``.
      **scalars: whatever else to keep, such as the loss.

    Raises:
      ValueError: if the number is not larger, if the layers are not those of
        the steps before, or if ``opt_state`` holds no such state, or none that
        fits ``params``.
    """
    step = int(step)
    last = [*self._steps[-1:], *self._pending][-1:]
    if last and step <= last[0].number:
      raise ValueError(f'step {step} comes after step {last[0].number}.')
    measured = tapped = histogram = None
    if opt_state is not None:
      measured = self._measured(opt_state)
    if taps is not None:
      stacks = tuple(stats.numbers.shape[:-1] for stats in taps.values())
      layers, order = _depth_order(taps.layers, stacks)
      if self.layers and layers != self.layers:
        raise ValueError(
          'the layers differ from those of the steps before:'
          f' {[layer.name for layer in layers]} and'
          f' {[layer.name for layer in self.layers]}.'
        )
      self.layers = layers
      tapped, histogram = _gather(taps.stats, order)
    scalars |= _by_norm(batch_norm)
    on_device = {k: v for k, v in scalars.items() if isinstance(v, jax.Array)}
    copied = _copied((tapped, histogram, measured, on_device))
    for leaf in jax.tree.leaves(copied):
      leaf.copy_to_host_async()
    tapped, histogram, measured, values = copied
    values = {**scalars, **values}
    self._append(self._pending, step, tapped, histogram, measured, values)
    self._arrive(wait=False)

  def _append(self, steps, number, tapped, histogram, watched, scalars):
    """To those pending or arrived; sparse measurements are thinned apart."""
    step = _Step(number, 0, tapped, histogram, watched, scalars)
    measured = _is_measured(step)
    steps.append(step._replace(index=self._added[measured]))
    self._added[measured] += 1

  def having(self, field: str) -> 'Record':
    """Of the steps only at which there were taps, or a watched optimizer.

    Args:
      field: ``'tapped'`` or ``'watched'``.

    Returns:
      A record of these steps.
    """
    self._arrive(wait=True)
    record = Record(capacity=self._capacity)
    record.layers, record.leaves = self.layers, self.leaves
    record._steps = [s for s in self._steps if getattr(s, field) is not None]
    return record

  def _measured(self, opt_state):
    found = [
      leaf
      for leaf in jax.tree.leaves(
        opt_state, is_leaf=lambda x: isinstance(x, _watch.WatchState)
      )
      if isinstance(leaf, _watch.WatchState)
    ]
    if len(found) != 1:
      raise ValueError(
        f'opt_state must hold one state of flow.watch, found {len(found)}.'
      )
    measured = found[0].measured
    if not self._knows_params or max(len(self.leaves), 1) != len(measured):
      raise ValueError(
        f'the optimizer watches {len(measured)} leaves, the record knows of'
        f' {len(self.leaves)}: make it as Record(params).'
      )
    return measured[: len(self.leaves)]

  def _arrive(self, wait):
    """Takes over what has been computed; all of it, if it is to wait."""
    while self._pending:
      head = self._pending[0]
      late = len(self._pending) > PENDING
      arrived = all(
        u.is_ready() for u in jax.tree.leaves(head) if hasattr(u, 'is_ready')
      )
      if not (wait or late or arrived):
        break
      self._pending.popleft()
      step = head._replace(
        **jax.tree.map(np.asarray, dict(zip(_RESULTS, head[2:], strict=True)))
      )
      step = step._replace(scalars=_columns_apart(step.scalars))
      self._steps.append(step)
      for write in self._writers:
        write(step.number, self._named(step))
      if len(self._steps) > self._capacity:
        self._thin()

  def _thin(self):
    """Drops of the older steps what is between multiples of the stride."""
    recent = self._capacity // 4
    first_bad = next((s for s in self._steps if not _is_finite(s)), None)
    while True:
      older, newer = self._steps[:-recent], self._steps[-recent:]
      older = [
        s
        for s in older
        if s.index % self._stride[_is_measured(s)] == 0 or s is first_bad
      ]
      self._steps = older + newer
      if len(older) <= self._capacity // 2:
        return
      measured = sum(map(_is_measured, older))
      self._stride[2 * measured > len(older)] *= 2

  def _named(self, step):
    """The numbers of a step that people plot, by name."""
    named = {name: float(value) for name, value in step.scalars.items()}
    if step.tapped is not None:
      stats = layer_columns(step.tapped)
      for i, layer in enumerate(self.layers):
        for column in ('norm', 'non_finite'):
          named[f'flow/{column}/{layer.name or "output"}'] = float(
            stats[column][i]
          )
    if step.watched is not None:
      stats = leaf_columns(step.watched)
      for i, leaf in enumerate(self.leaves):
        for column in ('gradient_norm', 'update_ratio', 'non_finite'):
          named[f'parameters/{column}/{leaf.name}'] = float(stats[column][i])
    return named

  @property
  def steps(self) -> np.ndarray:
    """The numbers of the steps, (steps,)."""
    self._arrive(wait=True)
    return np.array([step.number for step in self._steps], np.int64)

  @property
  def scalars(self) -> dict[str, np.ndarray]:
    """What else was added, (steps,) each; NaN where it was not."""
    self._arrive(wait=True)
    names = dict.fromkeys(name for s in self._steps for name in s.scalars)
    return {
      name: np.array([float(s.scalars.get(name, np.nan)) for s in self._steps])
      for name in names
    }

  def has_scalar(self, name: str) -> np.ndarray:
    """At which steps a scalar of this name was added, (steps,)."""
    self._arrive(wait=True)
    return np.array([name in step.scalars for step in self._steps], bool)

  @property
  def layer_stats(self) -> dict[str, np.ndarray]:
    """By name of the statistic, (steps, layers) each.

    ``calls``, ``elements``, ``sum``, ``zeros``, ``non_finite``, ``largest``,
    ``norm`` and ``rms`` of :class:`optax_ghm.flow.TapStats`, for the layers in
    ``layers``; NaN at steps without taps.
    """
    return layer_columns(
      self._stacked('tapped', (len(self.layers), len(_tap.COLUMNS)))
    )

  @property
  def leaf_stats(self) -> dict[str, np.ndarray]:
    """By name of the statistic, (steps, leaves) each.

    The properties of :class:`optax_ghm.flow.WatchState`, for the leaves in
    ``leaves``; NaN at steps without an optimizer's state.
    """
    return leaf_columns(
      self._stacked('watched', (len(self.leaves), len(_watch.COLUMNS)))
    )

  @property
  def norms(self) -> tuple[str, ...]:
    """The names of the batch norms of which statistics were added."""
    self._arrive(wait=True)
    start = f'{_NORM}{_stats.COLUMNS[0]}/'
    return tuple(
      name.removeprefix(start)
      for name in self.scalars
      if name.startswith(start)
    )

  @property
  def norm_stats(self) -> dict[str, np.ndarray]:
    """By name of the statistic, (steps, norms) each.

    The properties of :class:`optax_ghm.flow.BatchNormStats`, for those in
    ``norms``; NaN at steps without them. They are among the ``scalars``, too.
    """
    scalars, norms = self.scalars, self.norms
    missing = np.full(len(self._steps), np.nan)
    return {
      column: np.array(
        [scalars.get(f'{_NORM}{column}/{name}', missing) for name in norms]
      )
      .reshape(len(norms), len(self._steps))
      .T
      for column in _stats.COLUMNS
    }

  @property
  def histograms(self) -> np.ndarray | None:
    """(steps, layers, 64), as in :class:`optax_ghm.flow.TapStats`, or None."""
    self._arrive(wait=True)
    if all(step.histogram is None for step in self._steps):
      return None
    return self._stacked('histogram', (len(self.layers), _tap.CELLS))

  def _stacked(self, field, shape):
    self._arrive(wait=True)
    missing = np.full(shape, np.nan, np.float32)
    values = [getattr(step, field) for step in self._steps]
    values = [missing if value is None else value for value in values]
    return np.array(values, np.float32).reshape(len(values), *shape)

  def save(self, path: str | os.PathLike) -> None:
    """Writes the record as an npz file of plain arrays, without pickle.

    Args:
      path: of the file.
    """
    arrays = {
      'steps': self.steps,
      'tapped': self._stacked('tapped', (len(self.layers), len(_tap.COLUMNS))),
      'watched': self._stacked(
        'watched', (len(self.leaves), len(_watch.COLUMNS))
      ),
    }
    if self.histograms is not None:
      arrays['histogram'] = self.histograms
    scalars = self.scalars
    about = {
      'format': FORMAT,
      'capacity': self._capacity,
      'layers': self.layers,
      'leaves': self.leaves,
      'scalars': list(scalars),
    }
    for name in ('tapped', 'watched', 'histogram'):
      arrays[f'has_{name}'] = np.array(
        [getattr(step, name) is not None for step in self._steps], bool
      )
    for i, (name, values) in enumerate(scalars.items()):
      arrays[f'scalar_{i}'] = values
      arrays[f'has_scalar_{i}'] = self.has_scalar(name)
    with open(path, 'wb') as file:
      np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Record':
    """Reads what :meth:`save` wrote; steps can be added to it.

    Args:
      path: of the file.

    Returns:
      The record.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: if it is not one of these, is damaged, or of another format.
    """
    with open(path, 'rb') as file:
      try:
        with zipfile.ZipFile(file) as archive:
          about = json.loads(str(_array(archive, 'about', 'U', ())))
          written = about['format']
          if written == FORMAT:
            return cls._of(about, archive)
      except Exception as error:  # the bytes may be anything
        raise ValueError(
          f'{path} is not a record of optax_ghm.flow: {_in_one_line(error)}.'
        ) from error
    raise ValueError(
      f'{path} is of the format {written!r:.80}, this is {FORMAT!r}.'
    )

  @classmethod
  def _of(cls, about, archive):
    """The record that was written as these."""
    capacity, layers, leaves, names = (
      about[name] for name in ('capacity', 'layers', 'leaves', 'scalars')
    )
    _check_type('capacity', capacity, int)
    record = cls(capacity=capacity)
    record.layers = tuple(_taps.Layer(*layer) for layer in layers)
    record.leaves = tuple(Leaf(*leaf) for leaf in leaves)
    record._knows_params = bool(record.leaves)
    for layer in record.layers:
      for name, kinds in _OF_LAYERS.items():
        _check_type(f'{name} of a layer', getattr(layer, name), kinds)
    for leaf in record.leaves:
      _check_type('name of a leaf', leaf.name, str)
      _check_type('rank of a leaf', leaf.rank, int)
    for name in names:
      _check_type('name of a scalar', name, str)

    steps = _array(archive, 'steps', 'i', (None,))
    if (np.diff(steps) <= 0).any():
      raise ValueError('steps do not increase')

    def column(kind, name, *shape):
      return _array(archive, name, kind, (len(steps), *shape))

    rows, present = {}, {}
    for name, shape in (
      ('tapped', (len(layers), len(_tap.COLUMNS))),
      ('histogram', (len(layers), _tap.CELLS)),
      ('watched', (len(leaves), len(_watch.COLUMNS))),
    ):
      present[name] = column('b', f'has_{name}')
      if present[name].any():
        rows[name] = column('f', name, *shape)
    scalars = {
      name: (column('f', f'scalar_{j}'), column('b', f'has_scalar_{j}'))
      for j, name in enumerate(names)
    }
    for i, number in enumerate(steps):
      tapped, histogram, watched = (
        rows[name][i] if present[name][i] else None
        for name in ('tapped', 'histogram', 'watched')
      )
      known = {
        name: values[i] for name, (values, has) in scalars.items() if has[i]
      }
      record._append(
        record._steps, int(number), tapped, histogram, watched, known
      )
    return record


_OF_LAYERS = {
  'name': str,
  'kind': str,
  'has_kernel': bool,
  'loop': str | None,
}


def _check_type(name, value, kind):
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ValueError(f'the {name} is {value!r:.80}')


def _array(archive, name, kind, shape):
  """An array of the archive, of this kind of dtype and this shape."""
  with archive.open(f'{name}.npy') as file:
    array = np.lib.format.read_array(file, allow_pickle=False)
  fits = array.ndim == len(shape) and all(
    n in (None, m) for n, m in zip(shape, array.shape, strict=True)
  )
  if array.dtype.kind != kind or not fits:
    raise ValueError(f'{name} is {array.dtype}{list(array.shape)}')
  return array


def _in_one_line(error):
  text = f'{error}' or type(error).__name__
  return repr(text)[1:-1][:200].rstrip('.')


class Leaf(NamedTuple):
  """A parameter that a watched optimizer measures.

  Attributes:
    name: its path, joined by slashes.
    rank: how many axes it has.
  """

  name: str
  rank: int


_NORM = 'batch_norm/'


def _by_norm(batch_norm):
  """The statistics of each batch norm, by its name."""
  found, _ = jax.tree_util.tree_flatten_with_path(
    batch_norm,
    is_leaf=lambda u: isinstance(u, _stats.BatchNormStats),
  )
  named = {}
  for path, stats in found:
    if not isinstance(stats, _stats.BatchNormStats):
      raise ValueError(
        f'batch_norm must be a tree of flow.BatchNormStats, got {stats!r}.'
      )
    keys = [str(k.key) for k in path if hasattr(k, 'key')]
    named[_NORM + '/'.join(keys).removesuffix('stats').rstrip('/')] = (
      stats.numbers
    )
  return named


def _columns_apart(scalars):
  """Scalars with those of batch norms one by one, of stacked ones by row."""
  apart = {}
  for name, value in scalars.items():
    if not name.startswith(_NORM) or np.ndim(value) == 0:
      apart[name] = value
      continue
    norm = name.removeprefix(_NORM)
    for at in np.ndindex(value.shape[:-1]):
      row = norm + ''.join(f'[{i}]' for i in at)
      for column, number in zip(_stats.COLUMNS, value[at], strict=True):
        apart[f'{_NORM}{column}/{row}'] = number
  return apart


def _leaves(params):
  return tuple(
    Leaf(trees.path_name(path), leaf.ndim)
    for path, leaf in trees.counted_with_path(params)
  )


@jax.jit
def _copied(tree):
  """Results of their own, which no later step can have donated away."""
  return jax.tree.map(jnp.copy, tree)


def _is_measured(step):
  return step.tapped is not None or step.watched is not None


def _is_finite(step):
  return all(np.isfinite(u).all() for u in jax.tree.leaves(step[2:]))


@functools.lru_cache(maxsize=16)
def _depth_order(layers, stacks):
  """Layers by depth, a row for each of a stack, and where each comes from.

  Stacked layers that one loop calls follow one another, step by step of it.
  """
  stacked = [layer.name for layer, u in zip(layers, stacks, strict=True) if u]
  rows = []

  def loop(layer):
    if layer.loop is not None:
      return layer.loop
    around = [
      u for u in stacked if layer.name == u or layer.name.startswith(f'{u}/')
    ]
    return min(around, key=len, default='')

  def place(members, at):
    for (size, _), together in itertools.groupby(
      members,
      lambda member: (member[1][:1], None if at else loop(member[0])),
    ):
      inner = [(layer, stack[1:]) for layer, stack in together]
      if not size:
        rows.extend((layer, at) for layer, _ in inner)
      else:
        for i in range(*size):
          place(inner, (*at, i))

  place(list(zip(layers, stacks, strict=True)), ())
  named = tuple(
    layer._replace(name=layer.name + ''.join(f'[{i}]' for i in at))
    for layer, at in rows
  )
  return named, tuple((layer.name, at) for layer, at in rows)


@functools.partial(jax.jit, static_argnames='order')
def _gather(stats, order):
  """The numbers of all layers as one array, and the histograms."""
  numbers = jnp.stack([stats[name].numbers[at] for name, at in order])
  if any(s.histogram is None for s in stats.values()):
    return numbers, None
  return numbers, jnp.stack([stats[name].histogram[at] for name, at in order])


def layer_columns(numbers: np.ndarray) -> dict[str, np.ndarray]:
  """What the properties of TapStats say, in float64."""
  columns = {
    name: np.asarray(numbers[..., i], np.float64)
    for i, name in enumerate(_tap.COLUMNS)
  }
  norm = np.sqrt(
    columns.pop('small_squares') * 2.0**-160
    + columns.pop('squares')
    + columns.pop('large_squares') * 2.0**192
  )
  columns['norm'] = norm
  columns['rms'] = norm / np.sqrt(np.maximum(columns['elements'], 1))
  columns['largest'] = np.where(
    columns['calls'] > 1,
    np.minimum(columns['largest'], norm),
    columns['largest'],
  )
  return columns


def leaf_columns(measured: np.ndarray) -> dict[str, np.ndarray]:
  """What the properties of WatchState say."""
  columns = {
    name: np.asarray(measured[..., i], np.float64)
    for i, name in enumerate(_watch.COLUMNS)
  }
  with np.errstate(divide='ignore', invalid='ignore'):
    columns['update_ratio'] = columns['update_norm'] / columns['parameter_norm']
  return columns
