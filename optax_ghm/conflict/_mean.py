"""The plain mean, in the form of the methods that reconcile."""

import jax

from optax_ghm.conflict import _gramian


def mean_weights(gramian: jax.Array) -> jax.Array:
  r"""Equal weights: the gradient of the mean of the losses.

  .. math::
    w_i = 1 / m

  It is what reconciling is to be compared with. Kurin et al. find that it does
  as well, on several benchmarks, if it is tuned as carefully.

  Args:
    gramian: (m, m), inner products of the losses' gradients.

  Returns:
    (m,), the weights. A loss whose gradient is not finite has weight 0, and the
    mean is that of the others.

  Raises:
    ValueError: if ``gramian`` is not a square matrix.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import conflict
    >>> conflict.mean_weights(jnp.array([[1.0, -0.5], [-0.5, 1.0]]))
    Array([0.5, 0.5], dtype=float32)

  References:
    Kurin et al., `In Defense of the Unitary Scalarization for Deep Multi-Task
    Learning <https://arxiv.org/abs/2201.04122>`_, 2022
  """
  return _gramian.directions(gramian).shares
