"""Classes whose calls do something around the calls of another class."""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx


@functools.cache
def subclass(
  kind: type[nnx.Module], around: Callable[..., Any]
) -> type[nnx.Module]:
  """Returns a class that calls ``around(kind.__call__, self, args, kwargs)``.

  A module gets the class by ``object.__setattr__(module, '__class__', ...)``;
  the assignment of NNX would take the class for a part of the model. What was
  compiled for the original class is traced again for this one, because the
  types differ.
  """

  class Subclass(kind, pytree=kind._pytree__is_pytree):
    @functools.wraps(kind.__call__)
    def __call__(self, *args, **kwargs):
      return around(kind.__call__, self, args, kwargs)

  functools.update_wrapper(Subclass, kind, updated=())
  return Subclass
