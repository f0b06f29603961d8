"""The reversal as a module of Linen and of NNX."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn, nnx

import optax_ghm.linen
import optax_ghm.nnx

X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x, scale):
    return optax_ghm.linen.GradientReversal()(nn.Dense(3)(x), scale)


class Nnx(nnx.Module):
  def __init__(self):
    self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    self.reverse = optax_ghm.nnx.GradientReversal()

  def __call__(self, x, scale):
    return self.reverse(self.dense(x), scale)


def test_gradients_are_multiplied_by_minus_the_scale():
  @jax.jit
  def of_linen(key):
    variables = Linen().init(key, X, 1.0)
    assert set(variables) == {'params'}

    def loss(variables, scale):
      return jnp.sum(jnp.sin(Linen().apply(variables, X, scale)))

    return [jax.grad(loss)(variables, scale) for scale in (-1.0, 0.5)]

  @nnx.jit
  def of_nnx():
    model = Nnx()
    grad = nnx.grad(lambda m, scale: jnp.sum(jnp.sin(m(X, scale))))
    return [nnx.as_pure(grad(model, scale)) for scale in (-1.0, 0.5)]

  for plain, reversed_ in (of_linen(jax.random.key(0)), of_nnx()):
    expected = jax.tree.map(lambda g: -0.5 * np.asarray(g), plain)
    chex.assert_trees_all_close(reversed_, expected, rtol=1e-6)
