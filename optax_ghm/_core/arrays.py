"""Arrays: dtypes, products, and how they are laid out over devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

AxisName = str | tuple[str, ...] | None
"""Mapped axes over which an array is split; None if it is whole."""

LARGEST = float(np.finfo(np.float32).max)
"""A limit that is not known yet, in states that are to be finite."""


def is_inexact(x: Any) -> bool:
  """Whether ``x`` is a floating or complex array, and so has a gradient."""
  return hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.inexact)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
  """The dtype to compute in: float32 for 16-bit floats, else ``dtype``."""
  return np.promote_types(dtype, np.float32)


def widen(x: jax.Array) -> jax.Array:
  """``x`` in the dtype to compute in."""
  return x.astype(at_least_float32(x.dtype))


def parts(x: jax.Array) -> tuple[jax.Array, ...]:
  """The real parts that a number has: two, if it is complex."""
  return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def sizes(numbers: list[Any]) -> np.ndarray | jax.Array:
  """Sizes in float32; traced, if an export leaves one of them open.

  Args:
    numbers: integers, or what a symbolic shape has in their place.
  """
  if all(isinstance(n, int) for n in numbers):
    return np.array(numbers, np.float32)
  return jnp.asarray(numbers, jnp.float32)


def multiply(x: jax.Array, factor: jax.Array) -> jax.Array:
  """``x`` times a real factor, in the precision of ``x``.

  The parts of a complex number are multiplied one by one, since the product of
  an infinite complex number and a complex factor is NaN.
  """
  factor = factor.astype(x.real.dtype)
  if jnp.iscomplexobj(x):
    return jax.lax.complex(x.real * factor, x.imag * factor)
  return x * factor


def divisor(largest: jax.Array) -> jax.Array:
  """The nearest number that is safe to divide by.

  XLA may divide by multiplying with the reciprocal, and flushes the reciprocals
  of the largest float32 numbers, as well as subnormal numbers, to 0. NaN stays.
  No gradient flows through it, because what is divided by it is multiplied by
  it again.
  """
  return jax.lax.stop_gradient(jnp.clip(largest, 2.0**-120, 2.0**120))


def contract(weights: jax.Array, x: jax.Array) -> jax.Array:
  """The sums of ``x`` along its first axis, with one or several weights.

  The sums are a matrix product, since XLA is slow to sum along the first axis.

  Args:
    weights: (..., N), of the dtype of ``x``.
    x: (N, ...). A number that is not finite makes every sum that it belongs to
      NaN or infinite, even where its weight is 0.

  Returns:
    The leading axes of ``weights``, followed by the trailing axes of ``x``.
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


def is_split(x: jax.Array) -> bool:
  """Whether ``x`` is known, by explicit mesh axes, to be sharded."""
  return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def replicated(x: jax.Array) -> jax.Array:
  """``x`` whole on every device, if it is known to be sharded."""
  return jax.sharding.reshard(x, PartitionSpec()) if is_split(x) else x


def laid_out_as(x: jax.Array, like: jax.Array) -> jax.Array:
  """``x``, split over explicit mesh axes as ``like`` of its shape is."""
  spec = jax.typeof(like).sharding.spec
  same = jax.typeof(x).sharding.spec == spec
  return x if same else jax.sharding.reshard(x, spec)


def varying_axes(x: jax.Array) -> frozenset[str]:
  """The axes of a ``shard_map`` along which ``x`` differs."""
  kind = jax.typeof(x)  # its attribute has moved between versions of JAX
  return frozenset(kind.vma if hasattr(kind, 'vma') else kind.mat.varying)


def psum(x: Any, axis_name: AxisName) -> Any:
  """The sums of ``x`` over the mapped axes; ``x`` itself if there are none."""
  return x if axis_name is None else jax.lax.psum(x, axis_name)
