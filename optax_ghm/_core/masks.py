"""Masks: which examples count."""

import jax
import jax.numpy as jnp


def broadcast_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The mask of examples of this shape, as bool or float32.

  Args:
    mask: bool or real, broadcastable to ``shape``.
    shape: of the examples.

  Returns:
    The mask, of shape ``shape``.

  Raises:
    TypeError: if ``mask`` is complex.
    ValueError: if it does not broadcast.
  """
  mask = jnp.asarray(mask)
  if jnp.issubdtype(mask.dtype, jnp.complexfloating):
    raise TypeError(f'mask must be bool or real, got dtype {mask.dtype}.')
  if mask.dtype != bool:
    mask = mask.astype(jnp.float32)
  try:
    return jnp.broadcast_to(mask, shape)
  except ValueError:
    raise ValueError(
      f'mask of shape {mask.shape} does not broadcast to the examples of'
      f' shape {shape}.'
    ) from None


def counts(mask: jax.Array) -> jax.Array:
  """Which examples count at all: the mask is above 0 (or True)."""
  return mask > jnp.zeros_like(mask)
