"""Every transformation can be differentiated, whatever it does at that step.

Meta-gradients and gradient penalties differentiate the updates with respect to
the gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ghm
from tests.support.trial import every, make_gradients, make_params, scale

PROGRAMS = 75  # two or three for each transformation
EPSILON = 1e-2
# Calm is not at the border of what is clipped.
SIZES = {'calm': 0.5, 'clipped': 30.0, 'an outlier': 1e6}


def weighed(updates):
  """A number that depends on every update."""
  leaves = jax.tree.leaves(updates)
  return sum(
    (u * np.cos(np.arange(u.size)).reshape(u.shape)).sum() for u in leaves
  )


@functools.cache
def derivatives(entry):
  """Functions of gradients and state: an update, and both its derivatives."""
  params = make_params()

  def value(gradients, state):
    return weighed(entry.tx.update(gradients, state, params)[0])

  @jax.jit
  def along(gradients, direction, state):
    def at(step):
      moved = jax.tree.map(lambda g, d: g + step * d, gradients, direction)
      return value(moved, state)

    slope = optax.tree.vdot(jax.grad(value)(gradients, state), direction)
    return slope, (at(EPSILON) - at(-EPSILON)) / (2 * EPSILON)

  return jax.jit(entry.tx.update), along


@pytest.mark.device
@every
@pytest.mark.parametrize('size', SIZES.values(), ids=SIZES)
@pytest.mark.parametrize('steps', [0, 5], ids=['first step', 'later'])
def test_updates_have_their_derivative(entry, size, steps):
  update, along = derivatives(entry)
  state = jax.jit(entry.tx.init)(make_params())
  gradients = make_gradients(entry)
  for _ in range(steps):
    _, state = update(gradients, state, make_params())
  gradients = scale(gradients, np.float32(size))
  direction = scale(make_gradients(entry, 1), np.float32(size))
  slope, expected = along(gradients, direction, state)
  assert np.isfinite(slope)
  if not entry.name.startswith('harmonized'):  # the weights jump
    np.testing.assert_allclose(slope, expected, rtol=0.02, atol=0.02 * size)


@pytest.mark.device
def test_a_gradient_penalty_sees_through_a_clip_that_does_not_clip():
  """As torchopt#26 and optax#1452 have it."""
  x = np.array([0.5, 1.0], np.float32)
  clip = optax_ghm.in_backward(optax_ghm.clip_by_norm(100.0))

  def penalty(through, x):
    slope = jax.grad(lambda x: jnp.tanh(through(x) ** 3).sum())(x)
    return jnp.sum(slope**2)

  actual, expected = (
    jax.jit(jax.grad(functools.partial(penalty, f)))(x)
    for f in (clip, lambda x: x)
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  assert np.abs(expected).min() > 0.1
