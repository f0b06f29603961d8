"""What domain adaptation costs: the loss, CDAN's conditioning, and the fork.

Every row is a forward and backward pass: the cross-entropy of the domains
against Optax's, the multilinear maps against a broadcast product by hand, and,
in a network with two branches, the fork against one backward pass per loss as
in the paper. The limit of the fork is the network without it. The scores
without labels have no backward pass; beside them is the entropy of predictions.
"""

import functools

import harness
import jax
import jax.numpy as jnp
import optax

import optax_ghm
from optax_ghm import conflict, reversal

BATCH, WIDTH = 512, 512


def domain_data(size):
  one, two = jax.random.split(jax.random.key(0))
  return (
    jax.random.normal(one, (size, 2)),
    (jax.random.uniform(two, (size,)) < 0.3).astype(jnp.int32),
  )


def mean_gradient(losses):
  return jax.value_and_grad(lambda x, labels: losses(x, labels).mean())


def map_data(classes):
  one, two = jax.random.split(jax.random.key(0))
  features = jax.random.normal(one, (BATCH, 256))
  logits = jax.random.normal(two, (BATCH, classes))
  projections = reversal.multilinear_projections(
    jax.random.key(2), 256, classes, 1024
  )
  return features, jax.nn.softmax(logits), projections


def outer_product(features, predictions, _):
  product = features[:, :, None] * predictions[:, None, :]
  return product.reshape(BATCH, -1)


def randomized(features, predictions, projections):
  return optax_ghm.randomized_multilinear_map(
    features, predictions, projections
  )


def squared(mapped):
  """The mean square of a map, with its gradient."""
  return jax.value_and_grad(lambda *args: jnp.square(mapped(*args)).mean())


MAPS = {
  'by hand: broadcast': outer_product,
  'multilinear_map': lambda features, predictions, _: optax_ghm.multilinear_map(
    features, predictions
  ),
  'randomized_multilinear_map': randomized,
}


def fork_data():
  keys = jax.random.split(jax.random.key(0), 7)
  params = {
    name: [
      jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5
      for key in keys[i : i + 2]
    ]
    for i, name in ((0, 'trunk'), (2, 'domain'), (4, 'task'))
  }
  return params, jax.random.normal(keys[6], (BATCH, WIDTH))


def layers(weights, x):
  for w in weights:
    x = jnp.tanh(x @ w)
  return x


def branches(params, first, second):
  return (
    jnp.mean(jnp.square(layers(params['domain'], first))),
    jnp.mean(jnp.sin(layers(params['task'], second))),
  )


def forked(fork, params, x):
  def loss(params):
    return sum(branches(params, *fork(layers(params['trunk'], x))))

  return jax.value_and_grad(loss)(params)


def pass_per_loss(params, x):
  """One backward pass per loss; the gradients of the trunk are harmonized."""

  def loss(params, which):
    features = layers(params['trunk'], x)
    return branches(params, features, features)[which]

  domain, task = (jax.value_and_grad(loss)(params, i) for i in (0, 1))
  rows = jax.tree.map(
    lambda *leaves: jnp.stack(leaves), domain[1]['trunk'], task[1]['trunk']
  )
  first, second = conflict.gh_weights(conflict.gramian(rows))
  trunk = jax.tree.map(lambda row: first * row[0] + second * row[1], rows)
  return domain[0] + task[0], {
    'trunk': trunk,
    'domain': domain[1]['domain'],
    'task': task[1]['task'],
  }


def prediction_data():
  keys = jax.random.split(jax.random.key(0), 3)
  source, target = jax.random.normal(keys[0], (2, 10_000, 100))
  return 3 * jax.random.normal(keys[1], (10_000, 10)), source, target + 0.1


def entropy_by_hand(logits, source, target):
  log_p = jax.nn.log_softmax(logits)
  return -jnp.sum(jnp.exp(log_p) * log_p, 1).mean()


SCORES = {
  'by hand: entropy of the softmax': entropy_by_hand,
  'reversal.prediction_sums': lambda logits, source, target: (
    reversal.prediction_sums(logits)
  ),
  'reversal.soft_neighborhood_density': lambda logits, source, target: (
    reversal.soft_neighborhood_density(logits)
  ),
  'reversal.density_ratios': lambda logits, source, target: (
    reversal.density_ratios(source, target, source)
  ),
}


CASES = {
  'cross-entropy of two domains': harness.Growth(
    'examples',
    {
      n: harness.Case(
        {
          'optax.softmax_cross_entropy_with_integer_labels': mean_gradient(
            optax.softmax_cross_entropy_with_integer_labels
          ),
          'domain_loss': mean_gradient(optax_ghm.domain_loss),
        },
        functools.partial(domain_data, n),
        n,
      )
      for n in (10**4, 10**5, 10**6)
    },
  ),
  'conditioning of 256 features, batch 512': harness.Growth(
    'classes',
    {
      c: harness.Case(
        {name: squared(mapped) for name, mapped in MAPS.items()},
        functools.partial(map_data, c),
        BATCH * 256 * c,
        quick=c == 10,
      )
      for c in (10, 30, 100)
    },
  ),
  'two branches, six layers of 512, batch 512': harness.Case(
    {
      'by hand: a backward pass per loss': pass_per_loss,
      'conflict.fork': functools.partial(
        forked, functools.partial(conflict.fork, weights=conflict.gh_weights)
      ),
      'conflict.fork, GH++': functools.partial(
        forked,
        functools.partial(conflict.fork, weights=conflict.gh_plus_plus_weights),
      ),
      'limit: nothing harmonized': functools.partial(forked, lambda x: (x, x)),
    },
    fork_data,
    BATCH * WIDTH,
    limit='limit: nothing harmonized',
    quick=True,
  ),
  'scores of 10,000 examples of 10 classes, 100 features': harness.Case(
    SCORES, prediction_data, 10_000, quick=True
  ),
}
