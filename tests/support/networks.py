"""Networks with a known illness, and healthy ones, and a short training."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ghm import flow
from optax_ghm.linen import Tapped

CLASSES = 4


def gain(value):
  return nn.initializers.variance_scaling(value**2, 'fan_in', 'normal')


def four_of_five_off(key, shape, dtype=jnp.float32):
  del key
  return jnp.where(jnp.arange(shape[0]) % 5 == 0, 0, -9).astype(dtype)


class Plain(nn.Module):
  depth: int
  width: int = 64
  kernel_init: Any = gain(2**0.5)
  bias_init: Any = nn.initializers.zeros
  activation: Callable = nn.relu
  normalization: Callable | None = None
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x):
    for _ in range(self.depth - 1):
      x = nn.Dense(
        self.width, kernel_init=self.kernel_init, bias_init=self.bias_init
      )(x)
      if self.normalization:
        x = self.normalization()(x)
      x = self.activation(x)
      if self.dropout:
        x = nn.Dropout(self.dropout, deterministic=False)(x)
    return nn.Dense(CLASSES, kernel_init=self.kernel_init)(x)


class PreNormBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    y = nn.Dense(64)(nn.LayerNorm()(x))
    return x + nn.Dense(x.shape[-1])(nn.gelu(y)), None


class PreNorm(nn.Module):
  depth: int
  scanned: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(32)(x)
    if self.scanned:
      layers = nn.scan(
        PreNormBlock,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=self.depth,
      )
      x, _ = layers(name='layers')(x, None)
    else:
      for _ in range(self.depth):
        x, _ = PreNormBlock()(x)
    return nn.Dense(CLASSES)(nn.LayerNorm()(x))


class Transformer(nn.Module):
  depth: int = 2

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(32)(x.reshape(len(x), 8, 4))
    for _ in range(self.depth):
      y = nn.LayerNorm()(x)
      x = x + nn.MultiHeadDotProductAttention(4)(y)
      y = nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))
      x = x + nn.Dense(32)(y)
    return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean(1))


class Convolutions(nn.Module):
  kernel_init: Any = gain(2**0.5)
  residual: bool = False
  blocks: int = 6

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(16, (3, 3), kernel_init=self.kernel_init)(
      x.reshape(len(x), 4, 8, 1)
    )
    for _ in range(self.blocks):
      y = nn.Conv(16, (3, 3), kernel_init=self.kernel_init)(nn.relu(x))
      x = x + 0.5 * y if self.residual else y
    x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2))
    x = nn.relu(nn.Conv(16, (3, 3), kernel_init=self.kernel_init)(x))
    return nn.Dense(CLASSES)(x.reshape(len(x), -1))


class Recurrent(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.RNN(nn.LSTMCell(16))(x.reshape(len(x), 8, 4))
    return nn.Dense(CLASSES)(x[:, -1])


class CutOff(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(32, name='encoder')(x))
    x = nn.relu(nn.Dense(32, name='middle')(jax.lax.stop_gradient(x)))
    return nn.Dense(CLASSES, name='head')(x)


class Distances(nn.Module):
  """A root of 0 in the branch of a where that is not taken."""

  @nn.compact
  def __call__(self, x):
    square = jnp.maximum(x, 0)
    return jnp.where(square > 0, jnp.sqrt(square), 0.0)


class RootOfZero(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(32, name='first')(x)
    x = nn.Dense(32, name='second')(nn.tanh(x))
    x = Distances(name='distances')(x)
    x = nn.tanh(nn.Dense(32, name='third')(x))
    return nn.Dense(CLASSES, name='head')(x)


class Case(NamedTuple):
  """A training and the kinds of verdict that are right about it.

  ``at_start`` after one step, ``at_end`` after all.
  """

  model: nn.Module
  at_start: frozenset
  at_end: frozenset
  optimizer: optax.GradientTransformation = optax.adam(1e-3)
  spike_at: int | None = None


batch_norm = functools.partial(nn.BatchNorm, use_running_average=False)
none = frozenset()


def ill(model, *kinds, at_end=None, **kwargs):
  at_end = kinds if at_end is None else at_end
  return Case(model, frozenset(kinds), frozenset(at_end), **kwargs)


def healthy(model, **kwargs):
  return Case(model, none, none, **kwargs)


HEALTHY = {
  'He, 30 layers': healthy(Plain(30)),
  'tanh, Glorot, 12 layers': healthy(
    Plain(12, kernel_init=gain(1.0), activation=nn.tanh)
  ),
  'selu, LeCun, 12 layers': healthy(
    Plain(12, kernel_init=gain(1.0), activation=nn.selu)
  ),
  'batch normalization, 20 layers': healthy(
    Plain(20, normalization=batch_norm)
  ),
  'layer normalization, 12 layers': healthy(
    Plain(12, normalization=nn.LayerNorm)
  ),
  'dropout': healthy(Plain(6, dropout=0.3)),
  'pre-LN residual, 8 blocks': healthy(PreNorm(8)),
  'pre-LN residual, scanned': healthy(PreNorm(12, scanned=True)),
  'transformer': healthy(Transformer()),
  'convolutions': healthy(Convolutions()),
  'LSTM': healthy(Recurrent()),
}

sgd = optax.sgd(0.01)  # Adam heals most of these in a few dozen steps

ILL = {
  'gain 1.0, 30 layers': ill(
    Plain(30, kernel_init=gain(1.0)), 'vanishing', optimizer=sgd
  ),
  'gain 0.5, 30 layers': ill(Plain(30, kernel_init=gain(0.5)), 'vanishing'),
  'gain 2.0, 30 layers': ill(
    Plain(30, kernel_init=gain(2.0)), 'exploding', optimizer=optax.adam(1e-5)
  ),
  'sigmoid, 20 layers': ill(
    Plain(20, kernel_init=gain(1.0), activation=nn.sigmoid), 'vanishing'
  ),
  'convolutions, gain 0.6': ill(
    Convolutions(kernel_init=gain(0.6), blocks=8),
    'vanishing',
    optimizer=optax.sgd(0.001),
  ),
  'stop_gradient': ill(CutOff(), 'disconnected'),
  'root of zero': ill(RootOfZero(), 'not finite'),
  'dead units': ill(
    Plain(3, bias_init=four_of_five_off),
    at_end=['dead units'],
    optimizer=optax.sgd(0.1),
  ),
  'all units dead': ill(
    Plain(3, bias_init=nn.initializers.constant(-9.0)), 'no gradient'
  ),
  'learning rate 1e-7': ill(
    Plain(4), at_end=['small updates'], optimizer=optax.adam(1e-7)
  ),
  'learning rate 0.3 of the norm': ill(
    Plain(4), at_end=['large updates'], optimizer=optax.lamb(0.3)
  ),
  'one bad batch': ill(Plain(4), at_end=['spikes'], spike_at=25),
}


def data(seed):
  """Noisy clusters, as real features are: centered, of unit variance."""
  rng = np.random.default_rng(seed)
  centers = rng.normal(size=(CLASSES, 32))
  labels = rng.integers(CLASSES, size=(512,))
  x = centers[labels] + rng.normal(size=(512, 32))
  x = (x - x.mean(0)) / x.std(0)
  return jnp.asarray(x, jnp.float32), jnp.asarray(labels)


@functools.cache
def compiled(model, optimizer, batch):
  """The pieces of a training that seeds share."""
  tapped, tx = Tapped(model), flow.watch(optimizer)
  x = jnp.zeros((batch, 32))
  rngs = {'dropout': jax.random.key(1)}
  shapes = dict(
    jax.eval_shape(model.init, {'params': rngs['dropout'], **rngs}, x)
  )
  call = dict(rngs=rngs, mutable=sorted(set(shapes) - {'params'}))
  empty_taps = tapped.init(shapes, x, **call)

  def loss(params, taps, variables, x, labels):
    logits, variables = tapped.apply(
      {'params': params, **variables}, x, taps=taps, **call
    )
    value = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return value.mean(), variables

  @jax.jit
  def step(params, variables, state, x, labels):
    (value, variables), (grads, taps) = jax.value_and_grad(
      loss, argnums=(0, 1), has_aux=True
    )(params, empty_taps, variables, x, labels)
    with jax.numpy_dtype_promotion('standard'):
      updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, variables, state, value, taps

  return jax.jit(model.init), tx, step


def train(case, seed, steps=30, batch=128):
  """A record of the training."""
  x, labels = data(seed)
  init, tx, step = compiled(case.model, case.optimizer, batch)
  keys = {'params': jax.random.key(seed), 'dropout': jax.random.key(1)}
  variables = dict(init(keys, x[:batch]))
  params = variables.pop('params')
  state, record = jax.jit(tx.init)(params), flow.Record(params)
  rng = np.random.default_rng(seed)
  for i in range(steps):
    at = rng.integers(len(x), size=batch)
    bad = i == case.spike_at
    params, variables, state, value, taps = step(
      params,
      variables,
      state,
      x[at] * (1000.0 if bad else 1.0),
      (labels[at] + bad) % CLASSES,
    )
    record.add(i, taps=taps, opt_state=state, loss=value)
  return record


def first_steps(record, count):
  """The record as it was after so many steps."""
  earlier = flow.Record()
  earlier.layers, earlier.leaves = record.layers, record.leaves
  len(record)
  earlier._steps = record._steps[:count]
  return earlier
