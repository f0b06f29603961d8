"""Counts that do not overflow, and checks of ranges."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


def check_range(name: str, value: Any, low: float, high: float) -> None:
  """Raises a ``ValueError`` if a Python number is out of its range.

  Arrays and traced values pass: their values may not be known yet.
  """
  if isinstance(value, int | float) and not low <= value <= high:
    raise ValueError(f'{name} must be from {low} to {high}, got {value}.')


def count_if(event: ArrayLike, count: jax.Array) -> jax.Array:
  """``count`` plus 1 where the event happened, up to the largest integer."""
  return jnp.where(event, optax.safe_increment(count), count)
