"""Population statistics for the batch normalization of Linen models."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax
import jax
from flax import linen as nn

from optax_ghm.batch_normalization import _recalibrate
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

  over the batches b, in one pass, in every batch norm of the model: Flax's and
  this library's, with masks or domains, and under transformations (``nn.scan``,
  ``nn.vmap``, ``nn.remat``) that carry the collection ``batch_stats``. Running
  averages lag behind the weights, and do not fit weights that were averaged. On
  data of another domain this method is AdaBN. While it runs, layers normalize
  by their batches, so that the batches should be as large as in training.

  Args:
    apply: called as ``apply(variables, batch)``. It runs the model in training
      mode, with the collection ``batch_stats`` mutable, and returns what
      ``model.apply`` does. It is compiled once if every call of ``recalibrate``
      gets the same function. It may be a ``jax.vmap`` over stacked models.
    variables: of the model, with ``batch_stats``.
    batches: what ``apply`` takes; arrays, or trees of arrays.

  Returns:
    The variables, with means and variances of the data. A feature keeps its
    averages if it never counted or its statistics are not finite. A layer keeps
    them if it normalized by its running averages.

  Raises:
    ValueError: if there is no batch, ``apply`` returns no ``batch_stats``, or
      no layer normalized by its batch.

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
  averages = flax.core.unfreeze(variables['batch_stats'])
  stats = _map_norms(
    lambda old: {**old, _MOMENTS: _recalibrate.init(old['mean'])}, averages
  )
  for batch in batches:
    stats = _measure_batch(dict(variables), stats, batch, apply=apply)
  norms = filter(_is_norm, jax.tree.leaves(stats, is_leaf=_is_norm))
  _recalibrate.check_measured(norm[_MOMENTS] for norm in norms)
  averages = _map_norms(
    lambda old, measured: _recalibrate.replace(old, measured[_MOMENTS]),
    averages,
    stats,
  )
  return {**variables, 'batch_stats': averages}


_MOMENTS = '_moments'


_HOMES = (nn.BatchNorm.__module__, _batch_norm.__name__)


def _is_norm(u):
  return isinstance(u, Mapping) and {'mean', 'var'} <= u.keys()


def _map_norms(f, stats, *others):
  """Applies ``f`` to the variables of every batch norm; others stay."""
  return jax.tree.map(
    lambda u, *others: f(u, *others) if _is_norm(u) else u,
    stats,
    *others,
    is_leaf=_is_norm,
  )


def _merge_moments(call, args, kwargs, context):
  """Calls a batch norm, and merges the moments of its input."""
  norm, method = context.module, context.orig_method.func
  if (
    context.method_name == '__call__'
    and isinstance(norm, (nn.BatchNorm, _batch_norm.Normalization))
    # A subclass may change the input before it calls the method measured here.
    and method.__module__ in _HOMES
    and norm.has_variable('batch_stats', _MOMENTS)
  ):
    moments = _recalibrate.moments_of_call(norm, method, args, kwargs)
    if moments is not None:
      before = norm.get_variable('batch_stats', _MOMENTS)
      norm.put_variable('batch_stats', _MOMENTS, before.merge(moments))
  return call(*args, **kwargs)


@functools.partial(jax.jit, static_argnames='apply')
def _measure_batch(variables, stats, batch, *, apply):
  """Returns the statistics with the moments of one more batch."""
  with nn.intercept_methods(_merge_moments):
    result = apply({**variables, 'batch_stats': stats}, batch)
  updated = result[1] if isinstance(result, tuple) and len(result) > 1 else {}
  if not isinstance(updated, Mapping) or 'batch_stats' not in updated:
    raise ValueError(
      "apply must return (output, updated variables): let 'batch_stats' be"
      " mutable, as in model.apply(variables, x, mutable=['batch_stats'])."
    )
  return _map_norms(
    lambda before, after: {**before, _MOMENTS: after[_MOMENTS]},
    stats,
    flax.core.unfreeze(updated['batch_stats']),
  )
