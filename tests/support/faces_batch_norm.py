"""One way to call batch norms of Linen and NNX, of Flax and ours.

Variables go in, y and the next variables come out.
"""

from typing import Any, NamedTuple

import jax
import pytest
from flax import linen as nn, nnx, traverse_util

import optax_ghm.linen
import optax_ghm.nnx

STATS = 'batch_norm_stats'
both = pytest.mark.parametrize('name', ['linen', 'nnx'])


class Linen(NamedTuple):
  module: nn.Module

  def init(self, x, *args, **kwargs):
    return self.module.init(jax.random.key(0), x, *args, **kwargs)

  def __call__(self, variables, x, *args, **kwargs):
    y, updated = self.module.apply(
      variables, x, *args, mutable=['batch_stats', STATS], **kwargs
    )
    return y, {**variables, **updated}

  def recalibrate(self, variables, batches, **kwargs):
    """Batches are arrays, or pairs of an array and keyword arguments."""

    def apply(variables, batch):
      x, options = batch if isinstance(batch, tuple) else (batch, {})
      return self.module.apply(
        variables, x, mutable=['batch_stats'], **options, **kwargs
      )

    return optax_ghm.linen.recalibrate(apply, variables, batches)


class Nnx(NamedTuple):
  build: Any  # a new module for every call

  def init(self, x, *args, **kwargs):
    del x, args, kwargs
    return read(self.build())

  def __call__(self, variables, x, *args, **kwargs):
    module = self.build()
    write(module, variables)
    return module(x, *args, **kwargs), read(module)

  def recalibrate(self, variables, batches, **kwargs):
    module = self.build()
    write(module, variables)

    def apply(model, batch):
      x, options = batch if isinstance(batch, tuple) else (batch, {})
      return model(x, **options, **kwargs)

    assert optax_ghm.nnx.recalibrate(apply, module, batches) is None
    return read(module)


def read(module):
  """The variables of an NNX module, in the collections that Linen has."""
  kinds = {
    'params': nnx.Param,
    'batch_stats': nnx.BatchStat,
    STATS: optax_ghm.nnx.BatchNormStats,
  }
  found = {}
  for collection, kind in kinds.items():
    flat = nnx.to_flat_state(nnx.state(module, kind))
    if values := {path: variable.get_value() for path, variable in flat}:
      found[collection] = traverse_util.unflatten_dict(values)
  return found


def write(module, variables):
  for collection in variables.values():
    flat = traverse_util.flatten_dict(
      collection, is_leaf=lambda _, value: not isinstance(value, dict)
    )
    for path, value in flat.items():
      node = module
      for key in path:
        node = getattr(node, key) if isinstance(key, str) else node[key]
      node.set_value(value)


def face_of(name, kind='BatchNorm', features=3, flax=False, **options):
  """A batch norm of Linen or NNX; only that of NNX must be told to measure."""
  if name == 'linen':
    home = nn if flax else optax_ghm.linen
    options.pop('measure', None)
    return Linen(getattr(home, kind)(**options))
  home = nnx if flax else optax_ghm.nnx
  return Nnx(lambda: getattr(home, kind)(features, rngs=nnx.Rngs(0), **options))


def start(face, *args, **kwargs):
  """The first variables, compiled."""
  return jax.jit(lambda: face.init(*args, **kwargs))()


def widening(step):
  """A schedule."""
  return 1 + step.astype('float32')
