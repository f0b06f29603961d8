"""The step near the mean gradient that helps the worst-off loss most."""

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays, counters
from optax_ghm.conflict import _gramian, _minimum

HALVINGS = 24
"""From ten decades to rounding. Each solves a quadratic program."""

SHORTEST = 1e-4
"""The least norm of g_w, in units of the shortest gradient: of less, only
rounding would be left."""


def cagrad_weights(gramian: jax.Array, *, c: float = 0.5) -> jax.Array:
  r"""Weights of CAGrad: near the mean, best for the worst-off loss.

  .. math::
    d = \arg\max_{d} \min_i \langle g_i, d \rangle
      \;\text{ where } \lVert d - \bar g \rVert \le c \lVert \bar g \rVert,
      \qquad \bar g = \frac{1}{m} \sum_i g_i

  With c = 0 it is the mean; the larger c is, the nearer it is to
  :func:`mgda_weights` in direction. With c < 1 it is 0 only where the mean is,
  so that training ends at a minimum of the mean loss.

  Args:
    gramian: (m, m), inner products of the losses' gradients.
    c: from 0 to 1, how far to go from the mean. The authors take 0.4 to 0.5.

  Returns:
    (m,), the weights; float32, or float64 for such a Gramian. A loss whose
    gradient is not finite has weight 0, and does not count in the mean. A
    gradient of 0 is no worst-off loss: it changes only the mean.

  Raises:
    ValueError: if ``gramian`` is not a square matrix, or if c is out of range.

  Examples:
    >>> import functools
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm import conflict
    >>> rows = jnp.array([[1.0, 0.0], [-0.5, 2.0]])
    >>> milder = functools.partial(conflict.cagrad_weights, c=0.2)
    >>> for weights in (conflict.cagrad_weights, milder):
    ...   print(np.float64((rows @ (weights(rows @ rows.T) @ rows))).round(2))
    [0.77 1.62]
    [0.46 1.77]

  References:
    Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
    <https://arxiv.org/abs/2110.14048>`_, 2021
  """
  counters.check_range('c', c, 0, 1)
  of = _gramian.directions(gramian)
  longest = jnp.max(of.norms)
  unit = jnp.where(longest > 0, longest, 1)
  parts = of.norms * of.shares / unit
  size = _length(of.cosines, parts)  # of the mean, in units of the longest
  along_mean = arrays.contract(of.cosines, parts) / size
  shorter = of.shortness

  # The dual: minimize <g_w, mean> + c |mean| |g_w| over w >= 0 with sum 1, for
  # x = w |g|, in units of the shortest gradient. The norm of g_w is not smooth
  # where it is 0. With k |g_w|² / 2 in its place, the minimum is the same for
  # that k with k |g_w| = c, and k |g_w| never falls as k grows.
  fixed = jax.lax.stop_gradient((of.cosines, along_mean, shorter))

  def solved(k):
    cosines, along_mean, shorter = fixed
    scale = 1 / (1 + k)  # keeps the numbers near 1
    return _minimum.quadratic(scale * k * cosines, scale * along_mean, shorter)

  def halve(bracket, _):
    low, high = bracket
    middle = jnp.sqrt(low) * jnp.sqrt(high)
    enough = middle * _length(fixed[0], solved(middle)) > c
    return (
      jnp.where(enough, low, middle),
      jnp.where(enough, middle, high),
    ), None

  least = jnp.min(jnp.where(of.points, fixed[2], 1))
  bracket = c * least / 2, c / SHORTEST * jnp.ones_like(size)
  (_, k), _ = jax.lax.scan(halve, bracket, length=HALVINGS)

  def slope(x, cosines, along_mean):
    length = _length(cosines, x)
    along = arrays.contract(cosines, x) / length
    bent = (cosines - jnp.outer(along, along)) / length
    return along_mean + c * along, c * bent

  arguments = of.cosines, along_mean
  x = _minimum.at_minimum(slope, arguments, solved(k), shorter)
  x = jnp.where(of.points, x, 0)
  x *= c * unit * size / jnp.maximum(_length(of.cosines, x), SHORTEST)
  return of.shares + x / of.divisors


def _length(cosines, x):
  """The norm of the sum of unit vectors times x, and not quite 0."""
  square = jnp.sum(x * arrays.contract(cosines, x))
  return jnp.sqrt(jnp.maximum(square, 1e-12 * jnp.sum(x * x) + 1e-30))
