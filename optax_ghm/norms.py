"""Norms of gradients, computed once and safely."""

import jax
import jax.numpy as jnp
import numpy as np


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
  """The dtype to compute in: 16-bit floats become float32, others stay."""
  return np.promote_types(dtype, np.float32)


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
  sum_of_squares = jnp.sum(
    jnp.square(magnitude / unit), axis=axis, keepdims=True
  )
  return jnp.squeeze(unit * jnp.sqrt(sum_of_squares), axis=axis)
