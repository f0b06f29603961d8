"""Batch normalization as NNX modules."""

import dataclasses
from collections.abc import Mapping
from dataclasses import InitVar
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx import initializers
from flax.nnx.nn import dtypes

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import _stats, _step


class BatchNormStats(nnx.Variable[_stats.BatchNormStats]):
  """The :func:`optax_ghm.flow.batch_norm_stats` of the last training batch."""


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class Normalization(nnx.Module):
  """The arguments and the call that all modules here have in common."""

  num_features: int = dataclasses.field(kw_only=False)
  use_running_average: bool | None = False
  axis: int = -1
  momentum: float = 0.99
  epsilon: float = 1e-5
  dtype: Any = None
  param_dtype: Any = jnp.float32
  use_bias: bool = True
  use_scale: bool = True
  bias_init: InitVar[initializers.Initializer] = initializers.zeros
  scale_init: InitVar[initializers.Initializer] = initializers.ones
  axis_name: arrays.AxisName = None
  axis_index_groups: None = None
  use_fast_variance: bool = True
  promote_dtype: Any = dtypes.promote_dtype
  rngs: InitVar[nnx.Rngs]
  bias_metadata: InitVar[Mapping[str, Any] | None] = None
  scale_metadata: InitVar[Mapping[str, Any] | None] = None
  unbiased: bool = False
  debias: bool = False
  measure: bool = False
  mean: nnx.BatchStat[jax.Array] = dataclasses.field(init=False)
  var: nnx.BatchStat[jax.Array] = dataclasses.field(init=False)

  def __post_init__(
    self,
    bias_init: initializers.Initializer,
    scale_init: initializers.Initializer,
    rngs: nnx.Rngs,
    bias_metadata: Mapping[str, Any] | None,
    scale_metadata: Mapping[str, Any] | None,
  ) -> None:
    start, shape = _step.init(self, (self.num_features,))
    for name, value in start.items():
      setattr(self, name, nnx.BatchStat(value))

    def parameter(init, use, metadata):
      if not use:
        return nnx.data(None)
      value = init(rngs.params(), shape, self.param_dtype)
      return nnx.Param(value, **(metadata or {}))

    self.scale: nnx.Param[jax.Array] | None = parameter(
      scale_init, self.use_scale, scale_metadata
    )
    self.bias: nnx.Param[jax.Array] | None = parameter(
      bias_init, self.use_bias, bias_metadata
    )
    stats = _stats.BatchNormStats(jnp.zeros(5, jnp.float32))
    self.stats: BatchNormStats | None = (
      BatchNormStats(stats) if self.measure else nnx.data(None)
    )

  def set_view(self, use_running_average: bool | None = None) -> None:
    """Changes the module as ``nnx.view`` asks for.

    Args:
      use_running_average: whether to normalize by the running averages.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average

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
      use_running_average: whether to normalize by the running averages; None is
        what the module says.
      mask: bool, broadcastable to ``x``: which elements count.
      update_running_average: whether a batch changes the running averages.
        Without, the batch is normalized by its own statistics all the same, as
        in adaptation at test time.

    Returns:
      The normalized input.
    """
    return self._normalize(x, use_running_average, mask, update_running_average)

  def _normalize(self, x, use_running_average, mask, update, domain=None):
    if use_running_average is None:
      use_running_average = self.use_running_average
    if use_running_average is None:
      raise ValueError(
        'use_running_average must be given to the module or to the call.'
      )
    state = {
      name: getattr(self, name).get_value()
      for name in ('mean', 'var', 'weight', 'steps')
      if hasattr(self, name)
    }
    scale, bias = (
      None if u is None else u.get_value() for u in (self.scale, self.bias)
    )
    given = (x, state['mean'], scale, bias)
    y, changed, stats = _step.step(
      self,
      state,
      x,
      domain,
      by_average=use_running_average,
      update=update,
      measure=self.measure,
      mask=mask,
      axis_name=self.axis_name,
      scale=scale,
      bias=bias,
      dtype=dtypes.canonicalize_dtype(*given, dtype=self.dtype),
    )
    for name, value in changed.items():
      getattr(self, name).set_value(value)
    if self.stats is not None and stats is not None:
      self.stats.set_value(stats)
    return y


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class BatchNorm(Normalization):
  """:func:`optax_ghm.batch_norm` as a module that keeps running averages.

  Takes the place of ``flax.nnx.BatchNorm``: arguments, variables and
  checkpoints are the same, and so is the result, to rounding.

  Args:
    num_features: the number of features. All other arguments are keywords, with
      Flax's defaults.
    use_running_average: whether to normalize by the running averages;
      ``model.train()`` and ``model.eval()`` set it.
    axis: the feature axis.
    momentum: the share of the running averages that every batch leaves.
    epsilon: added to the variance.
    dtype: of the result; None promotes the dtypes of x, parameters and
      averages.
    param_dtype: of the parameters.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: initializer of the bias.
    scale_init: initializer of the scale.
    axis_name: mapped axes over which the batch is split.
    axis_index_groups: must be None.
    use_fast_variance: has no effect. The variance is always computed from the
      deviations from the mean, never as a difference of squares.
    promote_dtype: must be Flax's default.
    rngs: for the parameters.
    bias_metadata: of the variable of the bias, such as its sharding.
    scale_metadata: of the variable of the scale.
    unbiased: whether running variances are divided by count - 1.
    debias: whether the initial mean 0 and variance 1 have no part in the
      running averages; keeps their ``weight`` beside them. Set it to 1 for
      averages from a checkpoint that has none.
    measure: whether to keep :func:`optax_ghm.flow.batch_norm_stats` of the last
      batch, as ``stats``.
    ghost_size: how many examples are normalized together; None is all.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from optax_ghm.nnx import BatchNorm
    >>> norm = BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
    >>> x = jnp.array([[1.0], [3.0], [100.0]])
    >>> y = norm(x, mask=jnp.array([[True], [True], [False]]))
    >>> y[:2, 0].round(3)
    Array([-1.,  1.], dtype=float32)
    >>> norm.mean.get_value()
    Array([0.2], dtype=float32)
  """

  ghost_size: int | None = None


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class BatchRenorm(Normalization):
  """:func:`optax_ghm.batch_renorm` as a module.

  Takes the arguments of :class:`BatchNorm` up to ``measure``, and the limits.

  Args:
    r_max: limit of r, a number or a schedule over the number of training calls,
      which is then kept beside the running averages as ``steps``.
    d_max: limit of d, a number or a schedule over the number of training calls.

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

  r_max: optax.ScalarOrSchedule = 3.0
  d_max: optax.ScalarOrSchedule = 5.0


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class DomainBatchNorm(Normalization):
  """:func:`optax_ghm.domain_batch_norm` as a module: averages for each domain.

  Takes the arguments of :class:`BatchNorm` up to ``measure``, and those of the
  domains.

  Args:
    num_domains: how many domains there are.
    shared_affine: whether all domains share one scale and one bias.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from optax_ghm.nnx import DomainBatchNorm
    >>> norm = DomainBatchNorm(1, num_domains=2, rngs=nnx.Rngs(0))
    >>> y = norm(jnp.array([[1.0], [3.0], [9.0]]), jnp.array([0, 0, 1]))
    >>> norm.mean.get_value().round(3)
    Array([[0.02], [0.09]], dtype=float32)
  """

  num_domains: int
  shared_affine: bool = True

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
