"""Masks say which examples count, weights as how much."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def fit_mask(
  mask: ArrayLike | None, shape: tuple[int, ...], name: str = 'mask'
) -> jax.Array | None:
  """The mask with as many axes as ``shape``, of its size or 1 each.

  Args:
    mask: bool, broadcastable to ``shape``; None stays None.
    shape: of the examples.
    name: of the argument, for the errors.

  Raises:
    TypeError: if the mask is not bool.
    ValueError: if it does not broadcast, or if it could as well be meant for
      the leading axes as for the trailing ones: (N,) for examples (N, N).
  """
  if mask is None:
    return None
  mask = jnp.asarray(mask)
  if mask.dtype != bool:
    raise TypeError(
      f'{name} must be bool, got {mask.dtype}: give {name} != 0, or numbers as'
      ' weights.'
    )
  return _fit(mask, shape, name)


def broadcast_mask(
  mask: ArrayLike | None, shape: tuple[int, ...]
) -> jax.Array | None:
  """The mask broadcast to ``shape``; see :func:`fit_mask`."""
  fitted = fit_mask(mask, shape)
  return None if fitted is None else jnp.broadcast_to(fitted, shape)


def broadcast_weights(
  weights: ArrayLike | None, shape: tuple[int, ...], name: str = 'weights'
) -> jax.Array | None:
  """Weights as float32 of this shape, 0 for those below 0.

  Args:
    weights: real, broadcastable to ``shape``; None stays None.
    shape: of the examples.
    name: of the argument, for the errors.

  Raises:
    TypeError: if the weights are bool or complex.
    ValueError: as for :func:`fit_mask`.
  """
  if weights is None:
    return None
  weights = jnp.asarray(weights)
  if weights.dtype == bool or jnp.iscomplexobj(weights):
    raise TypeError(
      f'{name} must be real numbers, got {weights.dtype}: give bool as mask.'
    )
  weights = jnp.maximum(weights.astype(jnp.float32), 0)
  return jnp.broadcast_to(_fit(weights, shape, name), shape)


def _fit(x, shape, name):
  """``x`` with leading axes of size 1 in front, as many as it lacks."""
  missing = len(shape) - x.ndim
  if missing < 0 or not _broadcasts(x.shape, shape[missing:]):
    hint = ''
    if missing > 0 and _broadcasts(x.shape, shape[: x.ndim]):
      hint = f' Give {name}[{", ".join([":"] * x.ndim + ["None"] * missing)}].'
    raise ValueError(
      f'{name} of shape {x.shape} does not broadcast to the examples of shape'
      f' {shape}.{hint}'
    )
  if missing > 0 and x.size > 1 and _broadcasts(x.shape, shape[: x.ndim]):
    first = ', '.join([':'] * x.ndim + ['None'] * missing)
    last = ', '.join(['None'] * missing + [':'] * x.ndim)
    raise ValueError(
      f'{name} of shape {x.shape} could mean the first or the last axes of the'
      f' examples of shape {shape}: give {name}[{first}] or {name}[{last}].'
    )
  return jnp.expand_dims(x, tuple(range(missing)))


def _broadcasts(shape, to):
  return all(n in (1, m) for n, m in zip(shape, to, strict=True))


def counts(mask: jax.Array) -> jax.Array:
  """Which examples count at all: the mask is above 0 (or True)."""
  return mask > jnp.zeros_like(mask)
