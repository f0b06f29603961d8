"""What a clip in front of AdamW costs, against the one people chain today.

One donated training step of AdamW on given gradients: the tree of a transformer
(50M parameters, 196 leaves) and that of ResNet-50 (25M, 161).
"""

import functools
from typing import Any

import harness
import jax
import jax.numpy as jnp
import optax

import optax_ghm
from optax_ghm import norms


def transformer(layers=12, width=512, vocabulary=24_000):
  def dense(m, n):
    return {'kernel': (m, n), 'bias': (n,)}

  layer = {
    name: dense(width, width) for name in ('query', 'key', 'value', 'out')
  } | {
    'up': dense(width, 4 * width),
    'down': dense(4 * width, width),
    'norm_1': {'scale': (width,), 'bias': (width,)},
    'norm_2': {'scale': (width,), 'bias': (width,)},
  }
  return {f'layer_{i}': layer for i in range(layers)} | {
    'tokens': {'embedding': (vocabulary, width)},
    'positions': {'embedding': (512, width)},
    'norm': {'scale': (width,), 'bias': (width,)},
  }


def resnet_50():
  def convolved(size, m, n):
    return {
      'conv': {'kernel': (size, size, m, n)},
      'norm': {'scale': (n,), 'bias': (n,)},
    }

  tree: dict[str, Any] = {'stem': convolved(7, 3, 64)}
  channels = 64
  for stage, (blocks, width) in enumerate(
    [(3, 64), (4, 128), (6, 256), (3, 512)]
  ):
    for block in range(blocks):
      convolutions = {
        'reduce': convolved(1, channels, width),
        'conv': convolved(3, width, width),
        'expand': convolved(1, width, 4 * width),
      }
      if block == 0:
        convolutions['shortcut'] = convolved(1, channels, 4 * width)
      tree[f'block_{stage}_{block}'] = convolutions
      channels = 4 * width
  return tree | {'head': {'kernel': (2048, 1000), 'bias': (1000,)}}


def shapes(tree):
  return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, tuple))


def gradients(tree):
  def normal(shape):
    key = jax.random.fold_in(jax.random.key(0), len(shape) * sum(shape))
    return 1e-3 * jax.random.normal(key, shape)

  return (
    jax.tree.map(normal, tree, is_leaf=lambda leaf: isinstance(leaf, tuple)),
  )


def initial(optimizers, name, data):
  params = jax.tree.map(lambda g: 10 * g, *data)
  return params, optimizers[name].init(params)


def train_step(optimizer, carried, grads):
  params, state = carried
  updates, state = optimizer.update(grads, state, params)
  return optax.apply_updates(params, updates), state


def measured_only():
  """The limit: the norm is taken, and nothing done with it."""
  return optax.GradientTransformation(
    lambda params: jnp.zeros([]),
    lambda updates, state, params=None: (updates, norms.global_norm(updates)),
  )


def optimizers():
  adamw = optax.adamw(1e-4)
  before = {
    'optax.clip_by_global_norm': optax.clip_by_global_norm(1.0),
    'nothing': optax.identity(),
    'norm pass, no clip': measured_only(),
    'clip_by_norm': optax_ghm.clip_by_norm(1.0),
    'clip_by_percentile': optax_ghm.clip_by_percentile(),
    'clip_by_percentile, one number': optax_ghm.clip_by_percentile(
      estimator=optax_ghm.GeometricQuantile()
    ),
    'clip_by_zscore': optax_ghm.clip_by_zscore(),
    'clip_by_norm_ema': optax_ghm.clip_by_norm_ema(scope='global'),
    'clip_by_parameter_norm of leaves': optax_ghm.clip_by_parameter_norm(
      scope='leaf'
    ),
    'clip_by_parameter_norm': optax_ghm.clip_by_parameter_norm(),
    'optax.adaptive_grad_clip': optax.adaptive_grad_clip(0.01),
    'clip_by_second_moment': optax_ghm.clip_by_second_moment(),
    'clip_by_norm of leaves': optax_ghm.clip_by_norm(1.0, scope='leaf'),
    'clip_by_percentile of leaves': optax_ghm.clip_by_percentile(scope='leaf'),
    'clip_by_zscore of leaves': optax_ghm.clip_by_zscore(scope='leaf'),
    'clip_by_norm_ema of leaves': optax_ghm.clip_by_norm_ema(),
  }
  return {name: optax.chain(tx, adamw) for name, tx in before.items()} | {
    'calibrated': optax_ghm.calibrated(adamw),
    'optax.apply_if_finite': optax.apply_if_finite(adamw, 10),
  }


def case(tree):
  every = optimizers()
  return harness.Case(
    {
      name: functools.partial(train_step, optimizer)
      for name, optimizer in every.items()
    },
    functools.partial(gradients, tree),
    sum(int(jnp.prod(jnp.array(shape))) for shape in shapes(tree)),
    floor='norm pass, no clip',
    init=functools.partial(initial, every),
  )


CASES = {
  f'{name}, {len(shapes(tree))} leaves': case(tree)
  for name, tree in {
    'transformer': transformer(),
    'ResNet-50': resnet_50(),
  }.items()
}


if __name__ == '__main__':
  harness.main('clipping', __doc__ or '', CASES)
