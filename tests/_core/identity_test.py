"""Identities with a backward rule, wherever they stand."""

import jax
import jax.numpy as jnp
import numpy as np

from optax_ghm._core.identity import identity

X = np.float32([0.0, 4.0])
ZERO = np.float32(0)


@identity
def doubled(static, cotangent, residual):
  """Counts its calls in the gradient of the residual."""
  del static
  return (
    jax.tree.map(lambda leaf: 2 * leaf, cotangent),
    jnp.ones_like(residual),
  )


@jax.grad
def of_a_used_leaf(x):
  used, unused = doubled(None, (x, jnp.sqrt(x)), ZERO)
  del unused
  return jnp.sum(used**3)


def test_an_unused_leaf_has_no_gradient_and_two_gradients_keep_the_rule():
  """A gradient of zeros would be NaN behind the root at 0."""

  @jax.jit
  def grads(x):
    twice = jax.grad(lambda x: jnp.sum(of_a_used_leaf(x)))
    return of_a_used_leaf(x), twice(x)

  once, twice = grads(X)
  np.testing.assert_array_equal(once, 6 * X**2)
  np.testing.assert_array_equal(twice, 2 * 2 * 6 * X)


def test_nothing_is_called_where_no_leaf_is_used():
  def loss(x, residual):
    doubled(None, (x, jnp.sqrt(x)), residual)
    return jnp.sum(x)

  x_grad, calls = jax.jit(jax.grad(loss, argnums=(0, 1)))(X, ZERO)
  np.testing.assert_array_equal(x_grad, np.ones(2))
  assert float(calls) == 0


def test_the_primitive_has_the_name_of_its_rule():
  jaxpr = jax.make_jaxpr(lambda x: doubled(None, x, ZERO))(X)
  assert 'name=doubled' in str(jaxpr)
