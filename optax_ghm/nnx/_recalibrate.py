"""Population statistics for the batch normalization of NNX models."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

from optax_ghm.batch_normalization import _recalibrate
from optax_ghm.nnx import _batch_norm, _subclass


def recalibrate(
  apply: Callable[[Any, Any], Any],
  model: nnx.Module,
  batches: Iterable[Any],
) -> None:
  """Replaces running averages by the statistics of a whole data set, in place.

  Computes what :func:`optax_ghm.linen.recalibrate` does. Works for
  ``flax.nnx.BatchNorm`` and the modules of this library, and under
  transformations (``nnx.scan``, ``nnx.vmap``, ``nnx.remat``) that carry
  ``nnx.BatchStat``.

  Args:
    apply: called as ``apply(model, batch)`` with a copy of the model, which it
      runs in training mode. It is compiled once if every call of
      ``recalibrate`` gets the same function and model.
    model: the model, of which only ``nnx.BatchStat`` change.
    batches: what ``apply`` takes; arrays, or trees of arrays.

  Raises:
    ValueError: if there is no batch, no layer normalized by its batch, or a
      subclass of a batch norm has a ``__call__`` of its own.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from optax_ghm.nnx import recalibrate
    >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0]])]
    >>> recalibrate(lambda model, x: model(x), model, batches)
    >>> model.mean.get_value()
    Array([3.], dtype=float32)
  """
  copy = nnx.clone(model)
  for norm in _norms(copy):
    if type(norm).__call__ not in _CALLS:
      raise ValueError(
        f'{type(norm).__name__} has a __call__ of its own, whose batch norm'
        ' cannot be measured. Hold a batch norm instead of inheriting from it.'
      )
    kind = _subclass.subclass(type(norm), _merge_moments)
    object.__setattr__(norm, '__class__', kind)
    setattr(norm, _MOMENTS, _Moments(_recalibrate.init(norm.mean.get_value())))
  graph, measured, others = nnx.split(copy, _CHANGED, ...)
  for batch in batches:
    measured = _measure_batch(measured, others, batch, apply=apply, graph=graph)
  nnx.update(copy, measured)
  found = [getattr(norm, _MOMENTS).get_value() for norm in _norms(copy)]
  _recalibrate.check_measured(found)
  for norm, moments in zip(_norms(model), found, strict=True):
    averages = dict(nnx.as_pure(nnx.state(norm, nnx.BatchStat)))
    nnx.update(norm, _recalibrate.replace(averages, moments))


_MOMENTS = '_moments'


class _Moments(nnx.BatchStat):
  """Moments, which transformations carry like running averages."""


_CHANGED = nnx.Any(_Moments, nnx.RngState)
"""Random states change too, so that every batch has a dropout of its own."""


_CALLS = (
  nnx.BatchNorm.__call__,
  _batch_norm.Normalization.__call__,
  _batch_norm.DomainBatchNorm.__call__,
)


def _norms(model):
  kinds = (nnx.BatchNorm, _batch_norm.Normalization)
  return [m for _, m in nnx.iter_modules(model) if isinstance(m, kinds)]


@functools.partial(jax.jit, static_argnames=('apply', 'graph'))
def _measure_batch(measured, others, batch, *, apply, graph):
  """Returns the moments after one more batch."""
  model = nnx.merge(graph, measured, others)
  apply(model, batch)
  return nnx.state(model, _CHANGED)


def _merge_moments(call, norm, args, kwargs):
  """Calls a batch norm, and merges the moments of its input."""
  moments = _recalibrate.moments_of_call(norm, call, args, kwargs)
  if moments is not None:
    held = getattr(norm, _MOMENTS)
    held.set_value(held.get_value().merge(moments))
  return call(norm, *args, **kwargs)
