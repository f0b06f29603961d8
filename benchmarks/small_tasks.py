"""Ten small tasks, on whose losses a choice of the learning rate is measured.

All have a floor: labels or targets with noise, a bottleneck, or data held out,
without which a ratio to the best loss says little. None needs a download.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets


class Task(NamedTuple):
  """What is trained.

  Attributes:
    init: from a NumPy generator to parameters.
    loss: from parameters and a batch, a tuple of arrays, to a scalar.
    train: arrays of examples.
    held_out: other examples of the same kind.
    batch: examples in a batch.
  """

  init: Callable[[np.random.Generator], Any]
  loss: Callable[[Any, Any], jax.Array]
  train: tuple[np.ndarray, ...]
  held_out: tuple[np.ndarray, ...]
  batch: int = 32


def dense(rng, inputs, outputs, gain=1.0):
  scale = gain / np.sqrt(inputs)
  return {
    'w': rng.normal(0, scale, (inputs, outputs)).astype(np.float32),
    'b': np.zeros(outputs, np.float32),
  }


def mlp(sizes, rng, gain=2**0.5):
  pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
  gains = [gain] * (len(pairs) - 1) + [1.0]
  return [
    dense(rng, *pair, gain) for pair, gain in zip(pairs, gains, strict=True)
  ]


def apply(layers, x, activation=jax.nn.relu):
  for layer in layers[:-1]:
    x = activation(x @ layer['w'] + layer['b'])
  return x @ layers[-1]['w'] + layers[-1]['b']


def cross_entropy(logits, labels):
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean()


def split(*arrays, held_out=0.3, seed=0):
  """The examples in two parts, at random, floats as float32."""
  order = np.random.default_rng(seed).permutation(len(arrays[0]))
  count = int(held_out * len(order))
  arrays = [
    a.astype(np.float32 if a.dtype.kind == 'f' else np.int32) for a in arrays
  ]
  return (
    tuple(a[order[count:]] for a in arrays),
    tuple(a[order[:count]] for a in arrays),
  )


def standardized(x):
  return (x - x.mean(0)) / (x.std(0) + 1e-6)


def wrong(labels, share, classes, seed=0):
  """So many of the labels drawn at random."""
  rng = np.random.default_rng(seed)
  drawn = rng.integers(classes, size=len(labels))
  return np.where(rng.uniform(size=len(labels)) < share, drawn, labels)


def load_digits():
  """Pixels from 0 to 1, and labels."""
  pixels, labels = datasets.load_digits(return_X_y=True)
  return np.asarray(pixels) / 16, np.asarray(labels)


# The tasks on which the rule was developed.


def digits():
  """A classifier of handwritten digits."""
  x, y = load_digits()
  return Task(
    functools.partial(mlp, [64, 48, 10]),
    lambda params, batch: cross_entropy(apply(params, batch[0]), batch[1]),
    *split(x, y),
  )


def friedman():
  """A regression on a smooth function of ten numbers, with noise."""
  x, y = datasets.make_friedman1(4000, random_state=0)
  return Task(
    functools.partial(mlp, [10, 48, 1]),
    lambda params, batch: jnp.mean(
      jnp.square(apply(params, batch[0], jnp.tanh)[:, 0] - batch[1])
    ),
    *split(standardized(x), standardized(y)),
  )


WIDTH, CONTEXT, LETTERS = 24, 12, 12


def windows(seed, length):
  """Windows of a text of invented words, each calling for some to follow."""
  rng = np.random.default_rng(seed)
  words = [rng.integers(1, LETTERS, rng.integers(2, 6)) for _ in range(25)]
  follow = rng.dirichlet(np.full(len(words), 0.03), size=len(words))
  text, at = [], 0
  for _ in range(length):
    at = rng.choice(len(words), p=follow[at])
    text += [*words[at], 0]
  starts = rng.integers(len(text) - CONTEXT - 1, size=(length, 1))
  return np.array(text)[starts + np.arange(CONTEXT + 1)]


def characters():
  """A transformer of one layer that predicts the next character."""

  def init(rng):
    layers = ('query', 'key', 'value', 'out')
    return {
      'embed': rng.normal(0, 1, (LETTERS, WIDTH)).astype(np.float32),
      'at': rng.normal(0, 0.3, (CONTEXT, WIDTH)).astype(np.float32),
      'mlp': mlp([WIDTH, 48, WIDTH], rng),
      'head': dense(rng, WIDTH, LETTERS),
      **{name: dense(rng, WIDTH, WIDTH) for name in layers},
    }

  def loss(params, batch):
    def at(name, x):
      return x @ params[name]['w'] + params[name]['b']

    (tokens,) = batch
    x = params['embed'][tokens[:, :-1]] + params['at']
    y = jax.nn.standardize(x)
    scores = at('query', y) @ at('key', y).mT / np.sqrt(WIDTH)
    causal = np.tri(CONTEXT, dtype=bool)
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    x += at('out', weights @ at('value', y))
    x += apply(params['mlp'], jax.nn.standardize(x))
    return cross_entropy(at('head', jax.nn.standardize(x)), tokens[:, 1:])

  return Task(init, loss, *split(windows(0, 3000)), batch=16)


def autoencoder():
  """Digits through a bottleneck of sixteen numbers."""
  x, _ = load_digits()
  return Task(
    functools.partial(mlp, [64, 48, 16, 48, 64]),
    lambda params, batch: jnp.mean(
      jnp.sum(jnp.square(apply(params, batch[0], jnp.tanh) - batch[0]), -1)
    ),
    *split(x),
  )


def rare():
  """Two classes, one of 5 %, and some labels wrong."""
  x, y = datasets.make_classification(
    5000, 20, n_informative=8, weights=[0.95], flip_y=0, random_state=0
  )
  return Task(
    functools.partial(mlp, [20, 32, 1]),
    lambda params, batch: optax.sigmoid_binary_cross_entropy(
      apply(params, batch[0])[:, 0], batch[1]
    ).mean(),
    *split(standardized(x), y.astype(float)),
  )


# The tasks that were held back until the rule was chosen.


def deep():
  """Eight narrow layers of tanh on cell nuclei, some labels wrong."""
  x, y = datasets.load_breast_cancer(return_X_y=True)
  return Task(
    functools.partial(mlp, [30, *[12] * 8, 2], gain=1.0),
    lambda params, batch: cross_entropy(
      apply(params, batch[0], jnp.tanh), batch[1]
    ),
    *split(standardized(x), wrong(y, 0.1, 2)),
  )


def ratings():
  """Users and items of four factors each, observed with noise."""
  rng = np.random.default_rng(0)
  factors = [rng.normal(0, 1, (n, 4)) for n in (60, 40)]
  user, item = (rng.integers(n, size=6000) for n in (60, 40))
  rating = (factors[0][user] * factors[1][item]).sum(-1) / 2
  rating += rng.normal(0, 0.3, len(rating))

  def init(rng):
    return [rng.normal(0, 0.3, (n, 6)).astype(np.float32) for n in (60, 40)]

  def loss(params, batch):
    user, item, rating = batch
    predicted = jnp.sum(params[0][user] * params[1][item], -1)
    return jnp.mean(jnp.square(predicted - rating))

  return Task(init, loss, *split(user, item, rating), batch=64)


def waves():
  """A gated recurrent unit that continues waves with noise."""
  rng = np.random.default_rng(0)
  frequency, phase = rng.uniform([[0.3]], [[1.5]], (3000, 1)), 6.3
  x = np.sin(frequency * np.arange(17) + rng.uniform(0, phase, (3000, 1)))
  x += rng.normal(0, 0.1, x.shape)

  def init(rng):
    return {
      'gates': dense(rng, 17, 32),
      'candidate': dense(rng, 17, 16),
      'head': dense(rng, 16, 1),
    }

  def loss(params, batch):
    (x,) = batch

    def at(name, x):
      return x @ params[name]['w'] + params[name]['b']

    def step(h, x):
      gates = jax.nn.sigmoid(at('gates', jnp.concatenate([x, h], -1)))
      update, reset = jnp.split(gates, 2, -1)
      new = jnp.tanh(at('candidate', jnp.concatenate([x, reset * h], -1)))
      h = update * h + (1 - update) * new
      return h, at('head', h)

    h = jnp.zeros((len(x), 16))
    _, predicted = jax.lax.scan(step, h, x[:, :-1].T[..., None])
    return jnp.mean(jnp.square(predicted[..., 0].T - x[:, 1:]))

  return Task(init, loss, *split(x))


def mixer():
  """Residual layers, normalized, on patches of digits; some labels wrong."""
  x, y = load_digits()
  patches = x.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)

  def init(rng):
    return {
      'embed': dense(rng, 4, 16),
      'tokens': [mlp([16, 16, 16], rng) for _ in range(2)],
      'channels': [mlp([16, 32, 16], rng) for _ in range(2)],
      'head': dense(rng, 16, 10, 0.1),
    }

  def loss(params, batch):
    x, y = batch
    x = apply([params['embed']], x)
    for tokens, channels in zip(
      params['tokens'], params['channels'], strict=True
    ):
      x += apply(tokens, jax.nn.standardize(x).mT, jax.nn.gelu).mT
      x += apply(channels, jax.nn.standardize(x), jax.nn.gelu)
    return cross_entropy(
      apply([params['head']], jax.nn.standardize(x).mean(1)), y
    )

  return Task(init, loss, *split(patches, wrong(y, 0.05, 10)))


def softmax():
  """A linear classifier of digits whose pixels nobody scaled."""
  x, y = load_digits()
  return Task(
    functools.partial(mlp, [64, 10]),
    lambda params, batch: cross_entropy(apply(params, batch[0]), batch[1]),
    *split(16 * x, wrong(y, 0.05, 10)),
  )
