"""The shortest weighted mean of the gradients."""

import jax
import jax.numpy as jnp

from optax_ghm.conflict import _gramian, _minimum


def mgda_weights(gramian: jax.Array) -> jax.Array:
  r"""Weights of MGDA: the shortest of all weighted means.

  .. math::
    w = \arg\min_{w \ge 0,\; \sum_i w_i = 1}
      \Big\lVert \sum_i w_i g_i \Big\rVert

  A small step against it lowers every loss, as long as it is not 0. It is 0
  where no step lowers every loss, and also as soon as a single loss has a
  gradient of 0. The smallest gradients weigh most, and with them, often, the
  losses that are almost solved.

  Args:
    gramian: (m, m), inner products of the losses' gradients.

  Returns:
    (m,), the weights, with sum 1; float32, or float64 for such a Gramian. A
    loss whose gradient is not finite has weight 0.

  Raises:
    ValueError: if ``gramian`` is not a square matrix.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm import conflict
    >>> rows = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> print(np.float64(conflict.mgda_weights(rows @ rows.T)).round(4))
    [0.8 0.2]

  References:
    Désidéri, `Multiple-gradient descent algorithm
    <https://doi.org/10.1016/j.crma.2012.03.014>`_, 2012; Sener and Koltun,
    `Multi-Task Learning as Multi-Objective Optimization
    <https://arxiv.org/abs/1810.04650>`_, 2018
  """
  of = _gramian.directions(gramian)
  shorter = of.shortness
  # For x = w |g|, in units of the shortest gradient.
  x = _minimum.quadratic(of.cosines, jnp.zeros_like(shorter), shorter)
  vanished = (of.finite & ~of.points).astype(x.dtype)
  weights = jnp.where(jnp.any(vanished > 0), vanished, shorter * x)
  total = jnp.sum(weights)
  return weights / jnp.where(total > 0, total, 1)
