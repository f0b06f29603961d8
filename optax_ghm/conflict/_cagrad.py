"""The step near the mean gradient that helps the worst-off loss most."""

import jax
import jax.numpy as jnp

from optax_ghm._core import counters
from optax_ghm.conflict import _gramian, _minimum

ITERATIONS = 28


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
  along_mean = _gramian.multiply(of.cosines, parts) / size
  shorter = of.shortness

  # The dual: minimize <g_w, mean> + c |mean| |g_w| over w >= 0 with sum 1, for
  # x = w |g|, in units of the shortest gradient. The norm is the least value of
  # (|g_w|² / r + r) / 2, so that r is one unknown more and all is smooth.
  def slope(x_and_r, cosines, along_mean):
    x, r = x_and_r[:-1], x_and_r[-1]
    inner = _gramian.multiply(cosines, x) / r
    square = jnp.sum(inner * x) / r
    gradient = jnp.append(along_mean + c * inner, c / 2 * (1 - square))
    mixed, of_r = -c * inner / r, c * square / r
    above = jnp.concatenate([c * cosines / r, mixed[:, None]], axis=1)
    return gradient, jnp.concatenate([above, jnp.append(mixed, of_r)[None]])

  start = jnp.ones_like(shorter) / jnp.sum(shorter)
  x = _minimum.minimum(
    slope,
    (of.cosines, along_mean),
    jnp.append(start, jnp.ones_like(size)),
    jnp.append(shorter, jnp.zeros_like(size)),
    ITERATIONS,
  )[:-1]
  x = jnp.where(of.points, x, 0)
  x *= c * unit * size / _length(of.cosines, x)
  return of.shares + x / of.divisors


def _length(cosines, x):
  """The norm of the sum of unit vectors times x, and not quite 0.

  It is no less than any component, up to which the vectors may cancel.
  """
  components = _gramian.multiply(cosines, x)
  square = jnp.sum(x * components)
  least = 1e-12 * jnp.sum(x * x) + 1e-30
  longest = jnp.maximum(jnp.max(jnp.square(components)), least)
  return jnp.sqrt(jnp.maximum(square, longest))
