"""The statistics of batch norms as scalars of a record."""

from typing import Any

import jax
import numpy as np

from optax_ghm.batch_normalization import _stats

_PREFIX = 'batch_norm/'


def by_name(batch_norm: Any) -> dict[str, jax.Array]:
  """The statistics of every batch norm in a pytree, by its name."""
  found, _ = jax.tree_util.tree_flatten_with_path(
    batch_norm, is_leaf=lambda u: isinstance(u, _stats.BatchNormStats)
  )
  named = {}
  for path, stats in found:
    if not isinstance(stats, _stats.BatchNormStats):
      raise ValueError(
        f'batch_norm must be a tree of flow.BatchNormStats, got {stats!r}.'
      )
    keys = [str(k.key) for k in path if hasattr(k, 'key')]
    name = '/'.join(keys).removesuffix('stats').rstrip('/')
    named[_PREFIX + name] = stats.numbers
  return named


def split(scalars: dict[str, Any]) -> dict[str, Any]:
  """The scalars, with one for every statistic of every batch norm.

  Batch norms that are stacked are told apart by their index.
  """
  found = {}
  for name, value in scalars.items():
    if not name.startswith(_PREFIX) or np.ndim(value) == 0:
      found[name] = value
      continue
    norm = name.removeprefix(_PREFIX)
    for at in np.ndindex(value.shape[:-1]):
      row = norm + ''.join(f'[{i}]' for i in at)
      for column, number in zip(_stats.COLUMNS, value[at], strict=True):
        found[f'{_PREFIX}{column}/{row}'] = number
  return found


def names(scalars: dict[str, Any]) -> tuple[str, ...]:
  """The names of the batch norms among the scalars."""
  start = f'{_PREFIX}{_stats.COLUMNS[0]}/'
  return tuple(
    name.removeprefix(start) for name in scalars if name.startswith(start)
  )


def columns(
  scalars: dict[str, np.ndarray], steps: int
) -> dict[str, np.ndarray]:
  """The statistics by name, (steps, batch norms) each; NaN where missing."""
  missing, rows = np.full(steps, np.nan), names(scalars)
  return {
    column: np.stack(
      [
        missing,
        *(scalars.get(f'{_PREFIX}{column}/{row}', missing) for row in rows),
      ],
      axis=1,
    )[:, 1:]
    for column in _stats.COLUMNS
  }
