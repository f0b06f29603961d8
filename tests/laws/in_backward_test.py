"""A transformation inside the backward pass does what it does alone."""

import chex
import jax
import jax.numpy as jnp
import pytest

import optax_ghm
from tests.support.trial import (
  assert_close,
  make_params,
  make_steps,
  run,
  typical_whole,
)

pytestmark = pytest.mark.device


@typical_whole
def test_in_backward(entry):
  """Cotangents are its updates, activations its parameters."""
  identity = optax_ghm.in_backward(entry.tx)
  x = make_params()

  @jax.jit
  def step(cotangent, state):
    y, vjp = jax.vjp(identity, x, state)
    update, gradient = vjp(cotangent)
    state = optax_ghm.overwrite_with_gradient(state, gradient)
    return y, update, state, identity.unpack(state, x)

  state, updates = jax.jit(identity.init)(x), []
  for gradients in make_steps(entry):
    y, update, state, unpacked = step(gradients, state)
    chex.assert_trees_all_equal(y, x)
    updates.append(update)
  expected, expected_state = run(entry.tx, make_steps(entry))
  assert_close(updates, expected)
  assert_close(unpacked, expected_state)
  assert all(
    jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(state)
  )
