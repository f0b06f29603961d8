"""The bargain in which every loss gains in proportion to its weight."""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from optax_ghm._core import arrays
from optax_ghm.conflict import _gramian

ITERATIONS = 20

LARGEST = 1e3
"""What a weight is at most, in units of one over the norm. Gradients that would
need more are opposite up to rounding."""


def nash_mtl_weights(gramian: jax.Array) -> jax.Array:
  r"""Weights of Nash-MTL: the bargaining solution of the losses.

  .. math::
    G w = 1 / w, \qquad w > 0

  A small step against :math:`d = \sum_i w_i g_i` lowers every loss, each by
  :math:`1 / w_i` per unit. Losses of any scale progress alike. The length of d
  is :math:`\sqrt m`, whatever the gradients are: clip or schedule it, as the
  authors do.

  Args:
    gramian: (m, m), inner products of the losses' gradients. The method is not
      defined where no step lowers every loss; the weights are finite there, and
      d is still no longer than about :math:`\sqrt m`.

  Returns:
    (m,), the weights; float32, or float64 for such a Gramian. A loss whose
    gradient is 0 or not finite has weight 0.

  Raises:
    ValueError: if ``gramian`` is not a square matrix.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm import conflict
    >>> rows = jnp.array([[1.0, 0.0], [0.0, 4.0]])
    >>> weights = conflict.nash_mtl_weights(rows @ rows.T)
    >>> print(np.float64(weights).round(4), np.float64(weights @ rows).round(4))
    [1.   0.25] [1. 1.]

  References:
    Navon et al., `Multi-Task Learning as a Bargaining Game
    <https://arxiv.org/abs/2202.01017>`_, 2022
  """
  of = _gramian.directions(gramian)
  eye = jnp.eye(len(of.norms), dtype=of.norms.dtype)

  # Newton's method for the minimum of x C x / 2 - sum log x, with x = w |g|,
  # damped where it is far (Boyd & Vandenberghe, 2004, section 9.6).
  def iterate(x, _):
    slope = x * arrays.contract(of.cosines, x) - 1
    factor = jnp.linalg.cholesky(jnp.outer(x, x) * of.cosines + eye)
    change = -cho_solve((factor, True), slope)
    decrement = -jnp.sum(slope * change)  # squared
    far = decrement > 1 / 16
    root = jnp.sqrt(jnp.where(far, decrement, 1))
    damping = jnp.where(far, 1 / (1 + root), 1)
    return jnp.minimum(x * (1 + damping * change), LARGEST), None

  total = jnp.maximum(jnp.mean(jnp.sum(of.cosines, axis=1)), 1e-3)
  start = jnp.ones_like(of.norms) / jnp.sqrt(total)
  x, _ = jax.lax.scan(iterate, start, length=ITERATIONS)
  return jnp.where(of.points, x / of.divisors, 0)
