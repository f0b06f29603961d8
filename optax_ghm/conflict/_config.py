"""The step with equal angles to all gradients."""

import jax
import jax.numpy as jnp

from optax_ghm.conflict import _gramian, _pseudo_inverse


def config_weights(gramian: jax.Array) -> jax.Array:
  r"""Weights of ConFIG: equal angles to all gradients.

  .. math::
    d = \Big(\sum_i \langle g_i, u \rangle\Big)\, u, \qquad
    \langle u, g_i \rangle / \lVert g_i \rVert \;\text{equal for all } i,
      \qquad \lVert u \rVert = 1

  A small step against it lowers every loss, where the gradients are
  independent. The authors made it for physics-informed networks. Its direction
  is that of :func:`imtl_g_weights` or the opposite one, and its length is that
  of the gradients along it.

  Args:
    gramian: (m, m), inner products of the losses' gradients. For more losses
      than parameters, the angles are equal as far as they can be. It is not
      differentiable where two eigenvalues of the cosines are equal.

  Returns:
    (m,), the weights; float32, or float64 for such a Gramian. A loss whose
    gradient is 0 or not finite has weight 0, and so have all losses where no
    step has equal angles, as for opposite gradients.

  Raises:
    ValueError: if ``gramian`` is not a square matrix.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm import conflict
    >>> rows = jnp.array([[1.0, 0.0], [0.0, 4.0]])
    >>> weights = conflict.config_weights(rows @ rows.T)
    >>> print(np.float64(weights).round(4), np.float64(weights @ rows).round(4))
    [2.5   0.625] [2.5 2.5]

  References:
    Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed
    Neural Networks <https://arxiv.org/abs/2408.11104>`_, 2025
  """
  of = _gramian.directions(gramian)
  # With u_i the unit gradients, the direction is sum_i lengths_i u_i, and its
  # inner products with them are ones (as far as they can be), `reached`.
  lengths, reached = _pseudo_inverse.of_ones(of)
  square = jnp.sum(lengths)
  along = jnp.sum(of.norms * reached) / jnp.where(square > 0, square, 1)
  return lengths / of.divisors * along
