"""The pseudo-inverse of a matrix of cosines, applied to ones."""

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.conflict import _gramian


def of_ones(of: _gramian.Directions) -> tuple[jax.Array, jax.Array]:
  r"""Solves :math:`C x = 1` for the cosines C, in the least squares.

  Args:
    of: the gradients. Those without a direction are left out.

  Returns:
    (m,), the solution, and (m,), what :math:`C x` comes to. Both are 0 for
    gradients without a direction, and everywhere if x has no influence.
  """
  ones = of.points.astype(of.norms.dtype)
  values, vectors = jnp.linalg.eigh(of.cosines * jnp.outer(ones, ones))
  along = arrays.contract(vectors.T, ones)
  rounding = len(ones) * jnp.finfo(ones.dtype).eps
  known = values > rounding * values[-1]
  along = jnp.where(known, along, 0)
  # Opposite gradients: what is left of the ones is rounding.
  solvable = jnp.sum(along**2) > rounding * jnp.sum(ones)
  along = jnp.where(solvable, along, 0)
  solution = arrays.contract(vectors, along / jnp.where(known, values, 1))
  return ones * solution, ones * arrays.contract(vectors, along)
