"""Norms of gradients, computed once and safely."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from optax_ghm._core import leaf_rows, trees
from optax_ghm._core.arrays import (
  AxisName,
  at_least_float32,
  divisor,
  is_normal,
  is_split,
)


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
  x = x.astype(at_least_float32(x.dtype))
  if axis == ():
    return jnp.abs(x)
  # The magnitudes are for the maximum only: nothing is written out in between.
  largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0)
  unit = divisor(largest)
  root = _sqrt(_sum_of_squares(x, axis, unit))
  return jnp.squeeze(unit, axis=axis) * root


def _sqrt(x):
  """The root, with derivative 0 instead of infinity where it is 0."""
  positive = jnp.where(x == 0, 1, x)
  return jnp.where(x == 0, x, jnp.sqrt(positive))


def global_norm(tree: Any, axis_name: AxisName = None) -> jax.Array:
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
  axis_name: AxisName = None,
) -> jax.Array:
  r"""Norms of groups of leaves, all in one pass over the numbers.

  Squares are summed in float32 as they are. Only where a sum leaves the range
  in which that is right to rounding (it overflows, vanishes or is NaN) is a
  second, rescaled pass run, that of :func:`norm`. Where small leaves are many,
  those of about one size are joined first, so that thousands of them compile
  quickly; larger ones stay as they are, sharded or not.

  Args:
    leaves: as :func:`counted` gives them.
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
  dtype = _result_dtype(leaves)
  arrays, of_rows = leaf_rows.rows(leaves, groups)

  def per_row(reduce, *values):
    parts, start = [], 0
    for row in arrays:
      own = [v[start : start + len(row)] for v in values]
      own = [v.reshape(-1, *[1] * (row.ndim - 1)) for v in own]
      parts.append(reduce(row, tuple(range(1, row.ndim)), *own))
      start += len(row)
    return jnp.concatenate([part.astype(dtype) for part in parts])

  def per_group(combine, values):
    if count == 1:
      combine = {'sum': jnp.sum, 'max': jnp.max}[combine]
      return combine(values)[None]
    at = jnp.zeros([count], dtype).at[of_rows]
    return at.add(values) if combine == 'sum' else at.max(values)

  def rescaled():
    # Each row in its own unit: XLA would write out one that they share.
    largest = per_row(_largest)
    own = divisor(largest)
    unit = divisor(per_group('max', largest))
    ratio = jnp.where(is_normal(largest), own / unit[of_rows], 0)
    squares = per_row(_sum_of_squares, own)
    return unit, per_group('sum', squares * jnp.square(ratio))

  total = per_group('sum', per_row(_sum_of_squares))
  return _root(total, rescaled, axis_name)


def unit_norms(
  leaves: list[jax.Array],
  axes: list[tuple[int, ...]],
  axis_name: AxisName = None,
) -> jax.Array:
  """Norms over some axes of every leaf, in one pass as :func:`group_norms`.

  Args:
    leaves: as :func:`counted` gives them.
    axes: of every leaf, those to reduce over.
    axis_name: mapped axis, or axes, over which those are split.

  Returns:
    A vector: the norms of all leaves in a row, each leaf's raveled.
  """
  if not leaves:
    return jnp.zeros([0], jnp.float32)
  dtype = _result_dtype(leaves)

  def units(reduce):
    parts = map(reduce, leaves, axes)
    return jnp.concatenate(
      [
        (
          jax.sharding.reshard(part, PartitionSpec())
          if is_split(part)
          else part
        )
        .ravel()
        .astype(dtype)
        for part in parts
      ]
    )

  def rescaled():
    largest = units(norm)
    unit = divisor(largest)
    return unit, jnp.square(largest / unit)

  return _root(units(_sum_of_squares), rescaled, axis_name)


def _result_dtype(leaves):
  return np.result_type(
    *(jnp.finfo(at_least_float32(leaf.dtype)).dtype for leaf in leaves)
  )


def _root(total, rescaled, axis_name):
  """The roots of sums of squares; rescaled ones if any is out of range."""
  exact = jnp.all((total > 1e-30) & (total < jnp.inf))
  unit, total = jax.lax.cond(
    exact, lambda: (jnp.ones_like(total), total), rescaled
  )
  if axis_name is not None:
    here, unit = unit, jax.lax.pmax(unit, axis_name)
    total = jax.lax.psum(total * jnp.square(here / unit), axis_name)
  return unit * _sqrt(total)


def _largest(x, axis):
  return jnp.max(jnp.abs(x.astype(at_least_float32(x.dtype))), axis)


def _sum_of_squares(x, axis, unit=None):
  """Of the magnitudes, each divided by the unit."""
  x = x.astype(at_least_float32(x.dtype))
  parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
  if unit is not None:
    parts = [part / unit.astype(part.dtype) for part in parts]
  return sum(jnp.sum(jnp.square(part), axis) for part in parts)
