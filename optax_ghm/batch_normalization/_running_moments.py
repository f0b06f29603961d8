"""Running averages of batch statistics, to normalize without a batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters
from optax_ghm.batch_normalization import _moments


class RunningMoments(NamedTuple):
  """Running averages of the means and variances of batches.

  Attributes:
    mean: average of the means, for each feature (and domain); float32.
    var: average of the variances, shaped like ``mean``; float32.
    weight: the share of batches in the averages, shaped like ``mean``; the
      remainder is the share of the initial values. With 1 from the start the
      initial values count like any batch, as in Flax. From 0 the weight grows
      to 1, and the averages are of batches alone.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> running = optax_ghm.RunningMoments.init((1,), debias=True)
    >>> moments = optax_ghm.Moments.of(jnp.array([[1.0], [3.0]]))
    >>> running = running.update(moments, momentum=0.9)
    >>> running.mean, running.var
    (Array([2.], dtype=float32), Array([1.], dtype=float32))
    >>> running.weight
    Array([0.1], dtype=float32)
  """

  mean: jax.Array
  var: jax.Array
  weight: jax.Array

  @classmethod
  def init(
    cls, shape: tuple[int, ...], debias: bool = False
  ) -> 'RunningMoments':
    """Returns mean 0 and variance 1.

    Args:
      shape: of the features, behind the number of domains if there are domains.
      debias: whether these initial values count for nothing.
    """
    weight = jnp.zeros if debias else jnp.ones
    return cls(*(f(shape, jnp.float32) for f in (jnp.zeros, jnp.ones, weight)))

  def update(
    self,
    moments: _moments.Moments,
    *,
    momentum: ArrayLike = 0.99,
    unbiased: bool = False,
  ) -> 'RunningMoments':
    r"""Returns the averages after one more batch.

    .. math::
      w' = m\, w + 1 - m, \qquad
      \mu' = \mu + \frac{1 - m}{w'} (\mu_B - \mu)

    with the momentum m, and the variance accordingly. A feature stays as it is
    if nothing counted in this batch or its statistics are not finite. No
    gradient flows through the averages. Averages that were cast to 16 bits
    become float32: 16 bits can neither hold nor move them.

    Args:
      moments: of the batch. Merge the moments of micro-batches first.
      momentum: the share of the old average that is kept, as in Flax. PyTorch's
        momentum is 1 minus this one.
      unbiased: whether to average variances that are divided by count - 1, as
        PyTorch does, and not by the count, as Flax does.

    Raises:
      ValueError: if the moments have another shape than the averages, or the
        momentum is not from 0 to 1.
    """
    counters.check_range('momentum', momentum, 0, 1)
    if moments.mean.shape != self.mean.shape:
      raise ValueError(
        f'moments, of shape {moments.mean.shape}, must have that of the running'
        f' averages, {self.mean.shape}.'
      )
    old = self.widen()
    new = jax.lax.stop_gradient((moments.mean, moments.variance(unbiased)))
    mean, var = (u.astype(old.mean.dtype) for u in new)
    seen = (moments.count > 0) & jnp.isfinite(mean) & jnp.isfinite(var)
    weight = momentum * old.weight + (1 - momentum)
    rate = (1 - momentum) / jnp.where(weight == 0, 1, weight)

    def average(old, new):
      # Weights (1 - rate) and rate would not add up to 1 in floating point.
      moved = jnp.where(rate == 1, new, old + rate * (new - old))
      return jnp.where(seen, moved, old).astype(old.dtype)

    return RunningMoments(
      average(old.mean, mean),
      average(old.var, var),
      jnp.where(seen, weight, old.weight).astype(old.weight.dtype),
    )

  def widen(self) -> 'RunningMoments':
    """Returns the averages in float32, if they were cast to 16 bits."""
    return RunningMoments(*map(arrays.widen, self))
