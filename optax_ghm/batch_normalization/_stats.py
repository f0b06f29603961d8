"""How healthy a batch normalization is, in a few numbers per layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_ghm.batch_normalization import _moments, _running_moments

COLUMNS = ('mean_to_std', 'mean_drift', 'std_drift', 'clipped', 'constant')


class BatchNormStats(NamedTuple):
  """The result of :func:`batch_norm_stats`, as one array.

  Attributes:
    numbers: (..., 5), float32; the properties of this class read its columns.
  """

  numbers: jax.Array

  @property
  def mean_to_std(self) -> jax.Array:
    """The largest absolute mean of a feature, in its standard deviations."""
    return self._column('mean_to_std')

  @property
  def mean_drift(self) -> jax.Array:
    """How far batch means are from the running means, in running deviations."""
    return self._column('mean_drift')

  @property
  def std_drift(self) -> jax.Array:
    """How far logarithms of batch deviations are from the running ones."""
    return self._column('std_drift')

  @property
  def clipped(self) -> jax.Array:
    """The share of features at a limit of renormalization; 0 without limits."""
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
  r"""Measures how far a batch is from the running averages.

  .. math::
    \text{mean drift} = \sqrt{\operatorname{mean}_c
    \Big(\frac{\mu_B - \mu}{\sigma}\Big)^2}, \qquad
    \text{std drift} = \sqrt{\operatorname{mean}_c
    \Big(\log \frac{\sigma_B}{\sigma}\Big)^2}

  over the features c in which anything counted; all numbers are 0 if there are
  none. In batches of n independent examples the drifts are about
  :math:`n^{-1/2}` and :math:`(2n)^{-1/2}`. Much larger drifts mean that the
  running averages lag, or that batches differ by more than chance. The modules
  ``BatchNorm``, ``BatchRenorm`` and ``DomainBatchNorm`` measure these numbers
  themselves.

  Args:
    moments: of the batch.
    running: the averages before the batch.
    epsilon: of the batch norm.
    r_max: limit of r in renormalization, if there is one.
    d_max: limit of d in renormalization, if there is one.

  Returns:
    The numbers, through which no gradient flows.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> from optax_ghm import flow
    >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]])
    >>> stats = flow.batch_norm_stats(
    ...   optax_ghm.Moments.of(x), optax_ghm.RunningMoments.init((2,))
    ... )
    >>> print(stats.mean_drift.round(2), stats.constant)
    3.81 0.5

  References:
    Ioffe, `Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models <https://arxiv.org/abs/1702.03275>`_, 2017
  """
  moments, running = jax.lax.stop_gradient((moments, running))
  running = running.widen()
  moments = jax.tree.map(lambda u: u.astype(running.mean.dtype), moments)
  counted = moments.count > 0
  std = jnp.sqrt(moments.var + epsilon)
  running_std = jnp.sqrt(running.var + epsilon)
  d = (moments.mean - running.mean) / running_std
  log_r = jnp.log(std / running_std)
  clipped = (jnp.abs(d) > d_max) | (jnp.abs(log_r) > jnp.log(r_max))

  def mean(u):
    total = jnp.sum(u, where=counted, dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1)

  mean_to_std = jnp.abs(moments.mean) / std
  columns = {
    'mean_to_std': jnp.max(mean_to_std, initial=0, where=counted),
    'mean_drift': jnp.sqrt(mean(jnp.square(d))),
    'std_drift': jnp.sqrt(mean(jnp.square(log_r))),
    'clipped': mean(clipped),
    'constant': mean(moments.var < epsilon),
  }
  return BatchNormStats(
    jnp.stack([columns[name] for name in COLUMNS]).astype(jnp.float32)
  )
