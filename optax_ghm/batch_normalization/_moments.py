"""Count, mean and squared deviations of a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import _pool


class Moments(NamedTuple):
  r"""Statistics of a batch, which merge exactly with those of another batch.

  .. math::
    n = \sum_i w_i, \qquad \mu = \frac{1}{n} \sum_i w_i x_i, \qquad
    M_2 = \sum_i w_i (x_i - \mu)^2

  with w = 1 where the mask holds, and 0 elsewhere.

  Attributes:
    count: n, how many elements counted, for each feature; float32 (float64 for
      64-bit input).
    mean: μ, of the dtype of ``count``; 0 where nothing counted.
    m2: M₂, of the dtype of ``count``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> x = jnp.array([[1.0, 0.0], [3.0, 0.0]])
    >>> moments = optax_ghm.Moments.of(x)
    >>> moments.mean
    Array([2., 0.], dtype=float32)
    >>> moments.var
    Array([1., 0.], dtype=float32)

  References:
    Chan, Golub, LeVeque, `Updating formulae and a pairwise algorithm for
    computing sample variances
    <https://doi.org/10.1007/978-3-642-51461-6_3>`_, 1982; the same, `Algorithms
    for computing the sample variance
    <https://doi.org/10.1080/00031305.1983.10483115>`_, 1983
  """

  count: jax.Array
  mean: jax.Array
  m2: jax.Array

  @classmethod
  def init(cls, shape: tuple[int, ...], dtype: Any = jnp.float32) -> 'Moments':
    """Returns the moments of no elements, which are all 0."""
    return cls(*(jnp.zeros(shape, dtype) for _ in cls._fields))

  @classmethod
  def of(
    cls,
    x: jax.Array,
    *,
    axis: int | tuple[int, ...] = -1,
    mask: jax.Array | None = None,
    axis_name: arrays.AxisName = None,
  ) -> 'Moments':
    """Returns the moments of every feature.

    The sums take two passes, and a third one that corrects the rounding of the
    mean where the mean is many standard deviations away from 0. They are
    differentiable in both modes, unlike the moments that a batch norm returns,
    which are constants.

    Args:
      x: real floating array.
      axis: the feature axes, which remain, in the order they have in ``x``.
      mask: bool, broadcastable to ``x``: which elements count.
      axis_name: mapped axes over which the batch is split.

    Returns:
      The moments, shaped like the features. If an element that counts is NaN or
      infinite, mean and m2 of its feature are NaN.

    Raises:
      TypeError: if ``x`` is not real and floating, or ``mask`` not bool.
      ValueError: if ``axis`` or ``mask`` does not fit ``x``.
    """
    x = jnp.asarray(x)
    return of_pool(_pool.Pool.of(x, axis, axis_name, mask), x)

  @property
  def var(self) -> jax.Array:
    """The mean squared deviation, as in :class:`RunningMoments`."""
    return self.variance()

  def variance(self, unbiased: bool = False) -> jax.Array:
    """Returns m2 divided by the count, or by count - 1 if unbiased."""
    return self.m2 / jnp.maximum(self.count - (1 if unbiased else 0), 1)

  def merge(self, other: 'Moments') -> 'Moments':
    r"""Returns the moments of two batches together, exactly.

    .. math::
      \mu = \mu_a + \delta\,\frac{n_b}{n}, \qquad
      M_2 = M_{2,a} + M_{2,b} + \delta^2 \frac{n_a n_b}{n}, \qquad
      \delta = \mu_b - \mu_a, \quad n = n_a + n_b

    Micro-batches and epochs may be merged in any order. The result is, to
    rounding, that of one batch with all elements. A batch in which nothing
    counts changes nothing.

    Args:
      other: moments of the same shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_ghm
      >>> x = jnp.arange(6.0)[:, None]
      >>> first, second = map(optax_ghm.Moments.of, (x[:2], x[2:]))
      >>> first.merge(second).var
      Array([2.9166667], dtype=float32)
    """
    count = self.count + other.count
    share = other.count / jnp.maximum(count, 1)
    delta = other.mean - self.mean
    mean = self.mean + delta * share
    m2 = self.m2 + other.m2 + delta * (self.count * share) * delta
    return Moments(count, mean, m2)

  def pool(
    self, *, axis: int | None = None, axis_name: arrays.AxisName = None
  ) -> 'Moments':
    """Returns the moments of many batches together, as :meth:`merge` does.

    Args:
      axis: the axis along which the moments of the batches are stacked, if any.
      axis_name: mapped axes over whose devices to pool.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_ghm
      >>> halves = jnp.arange(4.0).reshape(2, 2)  # two batches of two numbers
      >>> optax_ghm.Moments.of(halves, axis=0).pool(axis=0).m2
      Array(5., dtype=float32)
    """
    axes = () if axis is None else axis

    def total(u):
      return arrays.psum(jnp.sum(u, axes, keepdims=True), axis_name)

    count = total(self.count)
    mean = total(self.count * self.mean) / jnp.maximum(count, 1)
    delta = self.mean - mean
    pooled = Moments(count, mean, total(self.m2 + delta * self.count * delta))
    return jax.tree.map(lambda u: jnp.squeeze(u, axes), pooled)


def of_pool(pool: _pool.Pool, x: jax.Array) -> Moments:
  """The moments of what is normalized together, shaped like the features."""
  count, mean, mean_error, var = pool.measure(x)
  return pool.squeeze(Moments(count, mean + mean_error, count * var))
