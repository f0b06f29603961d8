"""Batch normalisation as Linen modules."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.linen import dtypes, initializers, module

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import (
  _batch_norm,
  _domain,
  _ghost,
  _renorm,
  _running_moments,
  _stats,
)

STATS = 'batch_norm_stats'
"""The collection that statistics for the record go to, if it is mutable."""


class Normalization(nn.Module):
  """What the modules here have in common; the first of them explains it."""

  use_running_average: bool | None = None
  axis: int | tuple[int, ...] = -1
  decay: float = 0.99
  epsilon: float = 1e-5
  dtype: Any = None
  param_dtype: Any = jnp.float32
  use_bias: bool = True
  use_scale: bool = True
  bias_init: initializers.Initializer = initializers.zeros
  scale_init: initializers.Initializer = initializers.ones
  axis_name: arrays.AxisName = None
  unbiased: bool = False
  debias: bool = False

  def _norm(self, x, use_running_average, mask, update, domain=None):
    use_running_average = module.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    running, write = self._running_average(x)
    scale, bias = self._parameters(x)
    given = [u for u in (x, scale, bias) if u is not None]
    options: dict[str, Any] = {
      'axis': self.axis,
      'epsilon': self.epsilon,
      'dtype': dtypes.canonicalize_dtype(*given, dtype=self.dtype),
    }
    update = update and not (use_running_average or self.is_initializing())
    limits = self._limits(update)  # whose count of steps has to be there
    if use_running_average:
      return _batch_norm.batch_norm_inference(
        x, running.mean, running.var, scale, bias, domain=domain, **options
      )
    # There need not be such an axis where parameters are initialized.
    options['axis_name'] = None if self.is_initializing() else self.axis_name
    options['mask'] = mask
    y, moments = self._by_batch(
      x, scale, bias, running=running, domain=domain, **limits, **options
    )
    if self.is_mutable_collection(STATS) and not self.is_initializing():
      stats = _stats.batch_norm_stats(
        moments, running, epsilon=self.epsilon, **limits
      )
      self.put_variable(STATS, 'stats', stats)
    if update:
      write(
        _running_moments.update_running_moments(
          running, moments, decay=self.decay, unbiased=self.unbiased
        )
      )
    return y

  def _limits(self, update):
    """Of renormalisation, if there are any."""
    del update
    return {}

  def _by_batch(self, x, scale, bias, *, running, domain, **options):
    """Y and the moments of the batch."""
    raise NotImplementedError

  def _rows(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What statistics have before the features, and so the parameters."""
    return (), ()

  def _features(self, x):
    axes = (self.axis,) if isinstance(self.axis, int) else self.axis
    return tuple(x.shape[a] for a in sorted(a % x.ndim for a in axes))

  def _parameters(self, x):
    shape = (*self._rows()[1], *self._features(x))
    return (
      self.param(name, init, shape, self.param_dtype) if use else None
      for name, init, use in (
        ('scale', self.scale_init, self.use_scale),
        ('bias', self.bias_init, self.use_bias),
      )
    )

  def _running_average(self, x):
    """The running averages, and a function that replaces them."""
    start = _running_moments.RunningMoments.init(
      (*self._rows()[0], *self._features(x)), self.debias
    )
    kept = [
      self.variable('batch_stats', name, lambda value=value: value)
      for name, value in start._asdict().items()
      if name != 'weight' or self.debias
    ]
    running = _running_moments.RunningMoments(
      *(variable.value for variable in kept),
      *(() if self.debias else (start.weight,)),
    )

    def write(following):
      for variable, value in zip(kept, following, strict=False):
        variable.value = value

    return running, write


class BatchNorm(Normalization):
  """:func:`optax_ghm.batch_norm` as a module that keeps running averages.

  Takes the place of ``flax.linen.BatchNorm``: names, collections and
  checkpoints are the same, and so is what it computes, more exactly. What Flax
  calls ``momentum`` is ``decay`` here, and x has to be real and floating. With
  the collection ``batch_norm_stats`` mutable (and, in an ``nn.scan``, among its
  ``variable_axes``), every training call leaves
  :func:`optax_ghm.flow.batch_norm_stats` there.

  Attributes:
    use_running_average: whether to normalise by the running averages; here or
      in the call.
    axis: the feature axes.
    decay: how much of the running averages every batch leaves.
    epsilon: added to the variance.
    dtype: of the result; None promotes those of x and the parameters.
    param_dtype: of the parameters.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: initializer of the bias.
    scale_init: initializer of the scale.
    axis_name: mapped axes over which the batch is split.
    unbiased: whether running variances are divided by count - 1.
    debias: whether the averages are of the batches alone from the start, and
      not of mean 0 and variance 1 too; keeps their ``weight`` beside them.
    ghost_size: examples that are normalised together, if not all of a batch.

  Examples:
    >>> from flax import linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm.linen import BatchNorm
    >>> x = jnp.array([[1.0], [3.0], [100.0]])
    >>> mask = jnp.array([[True], [True], [False]])
    >>> norm = BatchNorm(decay=0.9)
    >>> variables = norm.init(jax.random.key(0), x, use_running_average=True)
    >>> y, updated = norm.apply(
    ...   variables,
    ...   x,
    ...   use_running_average=False,
    ...   mask=mask,
    ...   mutable=['batch_stats'],
    ... )
    >>> y[:2, 0].round(3)
    Array([-1.,  1.], dtype=float32)
    >>> updated['batch_stats']['mean']
    Array([0.2], dtype=float32)
  """

  ghost_size: int | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
    update_running_average: bool = True,
  ) -> jax.Array:
    """Normalises by the batch or by the running averages.

    Args:
      x: the input.
      use_running_average: whether by the running averages.
      mask: broadcastable to ``x``: what counts.
      update_running_average: False leaves these as they are while the batch is
        normalised by itself, as in adaptation at test time.

    Returns:
      The input, normalised.
    """
    return self._norm(x, use_running_average, mask, update_running_average)

  def _by_batch(self, x, scale, bias, *, running, domain, **options):
    del running, domain
    if self.ghost_size is None:
      return _batch_norm.batch_norm(x, scale, bias, **options)
    return _ghost.ghost_batch_norm(
      x, scale, bias, ghost_size=self.ghost_size, **options
    )


