"""The losses that an optimizer reconciles, as rows of numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ghm.conflict import _aggregate

COLUMNS = ('weight', 'norm', 'non_finite')
"""The first columns; the cosines with all losses follow."""


@jax.jit
def rows(state: _aggregate.ReconciledAggregateState) -> jax.Array:
  """A row for every loss, (m, 3 + m)."""
  norms = jnp.sqrt(jnp.diagonal(state.gramian))
  columns = state.weights, norms, state.non_finite.astype(norms.dtype)
  return jnp.concatenate([jnp.stack(columns, axis=1), state.cosines], axis=1)


def columns(rows: np.ndarray) -> dict[str, np.ndarray]:
  """The columns by name, and the lowest cosine of every loss."""
  rows = rows.astype(np.float64)
  cosines = rows[..., len(COLUMNS) :]
  return {
    **{name: rows[..., i] for i, name in enumerate(COLUMNS)},
    'lowest_cosine': cosines.min(-1, initial=1),
    'cosine': cosines,
  }


def named(rows: np.ndarray) -> dict[str, Any]:
  """The numbers of every loss that people plot, by name."""
  return {
    f'losses/{name}/{i}': float(value)
    for name, values in columns(rows).items()
    if values.ndim == 1
    for i, value in enumerate(values)
  }
