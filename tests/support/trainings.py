"""Networks with a known illness, and healthy ones, and a short training.

Every network is one program for the whole step; what differs among cases of a
network is changed in the parameters, or given to the step as a number.
"""

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

CLASSES, FEATURES, BATCH = 4, 32, 64
STEPS = (1, 12, 20)  # after which there is a record
SPIKE_AT, CHANGE_AT = 14, 5
ACTIVATIONS = {
  'relu': nn.relu,
  'tanh': nn.tanh,
  'selu': nn.selu,
  'sigmoid': nn.sigmoid,
}
he, zeros = nn.initializers.he_normal(), nn.initializers.zeros


class Plain(nn.Module):
  """Which activation it has is known when it runs."""

  depth: int = 20
  normalization: Callable | None = None
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, activation):
    for _ in range(self.depth - 1):
      x = nn.Dense(64, kernel_init=he)(x)
      if self.normalization:
        x = self.normalization()(x)
      every = [f(x) for f in ACTIVATIONS.values()]
      x = jax.lax.select_n(jnp.full(x.shape, activation), *every)
      if self.dropout:
        x = nn.Dropout(self.dropout, deterministic=False)(x)
    return nn.Dense(CLASSES, kernel_init=he)(x)


def scanned(block, length):
  return nn.scan(
    block,
    variable_axes={'params': 0, 'batch_stats': 0},
    split_rngs={'params': True},
    length=length,
  )(name='layers')


class BatchNormBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    x = nn.Dense(64, kernel_init=he)(x)
    return nn.relu(nn.BatchNorm(use_running_average=False)(x)), None


class BatchNorms(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    x, _ = scanned(BatchNormBlock, 20)(nn.Dense(64)(x), None)
    return nn.Dense(CLASSES)(x)


class PreNormBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    y = nn.Dense(64)(nn.LayerNorm()(x))
    return x + nn.Dense(x.shape[-1])(nn.gelu(y)), None


class PreNorm(nn.Module):
  depth: int
  scanned: bool = False

  @nn.compact
  def __call__(self, x, _):
    x = nn.Dense(32)(x)
    if self.scanned:
      x, _ = scanned(PreNormBlock, self.depth)(x, None)
    else:
      for _ in range(self.depth):
        x, _ = PreNormBlock()(x)
    return nn.Dense(CLASSES)(nn.LayerNorm()(x))


class Transformer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    x = nn.Dense(32)(x.reshape(len(x), 8, 4))
    for _ in range(2):
      y = nn.LayerNorm()(x)
      x = x + nn.MultiHeadDotProductAttention(4)(y)
      y = nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))
      x = x + nn.Dense(32)(y)
    return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean(1))


