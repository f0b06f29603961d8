"""Scopes: what of a tree is measured, clipped or normalized together."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_ghm._core import arrays, trees
from optax_ghm._core.norms import group_norms, unit_norms


@dataclasses.dataclass(frozen=True)
class Groups:
  """Named groups of leaves: a scope of the clips and normalizations.

  Attributes:
    labels: a label for every leaf, as for ``optax.partition``: a pytree that is
      a prefix of that of the gradients, or a function that makes it of them.

  Examples:
    >>> import optax_ghm
    >>> by_part = optax_ghm.Groups({'encoder': 'slow', 'head': 'fast'})
    >>> tx = optax_ghm.clip_by_zscore(scope=by_part)
  """

  labels: Any


_VECTORS = ('bias', 'scale')


def _layer_and_parameter(path):
  return ['', '', *trees.names(path)][-2:]


def is_kernel(path: tuple[Any, ...], leaf: jax.Array) -> bool:
  """Whether it has a fan-in: two axes at least, and no bias or scale."""
  return leaf.ndim > 1 and _layer_and_parameter(path)[1] not in _VECTORS


def flax_unit_axes(path: tuple[Any, ...], leaf: jax.Array) -> tuple[int, ...]:
  """The axes of a parameter of Flax that a unit sums over: its fan-in.

  A unit is what computes one output: a column of a dense kernel (in, out), a
  filter of a convolution (…, in, out), a column of one head of the query, key
  or value (in, heads, features), and the vector of one token of an embedding
  (tokens, features). Biases, scales and all of rank 0 or 1 are one unit. Not
  known by their names, and to be told by :class:`Units`: other layers with
  heads, such as a ``DenseGeneral``, and transposed kernels.

  Args:
    path: of the leaf, as ``jax.tree_util.tree_map_with_path`` gives it.
    leaf: the array.

  Returns:
    Axes to reduce over; the others count the units.

  Examples:
    >>> import jax
    >>> import optax_ghm
    >>> kernel = jax.tree_util.DictKey('kernel')
    >>> optax_ghm.flax_unit_axes((kernel,), jax.numpy.ones((3, 3, 16, 32)))
    (0, 1, 2)

  References:
    Brock et al., `High-Performance Large-Scale Image Recognition Without
    Normalization <https://arxiv.org/abs/2102.06171>`_, 2021
  """
  layer, parameter = _layer_and_parameter(path)
  if not is_kernel(path, leaf):
    return tuple(range(leaf.ndim))
  if parameter == 'embedding':
    return tuple(range(1, leaf.ndim))
  if layer in ('query', 'key', 'value') and leaf.ndim == 3:
    return (0,)
  return tuple(range(leaf.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Units:
  """Every unit by itself: the scope ``'unit'`` for layouts of one's own.

  Attributes:
    axes: from the path of a leaf and the leaf to the axes that a unit sums
      over, as :func:`flax_unit_axes`, which ``'unit'`` stands for.

  Examples:
    >>> import jax
    >>> import optax_ghm
    >>> def of_layers(path, leaf):
    ...   # Layers in a row, as nn.scan makes them: (layers, in, out).
    ...   layer = jax.eval_shape(lambda leaf: leaf[0], leaf)
    ...   return tuple(i + 1 for i in optax_ghm.flax_unit_axes(path, layer))
    >>> stacked = optax_ghm.Units(of_layers)
    >>> tx = optax_ghm.clip_by_parameter_norm(scope=stacked)
  """

  axes: Callable[[tuple[Any, ...], Any], tuple[int, ...]] = flax_unit_axes


FLAX_UNITS = Units()


Scope = Literal['global', 'leaf', 'unit'] | Groups | Units
"""The whole tree, every leaf, every unit of a leaf, or groups of leaves."""


class Scoped(NamedTuple):
  """The scope on one tree: which numbers of it have a norm together.

  Attributes:
    shape: of its norms: () for the whole tree, else (number of groups,).
    groups: of every counted leaf, an integer.
    axes: of every counted leaf, those that a unit sums over; None without
      units.
  """

  shape: tuple[int, ...]
  groups: np.ndarray
  axes: list[tuple[int, ...]] | None = None

  def norms(self, tree: Any, axis_name: arrays.AxisName = None) -> jax.Array:
    """The norms, float32 of the shape, in one pass if there are no units."""
    leaves = trees.counted(tree)
    if self.axes is None:
      count = self.shape[0] if self.shape else 1
      norms = group_norms(leaves, self.groups, count, axis_name)
    else:
      norms = unit_norms(leaves, self.axes, axis_name)
    return norms.astype(jnp.float32).reshape(self.shape)

  def sizes(self, tree: Any, axis_name: arrays.AxisName = None) -> jax.Array:
    """How many numbers have a norm together, float32 of the shape."""
    leaves = trees.counted(tree)
    if self.axes is None:
      sizes = np.zeros(self.shape[0] if self.shape else 1, np.float32)
      np.add.at(sizes, self.groups, [leaf.size for leaf in leaves])
    else:
      per_leaf = [
        int(np.prod([leaf.shape[i] for i in axes]))
        for leaf, axes in zip(leaves, self.axes, strict=True)
      ]
      sizes = np.repeat(
        np.array(per_leaf, np.float32),
        [leaf.size // n for leaf, n in zip(leaves, per_leaf, strict=True)],
      )
    return jnp.reshape(arrays.psum(sizes, axis_name), self.shape)

  def scale(self, tree: Any, factor: jax.Array) -> Any:
    """The tree times the factor of each norm; 0 where that is 0."""
    leaves, structure = jax.tree.flatten(tree)
    groups, offset = iter(self.groups), 0
    every_axes = iter(self.axes or ())

    def scale(leaf):
      nonlocal offset
      if not trees.is_counted(leaf):
        return leaf
      own = factor
      if self.axes is not None:
        axes = next(every_axes)
        shape = [1 if i in axes else size for i, size in enumerate(leaf.shape)]
        count = int(np.prod(shape))
        own = factor[offset : offset + count].reshape(shape)
        offset += count
      elif factor.ndim:
        own = factor[next(groups)]
      dtype = arrays.at_least_float32(leaf.dtype)
      scaled = arrays.multiply(
        leaf.astype(dtype), own.astype(jnp.finfo(dtype).dtype)
      )
      return jnp.where(own > 0, scaled, 0).astype(leaf.dtype)

    return structure.unflatten([scale(leaf) for leaf in leaves])


def scoped(scope: Scope, tree: Any) -> Scoped:
  """The scope on the tree.

  Raises:
    ValueError: if it is not a :data:`Scope`.
  """
  leaves = trees.counted(tree)
  if isinstance(scope, Groups):
    return _grouped(scope, tree)
  if isinstance(scope, Units):
    return _united(scope, tree)
  match scope:
    case 'global':
      return Scoped((), np.zeros(len(leaves), int))
    case 'leaf':
      return Scoped((len(leaves),), np.arange(len(leaves)))
    case 'unit':
      return _united(FLAX_UNITS, tree)
  raise ValueError(
    f"scope must be 'global', 'leaf', 'unit', Groups or Units, got {scope!r}."
  )


def _grouped(scope, tree):
  labels = scope.labels(tree) if callable(scope.labels) else scope.labels
  each = jax.tree.leaves(jax.tree.broadcast(labels, tree))
  of_all = jax.tree.leaves(tree)
  each = [
    label
    for label, leaf in zip(each, of_all, strict=True)
    if trees.is_counted(leaf)
  ]
  names = sorted(set(jax.tree.leaves(labels)), key=str)
  groups = np.array([names.index(label) for label in each], int)
  return Scoped((len(names),), groups)


def _united(scope, tree):
  axes = [
    np.lib.array_utils.normalize_axis_tuple(scope.axes(path, leaf), leaf.ndim)
    for path, leaf in trees.counted_with_path(tree)
  ]
  counts = [
    int(np.prod([leaf.shape[i] for i in set(range(leaf.ndim)) - set(kept)]))
    for leaf, kept in zip(trees.counted(tree), axes, strict=True)
  ]
  return Scoped((sum(counts),), np.arange(len(counts)), axes)
