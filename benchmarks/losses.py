"""Forward and backward of the GHM losses against what one would use instead.

python benchmarks/losses.py [--quick] [--only NAME]
"""

import functools

import harness
import jax
import jax.numpy as jnp
import optax

import optax_ghm

FLOOR = 'floor: one-exp cross-entropy'


@jax.custom_vjp
def one_exp_cross_entropy(logits, labels):
  """The floor: cross-entropy and its gradient from one exponential."""
  return _one_exp_fwd(logits, labels)[0]


def _one_exp_fwd(logits, labels):
  e = jnp.exp(-jnp.abs(logits))
  p = jnp.where(logits >= 0, 1.0, e) / (1 + e)
  loss = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(e)
  return loss, p - labels


one_exp_cross_entropy.defvjp(_one_exp_fwd, lambda r, ct: (ct * r, None))


def sigmoid_ghm(density):
  def loss(logits, labels):
    return optax_ghm.sigmoid_ghm_loss(logits, labels, density=density)[0]

  return loss


def softmax_ghm(logits, labels):
  return optax_ghm.softmax_ghm_loss_with_integer_labels(logits, labels)[0]


def harmonized_cross_entropy(logits, labels):
  logits = optax_ghm.harmonize(logits, axis=())
  return optax.sigmoid_binary_cross_entropy(logits, labels)


SIGMOID = {
  'optax.sigmoid_binary_cross_entropy': optax.sigmoid_binary_cross_entropy,
  FLOOR: one_exp_cross_entropy,
  'optax.losses.sigmoid_focal_loss': functools.partial(
    optax.losses.sigmoid_focal_loss, gamma=2.0
  ),
  'sigmoid_ghm_loss, windowed': sigmoid_ghm(optax_ghm.WindowedDensity()),
  'sigmoid_ghm_loss, 10 bins': sigmoid_ghm(optax_ghm.BinnedDensity(bins=10)),
  'sigmoid_ghm_loss, 30 bins': sigmoid_ghm(optax_ghm.BinnedDensity(bins=30)),
  'sigmoid_ghm_loss, 1000 bins': sigmoid_ghm(
    optax_ghm.BinnedDensity(bins=1000)
  ),
  'harmonize before optax cross-entropy': harmonized_cross_entropy,
}
SOFTMAX = {
  'optax.softmax_cross_entropy_with_integer_labels': (
    optax.softmax_cross_entropy_with_integer_labels
  ),
  'softmax_ghm_loss_with_integer_labels': softmax_ghm,
}


def sigmoid_data(size):
  """Logits of a detector: nearly all easy negatives."""
  one, two = jax.random.split(jax.random.key(0))
  labels = jax.random.uniform(one, (size,)) < 0.02
  logits = 2 * jax.random.normal(two, (size,)) + jnp.where(labels, 1.0, -4.0)
  return logits, labels.astype(jnp.float32)


def softmax_data(size, classes):
  one, two = jax.random.split(jax.random.key(0))
  labels = jax.random.randint(one, (size,), 0, classes)
  logits = jax.random.normal(two, (size, classes))
  return logits + 4 * jax.nn.one_hot(labels, classes), labels


def trained(losses):
  """Value and gradient of the mean of each loss."""

  def step(loss):
    return jax.value_and_grad(lambda x, y: loss(x, y).mean())

  return {name: step(loss) for name, loss in losses.items()}


CASES = {
  f'sigmoid N={n:.0e}': harness.Case(
    trained(SIGMOID), functools.partial(sigmoid_data, n), n, FLOOR
  )
  for n in (10**5, 10**6, 10**7)
} | {
  f'softmax N={n:.0e} C={c}': harness.Case(
    trained(SOFTMAX), functools.partial(softmax_data, n, c), n * c
  )
  for n, c in ((10**5, 10), (10**4, 1000))
}


if __name__ == '__main__':
  harness.main('losses', __doc__ or '', CASES)
