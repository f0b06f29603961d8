"""Counts that do not overflow, and checks of arguments."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


@runtime_checkable
class GradientTransformation(Protocol):
  """What Optax takes for a transformation, ``optax.MultiSteps`` included."""

  init: Any
  update: Any


def check_type(name: str, value: Any, expected: type) -> None:
  """Raises a ``TypeError`` if an argument is of another kind."""
  if isinstance(value, type) or not isinstance(value, expected):
    raise TypeError(
      f'{name} must be a {expected.__name__}, got {value!r}.'
      + ' Call it, and give what it returns.' * callable(value)
    )


def check_range(name: str, value: Any, low: float, high: float) -> None:
  """Raises a ``ValueError`` if a Python number is out of its range.

  Arrays and traced values pass: their values may not be known yet.
  """
  if isinstance(value, int | float) and not low <= value <= high:
    raise ValueError(f'{name} must be from {low} to {high}, got {value}.')


def count_if(event: ArrayLike, count: jax.Array) -> jax.Array:
  """``count`` plus 1 where the event happened, up to the largest integer."""
  return jnp.where(event, optax.safe_increment(count), count)
