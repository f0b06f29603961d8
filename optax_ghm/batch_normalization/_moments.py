"""Count, mean and squared deviations of what is normalised together."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import _pool


class Moments(NamedTuple):
  """Statistics of a batch, that merge exactly with those of another.

  Attributes:
    count: how many elements there were, per feature; float32, as all of these
      (float64 for 64-bit input).
    mean: their mean; 0 where there were none.
    m2: the sum of their squared deviations from it.
  """

  count: jax.Array
  mean: jax.Array
  m2: jax.Array

  @classmethod
  def init(cls, shape: tuple[int, ...], dtype: Any = jnp.float32) -> 'Moments':
    """Those of nothing."""
    return cls(*(jnp.zeros(shape, dtype) for _ in cls._fields))

  def variance(self, unbiased: bool = False) -> jax.Array:
    """The mean squared deviation; divided by count - 1 if unbiased."""
    return self.m2 / jnp.maximum(self.count - (1 if unbiased else 0), 1)


def batch_moments(
  x: jax.Array,
  *,
  axis: int | tuple[int, ...] = -1,
  mask: jax.Array | None = None,
  axis_name: arrays.AxisName = None,
) -> Moments:
  r"""Counts, means and squared deviations per feature.

  .. math::
    n = \sum_i w_i, \qquad \mu = \frac{1}{n} \sum_i w_i x_i, \qquad
    M_2 = \sum_i w_i (x_i - \mu)^2

  in two passes, and a third that makes up for the rounding of the mean where
  that is many standard deviations away from 0. Differentiable both ways, unlike
  the moments that come with a batch norm, which are constants.

  Args:
    x: real floating array.
    axis: the feature axes, those that stay, in the order they have in ``x``.
    mask: broadcastable to ``x``, not 0 for what counts.
    axis_name: mapped axes over which the batch is split.

  Returns:
    The moments, shaped like the features, in at least float32. NaN and
    infinities among what counts make those of their feature NaN.

  Raises:
    TypeError: if ``x`` is not real and floating.
    ValueError: if ``axis`` or ``mask`` does not fit ``x``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> x = jnp.array([[1.0, 0.0], [3.0, 0.0]])
    >>> moments = optax_ghm.batch_moments(x)
    >>> moments.mean
    Array([2., 0.], dtype=float32)
    >>> moments.variance()
    Array([1., 0.], dtype=float32)

  References:
    Chan, Golub, LeVeque, `Algorithms for computing the sample variance
    <https://doi.org/10.1080/00031305.1983.10483115>`_, 1983
  """
  x = jnp.asarray(x)
  pool = _pool.Pool.of(x, axis, axis_name)
  count, mean, rest, variance = pool.measure(x, _pool.fit_mask(x, mask))
  moments = Moments(count, mean + rest, count * variance)
  return pool.squeezed(moments)


def merge_moments(a: Moments, b: Moments) -> Moments:
  r"""The moments of two batches together, exactly.

  .. math::
    \mu = \mu_a + \delta\,\frac{n_b}{n}, \qquad
    M_2 = M_{2,a} + M_{2,b} + \delta^2 \frac{n_a n_b}{n}, \qquad
    \delta = \mu_b - \mu_a, \quad n = n_a + n_b

  Over micro-batches, over epochs, in any order: to rounding, what one batch of
  all of it has. A batch in which nothing counts changes nothing.

  Args:
    a: moments.
    b: others, of the same shape.

  Returns:
    Their moments together.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> x = jnp.arange(6.0)[:, None]
    >>> parts = [optax_ghm.batch_moments(part) for part in (x[:2], x[2:])]
    >>> optax_ghm.merge_moments(*parts).variance()
    Array([2.9166667], dtype=float32)

  References:
    Chan, Golub, LeVeque, `Updating formulae and a pairwise algorithm for
    computing sample variances
    <https://doi.org/10.1007/978-3-642-51461-6_3>`_, 1982
  """
  count = a.count + b.count
  share = b.count / jnp.maximum(count, 1)
  delta = b.mean - a.mean
  return Moments(
    count=count,
    mean=a.mean + delta * share,
    m2=a.m2 + b.m2 + delta * (a.count * share) * delta,
  )


def pool_moments(
  moments: Moments,
  *,
  axis: int | None = None,
  axis_name: arrays.AxisName = None,
) -> Moments:
  """The moments of many batches together.

  Args:
    moments: stacked along an axis, or of one device.
    axis: the axis along which they are stacked, if they are.
    axis_name: mapped axes over whose devices they are pooled.

  Returns:
    Their moments together, as :func:`merge_moments` would have them.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> halves = jnp.arange(4.0).reshape(2, 2)  # two batches of two numbers
    >>> stacked = optax_ghm.batch_moments(halves, axis=0)
    >>> optax_ghm.pool_moments(stacked, axis=0).m2
    Array(5., dtype=float32)
  """

  def total(u):
    if axis is not None:
      u = jnp.sum(u, axis, keepdims=True)
    return arrays.psum(u, axis_name)

  count = total(moments.count)
  mean = total(moments.count * moments.mean) / jnp.maximum(count, 1)
  delta = moments.mean - mean
  m2 = total(moments.m2 + delta * moments.count * delta)
  pooled = Moments(count, mean, m2)
  if axis is None:
    return pooled
  return jax.tree.map(lambda u: jnp.squeeze(u, axis), pooled)
