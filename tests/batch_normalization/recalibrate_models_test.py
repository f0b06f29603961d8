"""Recalibration of whole models, and training that continues afterwards."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import optax_ghm
import optax_ghm.linen
import optax_ghm.nnx
from tests.support.faces_batch_norm import Linen, Nnx, both, start
from tests.support.nnx_mode import graph_mode
from tests.support.oracles_batch_norm import (
  assert_is,
  by_numpy,
  normalized,
  seen_in_turn,
)

PROGRAMS = 75
recalibrate = optax_ghm.linen.recalibrate
homes = pytest.mark.parametrize('flax', [True, False], ids=['flax', 'ours'])


class LinenNet(nn.Module):
  norm: Any

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.Dense(4)(x)
    x = nn.relu(self.norm(use_running_average=not train)(x))
    return self.norm(use_running_average=not train)(nn.Dense(2)(x))


class NnxNet(nnx.Module):
  def __init__(self, norm):
    rngs = nnx.Rngs(0)
    self.dense = nnx.List(
      [nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)]
    )
    self.norms = nnx.List([norm(4, rngs=rngs), norm(2, rngs=rngs)])

  def __call__(self, x):
    x = nnx.relu(self.norms[0](self.dense[0](x)))
    return self.norms[1](self.dense[1](x))


@both
@homes
def test_layers_are_normalized_by_their_batches(name, flax, batches):
  if name == 'linen':
    home = nn if flax else optax_ghm.linen
    model = Linen(LinenNet(home.BatchNorm))
    layers, norms = (
      [f'{kind}_{i}' for i in (0, 1)] for kind in ('Dense', 'BatchNorm')
    )
  else:
    home = nnx if flax else optax_ghm.nnx
    model = Nnx(lambda: NnxNet(home.BatchNorm))
    layers = norms = (0, 1)
  variables = start(model, batches[0])
  if name == 'linen':
    variables['other'] = {'kept': np.ones(2, np.float32)}
  found = model.recalibrate(variables, batches)
  chex.assert_trees_all_equal(
    {**found, 'batch_stats': None}, {**variables, 'batch_stats': None}
  )
  params, stats = variables['params'], found['batch_stats']
  if name == 'nnx':
    params, stats = params['dense'], stats['norms']
  affine = ([params[i][key] for i in layers] for key in ('kernel', 'bias'))
  wanted = seen_in_turn(batches, *affine, lambda x: np.maximum(x, 0))
  for key, expected in zip(norms, wanted, strict=True):
    assert_is(stats[key], expected, 1e-4)


def test_layers_with_frozen_averages_keep_them(batches):
  """Such a layer normalizes by its averages."""
  models = {
    'linen': Linen(
      nn.Sequential([nn.BatchNorm(True), optax_ghm.linen.BatchNorm(False)])
    ),
    'nnx': Nnx(
      lambda: nnx.Sequential(
        nnx.BatchNorm(3, rngs=nnx.Rngs(0), use_running_average=True),
        optax_ghm.nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
      )
    ),
  }
  seen = [(x - np.float64(7)) / np.sqrt(1 + 1e-5) for x in batches]
  for name, model in models.items():
    variables = start(model, batches[0])
    first, second = 'layers_0', 'layers_1'
    of = variables['batch_stats']
    if name == 'nnx':
      of, first, second = of['layers'], 0, 1
    of[first]['mean'] = np.full(3, 7, np.float32)
    found = model.recalibrate(variables, batches)['batch_stats']
    found = found if name == 'linen' else found['layers']
    chex.assert_trees_all_equal(found[first], of[first])
    assert_is(found[second], by_numpy(seen))


class Shared(nn.Module):
  @nn.compact
  def __call__(self, x):
    norm = optax_ghm.linen.BatchNorm(False, name='norm')
    norm(x)
    return norm(2 * x[:2])


class NnxShared(nnx.Module):
  def __init__(self):
    self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    self.same = self.norm

  def __call__(self, x):
    self.norm(x)
    return self.same(2 * x[:2])


@pytest.mark.parametrize(
  'model', [Linen(Shared()), pytest.param(Nnx(NnxShared), marks=graph_mode)]
)
def test_a_module_that_is_called_twice_counts_both(model, batches):
  found = model.recalibrate(start(model, batches[0]), batches)
  wanted = by_numpy([*batches, *(2 * x[:2] for x in batches)])
  assert_is(found['batch_stats']['norm'], wanted)


def test_other_models_in_apply_are_let_alone(batches):
  """A teacher, say, with variables of its own."""
  teacher, model = nn.BatchNorm(False), optax_ghm.linen.BatchNorm(False)
  its, variables = (start(Linen(m), batches[0]) for m in (teacher, model))

  def apply(variables, x):
    x, _ = teacher.apply(its, 3 * x, mutable=['batch_stats'])
    return model.apply(variables, x, mutable=['batch_stats'])

  found = recalibrate(apply, variables, batches)['batch_stats']
  assert_is(found, by_numpy([normalized(3 * x) for x in batches]), 1e-4)


class Dropping(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dropout(0.5, deterministic=False)(x)
    nn.BatchNorm(False)(x)
    return x


def test_dropout_in_a_linen_model(batches):
  keys = jax.vmap(jax.random.key)(np.arange(2))
  data = list(zip(batches, keys, strict=True))
  model = Dropping()

  def apply(variables, batch):
    x, key = batch
    rngs = {'dropout': key}
    return model.apply(variables, x, rngs=rngs, mutable=['batch_stats'])

  rngs = {'params': keys[0], 'dropout': keys[0]}
  variables = jax.jit(model.init)(rngs, batches[0])
  found = recalibrate(apply, variables, data)['batch_stats']
  dropped = [np.asarray(jax.jit(apply)(variables, b)[0]) for b in data]
  assert np.any((dropped[0] == 0) != (dropped[1] == 0))
  assert_is(found['BatchNorm_0'], by_numpy(dropped))


class NnxDropping(nnx.Module):
  def __init__(self):
    self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    self.norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return self.norm(self.dropout(x))


def call(model, x):
  return model(x)


def test_dropout_in_an_nnx_model_differs_from_batch_to_batch():
  model = NnxDropping()
  kept = jax.tree.map(
    np.array, nnx.to_pure_dict(nnx.state(model, nnx.RngCount))
  )
  optax_ghm.nnx.recalibrate(call, model, [np.ones((4, 1), np.float32)] * 100)
  # The mean of 400 numbers that are 0 or 2; with 4 it would be 0, 0.5, ...
  mean = np.asarray(model.norm.mean.get_value())
  np.testing.assert_allclose(mean, 1, atol=0.2)
  assert float(mean[0] * 2) % 1 != 0
  found = nnx.to_pure_dict(nnx.state(model, nnx.RngCount))
  chex.assert_trees_all_equal(found, kept)


# What is compiled, and training that continues afterwards.


@both
def test_it_is_compiled_once_for_batches_of_a_shape(name, batches):
  data = [batches[0]] * 3 + [batches[1][:2]] * 2
  calls = []

  if name == 'linen':
    model = nn.BatchNorm(False)
    variables = start(Linen(model), batches[0])

    def apply(variables, x):
      calls.append(x.shape)
      assert isinstance(x, jax.core.Tracer)
      return model.apply(variables, x, mutable=['batch_stats'])

  else:
    variables = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def apply(model, x):
      calls.append(x.shape)
      return model(x)

  home = getattr(optax_ghm, name)
  for _ in range(2):
    home.recalibrate(apply, variables, data)
    assert calls == [(6, 3), (2, 3)]
  if name == 'nnx':
    variables.eval()  # another model, to the compiler
    with pytest.raises(ValueError, match='training mode'):
      home.recalibrate(apply, variables, data)


def test_nnx_models_train_on_as_if_nothing_had_been(batches):
  model = NnxNet(optax_ghm.nnx.BatchNorm)
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, x):
    grads = nnx.grad(lambda m: jnp.mean(jnp.sin(m(x))))(model)
    optimizer.update(model, grads)

  step(model, optimizer, batches[0])
  twin, its = nnx.clone((model, optimizer))
  graph = nnx.graphdef(model)
  optax_ghm.nnx.recalibrate(call, model, batches)
  assert nnx.graphdef(model) == graph
  for pair in ((model, optimizer), (twin, its)):
    step(*pair, batches[1])
  params, its = (nnx.state(m, nnx.Param) for m in (model, twin))
  chex.assert_trees_all_equal(params, its)
  assert [type(m) for m in model.norms] == [optax_ghm.nnx.BatchNorm] * 2
