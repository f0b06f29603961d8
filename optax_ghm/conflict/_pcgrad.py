"""Gradients that lose, one after another, what points against the others."""

import jax
import jax.numpy as jnp

from optax_ghm.conflict import _gramian


def pcgrad_weights(
  gramian: jax.Array, *, order: jax.Array | None = None
) -> jax.Array:
  r"""Weights of PCGrad: the sum of gradients that dodge one another.

  Every gradient starts as :math:`p_i = g_i` and meets the others in turn, each
  time with

  .. math::
    p_i \leftarrow p_i - \min\Big(0, \frac{\langle p_i, g_j \rangle}
      {\lVert g_j \rVert^2}\Big)\, g_j

  and the step is :math:`d = \sum_i p_i`: a sum, not a mean. For two losses it
  hurts neither, and is twice :func:`upgrad_weights`. For more, it may.

  Args:
    gramian: (m, m), inner products of the losses' gradients.
    order: (m, m), integers: row i is the order in which gradient i meets the
      gradients, itself among them, which changes nothing. The authors draw it
      anew in every step, as ``jax.vmap(jax.random.permutation, (0, None))(
      jax.random.split(key, m), m)`` does. Without it, each meets the first
      gradient first.

  Returns:
    (m,), the weights, 1 or more; float32, or float64 for such a Gramian. A loss
    whose gradient is not finite has weight 0.

  Raises:
    ValueError: if ``gramian`` is not a square matrix, or ``order`` has another
      shape.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import conflict
    >>> rows = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> weights = conflict.pcgrad_weights(rows @ rows.T)
    >>> print(weights, weights @ rows)
    [2.  1.5] [0.5 1.5]

  References:
    Yu et al., `Gradient Surgery for Multi-Task Learning
    <https://arxiv.org/abs/2001.06782>`_, 2020
  """
  of = _gramian.directions(gramian)
  tasks = jnp.arange(len(of.norms))
  if order is None:
    order = jnp.broadcast_to(tasks, of.cosines.shape)
  if jnp.shape(order) != of.cosines.shape:
    raise ValueError(
      f'order must have the shape {of.cosines.shape} of the Gramian, got'
      f' {jnp.shape(order)}.'
    )

  def meet(parts, others):  # (m, m): the lengths in p_i along every gradient
    along = jnp.sum(parts * of.cosines[others], axis=1)
    against = jnp.where(others == tasks, 0, jnp.minimum(along, 0))
    return parts.at[tasks, others].add(-against), None

  parts, _ = jax.lax.scan(meet, jnp.diag(of.norms), jnp.asarray(order).T)
  added = jnp.where(of.points, jnp.sum(parts, axis=0) / of.divisors, 1)
  return jnp.where(of.finite, added, 0)
