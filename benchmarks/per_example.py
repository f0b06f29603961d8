"""What weighing per-example gradients adds to a training step that has them.

The step is AdamW on a network of 784, 256 and 10 units, with the gradients of
all examples by vmap. Then come their mean, Optax's private aggregation (which
also clips, and draws noise), the harmonized mean, or the mean that measures the
noise scale. A barrier keeps XLA from making the plain gradient of the mean. The
limit is the step that has the gradient of the batch alone.
"""

import functools
import itertools

import harness
import jax
import optax

import optax_ghm

WIDTHS = (784, 256, 10)
LIMIT = 'limit: the gradient of the batch'


def network(params, x):
  for w in params[:-1]:
    x = jax.nn.relu(x @ w)
  return x @ params[-1]


def loss(params, x, label):
  return optax.softmax_cross_entropy_with_integer_labels(
    network(params, x), label
  ).mean()


def data(batch):
  one, two = jax.random.split(jax.random.key(0))
  return (
    jax.random.normal(one, (batch, WIDTHS[0])),
    jax.random.randint(two, (batch,), 0, WIDTHS[-1]),
  )


def mean():
  return optax.stateless(
    lambda updates, params: jax.tree.map(
      lambda u: u.mean(0), jax.lax.optimization_barrier(updates)
    )
  )


def optimizers():
  before = {
    'by hand: mean': mean(),
    'optax.differentially_private_aggregate': (
      optax.contrib.differentially_private_aggregate(1.0, 0.0, key=0)
    ),
    'harmonized_aggregate': optax_ghm.harmonized_aggregate(),
    'noise_scale_aggregate': optax_ghm.noise_scale_aggregate(1),
    LIMIT: optax.identity(),
  }
  return {
    name: optax.chain(tx, optax.adamw(1e-3)) for name, tx in before.items()
  }


def start(every, name, _):
  key = jax.random.key(1)
  params = [
    jax.random.normal(key, shape) / shape[0] ** 0.5
    for shape in itertools.pairwise(WIDTHS)
  ]
  return params, every[name].init(params)


def step(tx, vmapped, carry, x, labels):
  params, opt_state = carry
  gradient = jax.grad(loss)
  if vmapped:
    gradient = jax.vmap(gradient, (None, 0, 0))
  updates, opt_state = tx.update(gradient(params, x, labels), opt_state, params)
  return optax.apply_updates(params, updates), opt_state


def case(batch):
  every = optimizers()
  return harness.Case(
    {
      name: functools.partial(step, tx, name != LIMIT)
      for name, tx in every.items()
    },
    functools.partial(data, batch),
    batch * sum(m * n for m, n in itertools.pairwise(WIDTHS)),
    limit=LIMIT,
    init=functools.partial(start, every),
    quick=batch == 64,
  )


CASES = {
  'AdamW on per-example gradients': harness.Growth(
    'batch', {batch: case(batch) for batch in (16, 64, 256)}
  )
}