class Convolutions(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    x = x.reshape(len(x), 4, 8, 1)
    for _ in range(7):
      x = nn.relu(nn.Conv(16, (3, 3), kernel_init=he)(x))
    x = nn.avg_pool(x, (2, 2), (2, 2))
    x = nn.relu(nn.Conv(16, (3, 3), kernel_init=he)(x))
    return nn.Dense(CLASSES)(x.reshape(len(x), -1))


class Recurrent(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    x = nn.RNN(nn.LSTMCell(16))(x.reshape(len(x), 8, 4))
    return nn.Dense(CLASSES)(x[:, -1])


class ZeroScales(nn.Module):
  """A ResNet whose residual branches start at 0, as the published one's."""

  @nn.compact
  def __call__(self, x, _):
    def normalized(x, **kwargs):
      x = nn.Conv(8, (3, 3), use_bias=False)(x)
      return nn.BatchNorm(use_running_average=False, **kwargs)(x)

    x = nn.relu(normalized(x.reshape(len(x), 4, 8, 1)))
    for _ in range(3):
      y = nn.relu(normalized(x))
      x = nn.relu(x + normalized(y, scale_init=zeros))
    return nn.Dense(CLASSES)(x.mean((1, 2)))


class ZeroHeads(nn.Module):
  """Conditioned by kernels that start at 0, and so do adapters and the head."""

  @nn.compact
  def __call__(self, x, _):
    condition = nn.swish(nn.Dense(16)(x[:, :4]))
    x = Adapted(name='first')(x)
    for _ in range(2):
      y = nn.gelu(Adapted()(nn.LayerNorm()(x)))
      gate = nn.Dense(32, kernel_init=zeros)(condition)
      x = x + gate * nn.Dense(32)(y)
    return nn.Dense(CLASSES, kernel_init=zeros)(x)


class Adapted(nn.Module):
  """A layer with an adapter of low rank, the second factor of which is 0."""

  @nn.compact
  def __call__(self, x):
    low = self.param('low', nn.initializers.lecun_normal(), (x.shape[-1], 4))
    return nn.Dense(32)(x) + x @ low @ self.param('high', zeros, (4, 32))


class PostNorm(nn.Module):
  """A language model of 16 tokens, with tied embeddings."""

  @nn.compact
  def __call__(self, x, _):
    embedding = nn.Embed(16, 16)
    x = embedding(jnp.clip(3 * x[:, :8] + 8, 0, 15).astype(int))
    for _ in range(2):
      x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(4)(x))
      x = nn.LayerNorm()(x + nn.Dense(16)(nn.relu(nn.Dense(32)(x))))
    return embedding.attend(x)[:, -1, :CLASSES] / 4


class RootOfZero(nn.Module):
  """A root of 0 in the branch of a where that is not taken."""

  @nn.compact
  def __call__(self, x, _):
    x = nn.Dense(32, name='first')(x)
    x = nn.Dense(32, name='second')(nn.tanh(x))
    x = Distances(name='distances')(x)
    x = nn.tanh(nn.Dense(32, name='third')(x))
    return nn.Dense(CLASSES, name='head')(x)


class Distances(nn.Module):
  @nn.compact
  def __call__(self, x):
    square = jnp.maximum(x, 0)
    return jnp.where(square > 0, jnp.sqrt(square), 0.0)


class WiredWrongly(nn.Module):
  """A layer that is cut off, one with a frozen kernel, and one not used."""

  @nn.compact
  def __call__(self, x, _):
    x = nn.relu(nn.Dense(32, name='encoder')(x))
    x = nn.tanh(Frozen(name='frozen')(jax.lax.stop_gradient(x)))
    nn.Dense(CLASSES, name='unused')(x)
    return nn.Dense(CLASSES, name='head')(x)


class Frozen(nn.Module):
  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', nn.initializers.lecun_normal(), (32, 16))
    bias = self.param('bias', zeros, (16,))
    return x @ jax.lax.stop_gradient(kernel) + bias


class Case(NamedTuple):
  """A training and the kinds of verdict that are right about it.

  ``kinds`` are those after the first step; ``at_end``, some of those after all,
  is the same by default. ``change`` changes every parameter, given its path,
  before the step ``change_at``.
  """

  model: nn.Module
  kinds: tuple[str, ...] = ()
  at_end: tuple[str, ...] | None = None
  activation: str = 'relu'
  change: Callable[[str, np.ndarray], Any] | None = None
  change_at: int = 0
  rate: float = 1e-3
  growth: float = 1.0
  warm_up: int = 0
  penalty: float = 0.0
  bad_batch: int | None = None


def gain(value):
  """The kernels times what a gain differs from that of He's."""
  factor = np.float32(value / 2**0.5)
  return lambda path, u: u * factor if 'kernel' in path else u


def bias(of, values):
  return lambda path, u: u + values if f"'{of}" in path and u.ndim == 1 else u


FOUR_OF_FIVE_OFF = np.where(np.arange(64) % 5 == 0, 0, -9).astype(np.float32)
HALVED = gain(2**-0.5)
plain = functools.partial(Case, Plain())

HEALTHY = {
  'He, 20 layers': plain(),
  'tanh, Glorot': plain(activation='tanh', change=gain(1.0)),
  'selu, LeCun': plain(activation='selu', change=gain(1.0)),
  'batch normalization': Case(BatchNorms()),
  'layer normalization': Case(Plain(6, nn.LayerNorm)),
  'dropout': Case(Plain(6, dropout=0.3)),
  'pre-LN residual, 4 blocks': Case(PreNorm(4)),
  'pre-LN residual, scanned': Case(PreNorm(12, scanned=True)),
  'transformer': Case(Transformer()),
  'convolutions': Case(Convolutions()),
  'LSTM': Case(Recurrent()),
}

HEALTHY_STARTS = {
  'a stack with biases, warm-up of 100 steps': Case(
    PreNorm(6, scanned=True), warm_up=100
  ),
  'scales of 0, warm-up of 10,000 steps': Case(ZeroScales(), warm_up=10_000),
  'kernels of 0': Case(ZeroHeads()),
  'kernels of 0, warm-up of 1,000 steps': Case(ZeroHeads(), warm_up=1000),
  'post-LN, warm-up of 8,000 steps': Case(PostNorm(), warm_up=8000),
}

# Adam heals most of what is ill at the start in a few dozen steps.
ILL = {
  'gain 1.0': plain(('vanishing',), change=gain(1.0), rate=1e-5),
  'gain 0.5': plain(('vanishing',), change=gain(0.5)),
  'gain 2.0': plain(('exploding',), change=gain(2.0), rate=1e-5),
  'sigmoid': plain(('vanishing',), activation='sigmoid', change=gain(1.0)),
  'convolutions, gain 0.6': Case(
    Convolutions(), ('vanishing',), change=gain(0.6), rate=1e-5
  ),
  'gain 0.7 later': plain(
    at_end=('vanishing',), change=HALVED, change_at=CHANGE_AT, rate=1e-5
  ),
  'root of zero': Case(RootOfZero(), ('not finite',)),
  'dead units': plain(
    at_end=('dead units',), change=bias('Dense_0', FOUR_OF_FIVE_OFF)
  ),
  'all units dead': plain(
    ('no gradient',), change=bias('Dense_', np.float32(-9))
  ),
  'learning rate 1e-7': plain(at_end=('small updates',), rate=1e-7),
  'learning rate that grows': plain(
    at_end=('large updates',),
    activation='tanh',
    change=gain(1.0),
    rate=0.1,
    growth=1.5,
  ),
  'one bad batch': plain(at_end=('spikes',), rate=1e-5, bad_batch=SPIKE_AT),
  'wired wrongly': Case(
    WiredWrongly(), ('disconnected', 'disconnected', 'conflict')
  ),
  'wired wrongly, with a penalty': Case(
    WiredWrongly(), ('disconnected', 'disconnected', 'conflict'), penalty=1e-3
  ),
}


def data(seed):
  """Noisy clusters, as real features are: centered, of unit variance."""
  rng = np.random.default_rng(seed)
  centers = rng.normal(size=(CLASSES, FEATURES))
  labels = rng.integers(CLASSES, size=(512,))
  x = centers[labels] + rng.normal(size=(512, FEATURES))
  return ((x - x.mean(0)) / x.std(0)).astype(np.float32), labels


@functools.cache
def compiled(model):
  """The start and the step of a training, with numbers that cases share."""
  tapped = Tapped(model)

  def keys(seed):
    return {'params': jax.random.key(seed), 'dropout': jax.random.key(1)}

  @jax.jit
  def init(seed, x):
    variables = dict(model.init(keys(seed), x, 0))
    params = variables.pop('params')
    return params, variables, flow.watch(optax.adam(0.0)).init(params)

  @jax.jit
  def step(params, variables, state, x, labels, activation, rate, penalty):
    call = dict(rngs=keys(0), mutable=list(variables))
    empty_taps = tapped.init({'params': params, **variables}, x, 0, **call)

    def loss(params, taps):
      logits, updated = tapped.apply(
        {'params': params, **variables}, x, activation, taps=taps, **call
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      squares = [jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params)]
      return losses.mean() + penalty * sum(squares), updated

    (value, variables), (grads, taps) = jax.value_and_grad(
      loss, argnums=(0, 1), has_aux=True
    )(params, empty_taps)
    updates, state = flow.watch(optax.adam(rate)).update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, variables, state, value, taps

  return init, step


def train(case, seed, steps=STEPS):
  """Records of the first steps of a training."""
  x, labels = data(seed)
  init, step = compiled(case.model)
  params, variables, state = init(seed, x[:BATCH])
  activation = np.int32(list(ACTIVATIONS).index(case.activation))
  records = {count: flow.Record(params) for count in steps}
  rng = np.random.default_rng(seed)
  for i in range(max(steps)):
    if case.change and i == case.change_at:
      params = jax.tree_util.tree_map_with_path(
        lambda path, u: case.change(jax.tree_util.keystr(path), np.asarray(u)),
        params,
      )
    at, bad = rng.integers(len(x), size=BATCH), i == case.bad_batch
    batch = x[at] * np.float32(1000 if bad else 1), (labels[at] + bad) % CLASSES
    rate = case.rate * case.growth**i
    if case.warm_up:
      rate *= min(i / case.warm_up, 1)
    numbers = np.float32([rate, case.penalty])
    params, variables, state, value, taps = step(
      params, variables, state, *batch, activation, *numbers
    )
    for count, record in records.items():
      if i < count:
        record.add(i, taps=taps, opt_state=state, loss=value)
  return list(records.values())
