"""The mean gradient, projected so that it hurts no loss."""

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.conflict import _gramian, _minimum


def dualproj_weights(gramian: jax.Array) -> jax.Array:
  r"""Weights of DualProj: the mean gradient, projected.

  .. math::
    d = \arg\min_{p} \Big\lVert p - \frac{1}{m} \sum_i g_i \Big\rVert
      \;\text{ where } \langle g_j, p \rangle \ge 0 \text{ for all } j

  A small step against d raises no loss. It is one projection instead of the m
  of :func:`upgrad_weights`. The largest gradient decides more: where two
  gradients conflict, the smaller one may be left without any effect.

  Args:
    gramian: (m, m), inner products of the losses' gradients.

  Returns:
    (m,), the weights, 1 / m or more; float32, or float64 for such a Gramian. A
    loss whose gradient is not finite has weight 0, and does not count in m.

  Raises:
    ValueError: if ``gramian`` is not a square matrix.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm import conflict
    >>> rows = jnp.array([[1.0, 0.0], [-2.0, 4.0]])
    >>> weights = conflict.dualproj_weights(rows @ rows.T)
    >>> print(np.float64(weights).round(4), np.float64(weights @ rows).round(4))
    [1.  0.5] [0. 2.]

  References:
    Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
    <https://arxiv.org/abs/1706.08840>`_, 2017; named DualProj by Quinton and
    Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024
  """
  of = _gramian.directions(gramian)
  lengths = of.norms * of.shares
  unit = jnp.max(lengths)
  unit = jnp.where(unit > 0, unit, 1)
  mean = arrays.contract(of.cosines, lengths / unit)
  gains = _minimum.quadratic(of.cosines, mean)
  return of.shares + jnp.where(of.points, unit * gains / of.divisors, 0)
