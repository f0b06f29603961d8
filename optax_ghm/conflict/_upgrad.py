"""The mean of the gradients, each projected so that it hurts no loss."""

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.conflict import _gramian, _minimum


def upgrad_weights(gramian: jax.Array) -> jax.Array:
  r"""Weights of UPGrad: every gradient is projected alone, then averaged.

  .. math::
    d = \frac{1}{m} \sum_i \pi(g_i), \qquad
    \pi(g) = \arg\min_{p} \lVert p - g \rVert
      \;\text{ where } \langle g_j, p \rangle \ge 0 \text{ for all } j

  and the weights are those with :math:`d = \sum_i w_i g_i`. A small step
  against d raises no loss. Where no two gradients conflict, d is their mean;
  for two losses, it is half of what PCGrad and GH give. A loss that is scaled
  by c scales its own part of d by c, and nothing else: one that is a hundred
  times too large drowns the others here as in a sum. Scale the losses, or
  take :func:`of_unit_gradients` of this.

  Args:
    gramian: (m, m), inner products of the losses' gradients.

  Returns:
    (m,), the weights, 1 / m or more; float32, or float64 for such a Gramian. A
    loss whose gradient is not finite has weight 0, and does not count in m. A
    gradient of 0 changes only m. Accurate to about 1e-6 of d; where the
    parts that it adds up cancel to less than a hundredth, only to about 1e-4 of
    these.

  Raises:
    ValueError: if ``gramian`` is not a square matrix.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm import conflict
    >>> rows = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> weights = conflict.upgrad_weights(rows @ rows.T)
    >>> print(np.float64(weights).round(4), np.float64(weights @ rows).round(4))
    [1.   0.75] [0.25 0.75]

  References:
    Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024
  """
  of = _gramian.directions(gramian)
  # In units of its length, gradient i gains x = argmin |u_i + sum_j x_j u_j|.
  gains = jax.vmap(lambda own: _minimum.quadratic(of.cosines, own))(of.cosines)
  lengths = of.norms * of.shares
  added = arrays.contract(gains.T, lengths) / of.divisors
  return of.shares + jnp.where(of.points, added, 0)
