"""What a reversal, or any transformation, costs in the backward pass.

The reversal is compared with multiplying the cotangent by minus lambda by hand,
in the training step of a small network and alone. ``in_backward(tx)`` is
compared with ``tx.update`` of the same cotangent.
"""

import functools

import harness
import jax
import jax.numpy as jnp
import optax

import optax_ghm


def features(params, x):
  for w in params:
    x = jnp.tanh(x @ w)
  return x


def network_data(batch, width):
  keys = jax.random.split(jax.random.key(0), 5)
  params = [jax.random.normal(k, (width, width)) / width**0.5 for k in keys[:4]]
  return params, jax.random.normal(keys[4], (batch, width)), jnp.float32(0.7)


def reversed_step(params, x, scale):
  def loss(params):
    h = optax_ghm.reverse_gradient(features(params[:2], x), scale)
    return jnp.mean(jnp.square(features(params[2:], h)))

  return jax.value_and_grad(loss)(params)


def step_by_hand(params, x, scale):
  h, pull = jax.vjp(lambda p: features(p, x), params[:2])
  loss, (head, cotangent) = jax.value_and_grad(
    lambda p, h: jnp.mean(jnp.square(features(p, h))), argnums=(0, 1)
  )(params[2:], h)
  return loss, pull(cotangent * -scale)[0] + head


def array_data(size):
  keys = jax.random.split(jax.random.key(0))
  x, cotangent = (jax.random.normal(k, (size // 512, 512)) for k in keys)
  return x, cotangent, jnp.float32(0.7)


def reversed_cotangent(x, cotangent, scale):
  _, pull = jax.vjp(lambda x: optax_ghm.reverse_gradient(x, scale), x)
  return pull(cotangent)[0]


def multiplied_cotangent(x, cotangent, scale):
  del x
  return cotangent * -scale


def transformation_data(tx, size):
  x, cotangent, _ = array_data(size)
  return x, cotangent, tx.init(x), optax_ghm.in_backward(tx).init(x)


def updated(tx, x, cotangent, opt_state, state):
  del state
  return tx.update(cotangent, opt_state, x)


def pulled_back(tx, x, cotangent, opt_state, state):
  del opt_state
  _, pull = jax.vjp(optax_ghm.in_backward(tx), x, state)
  return pull(cotangent)


TRANSFORMATIONS = {
  'clip_by_global_norm': optax.clip_by_global_norm(1.0),
  'trace': optax.trace(0.9),
  'scale_by_adam': optax.scale_by_adam(),
}

CASES = {
  'reversal in a training step': harness.Case(
    {'by hand': step_by_hand, 'reverse_gradient': reversed_step},
    functools.partial(network_data, 1024, 512),
    1024 * 512,
    limit='by hand',
    quick=True,
  ),
  'reversal alone': harness.Growth(
    'numbers',
    {
      n: harness.Case(
        {
          'by hand: cotangent * -scale': multiplied_cotangent,
          'reverse_gradient': reversed_cotangent,
        },
        functools.partial(array_data, n),
        n,
        quick=n <= 10**6,
      )
      for n in (10**5, 10**6, 10**7)
    },
  ),
} | {
  f'in_backward({name})': harness.Growth(
    'numbers',
    {
      n: harness.Case(
        {
          'optax.*.update': functools.partial(updated, tx),
          'in_backward(optax.*)': functools.partial(pulled_back, tx),
        },
        functools.partial(transformation_data, tx, n),
        n,
        quick=n == 10**6,
      )
      for n in (10**6, 10**7)
    },
  )
  for name, tx in TRANSFORMATIONS.items()
}
