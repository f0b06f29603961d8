"""What a record accepts, and what to give it instead."""

import numbers
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ghm.conflict import _aggregate
from optax_ghm.flow import _leaf, _losses, _taps, _watch

_REAL = jnp.floating, jnp.integer, jnp.bool_


ONE_OF_SEVERAL = (
  'of replicas (pmap) or of an ensemble (vmap). Give that of one of them,'
  ' jax.tree.map(lambda x: x[0], {}), or keep a record for each.'
)


def leaves(params: Any) -> tuple[_leaf.Leaf, ...]:
  """The parameters that a watched optimizer measures.

  Raises:
    TypeError: if ``params`` is a module of Flax NNX, which holds more.
  """
  nnx = sys.modules.get('flax.nnx')
  if nnx is not None and isinstance(params, nnx.Module):
    raise TypeError(
      'params must be the parameters, nnx.state(model, nnx.Param), and not the'
      f' model, a {type(params).__name__}.'
    )
  return _leaf.leaves(params)


def measured(
  opt_state: Any, count: int | None, losses: int
) -> tuple[jax.Array | None, jax.Array | None]:
  """The rows of a watched optimizer's state, and those of reconciled losses.

  Args:
    opt_state: a pytree that holds one state of ``watch``, or one of
      ``reconciled_aggregate``, or one of each.
    count: the number of parameters; None if they are not known.
    losses: the number of losses; 0 if it is not known.

  Returns:
    (``count``, columns) and (``losses``, columns); None for what is not there.

  Raises:
    ValueError: if it holds neither, or several of a kind, or they are not of
      these rows.
  """
  watched = _states(opt_state, _watch.WatchState)
  reconciled = _states(opt_state, _aggregate.ReconciledAggregateState)
  if {len(watched), len(reconciled)} not in ({1}, {0, 1}):
    raise ValueError(
      'opt_state must hold one state of flow.watch, or one of'
      f' conflict.reconciled_aggregate, or one of each, found {len(watched)}'
      f' and {len(reconciled)}. (Of an nnx.Optimizer, give its opt_state.)'
    )
  return (
    _of_leaves(watched[0].measured, count) if watched else None,
    _of_losses(reconciled[0], losses) if reconciled else None,
  )


def _states(opt_state, kind):
  def is_one(node):
    return isinstance(node, kind)

  return list(filter(is_one, jax.tree.leaves(opt_state, is_leaf=is_one)))


def _check_one(stack):
  if stack:
    raise ValueError(
      f'opt_state has leading axes {stack}: it is '
      + ONE_OF_SEVERAL.format('opt_state')
    )


def _of_losses(state, losses):
  _check_one(state.weights.shape[:-1])
  if losses not in (0, len(state.weights)):
    raise ValueError(
      'the number of losses differs from that of the steps before:'
      f' {len(state.weights)} and {losses}.'
    )
  return _losses.rows(state)


def _of_leaves(rows, count):
  _check_one(rows.shape[:-2])
  if count is None or max(count, 1) != len(rows):
    raise ValueError(
      f'the optimizer watches {len(rows)} leaves, the record knows of'
      f' {count or 0}: make it as Record(params).'
    )
  return rows[:count]


def stacks(taps: _taps.Taps) -> tuple[tuple[int, ...], ...]:
  """The leading axes of all taps, those of layers that a loop calls.

  Raises:
    ValueError: if a layer that no loop calls has such axes.
  """
  found = tuple(stats.numbers.shape[:-1] for stats in taps.values())
  for layer, stack in zip(taps.layers, found, strict=True):
    if stack and layer.loop == '':
      raise ValueError(
        f'the tap of {layer.name or "the model"} has leading axes {stack}, and'
        ' no loop over layers calls it: it is ' + ONE_OF_SEVERAL.format('taps')
      )
  return found


def check_scalar(name: str, value: Any) -> None:
  """Raises an error that names the scalar, unless it is one real number.

  Raises:
    TypeError: if ``value`` is neither a real number nor an array of real
      numbers.
    ValueError: if it is an array with axes.
  """
  dtype = getattr(value, 'dtype', None)
  if dtype is None:
    real = isinstance(value, numbers.Real)
  else:
    real = any(jnp.issubdtype(dtype, kind) for kind in _REAL)
  if not real:
    raise TypeError(f'{name} must be a real number, got {value!r}.')
  if np.shape(value):
    raise ValueError(
      f'{name} must be a scalar, got an array of shape {np.shape(value)}. Add'
      ' its mean, or each number under a name of its own.'
    )
