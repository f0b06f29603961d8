"""Batch normalisation as NNX modules."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx.nn import dtypes

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import (
  _batch_norm,
  _domain,
  _ghost,
  _renorm,
  _running_moments,
  _stats,
)


class BatchNormStats(nnx.Variable):
  """What :func:`optax_ghm.flow.batch_norm_stats` found in the last batch."""


class Normalization(nnx.Module):
  """What the modules here have in common; the first of them explains it."""

  def __init__(
    self,
    num_features: int,
    *,
    use_running_average: bool | None = False,
    axis: int = -1,
    decay: float = 0.99,
    epsilon: float = 1e-5,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    use_bias: bool = True,
    use_scale: bool = True,
    bias_init: nnx.initializers.Initializer = nnx.initializers.zeros,
    scale_init: nnx.initializers.Initializer = nnx.initializers.ones,
    axis_name: arrays.AxisName = None,
    unbiased: bool = False,
    debias: bool = False,
    measure: bool = False,
    rngs: nnx.Rngs,
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    scale_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    rows, parameter_rows = self._rows()
    start = _running_moments.RunningMoments.init((*rows, num_features), debias)
    self.mean = nnx.BatchStat(start.mean)
    self.var = nnx.BatchStat(start.var)
    self.weight = nnx.BatchStat(start.weight) if debias else nnx.data(None)

    def parameter(init, use, metadata):
      if not use:
        return nnx.data(None)
      shape = (*parameter_rows, num_features)
      return nnx.Param(init(rngs.params(), shape, param_dtype), **metadata)

    self.scale = parameter(scale_init, use_scale, scale_metadata)
    self.bias = parameter(bias_init, use_bias, bias_metadata)
    stats = _stats.BatchNormStats(jnp.zeros(5, jnp.float32))
    self.stats = BatchNormStats(stats) if measure else nnx.data(None)
    self.num_features = num_features
    self.use_running_average = use_running_average
    self.axis = axis
    self.decay = decay
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_bias = use_bias
    self.use_scale = use_scale
    self.axis_name = axis_name
    self.unbiased = unbiased
    self.debias = debias

  def set_view(self, use_running_average: bool | None = None) -> None:
    """For ``nnx.view``.

    Args:
      use_running_average: whether to normalise by the running averages.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average

  def _norm(self, x, use_running_average, mask, update, domain=None):
    if use_running_average is None:
      use_running_average = self.use_running_average
    if use_running_average is None:
      raise ValueError(
        'use_running_average must be given to the module or to the call.'
      )
    if x.shape[self.axis] != self.num_features:
      raise ValueError(
        f'x, of shape {x.shape}, must have num_features={self.num_features}'
        f' along axis {self.axis}.'
      )
    scale, bias = (
      None if u is None else u.get_value() for u in (self.scale, self.bias)
    )
    mean, var = self.mean.get_value(), self.var.get_value()
    weight = jnp.ones_like(mean)
    if self.weight is not None:
      weight = self.weight.get_value()
    running = _running_moments.RunningMoments(mean, var, weight)
    given = [u for u in (x, mean, scale, bias) if u is not None]
    options: dict[str, Any] = {
      'axis': self.axis,
      'epsilon': self.epsilon,
      'dtype': dtypes.canonicalize_dtype(*given, dtype=self.dtype),
    }
    if use_running_average:
      return _batch_norm.batch_norm_inference(
        x, mean, var, scale, bias, domain=domain, **options
      )
    options.update(axis_name=self.axis_name, mask=mask)
    limits = self._limits(update)
    y, moments = self._by_batch(
      x, scale, bias, running=running, domain=domain, **limits, **options
    )
    if self.stats is not None:
      self.stats.set_value(
        _stats.batch_norm_stats(
          moments, running, epsilon=self.epsilon, **limits
        )
      )
    if update:
      running = _running_moments.update_running_moments(
        running, moments, decay=self.decay, unbiased=self.unbiased
      )
      self.mean.set_value(running.mean)
      self.var.set_value(running.var)
      if self.weight is not None:
        self.weight.set_value(running.weight)
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


