"""Norms of gradients, computed once and safely."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ghm._core import arrays, leaf_rows, trees


def norm(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
  r"""Euclidean norm over ``axis`` in float32, without overflow or underflow.

  .. math::
    \lVert x \rVert = m \sqrt{\textstyle\sum_i (|x_i| / m)^2},
    \qquad m = \max_i |x_i|

  Args:
    x: real or complex array of any shape and inexact dtype; it is cast to
      float32 (complex64) before anything is squared.
    axis: axes to reduce over, as in NumPy. ``None`` is all axes, ``()`` none:
      the norm is then the magnitude of every element.

  Returns:
    float32 (float64 for 64-bit input), the shape of ``x`` without ``axis``.
    NaN where an element is NaN, else inf where one is infinite, 0 for an empty
    slice.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm._core import norms
    >>> print(norms.norm(jnp.array([3e30, 4e30])))
    5e+30
    >>> norms.norm(jnp.array([[3.0, 4.0], [0.0, 0.0]]), axis=-1)
    Array([5., 0.], dtype=float32)
  """
  x = arrays.widen(x)
  if axis == ():
    return jnp.abs(x)
  # The magnitudes are for the maximum only: nothing is written out in between.
  largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0)
  unit = arrays.divisor(largest)
  root = _sqrt(_sum_of_squares(x, axis, unit))
  return jnp.squeeze(unit, axis=axis) * root


def _sqrt(x):
  """The root, with derivative 0 instead of infinity where it is 0."""
  positive = jnp.where(x == 0, 1, x)
  return jnp.where(x == 0, x, jnp.sqrt(positive))


def global_norm(tree: Any, axis_name: arrays.AxisName = None) -> jax.Array:
  """Euclidean norm of all leaves together, in one pass over the numbers.

  Args:
    tree: pytree; leaves that are neither floating nor complex do not count.
    axis_name: mapped axis, or axes, over which the leaves are split.

  Returns:
    A scalar, float32 (float64 where a leaf is of 64 bits). NaN where an element
    is NaN, else inf where one is infinite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm._core import norms
    >>> print(norms.global_norm({'a': jnp.array(3e30), 'b': jnp.array([4e30])}))
    5e+30
  """
  leaves = trees.counted(tree)
  return group_norms(leaves, np.zeros(len(leaves), int), 1, axis_name)[0]


def group_norms(
  leaves: list[jax.Array],
  groups: np.ndarray,
  count: int,
  axis_name: arrays.AxisName = None,
) -> jax.Array:
  r"""Norms of groups of leaves, all in one pass over the numbers.

  Squares are summed in float32 as they are. A second pass, with :func:`norm`,
  is run only where a sum leaves the range in which it is right to rounding: it
  overflows, vanishes or is NaN. Many small leaves are joined first
  (:func:`optax_ghm._core.leaf_rows.rows`), so that thousands of them compile
  quickly.

  Args:
    leaves: the leaves of :func:`optax_ghm._core.trees.counted`.
    groups: integers, the group of every leaf, from 0 to ``count`` - 1.
    count: how many groups there are.
    axis_name: mapped axis, or axes, over which the leaves are split.

  Returns:
    (count,), float32 (float64 where a leaf is of 64 bits).

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm._core import norms
    >>> leaves = [jnp.array([3.0]), jnp.full(4, 1e30), jnp.array([4.0])]
    >>> norms.group_norms(leaves, np.array([0, 1, 0]), 2)
    Array([5.e+00, 2.e+30], dtype=float32)
  """
  if not leaves:
    return jnp.zeros([count], jnp.float32)
  rows, of_rows = leaf_rows.rows(leaves, groups)
  axes = [tuple(range(1, row.ndim)) for row in rows]

  def per_row(reduce):
    return _concatenated(map(reduce, rows, axes))

  def per_group(values):
    if count == 1:
      return jnp.sum(values)[None]
    return jnp.zeros([count], values.dtype).at[of_rows].add(values)

  def rescaled():
    of_row = per_row(norm)
    largest = jnp.zeros([count], of_row.dtype).at[of_rows].max(of_row)
    unit = arrays.divisor(largest)
    return unit, per_group(jnp.square(of_row / unit[of_rows]))

  return _root(per_group(per_row(_sum_of_squares)), rescaled, axis_name)


def unit_norms(
  leaves: list[jax.Array],
  axes: list[tuple[int, ...]],
  axis_name: arrays.AxisName = None,
) -> jax.Array:
  """Norms over some axes of every leaf, in one pass as :func:`group_norms`.

  Args:
    leaves: the leaves of :func:`optax_ghm._core.trees.counted`.
    axes: the axes of every leaf to reduce over.
    axis_name: mapped axis, or axes, over which these axes are split.

  Returns:
    A vector: the raveled norms of one leaf after the other.
  """
  if not leaves:
    return jnp.zeros([0], jnp.float32)

  def per_unit(reduce):
    return _concatenated(map(reduce, leaves, axes))

  def rescaled():
    of_unit = per_unit(norm)
    unit = arrays.divisor(of_unit)
    return unit, jnp.square(of_unit / unit)

  return _root(per_unit(_sum_of_squares), rescaled, axis_name)


def _concatenated(parts):
  parts = [arrays.replicated(part).ravel() for part in parts]
  dtype = np.result_type(*(part.dtype for part in parts))
  return jnp.concatenate([part.astype(dtype) for part in parts])


def _root(total, rescaled, axis_name):
  """The roots of sums of squares; rescaled ones if any is out of range."""
  exact = jnp.all((total > 1e-30) & (total < jnp.inf))
  unit, total = jax.lax.cond(
    exact, lambda: (jnp.ones_like(total), total), rescaled
  )
  if axis_name is not None:
    here, unit = unit, jax.lax.pmax(unit, axis_name)
    total = arrays.psum(total * jnp.square(here / unit), axis_name)
  return unit * _sqrt(total)


def _sum_of_squares(x, axis, unit=None):
  """The sum of the squared magnitudes, each divided by ``unit`` before."""
  parts = arrays.parts(arrays.widen(x))
  if unit is not None:
    parts = [part / unit for part in parts]
  return sum(jnp.sum(jnp.square(part), axis) for part in parts)
