"""Identities with a backward rule, wherever they stand."""

import jax
import jax.numpy as jnp
import numpy as np

from optax_ghm._core.identity import identity

X = jnp.array([0.0, 4.0])


@identity
def doubled(static, cotangent, residual):
  """Counts its calls in the gradient of the residual."""
  del static
  return (
    jax.tree.map(lambda leaf: 2 * leaf, cotangent),
    jnp.ones_like(residual),
  )


@jax.jit
@jax.grad
def of_a_used_leaf(x):
  used, unused = doubled(None, (x, jnp.sqrt(x)), jnp.zeros([]))
  del unused
  return jnp.sum(used**3)


def test_an_unused_leaf_has_no_gradient():
  """A gradient of zeros would be NaN behind the root at 0."""
  np.testing.assert_array_equal(of_a_used_leaf(X), 6 * X**2)


def test_nothing_is_called_where_no_leaf_is_used():
  @jax.jit
  def loss(x, residual):
    doubled(None, (x, jnp.sqrt(x)), residual)
    return jnp.sum(x)

  x_grad, calls = jax.grad(loss, argnums=(0, 1))(X, jnp.zeros([]))
  np.testing.assert_array_equal(x_grad, jnp.ones(2))
  assert calls == 0


def test_a_gradient_of_a_gradient_keeps_the_rule():
  @jax.jit
  @jax.grad
  def second(x):
    return jnp.sum(of_a_used_leaf(x))

  np.testing.assert_array_equal(second(X), 2 * 2 * 6 * X)


def test_the_primitive_has_the_name_of_its_rule():
  jaxpr = jax.make_jaxpr(lambda x: doubled(None, x, jnp.zeros([])))(X)
  assert 'name=doubled' in str(jaxpr)
