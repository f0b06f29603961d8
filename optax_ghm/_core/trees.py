"""The leaves of a tree that have a gradient, and their names."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ghm._core import arrays


def is_counted(leaf: Any) -> bool:
  """Whether a leaf has a norm: it is floating or complex, and not empty."""
  return arrays.is_inexact(leaf) and 0 not in leaf.shape


def counted(tree: Any) -> list[jax.Array]:
  """The leaves that have a norm."""
  return [leaf for leaf in jax.tree.leaves(tree) if is_counted(leaf)]


def counted_with_path(tree: Any) -> list[tuple[tuple[Any, ...], jax.Array]]:
  """The leaves that have a norm, as pairs of path and leaf."""
  return [
    (path, leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if is_counted(leaf)
  ]


def like(tree: Any, other: Any) -> Any:
  """``other`` without those leaves in whose place ``tree`` has none.

  Frozen parameters are None, or a ``MaskedNode``, among the updates.
  """

  def is_gap(node):
    return node is None or isinstance(node, optax.MaskedNode)

  return jax.tree.map(
    lambda node, own: None if is_gap(node) else own,
    tree,
    other,
    is_leaf=is_gap,
  )


def select(where: jax.Array, new: Any, old: Any) -> Any:
  """``new`` where the condition holds, else ``old``.

  The axes of the condition are the first axes of every leaf.
  """

  def select(new, old):
    axes = range(where.ndim, new.ndim)
    return jnp.where(jnp.expand_dims(where, axes), new, old)

  return jax.tree.map(select, new, old)


def names(path: tuple[Any, ...]) -> list[str]:
  """The names of the modules along a path, then that of the parameter."""
  # The value of a box, such as an nnx.Variable or Linen's metadata, has none.
  if path and path[-1] == jax.tree_util.GetAttrKey('value'):
    path = path[:-1]
  return [
    str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k))))
    for k in path
  ]


def path_name(path: tuple[Any, ...]) -> str:
  """The names along a path, joined by slashes."""
  return '/'.join(names(path))
