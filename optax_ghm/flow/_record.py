"""The history of a training's gradients, kept on the host."""

import collections
import copy
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ghm.flow import (
  _accepts,
  _batch_norms,
  _leaf,
  _losses,
  _record_file,
  _tap,
  _taps,
  _watch,
)

MOST_PENDING = 64
"""Steps that may be on their way to the host before ``add`` waits."""

_LAYER_STATS = (
  *('calls', 'elements', 'sum', 'zeros'),
  *('non_finite', 'norm', 'rms', 'largest'),
)
_LEAF_STATS = (*_watch.COLUMNS, 'update_ratio')


class Record:
  """The history of a training: its taps and its watched optimizer.

  :meth:`add` does not wait for the device. It starts to copy the small results
  to the host, where they are read when they have arrived. The history is
  bounded: of steps older than its last quarter every second is kept, later
  every fourth, and so on. Steps with taps, a watched optimizer or losses that
  are reconciled are thinned apart from steps without, and the first step with a
  non-finite number is always kept.

  Args:
    params: the parameters, which name the rows of a watched optimizer. They are
      not kept.
    capacity: the most steps to keep, at least 4.
    writers: functions that are called with every step and its numbers by name
      before any step is dropped, such as
      :func:`optax_ghm.flow.json_lines_writer`.

  Attributes:
    layers: a :class:`optax_ghm.flow.Layer` for every tap, by depth.
    leaves: a :class:`optax_ghm.flow.Leaf` for every parameter.

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
    ...     params, flow.Taps.empty(['hidden'])
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
    self.leaves: tuple[_leaf.Leaf, ...] = _accepts.leaves(params)
    self.layers: tuple[_taps.Layer, ...] = ()
    self._knows_params = params is not None
    self._losses = 0
    self._capacity = capacity
    # A stride for the steps with measurements (True), and one for the others:
    # a few measurements among many losses would otherwise be thinned away.
    self._stride = {True: 1, False: 1}
    self._added = {True: 0, False: 0}
    self._writers = tuple(writers)
    self._pending: collections.deque[_record_file.Step] = collections.deque()
    self._steps: list[_record_file.Step] = []

  def __len__(self) -> int:
    return len(self._all_steps())

  def add(
    self,
    step: int,
    *,
    taps: _taps.Taps | None = None,
    opt_state: optax.OptState | None = None,
    batch_norm: Any = None,
    **scalars: Any,
  ) -> None:
    """Adds one step, without waiting until it is computed.

    Args:
      step: number of the step, larger than all before.
      taps: the filled taps.
      opt_state: a pytree that holds one state of :func:`optax_ghm.flow.watch`,
        or of :func:`optax_ghm.conflict.reconciled_aggregate`, or one of each.
        It is copied, so that the next step may donate it. Give it only at steps
        that measured: at others it still holds the last measurement.
      batch_norm: a pytree of :class:`optax_ghm.flow.BatchNormStats`: the
        collection ``batch_norm_stats`` of Linen, or
        ``nnx.state(model, optax_ghm.nnx.BatchNormStats)``.
      **scalars: any other numbers to keep, such as the loss. Of an ensemble or
        of replicas, add the mean or one of them, or keep a record for each.
        The same holds for ``taps`` and ``opt_state``.

    Raises:
      TypeError: if ``step`` is not an integer, or a scalar not a real number.
      ValueError: if the number is not larger, if a scalar is an array of
        several or one number, if the layers differ from those of the steps
        before, if taps or ``opt_state`` are those of replicas or of an
        ensemble, or if ``opt_state`` holds no such state, or several of a
        kind, or one that does not fit ``params`` or has other losses.
    """
    step = operator.index(step)
    for name, value in scalars.items():
      _accepts.check_scalar(name, value)
    last = [*self._steps[-1:], *self._pending][-1:]
    if last and step <= last[0].number:
      raise ValueError(f'step {step} comes after step {last[0].number}.')
    tapped = histogram = watched = losses = None
    if opt_state is not None:
      count = len(self.leaves) if self._knows_params else None
      watched, losses = _accepts.measured(opt_state, count, self._losses)
    if taps is not None:
      layers, order = _taps.depth_order(taps.layers, _accepts.stacks(taps))
      if self.layers and layers != self.layers:
        raise ValueError(
          'the layers differ from those of the steps before:'
          f' {[layer.name for layer in layers]} and'
          f' {[layer.name for layer in self.layers]}.'
        )
      self.layers = layers
      tapped, histogram = _taps.gather(taps.stats, order)
    scalars |= _batch_norms.by_name(batch_norm)
    on_device = {k: v for k, v in scalars.items() if isinstance(v, jax.Array)}
    copies = _copy((tapped, histogram, watched, losses, on_device))
    for leaf in jax.tree.leaves(copies):
      leaf.copy_to_host_async()
    tapped, histogram, watched, losses, values = copies
    scalars |= values
    numbers = tapped, histogram, watched, scalars, losses
    self._append(self._pending, _record_file.Step(step, 0, *numbers))
    self._receive(wait=False)

  def _append(self, steps, step):
    measured = step.is_measured
    steps.append(step._replace(index=self._added[measured]))
    self._added[measured] += 1
    if step.losses is not None:
      self._losses = len(step.losses)

  def until(self, step: int) -> 'Record':
    """The steps before a number, to go on from an older checkpoint.

    Args:
      step: the first step that will be made again.

    Returns:
      A record of the steps before, to which steps can be added. It has the same
      writers, which have written the later steps already.
    """
    earlier = (s for s in self._all_steps() if s.number < step)
    return self._of(earlier, self._writers)

  def _of(self, steps, writers=()):
    record = copy.copy(self)
    record._steps, record._writers = list(steps), tuple(writers)
    record._pending = collections.deque()
    record._stride, record._added = dict(self._stride), dict(self._added)
    return record

  def __getstate__(self) -> dict[str, Any]:
    """Without the writers, whose files and sessions are of this process."""
    self._receive(wait=True)
    return self.__dict__ | {'_writers': ()}

  def having(self, field: str) -> 'Record':
    """The steps at which there were taps, a watched optimizer, or losses.

    Args:
      field: ``'tapped'``, ``'watched'`` or ``'losses'``.

    Returns:
      A record of these steps only.
    """
    every = self._all_steps()
    return self._of(s for s in every if getattr(s, field) is not None)

  def _all_steps(self):
    self._receive(wait=True)
    return self._steps

  def _receive(self, wait):
    """Takes over the steps that have been computed, or waits for all."""
    while self._pending:
      head = self._pending[0]
      arrived = all(
        u.is_ready() for u in jax.tree.leaves(head) if hasattr(u, 'is_ready')
      )
      if not (wait or arrived or len(self._pending) > MOST_PENDING):
        break
      self._pending.popleft()
      step = _record_file.Step(*head[:2], *jax.tree.map(np.asarray, head[2:]))
      step = step._replace(scalars=_batch_norms.split(step.scalars))
      self._steps.append(step)
      for write in self._writers:
        write(step.number, self._named(step))
      if len(self._steps) > self._capacity:
        self._thin()

  def _thin(self):
    """Drops older steps whose index is no multiple of the stride."""
    recent = self._capacity // 4
    first_bad = next((s for s in self._steps if not _is_finite(s)), None)
    while True:
      older, newer = self._steps[:-recent], self._steps[-recent:]
      older = [
        s
        for s in older
        if s is first_bad or s.index % self._stride[s.is_measured] == 0
      ]
      self._steps = older + newer
      if len(older) <= self._capacity // 2:
        return
      measured = sum(s.is_measured for s in older)
      self._stride[2 * measured > len(older)] *= 2

  def _named(self, step):
    """The numbers of a step that people plot, by name."""
    named = {name: float(value) for name, value in step.scalars.items()}
    if step.tapped is not None:
      stats = _columns(_tap.TapStats, step.tapped, ('norm', 'non_finite'))
      for i, layer in enumerate(self.layers):
        for name, values in stats.items():
          named[f'flow/{name}/{layer.name or "output"}'] = float(values[i])
    if step.watched is not None:
      stats = _columns(
        _watch.WatchState,
        step.watched,
        ('gradient_norm', 'update_ratio', 'non_finite'),
      )
      for i, leaf in enumerate(self.leaves):
        for name, values in stats.items():
          named[f'parameters/{name}/{leaf.name}'] = float(values[i])
    return named if step.losses is None else named | _losses.named(step.losses)

  @property
  def steps(self) -> np.ndarray:
    """The numbers of the steps, (steps,)."""
    return np.array([step.number for step in self._all_steps()], np.int64)

  @property
  def scalars(self) -> dict[str, np.ndarray]:
    """All other numbers that were added, (steps,) each; NaN where missing."""
    steps = self._all_steps()
    names = dict.fromkeys(name for step in steps for name in step.scalars)
    return {
      name: np.array([float(s.scalars.get(name, np.nan)) for s in steps])
      for name in names
    }

  def has_scalar(self, name: str) -> np.ndarray:
    """Tells at which steps a scalar of this name was added, (steps,)."""
    return np.array([name in step.scalars for step in self._all_steps()], bool)

  @property
  def layer_stats(self) -> dict[str, np.ndarray]:
    """Statistics of the taps by name, (steps, layers) each.

    ``calls``, ``elements``, ``sum``, ``zeros``, ``non_finite``, ``norm``,
    ``rms`` and ``largest`` of :class:`optax_ghm.flow.TapStats`, in the order of
    ``layers``; NaN at steps without taps.
    """
    return _columns(_tap.TapStats, self._stacked('tapped'), _LAYER_STATS)

  @property
  def leaf_stats(self) -> dict[str, np.ndarray]:
    """Statistics of the parameters by name, (steps, leaves) each.

    The properties of :class:`optax_ghm.flow.WatchState`, in the order of
    ``leaves``; NaN at steps without an optimizer's state.
    """
    return _columns(_watch.WatchState, self._stacked('watched'), _LEAF_STATS)

  @property
  def loss_stats(self) -> dict[str, np.ndarray]:
    """Statistics of reconciled losses by name, (steps, losses) each.

    ``weight``, ``norm`` of the gradient, ``lowest_cosine`` with another loss
    and ``non_finite``, how often it was left out, as in
    :class:`optax_ghm.conflict.ReconciledAggregateState`; ``cosine``, of all
    pairs, is (steps, losses, losses). NaN at steps without them.
    """
    return _losses.columns(self._stacked('losses'))

  @property
  def batch_norms(self) -> tuple[str, ...]:
    """The names of the batch norms whose statistics were added."""
    return _batch_norms.names(self.scalars)

  @property
  def batch_norm_stats(self) -> dict[str, np.ndarray]:
    """Statistics of the batch norms by name, (steps, batch norms) each.

    The properties of :class:`optax_ghm.flow.BatchNormStats`, in the order of
    ``batch_norms``; NaN at steps without them. They are ``scalars`` as well.
    """
    return _batch_norms.columns(self.scalars, len(self))

  @property
  def histograms(self) -> np.ndarray | None:
    """(steps, layers, 64), as in :class:`optax_ghm.flow.TapStats`, or None."""
    if all(step.histogram is None for step in self._all_steps()):
      return None
    return self._stacked('histogram')

  def _stacked(self, field):
    counts = len(self.layers), len(self.leaves), self._losses
    shape = _record_file.shapes(*counts)[field]
    return _record_file.stacked(self._all_steps(), field, shape)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the record as an npz file of plain arrays, without pickle.

    Args:
      path: of the file.
    """
    steps = self._all_steps()
    _record_file.write(
      path,
      _record_file.Content(self._capacity, self.layers, self.leaves, steps),
    )

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> 'Record':
    """Reads a file that :meth:`save` wrote. Steps can be added to the record.

    Args:
      path: of the file.

    Returns:
      The record.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: if the file is no record, is damaged, or of another format.
    """
    capacity, layers, leaves, steps = _record_file.read(path)
    record = cls(capacity=capacity)
    record.layers, record.leaves = layers, leaves
    record._knows_params = bool(leaves)
    for step in steps:
      record._append(record._steps, step)
    return record


@jax.jit
def _copy(tree):
  """Copies that no later step can donate."""
  return jax.tree.map(jnp.copy, tree)


def _columns(kind: Any, numbers, names):
  """Properties of statistics of a kind, computed by NumPy in float64."""
  missing = [None] * (len(kind._fields) - 1)
  stats = kind(numbers.astype(np.float64), *missing)
  with np.errstate(all='ignore'):
    return {name: getattr(stats, name) for name in names}


def _is_finite(step):
  return all(np.isfinite(u).all() for u in jax.tree.leaves(step[2:]))
