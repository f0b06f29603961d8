"""What reconciling several losses costs: weights alone, and in training steps.

The weights of a Gramian, and of 256 at once, stand against those of the mean,
which take no time: it is a call alone. The training steps are of a network of
two and eight heads behind a trunk: forward, backward and Adam. They stand
against the step of the sum of the losses. ``fork`` reconciles at the features,
the others at all parameters, with one backward pass per loss. The steps of a
small network, of up to 32 heads, are there for their compilation.
"""

import functools
import itertools

import harness
import jax
import jax.numpy as jnp
import optax

from optax_ghm import conflict

BATCH, TRUNK, HEAD = 256, (784, 512, 512), (512, 256, 10)
WEIGHTS = {
  f'{name}_weights': getattr(conflict, f'{name}_weights')
  for name in (
    'mean',
    'upgrad',
    'dualproj',
    'mgda',
    'cagrad',
    'nash_mtl',
    'imtl_g',
    'config',
    'aligned_mtl',
    'pcgrad',
  )
}
OF_TWO = {
  'mean_weights': conflict.mean_weights,
  'gh_weights': conflict.gh_weights,
  'gh_plus_plus_weights': conflict.gh_plus_plus_weights,
}
SUM = 'by hand: the sum of the losses'
VECTOR = 'reconciled_value_and_grad, of a vector'


def rows(losses, *batch):
  """Gradients, half of whose pairs conflict, with norms over two decades."""
  one, two = jax.random.split(jax.random.key(0))
  decades = jax.random.uniform(one, (*batch, losses, 1), minval=-1)
  return 10**decades * jax.random.normal(two, (*batch, losses, 128))


def one_gramian(losses):
  return (conflict.gramian(rows(losses)),)


def many_gramians(losses):
  return (jax.vmap(conflict.gramian)(rows(losses, 256)),)


def weights_case(losses, many=False, every=WEIGHTS):
  return harness.Case(
    {name: jax.vmap(f) if many else f for name, f in every.items()},
    functools.partial(many_gramians if many else one_gramian, losses),
    losses**2 * (256 if many else 1),
    limit='mean_weights',
    quick=losses == 8 and not many,
  )


def network_data(heads, batch=BATCH, trunk=TRUNK, head=HEAD):
  """Parameters, inputs, and labels of every head."""
  keys = iter(jax.random.split(jax.random.key(0), 2 * heads + len(trunk) + 1))

  def layers(widths):
    return [
      jax.random.normal(next(keys), shape) * (2 / shape[0]) ** 0.5
      for shape in itertools.pairwise(widths)
    ]

  params = {
    'trunk': layers(trunk),
    'heads': [layers(head) for _ in range(heads)],
  }
  x = jax.random.normal(next(keys), (batch, trunk[0]))
  return params, x, jax.random.randint(next(keys), (heads, batch), 0, head[-1])


def mlp(weights, x):
  for w in weights[:-1]:
    x = jax.nn.relu(x @ w)
  return x @ weights[-1]


def losses_of(params, x, labels, fork=None):
  """The cross-entropies of all heads, in a list."""
  heads = params['heads']
  features = jax.nn.relu(mlp(params['trunk'], x))
  copies = fork(features, len(heads)) if fork else [features] * len(heads)
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  return [
    cross_entropy(mlp(head, copy), of_head).mean()
    for head, copy, of_head in zip(heads, copies, labels, strict=True)
  ]


def vector_of(*args):
  return jnp.stack(losses_of(*args))


def sum_gradient(fork=None):
  return jax.grad(lambda *args: sum(losses_of(*args, fork=fork)))


def reconciled(losses_fn):
  pulled = conflict.reconciled_value_and_grad(losses_fn)
  return lambda *args: pulled(*args)[1]


def step_programs(heads):
  """Gradients, or Jacobians, by name, with the optimizers they go to."""
  adam = optax.adam(1e-3)
  aggregate = optax.chain(conflict.reconciled_aggregate(heads), adam)
  return {
    SUM: (sum_gradient(), adam),
    'conflict.fork': (sum_gradient(conflict.fork), adam),
    'reconciled_value_and_grad': (reconciled(losses_of), adam),
    VECTOR: (reconciled(vector_of), adam),
    'jax.jacrev, reconciled_aggregate': (jax.jacrev(vector_of), aggregate),
  }


def start(programs, name, data):
  params = jax.tree.map(jnp.copy, data[0])
  return params, programs[name][1].init(params)


def step(gradient, tx, carry, _, x, labels):
  params, state = carry
  updates, state = tx.update(gradient(params, x, labels), state, params)
  return optax.apply_updates(params, updates), state


def step_case(heads, *sizes, quick=False):
  programs = step_programs(heads)
  return harness.Case(
    {
      name: functools.partial(step, *program)
      for name, program in programs.items()
    },
    functools.partial(network_data, heads, *sizes),
    BATCH * heads,
    limit=SUM,
    init=functools.partial(start, programs),
    quick=quick,
  )


CASES = {
  'weights': harness.Growth('losses', {m: weights_case(m) for m in (2, 8, 64)}),
  'weights, of two losses alone': weights_case(2, every=OF_TWO),
  'weights, 256 Gramians': harness.Growth(
    'losses', {m: weights_case(m, many=True) for m in (2, 8)}
  ),
  'training step, batch 256': harness.Growth(
    'heads', {m: step_case(m, quick=m == 2) for m in (2, 8)}
  ),
  'training step, small': harness.Growth(
    'heads', {m: step_case(m, 8, (16, 8), (8, 8, 4)) for m in (2, 8, 32)}
  ),
}
