"""Any method, blind to the scales of the losses."""

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.conflict import _gramian


def of_unit_gradients(weights: _gramian.Weights) -> _gramian.Weights:
  r"""Applies a method to gradients of length 1, so that no scale matters.

  .. math::
    w_i = \frac{v_i}{\lVert g_i \rVert}, \qquad
    v = \text{weights}\Big(\Big(\frac{\langle g_i, g_j \rangle}
      {\lVert g_i \rVert \lVert g_j \rVert}\Big)_{ij}\Big)

  The step is that of the method for :math:`g_i / \lVert g_i \rVert`, with a
  length of about 1, whatever the gradients are. A loss that is a hundred times
  too large then counts as much as the others.

  Args:
    weights: one of the methods of this package, or any function from a Gramian,
      (m, m), to weights, (m,).

  Returns:
    Such a function. What it gives gradients of 0, or with NaN or inf, is what
    the method gives them.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm import conflict
    >>> rows = jnp.array([[1.0, 0.0], [0.0, 100.0]])
    >>> weights = conflict.of_unit_gradients(conflict.upgrad_weights)
    >>> step = weights(rows @ rows.T) @ rows
    >>> print(np.float64(step).round(4))
    [0.5 0.5]
  """

  def of_units(gramian: jax.Array) -> jax.Array:
    lengths = _gramian.directions(gramian).divisors
    units = arrays.widen(gramian) / jnp.outer(lengths, lengths)
    return weights(units) / lengths

  return of_units
