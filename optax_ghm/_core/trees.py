"""The leaves that have a gradient, and their names."""

from typing import Any

import jax

from optax_ghm._core import arrays


def counted(tree: Any) -> list[jax.Array]:
  """The leaves that have a norm: floating or complex, and not empty."""
  return [u for u in jax.tree.leaves(tree) if arrays.is_inexact(u) and u.size]


def counted_with_path(tree):
  return [
    (path, leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if arrays.is_inexact(leaf) and leaf.size
  ]


def counted_with_name(tree: Any) -> list[tuple[str, Any]]:
  """The leaves that are measured, and their names."""
  return [(name(path), leaf) for path, leaf in counted_with_path(tree)]


def name(path):
  names = [
    str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k))))
    for k in path
  ]
  if path and path[-1] == jax.tree_util.GetAttrKey('value'):
    names.pop()  # of the box around a parameter
  return '/'.join(names)
