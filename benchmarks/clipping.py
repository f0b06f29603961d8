"""What a clip in front of AdamW costs, against the one people chain today.

Each case is one donated training step of AdamW on given gradients: of a
transformer (50M parameters, 196 leaves), of ResNet-50 (25M, 161 leaves), and of
2M parameters in more and more leaves. The limit is the optimizer alone; beside
it stands a transformation that takes the norm and does nothing with it.
"""

import functools
import math
from typing import Any

import harness
import jax
import jax.numpy as jnp
import optax

import optax_ghm
from optax_ghm._core import norms

LIMIT = 'limit: nothing in front'


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


def train_step(optimizer, carry, grads):
  params, state = carry
  updates, state = optimizer.update(grads, state, params)
  return optax.apply_updates(params, updates), state


def measured_only():
  return optax.GradientTransformation(
    lambda params: jnp.zeros([]),
    lambda updates, state, params=None: (updates, norms.global_norm(updates)),
  )


def optimizers():
  adamw = optax.adamw(1e-4)
  before = {
    'optax.clip_by_global_norm': optax.clip_by_global_norm(1.0),
    LIMIT: optax.identity(),
    'the norm is taken, nothing done': measured_only(),
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
    'clip_by_norm of leaves': optax_ghm.clip_by_norm(1.0, scope='leaf'),
    'clip_by_percentile of leaves': optax_ghm.clip_by_percentile(scope='leaf'),
    'clip_by_zscore of leaves': optax_ghm.clip_by_zscore(scope='leaf'),
    'clip_by_norm_ema of leaves': optax_ghm.clip_by_norm_ema(),
  }
  return {name: optax.chain(tx, adamw) for name, tx in before.items()} | {
    'calibrated': optax_ghm.calibrated(adamw),
    'skip_spikes': optax_ghm.skip_spikes(adamw),
    'optax.apply_if_finite': optax.apply_if_finite(adamw, 10),
  }


def of_updates():
  """Adam, its updates clipped behind the moments, by itself and guarded."""
  before = {
    'optax.clip_by_block_rms': optax.clip_by_block_rms(1.0),
    LIMIT: optax.identity(),
    'the norm is taken, nothing done': measured_only(),
    'optax.clip_by_global_norm': optax.clip_by_global_norm(1.0),
    'clip_by_rms': optax_ghm.clip_by_rms(),
    'clip_by_norm': optax_ghm.clip_by_norm(1.0),
    'clip_by_zscore': optax_ghm.clip_by_zscore(),
  }
  every = {
    name: optax.chain(
      optax.scale_by_adam(), tx, optax.scale_by_learning_rate(1e-4)
    )
    for name, tx in before.items()
  }
  return every | {
    'calibrated, nothing behind': optax_ghm.calibrated(every[LIMIT]),
    'calibrated, clip_by_rms': optax_ghm.calibrated(every['clip_by_rms']),
    'calibrated, clip_by_zscore': optax_ghm.calibrated(every['clip_by_zscore']),
  }


def normalized():
  """Normalization in front of momentum."""
  before = {
    'optax.normalize_by_update_norm': optax.normalize_by_update_norm(),
    LIMIT: optax.identity(),
    'the norm is taken, nothing done': measured_only(),
    'normalize_by_norm': optax_ghm.normalize_by_norm(),
    'normalize_by_norm of leaves': optax_ghm.normalize_by_norm(scope='leaf'),
    'normalize_by_norm of units': optax_ghm.normalize_by_norm(scope='unit'),
    'standardize': optax_ghm.standardize(),
    'optax.centralize': optax.centralize(),
    'centralize': optax_ghm.centralize(),
  }
  return {
    name: optax.chain(tx, optax.sgd(0.1, momentum=0.9))
    for name, tx in before.items()
  }


def equal_leaves(count):
  """2M parameters in so many matrices."""
  return {f'layer_{i}': (2**21 // count // 32, 32) for i in range(count)}


def case(tree, every, quick=False):
  return harness.Case(
    {
      name: functools.partial(train_step, optimizer)
      for name, optimizer in every.items()
    },
    functools.partial(gradients, tree),
    sum(math.prod(shape) for shape in shapes(tree)),
    limit=LIMIT if LIMIT in every else None,
    init=functools.partial(initial, every),
    quick=quick,
  )


CHOICE = (
  'optax.clip_by_global_norm',
  LIMIT,
  'clip_by_norm',
  'clip_by_zscore',
  'clip_by_norm of leaves',
  'clip_by_percentile of leaves',
  'clip_by_parameter_norm',
  'calibrated',
)
CASES = {
  f'{name}, {len(shapes(tree))} leaves': case(tree, optimizers())
  for name, tree in {
    'transformer': transformer(),
    'ResNet-50': resnet_50(),
  }.items()
} | {
  'behind the moments, ResNet-50': case(resnet_50(), of_updates()),
  'behind the moments, transformer': case(transformer(), of_updates()),
  'normalization, ResNet-50': case(resnet_50(), normalized()),
  'leaves of 2M parameters': harness.Growth(
    'leaves',
    {
      count: case(
        equal_leaves(count),
        {name: optimizers()[name] for name in CHOICE},
        quick=count == 16,
      )
      for count in (16, 64, 256)
    },
  ),
}
