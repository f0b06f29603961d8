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


@pytest.fixture(autouse=True)
def flax_promotes():
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    yield


@pytest.fixture
def batches(rng):
  """Three batches of images and labels."""
  images = rng.normal(0.5, 1, size=(3, 8, 6, 6, 3)).astype(np.float32)
  return list(zip(images, rng.integers(0, 4, size=(3, 8)), strict=True))


class LinenBlock(nn.Module):
  conv: Any
  norm: Any
  width: int
  stride: int

  @nn.compact
  def __call__(self, x):
    y = self.conv(self.width, (3, 3), self.stride)(x)
    y = self.conv(self.width, (3, 3))(nn.relu(self.norm()(y)))
    y = self.norm(scale_init=nn.initializers.constant(0.5))(y)
    if x.shape != y.shape:
      x = self.conv(self.width, (1, 1), self.stride, name='projection')(x)
      x = self.norm(name='norm_of_projection')(x)
    return nn.relu(x + y)


class LinenResNet(nn.Module):
  dtype: Any

  @nn.compact
  def __call__(self, x, train=True):
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
    norm = functools.partial(
      BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
    )
    x = nn.relu(norm(name='first')(conv(4, (3, 3))(x)))
    x = LinenBlock(conv, norm, 4, 1)(x)
    x = LinenBlock(conv, norm, 8, 2)(x)
    x = jnp.mean(x, axis=(1, 2))
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
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated

      (value, updated), grads = jax.value_and_grad(loss, has_aux=True)(
        variables['params']
      )
      updates, opt_state = tx.update(grads, opt_state)
      params = optax.apply_updates(variables['params'], updates)
      return {'params': params, **updated}, opt_state, value

    start = variables = jax.jit(model.init)(jax.random.key(0), batches[0][0])
    opt_state, losses = tx.init(variables['params']), []
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


class NnxBlock(nnx.Module):
  def __init__(self, width_in, width, stride, norm, rngs):
    conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
    self.first = conv(width_in, width, (3, 3), stride)
    self.first_norm = norm(width, rngs=rngs)
    self.second = conv(width, width, (3, 3))
    self.second_norm = norm(
      width, scale_init=nnx.initializers.constant(0.5), rngs=rngs
    )
    self.projection = conv(width_in, width, (1, 1), stride)
    self.norm_of_projection = norm(width, rngs=rngs)

  def __call__(self, x):
    y = nnx.relu(self.first_norm(self.first(x)))
    y = self.second_norm(self.second(y))
    return nnx.relu(self.norm_of_projection(self.projection(x)) + y)


class NnxResNet(nnx.Module):
  def __init__(self, rngs):
    norm = functools.partial(
      BatchNorm, momentum=0.9, epsilon=1e-5, dtype=jnp.float32
    )
    self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
    self.norm = norm(4, use_fast_variance=False, rngs=rngs)
    self.blocks = nnx.List(
      [NnxBlock(4, 4, 1, norm, rngs), NnxBlock(4, 8, 2, norm, rngs)]
    )
    self.dense = nnx.Linear(8, 4, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x)))
    for block in self.blocks:
      x = block(x)
    return self.dense(jnp.mean(x, axis=(1, 2)))


@nnx.jit
def nnx_step(model, optimizer, images, labels):
  def loss(model):
    return optax.softmax_cross_entropy_with_integer_labels(
      model(images), labels
    ).mean()

  value, grads = nnx.value_and_grad(loss)(model)
  optimizer.update(model, grads)
  return value


def test_a_resnet_of_nnx(use, batches):
  def run(norm):
    """The model after three steps, its first state, and losses."""
    use(norm)
    model = NnxResNet(nnx.Rngs(0))
    start = jax.tree.map(jnp.copy, nnx.state(model))
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
    [(path, type(u)) for path, u in nnx.to_flat_state(start)]
    for _, start, _ in (theirs, ours)
  ]
  assert kinds[0] == kinds[1]
  all_close(ours[2], theirs[2])
  states = [nnx.to_pure_dict(nnx.state(run[0])) for run in (theirs, ours)]
  all_close(states[1], states[0])
  images = batches[0][0]
  evaluate = nnx.jit(lambda model, x: model(x))
  expected = evaluate(theirs[0], images)
  for (model, *_), (other, *_) in ((ours, theirs), (theirs, ours)):
    restored = nnx.merge(nnx.graphdef(other), nnx.state(model))
    all_close(evaluate(restored, images), expected)
