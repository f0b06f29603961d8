"""The parameters that a watched optimizer measures, and their names."""

from typing import Any, NamedTuple

from optax_ghm._core import trees


class Leaf(NamedTuple):
  """A parameter that a watched optimizer measures.

  Attributes:
    name: path of the parameter, joined by slashes.
    rank: number of axes.
  """

  name: str
  rank: int


def leaves(params: Any) -> tuple[Leaf, ...]:
  """The parameters that have a gradient, in the order of their rows."""
  return tuple(
    Leaf(trees.path_name(path), leaf.ndim)
    for path, leaf in trees.counted_with_path(params)
  )


def leaf_names(params: Any) -> list[str]:
  """Names of the rows that :func:`watch` measures.

  Args:
    params: the parameters.

  Returns:
    For every leaf that has a gradient, its path joined by slashes.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> flow.leaf_names({'dense': {'kernel': jnp.ones((2, 2))}, 'step': 3})
    ['dense/kernel']
  """
  return [leaf.name for leaf in leaves(params)]
