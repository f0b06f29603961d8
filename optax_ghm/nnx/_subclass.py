"""Modules that do more when they are called, and are still what they were."""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx


@functools.cache
def subclass(
  kind: type[nnx.Module], around: Callable[..., Any]
) -> type[nnx.Module]:
  """A class whose calls are ``around(kind.__call__, self, args, kwargs)``.

  Set it by ``object.__setattr__(module, '__class__', ...)``: that of NNX would
  take the class for a part of the model. Being another type, it makes what has
  been compiled for the first one be traced anew.
  """

  @functools.wraps(kind.__call__)
  def __call__(self, *args, **kwargs):
    return around(kind.__call__, self, args, kwargs)

  names = ('__module__', '__qualname__', '__doc__')
  namespace = {name: getattr(kind, name) for name in names}
  return type(kind)(
    kind.__name__,
    (kind,),
    {**namespace, '__call__': __call__},
    pytree=kind._pytree__is_pytree,
  )
