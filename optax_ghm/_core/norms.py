"""Norms of gradients, computed once and safely."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

LARGEST_DIVISOR = 2.0**120
"""XLA divides by multiplying with the reciprocal: that of more is flushed."""

LARGEST_RECIPROCAL = 8e37
"""That of more is below the least normal float32."""

AxisName = str | tuple[str, ...] | None
"""Mapped axes over which an array is split."""


def is_inexact(x: Any) -> bool:
  """Whether it has a gradient: a floating or complex array, nothing else."""
  return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.inexact)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
  """The dtype to compute in: 16-bit floats become float32, others stay."""
  return np.promote_types(dtype, np.float32)


def multiply(x: jax.Array, factor: jax.Array) -> jax.Array:
  """X times a real number of its precision; complex infinities stay so."""
  if jnp.iscomplexobj(x):
    return jax.lax.complex(x.real * factor, x.imag * factor)
  return x * factor


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
    >>> from optax_ghm import norms
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
    >>> from optax_ghm import norms
    >>> print(norms.global_norm({'a': jnp.array(3e30), 'b': jnp.array([4e30])}))
    5e+30
  """
  leaves = counted(tree)
  return group_norms(leaves, np.zeros(len(leaves), int), 1, axis_name)[0]


def counted(tree: Any) -> list[jax.Array]:
  """The leaves that have a norm: floating or complex, and not empty."""
  return [u for u in jax.tree.leaves(tree) if is_inexact(u) and u.size]


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
    >>> from optax_ghm import norms
    >>> leaves = [jnp.array([3.0]), jnp.full(4, 1e30), jnp.array([4.0])]
    >>> norms.group_norms(leaves, np.array([0, 1, 0]), 2)
    Array([5.e+00, 2.e+30], dtype=float32)
  """
  if not leaves:
    return jnp.zeros([count], jnp.float32)
  dtype = _result_dtype(leaves)
  arrays, of_rows = rows(leaves, groups)

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


def divisor(largest):
  """What to divide by so that nothing overflows: 1 for 0, inf and NaN.

  And for subnormal numbers, by which XLA may divide as by 0.
  """
  unit = jnp.where(is_normal(largest) & jnp.isfinite(largest), largest, 1)
  return jnp.minimum(unit, LARGEST_DIVISOR)


def contract(weights: jax.Array, x: jax.Array) -> jax.Array:
  """The sums of ``x`` along its first axis, with one or several weights.

  As a product of matrices: XLA is slow to sum along the first axis.

  Args:
    weights: (..., N), of the dtype of ``x``.
    x: (N, ...). Where it is not finite, no sum over it is, 0 times or not.
  """
  sharding = jax.typeof(x).sharding
  spec = PartitionSpec(*[None] * (weights.ndim - 1), *sharding.spec[1:])
  return jnp.tensordot(
    weights,
    x,
    axes=1,
    precision=jax.lax.Precision.HIGHEST,
    out_sharding=sharding.update(spec=spec),
  )


def is_normal(x):
  """False for 0 and subnormal numbers; True for inf and NaN."""
  return ~(x < jnp.finfo(x.dtype).tiny)


def _largest(x, axis):
  return jnp.max(jnp.abs(x.astype(at_least_float32(x.dtype))), axis)


def _sum_of_squares(x, axis, unit=None):
  """Of the magnitudes, each divided by the unit."""
  x = x.astype(at_least_float32(x.dtype))
  parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
  if unit is not None:
    parts = [part / unit.astype(part.dtype) for part in parts]
  return sum(jnp.sum(jnp.square(part), axis) for part in parts)


SMALL, MANY, TOGETHER = 2**14, 32, 64
"""Leaves of up to so many elements are joined where there are so many, and so
many at a time: XLA compiles a few dozen operands per concatenation soonest."""


def rows(
  leaves: list[jax.Array], groups: np.ndarray
) -> tuple[list[jax.Array], np.ndarray]:
  """The leaves, each in a row of an array with a new first axis.

  Small leaves of one group share a row, if there is but one group; if there are
  several, each has a row to itself, filled up with zeros.

  Args:
    leaves: as :func:`counted` gives them.
    groups: the group of every leaf.

  Returns:
    The arrays, and the group of every row of them.
  """
  small = [
    i
    for i, leaf in enumerate(leaves)
    if leaf.size <= SMALL and not is_split(leaf)
  ]
  if len(small) < MANY:
    small = []
  one_group = len(set(groups[small])) == 1
  arrays, of_rows, classes = [], [], {}
  for i in small:
    size = 0 if one_group else 1 << (leaves[i].size - 1).bit_length()
    classes.setdefault((leaves[i].dtype, size), []).append(i)
  for (dtype, size), members in classes.items():
    for start in range(0, len(members), TOGETHER):
      some = members[start : start + TOGETHER]
      # One flat concatenation, which XLA copies piece by piece.
      pieces = []
      for i in some:
        pieces.append(leaves[i].ravel())
        if leaves[i].size < size:
          pieces.append(jnp.zeros(size - leaves[i].size, dtype))
      joined = jnp.concatenate(pieces)
      arrays.append(joined.reshape(-1, size or joined.size))
      of_rows += [groups[i] for i in (some[:1] if one_group else some)]
  for i in sorted(set(range(len(leaves))) - set(small)):
    arrays.append(leaves[i][None])
    of_rows.append(groups[i])
  return arrays, np.array(of_rows)


def is_split(leaf):
  """Whether the array is known, by explicit axes, to be sharded."""
  return any(axis is not None for axis in jax.typeof(leaf).sharding.spec)
