"""Forward and backward of the GHM losses, and of what they replace."""

import functools

import harness
import jax
import jax.numpy as jnp
import optax

import optax_ghm
from optax_ghm import harmonization

LIMIT = 'limit: cross-entropy from one exponential'


@jax.custom_vjp
def one_exp_cross_entropy(logits, labels):
  """The limit: cross-entropy and its gradient from one exponential."""
  return _one_exp_fwd(logits, labels)[0]


def _one_exp_fwd(logits, labels):
  e = jnp.exp(-jnp.abs(logits))
  p = jnp.where(logits >= 0, 1.0, e) / (1 + e)
  loss = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(e)
  return loss, p - labels


one_exp_cross_entropy.defvjp(_one_exp_fwd, lambda r, ct: (ct * r, None))


def sigmoid_ghm(density):
  def loss(logits, labels):
    return optax_ghm.sigmoid_ghm_loss(
      logits, labels, weighting=optax_ghm.HarmonyWeighting(density=density)
    )

  return loss


def harmonized_cross_entropy(logits, labels):
  logits = optax_ghm.harmonize(logits, axis=())
  return optax.sigmoid_binary_cross_entropy(logits, labels)


SIGMOID = {
  'optax.sigmoid_binary_cross_entropy': optax.sigmoid_binary_cross_entropy,
  LIMIT: one_exp_cross_entropy,
  'optax.losses.sigmoid_focal_loss': functools.partial(
    optax.losses.sigmoid_focal_loss, gamma=2.0
  ),
  'sigmoid_ghm_loss, windowed': sigmoid_ghm(optax_ghm.WindowedDensity()),
  'sigmoid_ghm_loss, 10 bins': sigmoid_ghm(optax_ghm.BinnedDensity(bins=10)),
  'sigmoid_ghm_loss, 30 bins': sigmoid_ghm(optax_ghm.BinnedDensity(bins=30)),
  'sigmoid_ghm_loss, 1000 bins': sigmoid_ghm(
    optax_ghm.BinnedDensity(bins=1000)
  ),
  'sigmoid_ghm_loss, as published': functools.partial(
    optax_ghm.sigmoid_ghm_loss, weighting=optax_ghm.GHM
  ),
  'harmonize before optax cross-entropy': harmonized_cross_entropy,
}
SOFTMAX = {
  'optax.softmax_cross_entropy_with_integer_labels': (
    optax.softmax_cross_entropy_with_integer_labels
  ),
  'softmax_ghm_loss_with_integer_labels': (
    optax_ghm.softmax_ghm_loss_with_integer_labels
  ),
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


def with_gradient(losses):
  """Value and gradient of the mean of each loss."""

  def step(loss):
    return jax.value_and_grad(lambda x, y: loss(x, y).mean())

  return {name: step(loss) for name, loss in losses.items()}


def one_vs_rest(logits, labels):
  return optax.sigmoid_binary_cross_entropy(
    logits, jax.nn.one_hot(labels, logits.shape[-1])
  )


def harmony(density):
  weighting = optax_ghm.HarmonyWeighting(density=density)
  return lambda g: optax_ghm.harmony_weights(g, weighting=weighting)[0]


RUNNING = optax_ghm.HarmonyWeighting(
  density=optax_ghm.BinnedDensity(bins=10, momentum=0.9)
)
WEIGHTS = {
  'ExactDensity': harmony(harmonization.ExactDensity()),
  'WindowedDensity': harmony(optax_ghm.WindowedDensity()),
  'BinnedDensity, 10 bins': harmony(optax_ghm.BinnedDensity(bins=10)),
  'BinnedDensity, 10 bins, momentum': lambda g: optax_ghm.harmony_weights(
    g,
    RUNNING.init(),
    weighting=RUNNING,
  ),
  'MMDetectionDensity': harmony(harmonization.MMDetectionDensity(bins=10)),
}


def norm_data(size):
  return (jax.random.beta(jax.random.key(0), 0.5, 3.0, (size,)),)


CASES = {
  'sigmoid': harness.Growth(
    'examples',
    {
      n: harness.Case(
        with_gradient(SIGMOID),
        functools.partial(sigmoid_data, n),
        n,
        LIMIT,
        quick=n <= 10**6,
      )
      for n in (10**5, 10**6, 10**7)
    },
  ),
  'softmax, 10,000 examples': harness.Growth(
    'classes',
    {
      c: harness.Case(
        with_gradient(SOFTMAX),
        functools.partial(softmax_data, 10**4, c),
        10**4 * c,
        quick=c == 100,
      )
      for c in (10, 100, 1000)
    },
  ),
  'one-vs-rest of 80 classes, 10,000 examples': harness.Case(
    with_gradient(
      {
        'optax.sigmoid_binary_cross_entropy, one-hot': one_vs_rest,
        'sigmoid_ghm_loss_with_integer_labels': (
          optax_ghm.sigmoid_ghm_loss_with_integer_labels
        ),
      }
    ),
    functools.partial(softmax_data, 10**4, 80),
    10**4 * 80,
  ),
  'regression, 1,000,000 numbers': harness.Case(
    with_gradient(
      {
        'optax.huber_loss': optax.huber_loss,
        'authentic_smooth_l1_loss': optax_ghm.authentic_smooth_l1_loss,
        'smooth_l1_ghm_loss': optax_ghm.smooth_l1_ghm_loss,
      }
    ),
    functools.partial(sigmoid_data, 10**6),
    10**6,
  ),
  'weights alone': harness.Growth(
    'examples',
    {
      n: harness.Case(WEIGHTS, functools.partial(norm_data, n), n)
      for n in (10**4, 10**5, 10**6)
    },
  ),
}
