"""The reversal as a module of Linen and of NNX."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn, nnx

import optax_ghm.linen
import optax_ghm.nnx


@pytest.fixture
def data(rng):
  x = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
  return x, jnp.asarray(rng.integers(0, 3, size=16))


def cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_linen_reversal(data):
  x, y = data

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, scale):
      h = nn.Dense(3)(x)
      return optax_ghm.linen.GradientReversal()(h, scale)

  model = Model()
  variables = model.init(jax.random.key(0), x, 1.0)
  grad = jax.jit(jax.grad(lambda v, s: cross_entropy(model.apply(v, x, s), y)))
  plain = grad(variables, jnp.float32(-1.0))
  chex.assert_trees_all_close(
    grad(variables, jnp.float32(0.5)),
    jax.tree.map(lambda g: -0.5 * g, plain),
    rtol=1e-6,
  )
  assert set(variables) == {'params'}


def test_nnx_reversal(data):
  x, y = data

  class Model(nnx.Module):
    def __init__(self):
      self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      self.reverse = optax_ghm.nnx.GradientReversal()

    def __call__(self, x, scale):
      return self.reverse(self.dense(x), scale)

  grad = nnx.jit(nnx.grad(lambda m, s: cross_entropy(m(x, s), y)))
  model = Model()
  plain = nnx.as_pure(grad(model, jnp.float32(-1.0)))
  chex.assert_trees_all_close(
    nnx.as_pure(grad(model, jnp.float32(0.5))),
    jax.tree.map(lambda g: -0.5 * g, plain),
    rtol=1e-6,
  )
