"""How the models of the zoo are trained: data, losses, optimizers and steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn, nnx
from sklearn.datasets import load_digits

from optax_ghm import flow
from optax_ghm.linen import Tapped
from optax_ghm.nnx import Tapped as NNXTapped
from tests.support import model_zoo as zoo
from tests.support.model_zoo import WORDS

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def mean_over(losses, mask):
  return jnp.sum(losses * mask) / jnp.sum(mask)


@functools.cache
def digits():
  data = load_digits()
  return (data.images / 16).astype(np.float32), data.target


def images(rng, size=32):
  x, y = digits()
  at = rng.integers(len(x), size=size)
  return x[at][..., None], y[at]


def centered(rng):
  x, y = images(rng)
  return (x.repeat(2, 1).repeat(2, 2) - 0.31) / 0.38, y


def text(rng, shape=(16, 16)):
  """A word leads to one of three others; sentences end in padding."""
  follow = np.random.default_rng(1).integers(1, WORDS, size=(WORDS, 3))
  words = rng.integers(1, WORDS, size=shape)
  for i in range(1, shape[1]):
    words[:, i] = follow[words[:, i - 1], rng.integers(3, size=shape[0])]
  lengths = rng.integers(shape[1] // 2, shape[1] + 1, size=shape[0])
  return (np.where(np.arange(shape[1]) < lengths[:, None], words, 0),)


def pairs(rng):
  """The translation of a word is the next one, in the order of the source."""
  (source,) = text(rng)
  return source, np.where(source > 0, source % (WORDS - 1) + 1, 0)


def tagged(rng):
  (words,) = text(rng)
  return words, (words + np.roll(words, 1, 1)) % 8


def opinions(rng):
  (words,) = text(rng)
  return words, (np.sum(words % 5 == 1, 1) > 2).astype(int)


def sums(rng):
  """Digits are 1 to 10, plus is 11, and 0 is the padding."""
  a, b = rng.integers(100, size=(2, 64))

  def spelled(texts, width):
    rows = [['0123456789+'.index(c) + 1 for c in u] for u in texts]
    return np.array([row + [0] * (width - len(row)) for row in rows])

  questions = [f'{i}+{j}' for i, j in zip(a, b, strict=True)]
  return spelled(questions, 5), spelled(map(str, a + b), 3)


def molecules(rng, graphs=16, most=12):
  """Rings with a few more bonds; a third of the labels is missing."""
  sizes = rng.integers(5, most, size=graphs)
  graph = np.repeat(np.arange(graphs), sizes)
  graph = np.concatenate(
    [graph, np.full(graphs * most - len(graph), graphs - 1)]
  )
  first = np.cumsum(sizes) - sizes
  edges = []
  for at, size in zip(first, sizes, strict=True):
    ring = at + np.arange(size)
    edges += [*zip(ring, np.roll(ring, 1), strict=True)]
  edges = np.array(edges)[rng.integers(len(edges), size=8 * graphs)]
  senders, receivers = np.concatenate([edges, edges[:, ::-1]]).T
  nodes = rng.normal(size=(len(graph), 9)).astype(np.float32)
  mean = np.stack([nodes[graph == g].mean(0) for g in range(graphs)])
  labels = np.concatenate([mean, mean[:, :3] * mean[:, 3:6]], 1) > 0
  labels = np.where(rng.random(labels.shape) < 1 / 3, np.nan, labels)
  return nodes, senders, receivers, graph, labels.astype(np.float32)


def frames(rng, size=16):
  """Frames, actions, old log-probabilities, advantages and returns."""
  x = rng.integers(256, size=(size, 24, 24, 4)) * (
    rng.random((size, 24, 24, 1)) < 0.2
  )
  returns = x[:, :12].mean((1, 2, 3)) / 25 + rng.normal(size=size)
  numbers = np.full(size, -np.log(6)), rng.normal(size=size), returns
  return (
    x.astype(np.uint8),
    rng.integers(6, size=size),
    *(u.astype(np.float32) for u in numbers),
  )


def classified(call, x, labels):
  return cross_entropy(call(x), labels).mean()


def next_words(call, tokens):
  return mean_over(cross_entropy(call(tokens), tokens), tokens > 0)


def next_words_after(call, tokens):
  losses = cross_entropy(call(tokens)[:, :-1], tokens[:, 1:])
  return mean_over(losses, tokens[:, 1:] > 0)


def translated(call, source, target):
  labels = optax.smooth_labels(jax.nn.one_hot(target, WORDS), 0.1)
  losses = optax.softmax_cross_entropy(call(source, target), labels)
  return mean_over(losses, target > 0)


def tags(call, words, labels):
  return mean_over(cross_entropy(call(words), labels), words > 0)


def spelled_out(call, question, answer):
  return mean_over(cross_entropy(call(question, answer), answer), answer > 0)


def reconstructed(call, x, labels):
  del labels
  x = x.reshape(len(x), -1)
  logits, mean, log_variance = call(x)
  pixels = optax.sigmoid_binary_cross_entropy(logits, x).sum(-1)
  squares = jnp.square(mean) + jnp.exp(log_variance) - log_variance - 1
  return jnp.mean(pixels + squares.sum(-1) / 2)


def properties(call, *inputs):
  *inputs, labels = inputs
  known = ~jnp.isnan(labels)
  labels = jnp.where(known, labels, 0)
  losses = optax.sigmoid_binary_cross_entropy(call(*inputs), labels)
  return mean_over(losses, known)


def clipped_policy(call, x, actions, old, advantages, returns):
  log_probs, values = call(x)
  taken = jnp.take_along_axis(log_probs, actions[:, None], 1)[:, 0]
  ratio = jnp.exp(taken - old)
  bounded = jnp.clip(ratio, 0.9, 1.1)
  policy = -jnp.minimum(ratio * advantages, bounded * advantages).mean()
  entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
  return policy + 0.5 * jnp.square(returns - values).mean() - 0.01 * entropy


class Training(NamedTuple):
  """A model and how it is trained: the rate is a number of the step."""

  model: Any
  data: Callable
  loss: Callable
  optimizer: Callable = optax.adam
  rate: Callable | float = 1e-3


def warm_up(steps, peak):
  return lambda i: peak * min((i + 1) / steps, 1)


def inverse_root(steps, peak):
  return lambda i: peak * min((i + 1) / steps, (steps / (i + 1)) ** 0.5)


def sgd(rate):
  return optax.sgd(rate, momentum=0.9, nesterov=True)


def decayed(rate):
  return optax.adamw(rate, b2=0.98, eps=1e-9, weight_decay=0.1)


ZOO = {
  'ImageNet ResNet': Training(
    zoo.ResNet(), centered, classified, sgd, warm_up(20, 0.1)
  ),
  'lm1b': Training(
    zoo.LanguageModel(), text, next_words, decayed, inverse_root(1000, 1.6e-3)
  ),
  'wmt': Training(
    zoo.Translator(), pairs, translated, decayed, inverse_root(1000, 2e-3)
  ),
  'nlp_seq, post-LN': Training(
    zoo.Tagger(), tagged, tags, decayed, inverse_root(8000, 5e-2)
  ),
  'seq2seq': Training(zoo.Seq2Seq(), sums, spelled_out, rate=3e-3),
  'ogbg': Training(zoo.GraphNetwork(), molecules, properties),
  'vae': Training(zoo.Autoencoder(), images, reconstructed),
  'sst2': Training(
    zoo.TextClassifier(), opinions, classified, optax.adamw, 5e-4
  ),
  'ppo': Training(zoo.ActorCritic(), frames, clipped_policy, rate=2.5e-4),
  'mnist, NNX': Training(
    zoo.ConvNet,
    images,
    classified,
    functools.partial(optax.adamw, b1=0.9),
    5e-3,
  ),
  'gemma, NNX': Training(
    zoo.Gemma, text, next_words_after, decayed, warm_up(100, 1e-3)
  ),
}


class Compiled(NamedTuple):
  """``start(seed, batch)`` gives a carry of parameters, all other variables and
  the optimizer; ``step`` another one, the loss and the taps. ``plain`` is the
  loss and its gradients without taps."""

  start: Callable
  step: Callable
  plain: Callable


@functools.cache
def compiled(name):
  training = ZOO[name]
  tx = functools.partial(_watched, training.optimizer)
  return (_linen if isinstance(training.model, nn.Module) else _nnx)(
    training, tx
  )


def _watched(optimizer, rate):
  return flow.watch(optimizer(rate))


def _carry_on(tx, rate, grads, params, state):
  updates, state = tx(rate).update(grads, state, params)
  return optax.apply_updates(params, updates), state


def _linen(training, tx):
  model = training.model

  @jax.jit
  def start(seed, batch):
    keys = {'params': jax.random.key(seed), 'dropout': jax.random.key(1)}
    found = {}

    def call(*inputs):
      output, found['variables'] = model.init_with_output(keys, *inputs)
      return output

    training.loss(call, *batch)
    rest = dict(found['variables'])
    params = rest.pop('params')
    return params, rest, tx(0.0).init(params)

  def loss(params, rest, key, batch):
    updated = {}

    def call(*inputs):
      variables, rngs = {'params': params, **rest}, {'dropout': key}
      output, new = model.apply(
        variables, *inputs, rngs=rngs, mutable=list(rest)
      )
      updated.update(new)
      return output

    return training.loss(call, *batch), updated

  @jax.jit
  def step(carry, batch, key, rate):
    params, rest, state = carry
    (value, rest), grads, taps = Tapped(model).value_and_grad(
      loss, has_aux=True
    )(params, rest, key, batch)
    params, state = _carry_on(tx, rate, grads, params, state)
    return (params, rest, state), value, grads, taps

  @jax.jit
  def plain(carry, batch, key):
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, _), grads = grad(*carry[:2], key, batch)
    return value, grads

  return Compiled(start, step, plain)


def _nnx(training, tx):
  graph, *_ = nnx.split(training.model(nnx.Rngs(0)), nnx.Param, ...)

  @jax.jit
  def start(seed, batch):
    rngs = nnx.Rngs(params=jax.random.key(seed), dropout=jax.random.key(1))
    _, params, rest = nnx.split(training.model(rngs), nnx.Param, ...)
    return params, rest, tx(0.0).init(params)

  def loss(model, batch):
    return training.loss(model, *batch)

  @jax.jit
  def step(carry, batch, key, rate):
    params, rest, state = carry
    model = nnx.merge(graph, params, rest)
    value, grads, taps = NNXTapped().value_and_grad(loss)(model, batch)
    _, _, rest = nnx.split(model, nnx.Param, ...)
    params, state = _carry_on(tx, rate, grads, params, state)
    return (params, rest, state), value, grads, taps

  @jax.jit
  def plain(carry, batch, key):
    model = nnx.merge(graph, *carry[:2])
    return nnx.value_and_grad(loss)(model, batch)

  return Compiled(start, step, plain)


def train(name, seed, steps=50, rate=None, change=None, batch=None):
  """The record of a training, and its losses.

  ``rate`` takes the place of the usual one, ``change`` is applied to every
  parameter at the start, given its path, and ``batch`` to every batch.
  """
  training, (start, step, _) = ZOO[name], compiled(name)
  rate = training.rate if rate is None else rate
  rng = np.random.default_rng(seed)
  first = training.data(np.random.default_rng(seed))
  params, rest, state = start(seed, first)
  if change:
    params = jax.tree_util.tree_map_with_path(
      lambda path, u: change(jax.tree_util.keystr(path), np.asarray(u)), params
    )
  carry, record, losses = (params, rest, state), flow.Record(params), []
  for i in range(steps):
    data = training.data(rng)
    if batch:
      data = batch(i, data)
    now = np.float32(rate(i) if callable(rate) else rate)
    carry, loss, _, taps = step(carry, data, jax.random.key(i), now)
    record.add(i, taps=taps, opt_state=carry[2], loss=loss)
    losses.append(loss)
  return record, np.array(losses)
