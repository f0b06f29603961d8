"""The units of parameters, which may be dead, and the layers that have them."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from optax_ghm._core import arrays, leaf_rows, scopes, trees

DEAD_AFTER = 10
"""Measured steps in a row without a gradient that make a unit dead."""


class OfLeaf(NamedTuple):
  """The units of a parameter.

  Attributes:
    axes: the axes that a unit sums over; None without units.
    layers: how many layers are stacked in the parameter.
    units: how many units each of them has.
    guessed: whether it may be no stack. Then a layer without any gradient does
      not count: the edge of a convolution's kernel, or a head of attention.
  """

  axes: tuple[int, ...] | None
  layers: int = 1
  units: int = 0
  guessed: bool = False


def of_leaves(tree: Any, units: scopes.Units) -> list[OfLeaf]:
  """The units of every leaf that has a gradient.

  Embeddings have no units, since the gradient of an unused token is 0 without
  any harm, and neither have kernels with a bias, whose gradient says the same
  at less cost.
  """
  counted = [
    (path, trees.path_name(path), leaf)
    for path, leaf in trees.counted_with_path(tree)
  ]
  names = {name for _, name, _ in counted}
  found = []
  for path, name, leaf in counted:
    parent, _, own = name.rpartition('/')
    is_kernel = scopes.is_kernel(path, leaf)
    has_bias = f'{parent}/bias'.removeprefix('/') in names
    if is_kernel and (own == 'embedding' or has_bias):
      found.append(OfLeaf(None))
    else:
      axes = normalize_axis_tuple(units.axes(path, leaf), leaf.ndim)
      guess = units == scopes.FLAX_UNITS and _like_a_stack(
        leaf, axes, is_kernel
      )
      axes = axes[1:] if guess else axes
      found.append(_of_leaf(leaf, axes, is_kernel)._replace(guessed=guess))
  return found


def _like_a_stack(leaf, axes, is_kernel):
  """Whether a leaf has one axis more than those of most layers of Flax."""
  if not is_kernel:
    return leaf.ndim == 2
  return leaf.ndim in (3, 5) and len(axes) == leaf.ndim - 1


def _of_leaf(leaf, axes, is_kernel):
  """The axes before the first that a unit sums over are those of a stack.

  Where none but these count the units, as of a transposed kernel, the last of
  them does. A bias and a scale have a unit for each number that is summed over.
  """
  stack = min(axes, default=0)
  if is_kernel and stack + len(axes) == leaf.ndim:
    stack = max(stack - 1, 0)
  own = axes if is_kernel else ()
  layers = math.prod(leaf.shape[:stack])
  counts = math.prod(n for i, n in enumerate(leaf.shape) if i not in own)
  return OfLeaf(own, layers, counts // layers)


def count_dead(
  gradients: Any, found: list[OfLeaf], zero_steps: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Counts the units that are dead after a step.

  Args:
    gradients: those of the step.
    found: the units of their leaves.
    zero_steps: of every unit, how many steps before had no gradient.

  Returns:
    The next ``zero_steps``, and of every leaf, how many units are dead in the
    layer that has most.
  """
  is_zero = [
    arrays.replicated(jnp.all(leaf == 0, units.axes)).ravel()
    for leaf, units in zip(trees.counted(gradients), found, strict=True)
    if units.axes is not None
  ]
  if is_zero:
    while len(is_zero) > 1:  # in pieces, which XLA compiles faster
      is_zero = [
        jnp.concatenate(is_zero[i : i + leaf_rows.TOGETHER])
        for i in range(0, len(is_zero), leaf_rows.TOGETHER)
      ]
    zero_steps = jnp.where(is_zero[0], zero_steps + 1, 0)
  leaf_of_layer = np.repeat(np.arange(len(found)), [u.layers for u in found])
  units = np.array([u.units for u in found])[leaf_of_layer]
  layer_of_unit = np.repeat(np.arange(len(units)), units)
  is_dead = zero_steps[: len(layer_of_unit)] >= DEAD_AFTER
  of_layer = jnp.zeros(len(units), jnp.float32)
  of_layer = of_layer.at[layer_of_unit].add(is_dead.astype(jnp.float32))
  guessed = np.array([u.guessed for u in found], bool)[leaf_of_layer]
  whole = of_layer == units.astype(np.float32)
  of_layer = jnp.where(guessed & whole, 0, of_layer)
  if len(units) == len(found):
    return zero_steps, of_layer
  return zero_steps, jnp.zeros(len(found)).at[leaf_of_layer].max(of_layer)
