"""Scopes: which numbers of a tree have a norm together."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from optax_ghm._core import arrays, trees
from optax_ghm._core.norms import group_norms, unit_norms


@dataclasses.dataclass(frozen=True)
class Groups:
  """Named groups of leaves: a scope of the clips and normalizations.

  Attributes:
    labels: a label for every leaf, as for ``optax.partition``: a pytree that is
      a prefix of the gradients, or a function from the gradients to one.

  Examples:
    >>> import optax_ghm
    >>> by_part = optax_ghm.Groups({'encoder': 'slow', 'head': 'fast'})
    >>> tx = optax_ghm.clip_by_zscore(scope=by_part)
  """

  labels: Any


def is_kernel(path: tuple[Any, ...], leaf: jax.Array) -> bool:
  """Whether a parameter of Flax has a fan-in.

  It has two axes at least, and is neither a bias nor a scale.
  """
  return leaf.ndim > 1 and trees.names(path)[-1:] not in (['bias'], ['scale'])


def flax_unit_axes(path: tuple[Any, ...], leaf: jax.Array) -> tuple[int, ...]:
  """The fan-in of a parameter of Flax: the axes that a unit sums over.

  A unit is what computes one output: a column of a dense kernel (in, out), a
  filter of a convolution (…, in, out), a column of one head of the query, key
  or value (in, heads, features), or the vector of one token of an embedding
  (tokens, features). A bias, a scale, and every parameter of rank 0 or 1 is one
  unit. Other layers with heads, such as a ``DenseGeneral``, and transposed
  kernels cannot be told by their names: use :class:`~optax_ghm.Units` for them.

  Args:
    path: path of the leaf, as ``jax.tree_util.tree_map_with_path`` gives it.
    leaf: the array.

  Returns:
    The axes to reduce over; the other axes count the units.

  Examples:
    >>> import jax
    >>> from optax_ghm import calibration
    >>> kernel = jax.tree_util.DictKey('kernel')
    >>> calibration.flax_unit_axes((kernel,), jax.numpy.ones((3, 3, 16, 32)))
    (0, 1, 2)

  References:
    Brock et al., `High-Performance Large-Scale Image Recognition Without
    Normalization <https://arxiv.org/abs/2102.06171>`_, 2021
  """
  layer, parameter = ['', '', *trees.names(path)][-2:]
  if not is_kernel(path, leaf):
    return tuple(range(leaf.ndim))
  if parameter == 'embedding':
    return tuple(range(1, leaf.ndim))
  if layer in ('query', 'key', 'value') and leaf.ndim == 3:
    return (0,)
  return tuple(range(leaf.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Units:
  """The scope ``'unit'`` for layouts of your own.

  Attributes:
    axes: a function from the path of a leaf and the leaf to the axes that a
      unit sums over. The default, ``flax_unit_axes``, is what the scope
      ``'unit'`` stands for.

  Examples:
    >>> import jax
    >>> import optax_ghm
    >>> from optax_ghm.calibration import flax_unit_axes
    >>> def of_layers(path, leaf):
    ...   # Stacked layers, as nn.scan makes them: (layers, in, out).
    ...   layer = jax.eval_shape(lambda leaf: leaf[0], leaf)
    ...   return tuple(i + 1 for i in flax_unit_axes(path, layer))
    >>> stacked = optax_ghm.Units(of_layers)
    >>> tx = optax_ghm.clip_by_parameter_norm(scope=stacked)
  """

  axes: Callable[[tuple[Any, ...], Any], tuple[int, ...]] = flax_unit_axes


FLAX_UNITS = Units()


Scope = Literal['global', 'leaf', 'unit'] | Groups | Units
"""The whole tree, every leaf, every unit of a leaf, or groups of leaves."""


class Scoped(NamedTuple):
  """A scope on one tree.

  Attributes:
    shape: shape of the norms: () for the whole tree, else (number of norms,).
    groups: the group of every counted leaf, an integer; empty with units.
    axes: the axes of every counted leaf that a unit sums over; None without
      units.
  """

  shape: tuple[int, ...]
  groups: np.ndarray = np.zeros(0, int)
  axes: list[tuple[int, ...]] | None = None

  def norms(self, tree: Any, axis_name: arrays.AxisName = None) -> jax.Array:
    """The norms, float32, in one pass over the numbers."""
    leaves = trees.counted(tree)
    if self.axes is None:
      count = math.prod(self.shape)
      norms = group_norms(leaves, self.groups, count, axis_name)
    else:
      norms = unit_norms(leaves, self.axes, axis_name)
    return norms.astype(jnp.float32).reshape(self.shape)

  def sizes(self, tree: Any, axis_name: arrays.AxisName = None) -> jax.Array:
    """How many numbers each norm is of, float32."""
    leaves = trees.counted(tree)
    if self.axes is None:
      each: list[Any] = [0] * math.prod(self.shape)
      for leaf, group in zip(leaves, self.groups, strict=True):
        each[group] += leaf.size
      sizes = arrays.sizes(each).reshape(self.shape)
    else:
      fan_ins, counts = [], []
      for leaf, (_, shape) in zip(leaves, self._places(leaves), strict=True):
        counts.append(math.prod(shape))
        fan_ins.append(leaf.size // counts[-1])
      of_units = np.repeat(np.arange(len(counts)), counts)
      sizes = arrays.sizes(fan_ins)[of_units]
    return arrays.psum(jnp.asarray(sizes), axis_name)

  def scale(self, tree: Any, factor: jax.Array) -> Any:
    """The tree times the factor of each norm; 0 where the factor is 0."""
    places = self._places(trees.counted(tree))

    def scale(leaf):
      if not trees.is_counted(leaf):
        return leaf
      at, shape = next(places)
      own = factor[at].reshape(shape)
      scaled = arrays.multiply(arrays.widen(leaf), own)
      return jnp.where(own > 0, scaled, 0).astype(leaf.dtype)

    return jax.tree.map(scale, tree)

  def _places(self, leaves):
    """The place of each leaf's norms, and a shape that broadcasts to it."""
    if self.axes is None:
      yield from ((i if self.shape else (), ()) for i in self.groups)
      return
    stop = 0
    for leaf, axes in zip(leaves, self.axes, strict=True):
      shape = [1 if i in axes else n for i, n in enumerate(leaf.shape)]
      start, stop = stop, stop + math.prod(shape)
      yield slice(start, stop), shape


