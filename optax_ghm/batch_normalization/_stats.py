"""How healthy a batch normalisation is, in a few numbers per layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_ghm.batch_normalization import _moments, _running_moments

COLUMNS = ('mean_to_std', 'mean_drift', 'std_drift', 'clipped', 'constant')


class BatchNormStats(NamedTuple):
  """What :func:`batch_norm_stats` measures, as one array.

  Attributes:
    numbers: (..., 5), float32: what the properties of this class read.
  """

  numbers: jax.Array

  @property
  def mean_to_std(self) -> jax.Array:
    """The largest mean, in standard deviations."""
    return self._column('mean_to_std')

  @property
  def mean_drift(self) -> jax.Array:
    """How far the batch means are off the running ones, in running stds."""
    return self._column('mean_drift')

  @property
  def std_drift(self) -> jax.Array:
    """How far the logarithms of the deviations are off the running ones."""
    return self._column('std_drift')

  @property
  def clipped(self) -> jax.Array:
    """The share of features at the limits of renormalisation; 0 without."""
    return self._column('clipped')

  @property
  def constant(self) -> jax.Array:
    """The share of features whose variance is below epsilon."""
    return self._column('constant')

  def _column(self, name):
    return self.numbers[..., COLUMNS.index(name)]


def batch_norm_stats(
  moments: _moments.Moments,
  running: _running_moments.RunningMoments,
  *,
  epsilon: float = 1e-5,
  r_max: ArrayLike = jnp.inf,
  d_max: ArrayLike = jnp.inf,
) -> BatchNormStats:
  r"""How far a batch is from the running averages, and what is odd about it.

  .. math::
    \text{mean drift} = \sqrt{\operatorname{mean}_c
    \Big(\frac{\mu_B - \mu}{\sigma}\Big)^2}, \qquad
    \text{std drift} = \sqrt{\operatorname{mean}_c
    \Big(\log \frac{\sigma_B}{\sigma}\Big)^2}

  over the features c of which anything counted (0 if there is none). Of
  batches of n independent examples these are about :math:`n^{-1/2}` and
  :math:`(2n)^{-1/2}`; much more says that the running averages lag, or that
  batches differ by more than chance. The modules ``BatchNorm`` and its kin
  measure this themselves. Averages that have seen no batch yet have mean 0 and
  variance 1.

  Args:
    moments: of the batch.
    running: averages before it.
    epsilon: of the batch norm.
    r_max: limit of renormalisation, if there is one.
    d_max: the same.

  Returns:
    The numbers. No gradient flows through.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> from optax_ghm import flow
    >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]])
    >>> stats = flow.batch_norm_stats(
    ...   optax_ghm.batch_moments(x), optax_ghm.RunningMoments.init((2,))
    ... )
    >>> print(stats.mean_drift.round(2), stats.constant)
    3.81 0.5

  References:
    Ioffe, `Batch Renormalization <https://arxiv.org/abs/1702.03275>`_, 2017
  """
  moments, running = jax.lax.stop_gradient((moments, running))
  moments = jax.tree.map(lambda u: u.astype(running.mean.dtype), moments)
  counted = moments.count > 0
  variance = moments.variance()
  std, running_std = (
    jnp.sqrt(variance + epsilon),
    jnp.sqrt(running.var + epsilon),
  )
  d = (moments.mean - running.mean) / running_std
  log_r = jnp.log(std / running_std)
  clipped = (jnp.abs(d) > d_max) | (jnp.abs(log_r) > jnp.log(r_max))

  def mean(u):
    total = jnp.sum(u, where=counted, dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1)

  columns = {
    'mean_to_std': jnp.max(
      jnp.abs(moments.mean) / std, initial=0, where=counted
    ),
    'mean_drift': jnp.sqrt(mean(jnp.square(d))),
    'std_drift': jnp.sqrt(mean(jnp.square(log_r))),
    'clipped': mean(clipped),
    'constant': mean(variance < epsilon),
  }
  return BatchNormStats(
    jnp.stack([columns[name] for name in COLUMNS]).astype(jnp.float32)
  )
