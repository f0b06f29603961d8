"""Running averages of batch statistics, for normalising without a batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_ghm.batch_normalization import _moments


class RunningMoments(NamedTuple):
  """Averages of the means and variances of batches.

  Attributes:
    mean: per feature (and domain), float32.
    var: the same.
    weight: how much of the averages are batches, and not their start: 1 makes
      the start count like any batch, as in Flax; from 0 it grows to 1, and the
      averages are of the batches alone.
  """

  mean: jax.Array
  var: jax.Array
  weight: jax.Array

  @classmethod
  def init(
    cls, shape: tuple[int, ...], debias: bool = False
  ) -> 'RunningMoments':
    """Mean 0 and variance 1; those count for nothing if ``debias``."""
    weight = jnp.zeros if debias else jnp.ones
    return cls(*(f(shape, jnp.float32) for f in (jnp.zeros, jnp.ones, weight)))


def update_running_moments(
  running: RunningMoments,
  moments: _moments.Moments,
  *,
  decay: ArrayLike = 0.99,
  unbiased: bool = False,
) -> RunningMoments:
  r"""Running averages after one more batch.

  .. math::
    w' = \delta w + 1 - \delta, \qquad
    \mu' = \mu + \frac{1 - \delta}{w'} (\mu_B - \mu)

  and so for the variance, with the decay δ: what PyTorch calls momentum is 1 -
  δ, what Flax calls so is δ. Features of which nothing counted in this batch,
  or whose statistics are not finite, stay as they are. No gradient flows
  through.

  Args:
    running: averages so far.
    moments: of the batch; of all micro-batches, if these are merged first.
    decay: how much of the averages is kept.
    unbiased: whether to average variances that are divided by count - 1, as
      PyTorch does, or by the count, as Flax does.

  Returns:
    The next averages.

  Raises:
    ValueError: if the shapes of both differ.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> running = optax_ghm.RunningMoments.init((1,), debias=True)
    >>> moments = optax_ghm.batch_moments(jnp.array([[1.0], [3.0]]))
    >>> running = optax_ghm.update_running_moments(running, moments, decay=0.9)
    >>> running.mean, running.var
    (Array([2.], dtype=float32), Array([1.], dtype=float32))
    >>> running.weight
    Array([0.1], dtype=float32)
  """
  if moments.mean.shape != running.mean.shape:
    raise ValueError(
      f'moments, of shape {moments.mean.shape}, must have that of the running'
      f' averages, {running.mean.shape}.'
    )
  moments = jax.tree.map(
    lambda u: u.astype(running.mean.dtype), jax.lax.stop_gradient(moments)
  )
  mean, var = moments.mean, moments.variance(unbiased)
  seen = (moments.count > 0) & jnp.isfinite(mean) & jnp.isfinite(var)
  weight = decay * running.weight + (1 - decay)
  rate = (1 - decay) / jnp.where(weight == 0, 1, weight)

  def average(old, new):
    # The shares of (1 - rate) * old + rate * new would not add up to 1.
    moved = old + rate * (new - old)
    return jnp.where(rate == 1, new, moved).astype(old.dtype)

  following = RunningMoments(
    average(running.mean, mean),
    average(running.var, var),
    jnp.asarray(weight, running.weight.dtype),
  )
  return jax.tree.map(
    lambda new, old: jnp.where(seen, new, old), following, running
  )
