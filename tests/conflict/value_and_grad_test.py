"""Values of several losses, and one gradient that reconciles them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ghm import conflict
from tests.support import oracles_conflict as oracles

X = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)
PARAMS = {
  'w': np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32),
  'b': np.zeros(3, np.float32),
}


def outputs(params, x):
  return jnp.tanh(x @ params['w'] + params['b'][None])


def three(params, x, scale=1.0):
  """Losses that pull the outputs apart."""
  y = outputs(params, x)
  return {
    'up': jnp.mean(jnp.square(y - 1)),
    'down': scale * jnp.mean(jnp.square(y + 1)),
    'apart': jnp.mean(y[:, 0] * y[:, 1]),
  }


def as_vector(params, x):
  return jnp.stack(list(three(params, x).values()))


def rows_of(losses_fn, *args):
  """(m, n), float64, in the order of the leaves of losses."""
  jacobian = jax.jit(jax.jacrev(losses_fn))(*args)
  per_loss = [
    jacobian[name] if isinstance(jacobian[name], dict) else None
    for name in sorted(jacobian)
  ]
  return np.stack(
    [
      np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(g)])
      for g in per_loss
    ]
  )


def flat(tree):
  return np.concatenate([np.float64(u).ravel() for u in jax.tree.leaves(tree)])


@pytest.mark.parametrize('batch_size', [None, 1, 2])
def test_it_is_values_weights_and_the_reconciled_gradient(batch_size):
  step = jax.jit(
    conflict.reconciled_value_and_grad(three, batch_size=batch_size)
  )
  losses, grads, how = step(PARAMS, X, scale=5.0)
  chex.assert_trees_all_close(losses, jax.jit(three)(PARAMS, X, 5.0), rtol=1e-6)
  rows = rows_of(functools.partial(three, scale=5.0), PARAMS, X)
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, PARAMS)
  np.testing.assert_allclose(
    flat(grads), oracles.upgrad(rows), rtol=1e-3, atol=1e-5
  )
  weights = np.float64([how.weights[name] for name in sorted(how.weights)])
  np.testing.assert_allclose(weights @ rows, flat(grads), rtol=1e-4, atol=1e-5)
  units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  np.testing.assert_allclose(how.cosines, units @ units.T, atol=1e-5)


def test_a_vector_of_losses_other_weights_and_other_data():
  def losses_fn(params, x):
    return as_vector(params, x), {'outputs': outputs(params, x)}

  step = jax.jit(
    conflict.reconciled_value_and_grad(
      losses_fn, conflict.mean_weights, has_aux=True
    )
  )
  (losses, aux), grads, how = step(PARAMS, X)
  expected = jax.jit(
    jax.value_and_grad(lambda params, x: jnp.mean(as_vector(params, x)))
  )(PARAMS, X)
  np.testing.assert_allclose(jnp.mean(losses), expected[0], rtol=1e-6)
  chex.assert_trees_all_close(grads, expected[1], rtol=1e-5, atol=1e-7)
  assert aux['outputs'].shape == (16, 3)
  np.testing.assert_allclose(how.weights, 1 / 3, rtol=1e-6)


def test_training_lowers_a_loss_that_the_sum_would_raise():
  """One loss scaled 100 times drowns the other, unless they are reconciled."""

  def losses_fn(w):
    return jnp.stack([jnp.square(w[0] - 1), 100 * jnp.square(w[0] + w[1])])

  def slope(reconciled):
    step = conflict.reconciled_value_and_grad(
      losses_fn,
      conflict.upgrad_weights if reconciled else conflict.mean_weights,
    )

    @jax.jit
    def fall(w):
      before, grads, _ = step(w)
      return before - losses_fn(w - 1e-4 * grads)

    return fall(np.float32([0.5, 1.0]))

  assert slope(False)[0] < 0 < slope(True).min()


def test_a_loss_with_a_bad_gradient_is_left_out():
  def losses_fn(params, x):
    bad = jnp.sqrt(jnp.sum(0 * outputs(params, x)))  # the derivative is NaN
    return {**three(params, x), 'bad': bad}

  _, grads, how = jax.jit(conflict.reconciled_value_and_grad(losses_fn))(
    PARAMS, X
  )
  _, expected, _ = jax.jit(conflict.reconciled_value_and_grad(three))(PARAMS, X)
  assert how.weights['bad'] == 0
  chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)


def test_losses_of_16_bits_and_one_that_is_a_number():
  def losses_fn(params, x):
    losses = three(params, x)
    return {**losses, 'up': losses['up'].astype(jnp.bfloat16), 'off': 0.0}

  losses, grads, how = jax.jit(conflict.reconciled_value_and_grad(losses_fn))(
    PARAMS, X
  )
  assert losses['up'].dtype == jnp.bfloat16
  expected = 0.75 * oracles.upgrad(rows_of(three, PARAMS, X))
  np.testing.assert_allclose(flat(grads), expected, rtol=2e-2, atol=1e-2)
  chex.assert_shape(how.weights['up'], ())
  assert how.weights['up'].dtype == np.float32


def test_wrong_arguments_are_named():
  with pytest.raises(ValueError, match='one loss or more'):
    conflict.reconciled_value_and_grad(lambda w: {})(X)
  for wrong in ({'a': X, 'b': X[0, 0]}, X):
    with pytest.raises(ValueError, match=r'one vector.*\(16, 4\).*has_aux'):
      conflict.reconciled_value_and_grad(lambda w, wrong=wrong: wrong)(X)
  with pytest.raises(TypeError, match='floating numbers.*int32'):
    conflict.reconciled_value_and_grad(lambda w: jnp.int32(1))(X)
  with pytest.raises(TypeError, match='has_aux.*a pair'):
    conflict.reconciled_value_and_grad(lambda w: w[0], has_aux=True)(X)
  with pytest.raises(ValueError, match=r'weights must return.*\(4,\)'):
    conflict.reconciled_value_and_grad(lambda w: w[0], lambda g: g)(X)
  with pytest.raises(ValueError, match='floating or complex'):
    conflict.reconciled_value_and_grad(lambda w: jnp.ones(2))(np.arange(3))
