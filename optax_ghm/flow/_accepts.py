"""What a record takes as a number."""

import numbers
from typing import Any

import jax.numpy as jnp
import numpy as np

_REAL = jnp.floating, jnp.integer, jnp.bool_


def check(name: str, value: Any) -> None:
  """Raises an error that names the scalar, unless it is one real number.

  Raises:
    TypeError: if ``value`` is neither a real number nor an array of real
      numbers.
    ValueError: if it is an array with axes.
  """
  dtype = getattr(value, 'dtype', None)
  if dtype is None:
    real = isinstance(value, numbers.Real)
  else:
    real = any(jnp.issubdtype(dtype, kind) for kind in _REAL)
  if not real:
    raise TypeError(f'{name} must be a real number, got {value!r}.')
  if np.shape(value):
    raise ValueError(
      f'{name} must be a scalar, got an array of shape {np.shape(value)}. Add'
      ' its mean, or each number under a name of its own.'
    )
