"""Gradients of examples, or of losses: their norms and weighted sums."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm._core.norms import norm

FEW = 8
"""So many rows are added one by one: a matrix product would copy them."""

MADE_BY = {
  'batch': 'Make them with jax.vmap(jax.grad(...)).',
  'loss': 'Make them with jax.jacrev(...).',
}
"""Where gradients with a leading axis come from."""


def are_few(rows: jax.Array) -> bool:
  """Whether so few rows are better taken one by one."""
  count = rows.shape[0]  # no integer, if an export leaves it open
  return isinstance(count, int) and count <= FEW


def leading(
  updates: Any, params: Any = None, what: str = 'batch'
) -> list[jax.Array]:
  """The leaves that have a gradient, all with the same leading axis.

  Args:
    updates: pytree whose floating and complex leaves have the examples, or the
      losses, along their first axis.
    params: the parameters, if known, to check the shapes of the gradients.
    what: what the axis is, for the error.

  Raises:
    ValueError: if the leaves differ in their first axis or have none, or if a
      leaf does not have the shape of its parameter behind that axis.
  """
  leaves, of_params = jax.tree.leaves(updates), jax.tree.leaves(params)
  counted = [leaf for leaf in leaves if arrays.is_inexact(leaf)]
  sizes = {leaf.shape[:1] for leaf in counted}
  if len(sizes) > 1 or () in sizes:
    raise ValueError(
      f'updates must be gradients with one leading {what} axis, got shapes'
      f' {[leaf.shape for leaf in counted]}.'
    )
  if len(leaves) == len(of_params):  # gradients may be averaged already
    for leaf, param in zip(leaves, of_params, strict=True):
      if arrays.is_inexact(leaf) and leaf.shape[1:] != jnp.shape(param):
        raise ValueError(
          f'updates must be gradients with a {what} axis before the shape of'
          f' the parameter: got {leaf.shape} for {jnp.shape(param)}.'
          f' {MADE_BY[what]}'
        )
  return counted


def norms(updates: Any, params: Any = None) -> jax.Array:
  """The global norm of every example's gradient.

  Args:
    updates: pytree whose floating and complex leaves have the examples along
      their first axis. At least one leaf is floating or complex.
    params: the parameters, if known, to check the shapes of the gradients.

  Returns:
    The norms, float32 of shape (batch,).

  Raises:
    ValueError: as :func:`leading`.
  """
  examples = leading(updates, params)
  per_leaf = [
    norm(leaf, tuple(range(1, leaf.ndim))).astype(jnp.float32)
    for leaf in examples
  ]
  return norm(jnp.stack(per_leaf, -1), axis=-1)


def weighted_sum(
  updates: Any, weights: jax.Array, axis_name: arrays.AxisName = None
) -> Any:
  """The weighted sum of the examples' gradients.

  Args:
    updates: pytree with the examples along the first axis of every floating or
      complex leaf; other leaves pass unchanged.
    weights: floats of shape (batch,). A gradient of weight 0 may be NaN.
    axis_name: mapped axis, or axes, over which the batch is split.

  Returns:
    A pytree of the same structure, without the first axis.
  """

  def over_examples(update):
    if not arrays.is_inexact(update):
      return update
    if are_few(weights):  # one loop over all rows, without a copy of them
      total = sum(
        jnp.where(weight != 0, arrays.multiply(arrays.widen(row), weight), 0)
        for weight, row in zip(weights, update, strict=True)
      )
    else:
      counts = jnp.expand_dims(weights != 0, range(1, update.ndim))
      numbers = arrays.widen(jnp.where(counts, update, 0))
      total = arrays.contract(weights.astype(numbers.dtype), numbers)
    return arrays.psum(total, axis_name).astype(update.dtype)

  return jax.tree.map(over_examples, updates)