class BatchRenorm(Normalization):
  """:func:`optax_ghm.batch_renorm` as a module.

  Attributes:
    use_running_average: see :class:`BatchNorm`, as are those up to ``debias``.
    r_max: limit of r, a number or a schedule over the training calls, which
      are then counted beside the running averages.
    d_max: limit of d, the same.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> from optax_ghm.linen import BatchRenorm
    >>> r_max, d_max = optax_ghm.renorm_schedules()
    >>> norm = BatchRenorm(False, r_max=r_max, d_max=d_max)
    >>> x = jnp.array([[1.0], [3.0]])
    >>> variables = norm.init(jax.random.key(0), x)
    >>> y, updated = norm.apply(variables, x, mutable=['batch_stats'])
    >>> int(updated['batch_stats']['steps'])
    1
  """

  r_max: optax.ScalarOrSchedule = 3.0
  d_max: optax.ScalarOrSchedule = 5.0

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
    update_running_average: bool = True,
  ) -> jax.Array:
    """Normalises by the batch or by the running averages.

    Args:
      x: the input.
      use_running_average: whether by the running averages.
      mask: broadcastable to ``x``: what counts.
      update_running_average: False leaves these as they are while the batch is
        normalised by itself, as in adaptation at test time.

    Returns:
      The input, normalised.
    """
    return self._norm(x, use_running_average, mask, update_running_average)

  def _by_batch(self, x, scale, bias, *, running, domain, **options):
    del domain
    return _renorm.batch_renorm(x, running, scale, bias, **options)

  def _limits(self, update):
    limits = {'r_max': self.r_max, 'd_max': self.d_max}
    if any(map(callable, limits.values())):
      steps = self.variable(
        'batch_stats', 'steps', lambda: jnp.zeros([], jnp.int32)
      )
      limits = {
        name: limit(steps.value) if callable(limit) else limit
        for name, limit in limits.items()
      }
      if update:
        steps.value = jnp.asarray(optax.safe_increment(steps.value))
    return limits


class DomainBatchNorm(Normalization):
  """:func:`optax_ghm.domain_batch_norm` as a module: averages per domain.

  Attributes:
    use_running_average: see :class:`BatchNorm`, as are those up to ``debias``.
    num_domains: how many domains there are.
    shared_affine: whether scale and bias are the same in all of them.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm.linen import DomainBatchNorm
    >>> norm = DomainBatchNorm(False, num_domains=2)
    >>> x, domain = jnp.array([[1.0], [3.0], [9.0]]), jnp.array([0, 0, 1])
    >>> variables = norm.init(jax.random.key(0), x, domain)
    >>> variables['batch_stats']['mean'].shape
    (2, 1)
    >>> y, updated = norm.apply(variables, x, domain, mutable=['batch_stats'])
    >>> updated['batch_stats']['mean'].round(3)
    Array([[0.02], [0.09]], dtype=float32)
  """

  num_domains: int = 2
  shared_affine: bool = True

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    domain: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
    update_running_average: bool = True,
  ) -> jax.Array:
    """Normalises every domain by itself or by its running averages.

    Args:
      x: the input, examples along axis 0.
      domain: integers, one per example, or one for all.
      use_running_average: whether by the running averages.
      mask: broadcastable to ``x``: what counts.
      update_running_average: see :class:`BatchNorm`.

    Returns:
      The input, normalised.
    """
    return self._norm(
      x, use_running_average, mask, update_running_average, domain
    )

  def _by_batch(self, x, scale, bias, *, running, domain, **options):
    del running
    return _domain.domain_batch_norm(
      x, domain, scale, bias, num_domains=self.num_domains, **options
    )

  def _rows(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rows = (self.num_domains,)
    return rows, () if self.shared_affine else rows
