"""What taps and a watched optimizer add to a training step.

The whole step is timed, forward, backward and optimizer: plain, with taps at
all modules and all of their statistics, with a watched optimizer, with both.
Where only every tenth step is measured, the steps between are those of 'watch,
not measuring'.

  python benchmarks/flow.py --quick
"""

import functools
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

  @nn.compact
  def __call__(self, x, _=None):
    """Returns a carry and nothing, as a scan wants it."""
    attention: Any = nn.MultiHeadDotProductAttention(self.heads)
    x = x + attention(nn.LayerNorm()(x))
    y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
    return x + nn.Dense(x.shape[-1])(y), None


class Transformer(nn.Module):
  """Six blocks, or a scanned and rematted stack of more."""

  depth: int = 6
  scanned: bool = False

  @nn.compact
  def __call__(self, x):
    if self.scanned:
      stack: Any = nn.scan(
        nn.remat(Block),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=self.depth,
      )
      x, _ = stack(name='blocks')(x, None)
    else:
      for _ in range(self.depth):
        x, _ = Block()(x)
    return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


def case(model, shape, programs):
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

  def step(carried, x, labels, *, tx, **extra):
    params, state, taps = carried
    sinks = jax.tree.map(jnp.zeros_like, taps)

    def loss(params, sinks):
      logits = tapped.apply({'params': params}, x, taps=sinks)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean()

    grads, taps = jax.grad(loss, argnums=(0, 1))(params, sinks)
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
    init=init,
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
}


if __name__ == '__main__':
  harness.main('flow', __doc__ or '', CASES)
