"""Arrays: dtypes, products, and how they are laid out over devices."""

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


def is_split(leaf):
  """Whether the array is known, by explicit axes, to be sharded."""
  return any(axis is not None for axis in jax.typeof(leaf).sharding.spec)


def varying_axes(x: jax.Array) -> frozenset[str]:
  """The axes of a ``shard_map`` along which x differs; its name has moved."""
  kind = jax.typeof(x)
  return frozenset(kind.vma if hasattr(kind, 'vma') else kind.mat.varying)


def psum(x: Any, axis_name: AxisName) -> Any:
  """The sums over the mapped axes, if there are any: else ``x`` itself."""
  return x if axis_name is None else jax.lax.psum(x, axis_name)
