"""Masks say which examples count, weights say how much each counts."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def fit_mask(
  mask: ArrayLike | None, shape: tuple[int, ...]
) -> jax.Array | None:
  """The mask with as many axes as ``shape``, each of its size or 1.

  Args:
    mask: bool, broadcastable to ``shape``; None stays None.
    shape: the shape of the examples.

  Returns:
    The mask, a bool array.

  Raises:
    TypeError: if the mask is not bool.
    ValueError: if the mask does not broadcast, or if it could be meant for the
      first axes as well as for the last: (N,) for examples (N, N).
  """
  if mask is None:
    return None
  mask = jnp.asarray(mask)
  if mask.dtype != bool:
    raise TypeError(
      f'mask must be bool, got {mask.dtype}: give mask != 0, or give the'
      ' numbers as weights.'
    )
  return _fit(mask, shape, 'mask')


def broadcast_mask(
  mask: ArrayLike | None, shape: tuple[int, ...]
) -> jax.Array | None:
  """The mask, checked as in :func:`fit_mask` and broadcast to ``shape``."""
  fitted = fit_mask(mask, shape)
  return None if fitted is None else jnp.broadcast_to(fitted, shape)


def broadcast_weights(
  weights: ArrayLike | None, shape: tuple[int, ...], name: str = 'weights'
) -> jax.Array | None:
  """Weights as float32 of ``shape``, with 0 for negative weights and NaN.

  Args:
    weights: real numbers, broadcastable to ``shape``; None stays None.
    shape: the shape of the examples.
    name: the name of the argument, for error messages.

  Returns:
    The weights, a float32 array.

  Raises:
    TypeError: if the weights are bool or complex.
    ValueError: if the weights do not broadcast, or if they could be meant for
      the first axes as well as for the last.
  """
  if weights is None:
    return None
  weights = jnp.asarray(weights)
  if weights.dtype == bool or jnp.iscomplexobj(weights):
    raise TypeError(
      f'{name} must be real numbers, got {weights.dtype}: give bool as mask.'
    )
  weights = _fit(weights.astype(jnp.float32), shape, name)
  return jnp.broadcast_to(jnp.where(weights > 0, weights, 0), shape)


def amounts(
  mask: ArrayLike | None, weights: ArrayLike | None, shape: tuple[int, ...]
) -> jax.Array | None:
  """Mask and weights in one: as how many examples each example counts.

  Args:
    mask: bool, broadcastable to ``shape``, or None.
    weights: real numbers, broadcastable to ``shape``, or None.
    shape: the shape of the examples.

  Returns:
    None if all examples count as one, the mask if there are no weights, else
    float32 of ``shape``. False and 0 leave an example out.
  """
  mask, weights = broadcast_mask(mask, shape), broadcast_weights(weights, shape)
  if mask is None:
    return weights
  return mask if weights is None else jnp.where(mask, weights, 0)


def _fit(x, shape, name):
  """``x`` with axes of size 1 in front, as many as it lacks."""
  missing = len(shape) - x.ndim
  first = f'{name}[{", ".join([":"] * x.ndim + ["None"] * missing)}]'
  last = f'{name}[{", ".join(["None"] * missing + [":"] * x.ndim)}]'
  fits_first = missing > 0 and _broadcasts(x.shape, shape[: x.ndim])
  if missing < 0 or not _broadcasts(x.shape, shape[missing:]):
    raise ValueError(
      f'{name} of shape {x.shape} does not broadcast to the examples of shape'
      f' {shape}.' + f' Give {first}.' * fits_first
    )
  if fits_first and x.size not in (0, 1):
    raise ValueError(
      f'{name} of shape {x.shape} could mean the first or the last axes of the'
      f' examples of shape {shape}: give {first} or {last}.'
    )
  return jnp.expand_dims(x, tuple(range(missing)))


def _broadcasts(shape, to):
  return all(n in (1, m) for n, m in zip(shape, to, strict=True))
