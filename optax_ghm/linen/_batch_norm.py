"""Batch normalization as Linen modules."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.linen import dtypes, initializers, module

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import _step

STATS = 'batch_norm_stats'
"""The collection of statistics for the record, written if it is mutable."""


class Normalization(nn.Module):
  """The arguments and the call that all modules here have in common."""

  use_running_average: bool | None = None
  axis: int | tuple[int, ...] = -1
  momentum: float = 0.99
  epsilon: float = 1e-5
  dtype: Any = None
  param_dtype: Any = jnp.float32
  use_bias: bool = True
  use_scale: bool = True
  bias_init: initializers.Initializer = initializers.zeros
  scale_init: initializers.Initializer = initializers.ones
  axis_name: arrays.AxisName = None
  axis_index_groups: None = None
  use_fast_variance: bool = True
  force_float32_reductions: bool = True
  unbiased: bool = False
  debias: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
    update_running_average: bool = True,
  ) -> jax.Array:
    """Normalizes by the batch or by the running averages.

    Args:
      x: real floating array.
      use_running_average: whether to normalize by the running averages; must be
        given either here or to the module.
      mask: bool, broadcastable to ``x``: which elements count.
      update_running_average: whether a batch changes the running averages.
        Without, the batch is normalized by its own statistics all the same, as
        in adaptation at test time.

    Returns:
      The normalized input.
    """
    return self._normalize(x, use_running_average, mask, update_running_average)

  def _normalize(self, x, use_running_average, mask, update, domain=None):
    use_running_average = module.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    axes = (self.axis,) if isinstance(self.axis, int) else self.axis
    features = [x.shape[a] for a in sorted(a % x.ndim for a in axes)]
    start, shape = _step.init(self, features)

    def parameter(name, init, use):
      return self.param(name, init, shape, self.param_dtype) if use else None

    scale = parameter('scale', self.scale_init, self.use_scale)
    bias = parameter('bias', self.bias_init, self.use_bias)
    given = self.has_variable('batch_stats', 'mean')
    if given and 'weight' in start:  # that of averages without one
      start['weight'] = jnp.ones_like(start['weight'])
    variables = {
      name: self.variable('batch_stats', name, lambda value=value: value)
      for name, value in start.items()
      # A checkpoint of Flax has mean and var alone, which evaluation can use.
      if name in ('mean', 'var')
      or self.has_variable('batch_stats', name)
      or self.is_mutable_collection('batch_stats')
    }
    initializing = self.is_initializing()
    y, changed, stats = _step.step(
      self,
      {name: variable.value for name, variable in variables.items()},
      x,
      domain,
      by_average=use_running_average,
      update=update and not initializing,
      measure=not initializing and self.is_mutable_collection(STATS),
      mask=mask,
      # The axis need not exist where parameters are initialized.
      axis_name=None if initializing else self.axis_name,
      scale=scale,
      bias=bias,
      dtype=dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype),
    )
    for name, value in changed.items():
      variables[name].value = value
    if stats is not None:
      self.put_variable(STATS, 'stats', stats)
    return y


class BatchNorm(Normalization):
  """:func:`optax_ghm.batch_norm` as a module that keeps running averages.

  Takes the place of ``flax.linen.BatchNorm``: arguments, variables and
  checkpoints are the same, and so is the result, to rounding. With the
  collection ``batch_norm_stats`` mutable (and, in an ``nn.scan``, among its
  ``variable_axes``), every training call writes the statistics
  :func:`optax_ghm.flow.batch_norm_stats` there.

  Attributes:
    use_running_average: whether to normalize by the running averages; must be
      given either here or in the call.
    axis: the feature axes.
    momentum: the share of the running averages that every batch leaves.
    epsilon: added to the variance.
    dtype: of the result; None promotes the dtypes of x and the parameters.
    param_dtype: of the parameters.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: initializer of the bias.
    scale_init: initializer of the scale.
    axis_name: mapped axes over which the batch is split.
    axis_index_groups: must be None.
    use_fast_variance: has no effect. The variance is always computed from the
      deviations from the mean, never as a difference of squares.
    force_float32_reductions: must be True.
    unbiased: whether running variances are divided by count - 1.
    debias: whether the initial mean 0 and variance 1 have no part in the
      running averages; keeps their ``weight`` beside them, 1 for averages
      from a checkpoint that has none.
    ghost_size: how many examples are normalized together; None is all.

  Examples:
    >>> from flax import linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm.linen import BatchNorm
    >>> x = jnp.array([[1.0], [3.0], [100.0]])
    >>> mask = jnp.array([[True], [True], [False]])
    >>> norm = BatchNorm(momentum=0.9)
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


class BatchRenorm(Normalization):
  """:func:`optax_ghm.batch_renorm` as a module.

  Has the attributes of :class:`BatchNorm` up to ``debias``, and the limits.

  Attributes:
    r_max: limit of r, a number or a schedule over the number of training calls,
      which is then kept beside the running averages as ``steps``.
    d_max: limit of d, a number or a schedule over the number of training calls.

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


class DomainBatchNorm(Normalization):
  """:func:`optax_ghm.domain_batch_norm` as a module: averages for each domain.

  Has the attributes of :class:`BatchNorm` up to ``debias``, and those of the
  domains.

  Attributes:
    num_domains: how many domains there are.
    shared_affine: whether all domains share one scale and one bias.

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
    """Normalizes every domain by its examples or by its running averages.

    Args:
      x: real floating array, examples along axis 0.
      domain: integers or bool, one for each example, or one for all.
      use_running_average: as for :class:`BatchNorm`.
      mask: as for :class:`BatchNorm`.
      update_running_average: as for :class:`BatchNorm`.

    Returns:
      The normalized input.
    """
    return self._normalize(
      x, use_running_average, mask, update_running_average, domain
    )
