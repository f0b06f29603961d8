"""Norms of gradients, computed once and safely."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LARGEST_DIVISOR = 2.0**120
"""XLA divides by multiplying with the reciprocal: that of more is flushed."""


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
  magnitude = jnp.abs(x.astype(at_least_float32(x.dtype)))
  if axis == ():
    return magnitude
  largest = jnp.max(magnitude, axis=axis, keepdims=True, initial=0)
  # Dividing by 1 where the largest is 0 or not finite lets 0, inf and NaN be.
  unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
  unit = jnp.minimum(unit, LARGEST_DIVISOR)
  sum_of_squares = jnp.sum(
    jnp.square(magnitude / unit), axis=axis, keepdims=True
  )
  return jnp.squeeze(unit * _sqrt(sum_of_squares), axis=axis)


def _sqrt(x):
  """The root, with derivative 0 instead of infinity where it is 0."""
  positive = jnp.where(x == 0, 1, x)
  return jnp.where(x == 0, x, jnp.sqrt(positive))


def global_norm(tree: Any, axis_name: Any = None) -> jax.Array:
  """Euclidean norm of all leaves together, as :func:`norm` takes it.

  Args:
    tree: pytree; leaves that are neither floating nor complex do not count.
    axis_name: mapped axis, or axes, over which the leaves are split.

  Returns:
    A scalar, float32 (float64 where a leaf is of 64 bits).

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import norms
    >>> print(norms.global_norm({'a': jnp.array(3e30), 'b': jnp.array([4e30])}))
    5e+30
  """
  leaves = [leaf for leaf in jax.tree.leaves(tree) if is_inexact(leaf)]
  if not leaves:
    return jnp.zeros([], jnp.float32)
  each = [norm(leaf) for leaf in leaves]
  dtype = np.result_type(*(n.dtype for n in each))
  here = norm(jnp.stack([n.astype(dtype) for n in each]))
  if axis_name is None:
    return here
  largest = jax.lax.pmax(here, axis_name)
  unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
  unit = jnp.minimum(unit, LARGEST_DIVISOR)
  return unit * _sqrt(jax.lax.psum(jnp.square(here / unit), axis_name))
