"""Models written for Flax, in which one imported name is exchanged."""

import functools
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx, serialization

import optax_ghm.linen
import optax_ghm.nnx

pytestmark = pytest.mark.usefixtures('as_users_run_jax')
BatchNorm: Any = None
"""The name that the models below import: the module of Flax or ours."""


def all_close(found, expected):
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def use(monkeypatch):
  """Exchanges the import."""
  return functools.partial(
    monkeypatch.setattr, sys.modules[__name__], 'BatchNorm'
  )


@pytest.fixture
def batches(rng):
  """Three batches of images and labels."""
  images = rng.normal(0.5, 1, size=(3, 6, 8, 8, 3)).astype(np.float32)
  return list(zip(images, rng.integers(0, 4, size=(3, 6)), strict=True))


def mean_loss(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class LinenResNet(nn.Module):
  dtype: Any

  @nn.compact
  def __call__(self, x, train=True):
    conv = functools.partial(nn.Conv, 4, use_bias=False, dtype=self.dtype)
    norm = functools.partial(
      BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
    )
    x = nn.relu(norm(name='first')(conv((3, 3))(x)))
    y = conv((3, 3))(nn.relu(norm()(conv((3, 3), 2)(x))))
    y = norm(scale_init=nn.initializers.constant(0.5))(y)
    x = norm(name='norm_of_projection')(conv((1, 1), 2, name='projection')(x))
    x = jnp.mean(nn.relu(x + y), axis=(1, 2))
    return nn.Dense(4, dtype=self.dtype)(x)


def test_a_resnet_of_linen(use, batches):
  model = LinenResNet(jnp.float32)
  tx = optax.sgd(0.05, momentum=0.9)

  def run(norm):
    """Variables before and after three steps, losses, and evaluation."""
    use(norm)

    @jax.jit
    def step(variables, opt_state, images, labels):
      def loss(params):
        logits, updated = model.apply(
          {**variables, 'params': params}, images, mutable=['batch_stats']
        )
        return mean_loss(logits, labels), updated

      (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(
        variables['params']
      )
      updates, opt_state = tx.update(grads, opt_state)
      params = optax.apply_updates(variables['params'], updates)
      return {'params': params, **updated}, opt_state, value

    init = jax.jit(model.init, static_argnums=2)
    key, images = jax.random.key(0), batches[0][0]
    start = variables = init(key, images, True)
    # There are no other collections, however it is initialized.
    shapes = jax.eval_shape(lambda: model.init(key, images, False))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, start)
    opt_state, losses = jax.jit(tx.init)(variables['params']), []
    for images, labels in batches:
      variables, opt_state, value = step(variables, opt_state, images, labels)
      losses.append(value)
    evaluate = jax.jit(functools.partial(model.apply, train=False))
    return start, variables, losses, evaluate

  theirs, ours = map(run, (nn.BatchNorm, optax_ghm.linen.BatchNorm))
  chex.assert_trees_all_equal(ours[0], theirs[0])
  all_close(ours[1:3], theirs[1:3])
  images = batches[0][0]
  expected = theirs[3](theirs[1], images)
  for found, other in ((ours, theirs), (theirs, ours)):
    saved = serialization.to_bytes(found[1])
    restored = serialization.from_bytes(other[0], saved)
    all_close(other[3](restored, images), expected)


class NnxResNet(nnx.Module):
  def __init__(self, rngs):
    conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
    norm = functools.partial(
      BatchNorm, 4, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, rngs=rngs
    )
    self.convs = nnx.List(
      [conv(3, 4, (3, 3)), conv(4, 4, (3, 3), 2), conv(4, 4, (3, 3))]
    )
    half = nnx.initializers.constant(0.5)
    self.norms = nnx.List(
      [norm(use_fast_variance=False), norm(), norm(scale_init=half)]
    )
    self.projection = conv(4, 4, (1, 1), 2)
    self.norm_of_projection = norm()
    self.dense = nnx.Linear(4, 4, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norms[0](self.convs[0](x)))
    y = nnx.relu(self.norms[1](self.convs[1](x)))
    y = self.norms[2](self.convs[2](y))
    x = nnx.relu(self.norm_of_projection(self.projection(x)) + y)
    return self.dense(jnp.mean(x, axis=(1, 2)))


@nnx.jit
def nnx_step(model, optimizer, images, labels):
  value, grads = nnx.value_and_grad(
    lambda model: mean_loss(model(images), labels)
  )(model)
  optimizer.update(model, grads)
  return value


def values_of(model):
  return nnx.to_pure_dict(nnx.state(model))


def test_a_resnet_of_nnx(use, batches):
  def run(norm):
    """The model after three steps, its first state, and losses."""
    use(norm)
    model = nnx.jit(lambda: NnxResNet(nnx.Rngs(0)))()
    start = jax.tree.map(np.array, values_of(model))
    optimizer = nnx.Optimizer(
      model, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param
    )
    model.train()
    losses = [nnx_step(model, optimizer, *batch) for batch in batches]
    model.eval()
    return model, start, losses

  theirs, ours = map(run, (nnx.BatchNorm, optax_ghm.nnx.BatchNorm))
  chex.assert_trees_all_equal(ours[1], theirs[1])
  kinds = [
    [(path, type(u)) for path, u in nnx.to_flat_state(nnx.state(model))]
    for model, *_ in (theirs, ours)
  ]
  assert kinds[0] == kinds[1]
  all_close(ours[2], theirs[2])
  before = jax.tree.map(np.array, values_of(ours[0]))
  all_close(before, values_of(theirs[0]))
  images = batches[0][0]
  evaluate = nnx.jit(lambda model, x: model(x))
  expected = evaluate(theirs[0], images)
  for (model, *_), (other, *_) in ((ours, theirs), (theirs, ours)):
    restored = nnx.merge(nnx.graphdef(other), nnx.state(model))
    all_close(evaluate(restored, images), expected)
  chex.assert_trees_all_equal(values_of(ours[0]), before)
