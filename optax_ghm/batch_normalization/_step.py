"""One call of a batch norm module, as a function of its variables."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax

from optax_ghm._core import counters
from optax_ghm.batch_normalization import (
  _batch_norm,
  _domain,
  _ghost,
  _renorm,
  _running_moments,
  _stats,
)

_FIXED = 'axis_index_groups', 'force_float32_reductions', 'promote_dtype'
"""Arguments of Flax that must have their default values."""


def init(norm, features):
  """Returns the variables of a module and the shape of its parameters.

  Args:
    norm: the module; see :func:`step`.
    features: the shape of the features.

  Returns:
    A dict of the variables that have no gradient, and the shape of scale and
    bias. The variables are ``mean`` and ``var``, with ``debias`` their
    ``weight``, and with a schedule of ``r_max`` or ``d_max`` the number of
    training ``steps``.

  Raises:
    ValueError: if an argument of Flax that has no counterpart is given, or a
      number is out of its range.
  """
  for field in dataclasses.fields(norm):
    if field.name in _FIXED and getattr(norm, field.name) is not field.default:
      raise ValueError(
        f'{field.name} must have its default value: sums are always in at least'
        ' float32, and over the whole of the axes that axis_name names.'
      )
  counters.check_range('momentum', norm.momentum, 0, 1)
  limits = _limits(norm)
  if limits:
    _renorm.check_limits(**limits)
  domains = (norm.num_domains,) if hasattr(norm, 'num_domains') else ()
  shape = (*domains, *features)
  state = _running_moments.RunningMoments.init(shape, norm.debias)._asdict()
  if not norm.debias:
    del state['weight']
  if any(map(callable, limits.values())):
    state['steps'] = jnp.zeros([], jnp.int32)
  shared = not domains or norm.shared_affine
  return state, tuple(features) if shared else shape


def running_moments(state):
  """Returns the averages among the variables of a module."""
  weight = state.get('weight', jnp.ones_like(state['mean']))
  return _running_moments.RunningMoments(state['mean'], state['var'], weight)


def step(
  norm, state, x, domain, by_average, update, measure, mask, axis_name, **args
):
  """Normalizes by the batch or by the running averages.

  Args:
    norm: the module, of which the attributes ``axis``, ``momentum``,
      ``epsilon`` and ``unbiased`` are read, and those that say which kind it
      is: ``ghost_size``; ``r_max`` and ``d_max``; or ``num_domains``.
    state: the variables that :func:`init` made.
    x: the input.
    domain: of every example, for a module with domains; else None.
    by_average: whether to normalize by the averages in ``state``.
    update: whether to include the batch in the averages.
    measure: whether to return statistics for the record.
    mask: bool, broadcastable to ``x``: which elements count.
    axis_name: mapped axes over which the batch is split.
    **args: ``scale`` and ``bias``, shaped as :func:`init` says or None, and the
      ``dtype`` of the result.

  Returns:
    The output, the variables that change, and the statistics for the record,
    None without ``measure`` or with ``by_average``.
  """
  running = running_moments(state)
  if domain is not None:
    _check_domains(norm, running.mean.shape, x.shape)
  args |= {'axis': norm.axis, 'epsilon': norm.epsilon}
  if by_average:
    y = _batch_norm.batch_norm_inference(x, running, domain=domain, **args)
    return y, {}, None
  args |= {'mask': mask, 'axis_name': axis_name}
  steps = state.get('steps', np.int32(0))
  limits = {
    name: limit(steps) if callable(limit) else limit
    for name, limit in _limits(norm).items()
  }
  if limits:
    y, moments = _renorm.batch_renorm(x, running, **limits, **args)
  elif domain is not None:
    args['num_domains'] = norm.num_domains
    y, moments = _domain.domain_batch_norm(x, domain, **args)
  elif norm.ghost_size is not None:
    args['ghost_size'] = norm.ghost_size
    y, moments = _ghost.ghost_batch_norm(x, **args)
  else:
    y, moments = _batch_norm.batch_norm(x, **args)
  stats = None
  if measure:
    options = {'epsilon': norm.epsilon, **limits}
    stats = _stats.batch_norm_stats(moments, running, **options)
  if not update:
    return y, {}, stats
  options = {'momentum': norm.momentum, 'unbiased': norm.unbiased}
  updated = running.update(moments, **options)._asdict()
  changed = {name: u for name, u in updated.items() if name in state}
  if 'steps' in state:
    changed['steps'] = jnp.asarray(optax.safe_increment(state['steps']))
  return y, changed, stats


def _check_domains(norm, shape, of_x):
  axes = (norm.axis,) if isinstance(norm.axis, int) else norm.axis
  features = (of_x[a] for a in sorted(a % len(of_x) for a in axes))
  expected = (norm.num_domains, *features)
  if shape != expected:
    raise ValueError(
      f'mean and var have shape {shape}, and those of {norm.num_domains}'
      f' domains have {expected}: repeat the averages of a checkpoint without'
      ' domains for each domain.'
    )


def _limits(norm):
  return {n: getattr(norm, n) for n in ('r_max', 'd_max') if hasattr(norm, n)}
