"""What taps and a watched optimizer add to a training step.

The whole step is timed, forward, backward and optimizer: plain, with taps at
all modules, with a watched optimizer, and with both. 'watch, not measuring' is
the step between two measured ones. Adding a step to a record is compared with
fetching its numbers.
"""

import functools
import itertools
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from optax_ghm import flow
from optax_ghm.linen import Tapped


class Dense(nn.Module):
  """20 layers, 1,024 wide."""

  depth: int = 20
  width: int = 1024

  @nn.compact
  def __call__(self, x):
    for _ in range(self.depth):
      x = nn.relu(
        nn.Dense(self.width, kernel_init=nn.initializers.he_normal())(x)
      )
    return nn.Dense(10)(x)


class Convolutions(nn.Module):
  """Six 3 x 3 convolutions, pooled after every other."""

  @nn.compact
  def __call__(self, x):
    for features in (32, 64, 128):
      for _ in range(2):
        x = nn.relu(nn.Conv(features, (3, 3))(x))
      x = nn.max_pool(x, (2, 2), (2, 2))
    return nn.Dense(10)(x.mean((1, 2)))


class Block(nn.Module):
  """Pre-LN: attention and two dense layers."""

  heads: int = 4
  dtype: Any = None

  @nn.compact
  def __call__(self, x, _=None):
    """Returns the carry and no output, as a scan needs it."""
    attention: Any = nn.MultiHeadDotProductAttention(self.heads, self.dtype)
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    x = x + attention(nn.LayerNorm(dtype=self.dtype)(x))
    y = nn.gelu(dense(4 * x.shape[-1])(nn.LayerNorm(dtype=self.dtype)(x)))
    return x + dense(x.shape[-1])(y), None


class Transformer(nn.Module):
  """Six blocks, or a scanned and rematted stack of more."""

  depth: int = 6
  scanned: bool = False
  heads: int = 4
  dtype: Any = None

  @nn.compact
  def __call__(self, x):
    if self.scanned:
      stack: Any = nn.scan(
        nn.remat(Block),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=self.depth,
      )
      x, _ = stack(self.heads, self.dtype, name='blocks')(x, None)
    else:
      for _ in range(self.depth):
        x, _ = Block(self.heads, self.dtype)(x)
    return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


def case(model, shape, programs, quick=False):
  """Training steps of the model, some of them measured."""
  optimizer = optax.adamw(1e-3)
  watched = flow.watch(optimizer)
  tapped = Tapped(model)

  def data():
    x = jax.random.normal(jax.random.key(0), shape)
    return x, jnp.arange(shape[0]) % 10

  def init(name, data):
    params = jax.jit(model.init)(jax.random.key(1), data[0])['params']
    tx = watched if 'watch' in name else optimizer
    taps = tapped.init({'params': params}, data[0]) if 'taps' in name else None
    return params, tx.init(params), taps

  def step(carry, x, labels, *, tx, **extra):
    params, state, taps = carry
    empty_taps = jax.tree.map(jnp.zeros_like, taps)

    def loss(params, empty_taps):
      logits = tapped.apply({'params': params}, x, taps=empty_taps)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean()

    grads, taps = jax.grad(loss, argnums=(0, 1))(params, empty_taps)
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state, taps

  every = {
    'plain': functools.partial(step, tx=optimizer),
    'taps': functools.partial(step, tx=optimizer),
    'watch': functools.partial(step, tx=watched),
    'watch, not measuring': functools.partial(step, tx=watched, measure=False),
    'taps and watch': functools.partial(step, tx=watched),
  }
  return harness.Case(
    {name: every[name] for name in ('plain', *programs)},
    data,
    elements=int(np.prod(shape)),
    limit='plain',
    init=init,
    quick=quick,
  )


def recorded(depth):
  """Adding a measured step of a network of so many layers to a record."""
  model, tx = Dense(depth, 64), flow.watch(optax.sgd(0.1))

  def data():
    x, tapped = jnp.ones((8, 64)), Tapped(model)
    params = jax.jit(model.init)(jax.random.key(0), x)
    grads, taps = jax.jit(
      jax.grad(
        lambda params, taps: tapped.apply(params, x, taps=taps).mean(),
        argnums=(0, 1),
      )
    )(params, tapped.init(params, x))
    return params, taps, jax.jit(tx.update)(grads, tx.init(params), params)[1]

  @jax.jit
  def fresh(*measured):  # arrays keep the host copy of an earlier fetch
    return jax.tree.map(jnp.copy, measured)

  def fetched(params, *measured):
    del params
    return lambda: jax.device_get(fresh(*measured))

  def added(params, *measured):
    record, steps = flow.Record(params), itertools.count()

    def call():
      taps, opt_state = fresh(*measured)
      record.add(next(steps), taps=taps, opt_state=opt_state)
      return len(record)  # once it has arrived

    return call

  return harness.Case(
    {
      'jax.device_get': harness.Eager(fetched),
      'Record.add': harness.Eager(added),
    },
    data,
    elements=depth,
    quick=depth == 40,
  )


ALL = ('taps', 'watch', 'watch, not measuring', 'taps and watch')
CASES = {
  '20 dense layers, 1,024 wide, batch 256': case(Dense(), (256, 1024), ALL),
  'convolutions, 32 x 32, batch 64': case(Convolutions(), (64, 32, 32, 3), ALL),
  'transformer, 6 x 256, 16 sequences of 64': case(
    Transformer(), (16, 64, 256), ALL
  ),
  '48 scanned, rematted blocks, 4 sequences of 64': case(
    Transformer(48, scanned=True), (4, 64, 128), ('taps', 'taps and watch')
  ),
  'dense layers, 256 wide, batch 256': harness.Growth(
    'layers',
    {
      depth: case(Dense(depth, 256), (256, 256), ALL, quick=depth == 10)
      for depth in (10, 30, 90)
    },
  ),
  'record': harness.Growth(
    'layers', {depth: recorded(depth) for depth in (10, 40, 160)}
  ),
}
