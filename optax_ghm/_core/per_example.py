"""Per-example gradients: their norms, and averages of them."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm._core.norms import norm


def norms(updates: Any, params: Any = None) -> jax.Array:
  """The global norm of every example's gradients, float32 of shape (batch,).

  Args:
    updates: pytree whose floating and complex leaves, of which there is one at
      least, have the examples along their first axis.
    params: if given, what the gradients are of.

  Raises:
    ValueError: if the leaves differ in their first axis or have none, or do not
      have the shape of ``params`` behind it.
  """
  examples = [u for u in jax.tree.leaves(updates) if arrays.is_inexact(u)]
  sizes = {u.shape[0] if u.ndim else None for u in examples}
  if len(sizes) > 1 or None in sizes:
    raise ValueError(
      'updates must be per-example gradients with one leading batch axis,'
      f' got shapes {[u.shape for u in examples]}.'
    )
  _check_per_example(updates, params)
  per_leaf = [
    norm(u, tuple(range(1, u.ndim))).astype(jnp.float32) for u in examples
  ]
  return norm(jnp.stack(per_leaf, -1), axis=-1)


def _check_per_example(updates, params):
  """Catches gradients that were averaged before, where params can tell."""
  updates, params = jax.tree.leaves(updates), jax.tree.leaves(params)
  if len(updates) != len(params):
    return
  for update, param in zip(updates, params, strict=True):
    if arrays.is_inexact(update) and update.shape[1:] != jnp.shape(param):
      raise ValueError(
        'updates must be per-example gradients, a batch axis before the shape'
        f' of the parameter: got {update.shape} for {jnp.shape(param)}. Make'
        ' them with jax.vmap(jax.grad(...)).'
      )


def weighted_sum(
  updates: Any, weights: jax.Array, axis_name: arrays.AxisName = None
) -> Any:
  """The sum of the examples' gradients; what has weight 0 may be NaN or inf.

  Args:
    updates: as for :func:`norms`; leaves that are neither floating nor complex
      pass unchanged.
    weights: of shape (batch,).
    axis_name: mapped axis, or axes, over which the batch is split.
  """

  def over_examples(update):
    if not arrays.is_inexact(update):
      return update
    dtype = arrays.at_least_float32(update.dtype)
    counts = jnp.expand_dims(weights != 0, range(1, update.ndim))
    total = arrays.contract(
      weights.astype(dtype), jnp.where(counts, update, 0).astype(dtype)
    )
    return arrays.psum(total, axis_name).astype(update.dtype)

  return jax.tree.map(over_examples, updates)
