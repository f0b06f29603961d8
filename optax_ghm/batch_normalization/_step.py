"""One call of a batch norm module, as a function of its variables."""

from typing import Any

import jax.numpy as jnp
import optax

from optax_ghm.batch_normalization import (
  _batch_norm,
  _domain,
  _ghost,
  _renorm,
  _running_moments,
  _stats,
)


def check_flax_options(axis_index_groups, **defaults):
  """Refuses values of Flax's arguments that have no counterpart here.

  Args:
    axis_index_groups: Flax's argument.
    **defaults: for other arguments, whether they have their default value.
  """
  if axis_index_groups is not None:
    raise ValueError(
      'axis_index_groups must be None: split the devices into two named axes,'
      ' and give the one to sum over as axis_name.'
    )
  for name, is_default in defaults.items():
    if not is_default:
      raise ValueError(
        f'{name} must be the default: statistics are always of at least'
        ' float32, and dtype is that of the result.'
      )


def init(shape, debias, limits):
  """Returns the variables of a module that are not trained.

  Args:
    shape: of the averages.
    debias: whether their weight is kept beside mean and variance.
    limits: of renormalization; if one is a schedule, the number of training
      steps is kept too, as ``steps``.
  """
  state = _running_moments.RunningMoments.init(shape, debias)._asdict()
  if not debias:
    del state['weight']
  if any(map(callable, limits.values())):
    state['steps'] = jnp.zeros([], jnp.int32)
  return state


def step(
  state,
  x,
  scale,
  bias,
  domain=None,
  *,
  use_running_average,
  update,
  mask,
  axis,
  axis_name,
  momentum,
  epsilon,
  dtype,
  unbiased,
  limits,
  ghost_size=None,
):
  """Normalizes by the batch or by the running averages.

  Args:
    state: the variables that :func:`init` made.
    x: the input.
    scale: shaped like the features (and domains), or None.
    bias: shaped like the features (and domains), or None.
    domain: of every example, for a batch norm of domains.
    use_running_average: whether to normalize by the averages in ``state``.
    update: whether to include the batch in the averages.
    mask: bool, broadcastable to ``x``: which elements count.
    axis: the feature axes.
    axis_name: mapped axes over which the batch is split.
    momentum: the share of the averages that a batch leaves.
    epsilon: added to the variance.
    dtype: of the result.
    unbiased: whether running variances are divided by count - 1.
    ghost_size: how many examples are normalized together; None is all.
    limits: ``r_max`` and ``d_max`` of a batch renormalization, numbers or
      schedules over ``state['steps']``; else empty.

  Returns:
    The output, the variables that change, and statistics of the batch for the
    record, None with ``use_running_average``.
  """
  weight = state.get('weight', jnp.ones_like(state['mean']))
  running = _running_moments.RunningMoments(state['mean'], state['var'], weight)
  options: dict[str, Any] = {'axis': axis, 'epsilon': epsilon, 'dtype': dtype}
  if use_running_average:
    y = _batch_norm.batch_norm_inference(
      x, running, scale, bias, domain=domain, **options
    )
    return y, {}, None
  options |= {'mask': mask, 'axis_name': axis_name}
  limits = {
    name: limit(state['steps']) if callable(limit) else limit
    for name, limit in limits.items()
  }
  if limits:
    y, moments = _renorm.batch_renorm(
      x, running, scale, bias, **limits, **options
    )
  elif domain is not None:
    y, moments = _domain.domain_batch_norm(
      x, domain, scale, bias, num_domains=len(running.mean), **options
    )
  elif ghost_size is not None:
    y, moments = _ghost.ghost_batch_norm(
      x, scale, bias, ghost_size=ghost_size, **options
    )
  else:
    y, moments = _batch_norm.batch_norm(x, scale, bias, **options)
  stats = _stats.batch_norm_stats(moments, running, epsilon=epsilon, **limits)
  if not update:
    return y, {}, stats
  updated = running.update(moments, momentum=momentum, unbiased=unbiased)
  next_state = {k: v for k, v in updated._asdict().items() if k in state}
  if 'steps' in state:
    next_state['steps'] = jnp.asarray(optax.safe_increment(state['steps']))
  return y, next_state, stats
