"""Gradient harmonization of two losses, and its milder variant."""

import math

import jax
import jax.numpy as jnp

from optax_ghm._core import counters
from optax_ghm.conflict import _gramian


def gh_weights(gramian: jax.Array) -> jax.Array:
  r"""Weights of GH, for two losses whose gradients conflict.

  Where :math:`\langle g_1, g_2 \rangle < 0`,

  .. math::
    w_1 = 1 - \frac{\langle g_1, g_2 \rangle}{\lVert g_1 \rVert^2}, \qquad
    w_2 = 1 - \frac{\langle g_1, g_2 \rangle}{\lVert g_2 \rVert^2}

  and both weights are 1 otherwise. The step is the sum of the two gradients
  after each has lost the component that points against the other, so that it
  raises neither loss. For two losses, it is that of :func:`pcgrad_weights`, and
  twice that of :func:`upgrad_weights`.

  Args:
    gramian: (2, 2), inner products of the losses' gradients.

  Returns:
    (2,), the weights; float32, or float64 for such a Gramian. Both are 1 where
    a gradient is 0. A loss whose gradient is not finite has weight 0.

  Raises:
    ValueError: if ``gramian`` is not a matrix of two losses.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import conflict
    >>> rows = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> weights = conflict.gh_weights(rows @ rows.T)
    >>> print(weights, weights @ rows)
    [2.  1.5] [0.5 1.5]

  References:
    Huang et al., `Gradient Harmonization in Unsupervised Domain Adaptation
    <https://arxiv.org/abs/2408.00288>`_, 2024
  """
  of = _of_two(gramian)
  against = jnp.minimum(of.cosines[0, 1], 0)
  return _where_finite(1 - against * of.divisors[::-1] / of.divisors, of)


def gh_plus_plus_weights(
  gramian: jax.Array, *, harmonic_range: float = 0.5
) -> jax.Array:
  r"""Weights of GH++, which changes two conflicting gradients less than GH.

  Where the angle θ between the gradients is more than a right angle,

  .. math::
    w_1 = 1 + 2 \sin \frac{\beta}{2}, \qquad
    w_2 = 1 - 2 \sin \frac{\theta - \pi/2 - \beta}{2}, \qquad
    \beta = \eta\, (\theta - \pi / 2)

  as in the authors' published code, and both weights are 1 otherwise. The step
  may raise a loss.

  Args:
    gramian: (2, 2), inner products of the losses' gradients: of the domain loss
      first, then of the task's.
    harmonic_range: η, from 0 to 1: the share of the excess over a right angle
      that the first weight answers for.

  Returns:
    (2,), the weights; float32, or float64 for such a Gramian. Both are 1 where
    a gradient is 0. A loss whose gradient is not finite has weight 0.

  Raises:
    ValueError: if ``gramian`` is not a matrix of two losses, or
      ``harmonic_range`` is out of range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm import conflict
    >>> rows = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> print(np.float64(conflict.gh_plus_plus_weights(rows @ rows.T)).round(4))
    [1.3902 0.6098]

  References:
    Huang et al., `Gradient Harmonization in Unsupervised Domain Adaptation
    <https://arxiv.org/abs/2408.00288>`_, 2024
  """
  counters.check_range('harmonic_range', harmonic_range, 0, 1)
  of = _of_two(gramian)
  cosine = of.cosines[0, 1]
  # The derivative of the arc sine is infinite at -1, of opposite gradients.
  inside = (cosine < 0) & (cosine > -1)
  excess = jnp.arcsin(jnp.where(inside, -cosine, 0))
  excess = jnp.where(inside | (cosine >= 0), excess, math.pi / 2)
  first = harmonic_range * excess
  weights = 1 + 2 * jnp.sin(first / 2), 1 - 2 * jnp.sin((excess - first) / 2)
  return _where_finite(jnp.stack(weights), of)


def _of_two(gramian):
  if jnp.shape(gramian) != (2, 2):
    raise ValueError(
      'gramian must be that of two losses, of shape (2, 2), got shape'
      f' {jnp.shape(gramian)}. For more, take upgrad_weights.'
    )
  return _gramian.directions(gramian)


def _where_finite(weights, of):
  return jnp.where(of.finite, weights, 0)
