"""The step with equal components along all gradients."""

import jax
import jax.numpy as jnp

from optax_ghm.conflict import _gramian, _pseudo_inverse


def imtl_g_weights(gramian: jax.Array) -> jax.Array:
  r"""Weights of IMTL-G: equal components along all gradients.

  .. math::
    \langle d, g_i \rangle / \lVert g_i \rVert \;\text{equal for all } i,
      \qquad d = \sum_i w_i g_i, \qquad \sum_i w_i = 1

  Losses of any scale progress alike. Weights may be negative. For three losses
  or more, the components may be negative, too: a step then raises every loss,
  where :func:`config_weights` has the opposite direction. Where the gradients
  almost depend on one another, the weights are large.

  Args:
    gramian: (m, m), inner products of the losses' gradients. The method is not
      defined for more losses than parameters; the weights are finite there. It
      is not differentiable where two eigenvalues of the cosines are equal.

  Returns:
    (m,), the weights, with sum 1; float32, or float64 for such a Gramian. A
    loss whose gradient is 0 or not finite has weight 0, and so have all losses
    where no step has equal components, as for opposite gradients.

  Raises:
    ValueError: if ``gramian`` is not a square matrix.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm import conflict
    >>> rows = jnp.array([[1.0, 0.0], [0.0, 4.0]])
    >>> weights = conflict.imtl_g_weights(rows @ rows.T)
    >>> print(np.float64(weights).round(4), np.float64(weights @ rows).round(4))
    [0.8 0.2] [0.8 0.8]

  References:
    Liu et al., `Towards Impartial Multi-task Learning
    <https://openreview.net/forum?id=IMPnRXEWpvr>`_, 2021
  """
  of = _gramian.directions(gramian)
  lengths, _ = _pseudo_inverse.of_ones(of)
  weights = lengths * of.shortness
  total, size = jnp.sum(weights), jnp.sum(jnp.abs(weights))
  defined = jnp.abs(total) > jnp.finfo(total.dtype).eps * size
  return jnp.where(defined, weights / jnp.where(defined, total, 1), 0)