def scoped(scope: Scope, tree: Any) -> Scoped:
  """The scope on the tree.

  Raises:
    ValueError: if ``scope`` is not a :data:`Scope`.
  """
  count = len(trees.counted(tree))
  match scope:
    case Groups():
      return _grouped(scope, tree)
    case Units():
      return _united(scope, tree)
    case 'global':
      return Scoped((), np.zeros(count, int))
    case 'leaf':
      return Scoped((count,), np.arange(count))
    case 'unit':
      return scoped(FLAX_UNITS, tree)
  raise ValueError(
    f"scope must be 'global', 'leaf', 'unit', Groups or Units, got {scope!r}."
  )


def check_same_tree(state: jax.Array, shape: tuple[int, ...]) -> None:
  """Raises if a state is not of the norms of the updates.

  Args:
    state: an array of the state that has an entry for each norm.
    shape: the shape of the norms of the updates.

  Raises:
    ValueError: if the tree that ``init`` saw had other norms.
  """
  if state.shape != shape:
    made, got = math.prod(state.shape), math.prod(shape)
    raise ValueError(
      f'the state was made for {made} leaves, units or groups, the updates have'
      f' {got}: init must see a tree with None and MaskedNode in the same'
      ' places.'
    )


def _grouped(scope, tree):
  labels = scope.labels
  # A module of labels may be callable, too, but a function is a leaf.
  if callable(labels) and jax.tree.leaves(labels) == [labels]:
    labels = labels(tree)
  names = sorted(set(jax.tree.leaves(labels)), key=str)
  of_leaves = jax.tree.leaves(jax.tree.broadcast(labels, tree))
  groups = [
    names.index(label)
    for label, leaf in zip(of_leaves, jax.tree.leaves(tree), strict=True)
    if trees.is_counted(leaf)
  ]
  return Scoped((len(names),), np.array(groups, int))


def _united(scope, tree):
  axes, count = [], 0
  for path, leaf in trees.counted_with_path(tree):
    own = normalize_axis_tuple(scope.axes(path, leaf), leaf.ndim)
    axes.append(own)
    count += math.prod(n for i, n in enumerate(leaf.shape) if i not in own)
  return Scoped((count,), axes=axes)
