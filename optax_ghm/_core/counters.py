"""Counts that do not overflow, and checks of ranges."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


def check_range(name: str, value: Any, low: float, high: float) -> None:
  """What is known while tracing, Python's own numbers, must be in the range."""
  if isinstance(value, int | float) and not low <= value <= high:
    raise ValueError(f'{name} must be from {low} to {high}, got {value}.')


def count_if(event: ArrayLike, count: jax.Array) -> jax.Array:
  """One more where it happened, as long as int32 holds it."""
  return jnp.where(event, optax.safe_increment(count), count)
