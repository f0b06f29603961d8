"""Population statistics for the batch normalisation of NNX models."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_ghm.batch_normalization import _moments, _recalibrate
from optax_ghm.nnx import _batch_norm, _subclass


def recalibrate(
  apply: Callable[[Any, Any], Any],
  model: nnx.Module,
  batches: Iterable[Any],
) -> None:
  """Replaces running averages by the statistics of a whole data set, in place.

  See :func:`optax_ghm.linen.recalibrate` for what this computes and is good
  for. Works for ``flax.nnx.BatchNorm`` and ours, in ``nnx.scan``, ``nnx.vmap``
  and ``nnx.remat`` that carry ``nnx.BatchStat``.

  Args:
    apply: called as ``apply(model, batch)`` with a copy of the model, to run it
      in training mode. It is jitted, once if it is the same function, on the
      same model, at every call of ``recalibrate``.
    model: the model; its ``nnx.BatchStat`` change, nothing else.
    batches: what ``apply`` takes; arrays, or trees of them.

  Raises:
    ValueError: if there is no batch, nothing was normalised by its batch, or a
      module that is a batch norm by inheritance has its own ``__call__``.

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
  copy, apply = nnx.clone(model), _recalibrate.hashable(apply)
  for _, norm in _norms(copy):
    if type(norm).__call__ not in _CALLS:
      raise ValueError(
        f'{type(norm).__name__} has a __call__ of its own: what it normalises'
        ' cannot be seen. Hold a batch norm instead of being one.'
      )
    kind = _subclass.subclass(type(norm), _measure)
    object.__setattr__(norm, '__class__', kind)
    mean = norm.mean.get_value()
    start = _recalibrate.nothing_measured(mean)
    setattr(norm, _HELD, _Moments(start))
  carried = nnx.Any(_Moments, nnx.RngState)  # so that dropout goes on
  graph, measured, rest = nnx.split(copy, carried, ...)
  empty = True
  for batch in batches:
    empty = False
    measured = _measured(measured, rest, batch, apply=apply, graph=graph)
  if empty:
    raise ValueError('batches must hold at least one.')
  nnx.update(copy, measured)
  found = {
    path: getattr(norm, _HELD).get_value() for path, norm in _norms(copy)
  }
  if not any(float(jnp.sum(moments.count)) for moments in found.values()):
    raise ValueError(
      'no batch norm normalised by its batch: apply must run the model in'
      ' training mode (use_running_average=False).'
    )
  for path, norm in _norms(model):
    for name, value in _recalibrate.settle(
      found[path], {n: v.get_value() for n, v in _averages(norm).items()}
    ).items():
      getattr(norm, name).set_value(value)


_HELD = '_moments'


class _Moments(nnx.BatchStat):
  """Moments that go where running averages go."""


_CALLS = {
  kind.__call__
  for kind in (
    nnx.BatchNorm,
    _batch_norm.BatchNorm,
    _batch_norm.BatchRenorm,
    _batch_norm.DomainBatchNorm,
  )
}


def _norms(model):
  kinds = (nnx.BatchNorm, _batch_norm.Normalization)
  return [(p, m) for p, m in nnx.iter_modules(model) if isinstance(m, kinds)]


def _averages(norm):
  names = ('mean', 'var', 'weight')
  return {n: getattr(norm, n) for n in names if getattr(norm, n, None)}


@functools.partial(jax.jit, static_argnames=('apply', 'graph'))
def _measured(measured, rest, batch, *, apply, graph):
  """The moments after one more batch."""
  model = nnx.merge(graph, measured, rest)
  apply(model, batch)
  return nnx.state(model, nnx.Any(_Moments, nnx.RngState))


def _measure(call, norm, args, kwargs):
  """The call of a batch norm that merges the moments of what it normalises."""
  moments = _recalibrate.moments_of_call(norm, call, args, kwargs)
  if moments is not None:
    held = getattr(norm, _HELD)
    held.set_value(_moments.merge_moments(held.get_value(), moments))
  return call(norm, *args, **kwargs)