class BatchNorm(Normalization):
  """:func:`optax_ghm.batch_norm` as a module that keeps running averages.

  Takes the place of ``flax.nnx.BatchNorm``: names and state are the same, and
  so is what it computes, more exactly. What Flax calls ``momentum`` is
  ``decay`` here.

  Args:
    num_features: how many features there are. The arguments that follow are
      keywords, with Flax's defaults.
    use_running_average: whether to normalise by the running averages;
      ``model.train()`` and ``model.eval()`` set it.
    axis: the feature axis.
    decay: how much of the running averages every batch leaves; 0.99.
    epsilon: added to the variance; 1e-5.
    dtype: of the result; None promotes those of x, parameters and averages.
    param_dtype: of the parameters.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: initializer of the bias.
    scale_init: initializer of the scale.
    axis_name: mapped axes over which the batch is split.
    unbiased: whether running variances are divided by count - 1.
    debias: whether the averages are of the batches alone from the start, and
      not of mean 0 and variance 1 too; keeps their ``weight`` beside them.
    measure: whether to keep :func:`optax_ghm.flow.batch_norm_stats` of the last
      batch, as ``stats`` (``stats.get_value()``).
    rngs: for the parameters.
    bias_metadata: of the variable, such as its sharding.
    scale_metadata: the same.
    ghost_size: examples that are normalised together, if not all of a batch.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from optax_ghm.nnx import BatchNorm
    >>> norm = BatchNorm(1, decay=0.9, rngs=nnx.Rngs(0))
    >>> x = jnp.array([[1.0], [3.0], [100.0]])
    >>> y = norm(x, mask=jnp.array([[True], [True], [False]]))
    >>> y[:2, 0].round(3)
    Array([-1.,  1.], dtype=float32)
    >>> norm.mean.get_value()
    Array([0.2], dtype=float32)
  """

  def __init__(
    self, num_features: int, *, ghost_size: int | None = None, **kwargs: Any
  ):
    super().__init__(num_features, **kwargs)
    self.ghost_size = ghost_size

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

  Args:
    num_features: see :class:`BatchNorm`, as are all but ``ghost_size``.
    r_max: limit of r, a number or a schedule over the training calls, which
      are then counted beside the running averages.
    d_max: limit of d, the same.
    **kwargs: as for :class:`BatchNorm`.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> from optax_ghm.nnx import BatchRenorm
    >>> r_max, d_max = optax_ghm.renorm_schedules()
    >>> norm = BatchRenorm(1, r_max=r_max, d_max=d_max, rngs=nnx.Rngs(0))
    >>> y = norm(jnp.array([[1.0], [3.0]]))
    >>> int(norm.steps.get_value())
    1
  """

  def __init__(
    self,
    num_features: int,
    *,
    r_max: optax.ScalarOrSchedule = 3.0,
    d_max: optax.ScalarOrSchedule = 5.0,
    **kwargs: Any,
  ):
    super().__init__(num_features, **kwargs)
    self.r_max, self.d_max = r_max, d_max
    self.steps = nnx.data(None)
    if callable(r_max) or callable(d_max):
      self.steps = nnx.BatchStat(jnp.zeros([], jnp.int32))

  def __call__(
    self,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
    update_running_average: bool = True,
  ) -> jax.Array:
    """See :class:`BatchNorm`."""
    return self._norm(x, use_running_average, mask, update_running_average)

  def _by_batch(self, x, scale, bias, *, running, domain, **options):
    del domain
    return _renorm.batch_renorm(x, running, scale, bias, **options)

  def _limits(self, update):
    limits = {'r_max': self.r_max, 'd_max': self.d_max}
    if self.steps is None:
      return limits
    steps = self.steps.get_value()
    if update:
      self.steps.set_value(jnp.asarray(optax.safe_increment(steps)))
    return {
      name: limit(steps) if callable(limit) else limit
      for name, limit in limits.items()
    }


class DomainBatchNorm(Normalization):
  """:func:`optax_ghm.domain_batch_norm` as a module: averages per domain.

  Args:
    num_features: see :class:`BatchNorm`, as are all but ``ghost_size``.
    num_domains: how many domains there are.
    shared_affine: whether scale and bias are the same in all of them.
    **kwargs: as for :class:`BatchNorm`.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from optax_ghm.nnx import DomainBatchNorm
    >>> norm = DomainBatchNorm(1, num_domains=2, rngs=nnx.Rngs(0))
    >>> y = norm(jnp.array([[1.0], [3.0], [9.0]]), jnp.array([0, 0, 1]))
    >>> norm.mean.get_value().round(3)
    Array([[0.02], [0.09]], dtype=float32)
  """

  def __init__(
    self,
    num_features: int,
    *,
    num_domains: int,
    shared_affine: bool = True,
    **kwargs: Any,
  ):
    self.num_domains, self.shared_affine = num_domains, shared_affine
    super().__init__(num_features, **kwargs)

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
