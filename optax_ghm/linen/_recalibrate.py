"""Population statistics for the batch normalisation of Linen models."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn

from optax_ghm.batch_normalization import _moments, _recalibrate
from optax_ghm.linen import _batch_norm


def recalibrate(
  apply: Callable[[Any, Any], tuple[Any, Any]],
  variables: Mapping[str, Any],
  batches: Iterable[Any],
) -> dict[str, Any]:
  r"""Replaces running averages by the statistics of a whole data set.

  .. math::
    \mu = \frac{1}{N} \sum_b n_b\, \mu_b, \qquad
    \sigma^2 = \frac{1}{N} \sum_b \big(M_{2,b} + n_b (\mu_b - \mu)^2\big)

  over the batches b, in one pass, at every batch norm of the model: Flax's and
  ours, masked, of domains, in ``nn.scan``, ``nn.vmap`` and ``nn.remat`` that
  carry the collection ``batch_stats``. Running averages lag behind the weights,
  and know nothing of weights that were averaged; on the data of another domain
  this is AdaBN. Layers are normalised by their batches while it runs, so let
  these be as large as in training.

  Args:
    apply: called as ``apply(variables, batch)``, to run the model in training
      mode, with the collection ``batch_stats`` mutable. It is jitted, once if
      it is the same function at every call of ``recalibrate``; it may be a
      ``jax.vmap`` over stacked models.
    variables: of the model, with ``batch_stats``.
    batches: what ``apply`` takes; arrays, or trees of them.

  Returns:
    The variables, with means and variances of the batches. Features that never
    counted, or had something that is not finite, and layers that normalised by
    running averages, keep theirs.

  Raises:
    ValueError: if there is no batch, ``apply`` returns no ``batch_stats``, or
      nothing was normalised by its batch.

  Examples:
    >>> from flax import linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm.linen import recalibrate
    >>> model = nn.BatchNorm(use_running_average=False)
    >>> variables = model.init(jax.random.key(0), jnp.ones((2, 1)))
    >>> variables = recalibrate(
    ...   lambda v, x: model.apply(v, x, mutable=['batch_stats']),
    ...   variables,
    ...   [jnp.array([[1.0], [3.0]]), jnp.array([[5.0]])],
    ... )
    >>> variables['batch_stats']['mean']
    Array([3.], dtype=float32)

  References:
    Wu, Johnson, `Rethinking "Batch" in BatchNorm
    <https://arxiv.org/abs/2105.07576>`_, 2021; Li et al., `Revisiting Batch
    Normalization For Practical Domain Adaptation
    <https://arxiv.org/abs/1603.04779>`_, 2016
  """
  if 'batch_stats' not in variables:
    raise ValueError("variables must have the collection 'batch_stats'.")
  apply = _recalibrate.hashable(apply)
  stats = _with_moments(flax.core.unfreeze(variables['batch_stats']))
  empty = True
  for batch in batches:
    empty = False
    stats = _measured(dict(variables), stats, batch, apply=apply)
  if empty:
    raise ValueError('batches must hold at least one.')
  counts = [m.count for m in _all_moments(stats)]
  if not any(float(jnp.sum(count)) for count in counts):
    raise ValueError(
      'no batch norm normalised by its batch: apply must run the model in'
      ' training mode (use_running_average=False).'
    )
  return {**variables, 'batch_stats': _settled(stats)}


_MOMENTS = '_moments'


_HOMES = (nn.BatchNorm.__module__, _batch_norm.__name__)


def _measure(next_fun, args, kwargs, context):
  """An interceptor that merges the moments of what is normalised."""
  norm = context.module
  if (
    context.method_name == '__call__'
    and isinstance(norm, (nn.BatchNorm, _batch_norm.Normalization))
    and context.orig_method.func.__module__ in _HOMES  # not of subclasses
    and norm.has_variable('batch_stats', _MOMENTS)
  ):
    moments = _recalibrate.moments_of_call(
      norm, context.orig_method.func, args, kwargs
    )
    if moments is not None:
      before = norm.get_variable('batch_stats', _MOMENTS)
      norm.put_variable(
        'batch_stats', _MOMENTS, _moments.merge_moments(before, moments)
      )
  return next_fun(*args, **kwargs)


@functools.partial(jax.jit, static_argnames='apply')
def _measured(variables, stats, batch, *, apply):
  """The statistics with the moments of one more batch."""
  wrong = (
    "apply must return (output, updated variables): let 'batch_stats' be"
    " mutable, as in model.apply(variables, x, mutable=['batch_stats'])."
  )
  try:
    with nn.intercept_methods(_measure):
      result = apply({**variables, 'batch_stats': stats}, batch)
  except flax.errors.ModifyScopeVariableError as error:
    raise ValueError(wrong) from error
  updated = result[1] if isinstance(result, tuple) and len(result) > 1 else {}
  if not isinstance(updated, Mapping) or 'batch_stats' not in updated:
    raise ValueError(wrong)
  return _with_moments(
    flax.core.unfreeze(variables['batch_stats']),
    flax.core.unfreeze(updated['batch_stats']),
  )


def _is_norm(stats):
  return {'mean', 'var'} <= set(stats)


def _with_moments(stats, measured=None):
  """The statistics with moments beside them: those measured, or of nothing."""
  result = {
    key: _with_moments(value, None if measured is None else measured[key])
    if isinstance(value, Mapping)
    else value
    for key, value in stats.items()
  }
  if _is_norm(stats):
    result[_MOMENTS] = (
      _recalibrate.nothing_measured(stats['mean'])
      if measured is None
      else measured[_MOMENTS]
    )
  return result


def _all_moments(stats):
  return [
    leaf
    for leaf in jax.tree.leaves(
      stats, is_leaf=lambda u: isinstance(u, _moments.Moments)
    )
    if isinstance(leaf, _moments.Moments)
  ]


def _settled(stats):
  """Statistics with the moments in the place of the running averages."""
  result: dict[str, Any] = {
    key: _settled(value) if isinstance(value, Mapping) else value
    for key, value in stats.items()
    if key != _MOMENTS
  }
  if _is_norm(stats):
    result.update(_recalibrate.settle(stats[_MOMENTS], result))
  return result
