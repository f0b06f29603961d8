"""Trainings with a watched optimizer, each of them one program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

ONES = np.ones(2, np.float32)


def random(rng, shape, dtype=jnp.float32, scale=1.0):
  x = rng.normal(size=shape) * scale
  if dtype == jnp.complex64:
    x = x + 1j * rng.normal(size=shape) * scale
  return np.asarray(x).astype(dtype)


def make_params(count=()):
  """Parameters, or so many gradients of them, in arrays."""
  rng = np.random.default_rng(8 if count else 7)
  return {
    'dense': {
      'kernel': random(rng, (*count, 4, 3)),
      'bias': random(rng, (*count, 3)),
    },
    'norm': {'scale': random(rng, (*count, 3))},
  }


def train(tx, steps, params, **extra_args):
  """Updates and states of all steps, the first axis of ``steps``."""

  def step(carry, gradients):
    params, state = carry
    updates, state = tx.update(gradients, state, params, **extra_args)
    params = optax.apply_updates(params, updates)
    return (params, state), (updates, state)

  params = jax.tree.map(jnp.asarray, params)
  with jax.numpy_dtype_promotion('standard'):  # Optax mixes dtypes
    return jax.lax.scan(step, (params, tx.init(params)), steps)[1]


def run(tx, *args, **kwargs):
  """The same, compiled and with arrays of NumPy."""
  found = jax.jit(functools.partial(train, tx, **kwargs))(*args)
  return jax.device_get(found)


def once(tx, gradients, params):
  """Updates and state of one compiled step."""

  @jax.jit
  def step(gradients, params):
    return tx.update(gradients, tx.init(params), params)

  return jax.device_get(step(gradients, params))


def at(tree, index):
  return jax.tree.map(lambda u: u[index], tree)
