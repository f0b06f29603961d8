"""Recalibration of models under transformations."""

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn, nnx

import optax_ghm.linen
import optax_ghm.nnx
from tests.support.faces_batch_norm import Linen, Nnx, face_of, start
from tests.support.nnx_mode import TREE, graph_mode
from tests.support.oracles_batch_norm import assert_is, by_numpy, seen_in_turn

PROGRAMS = 65
recalibrate = optax_ghm.linen.recalibrate


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    x = nn.Dense(3, name='dense')(x)
    return nn.BatchNorm(False, name='norm')(x), None


class Stack(nn.Module):
  @nn.compact
  def __call__(self, x):
    axes = {'params': 0, 'batch_stats': 0}
    block = nn.remat(nn.jit(Block))
    blocks = nn.scan(block, axes, split_rngs={'params': True}, length=2)
    return blocks(name='blocks')(x, None)[0]


class Side(nn.Module):
  @nn.compact
  def __call__(self, x):
    blocks = nn.vmap(
      Block,
      {'params': 0, 'batch_stats': 0},
      split_rngs={'params': True},
      in_axes=None,
      axis_size=2,
    )
    return blocks(name='blocks')(x)[0]


class NnxBlock(nnx.Module):
  def __init__(self, key):
    rngs = nnx.Rngs(key)
    self.dense = nnx.Linear(3, 3, rngs=rngs)
    self.norm = optax_ghm.nnx.BatchNorm(3, rngs=rngs)

  @nnx.jit
  def __call__(self, x):
    return self.norm(self.dense(x))


class NnxStack(nnx.Module):
  def __init__(self):
    keys = jax.random.split(jax.random.key(0), 2)
    self.blocks = nnx.vmap(NnxBlock)(keys)

  def __call__(self, x):
    return nnx.scan(
      lambda x, block: nnx.remat(NnxBlock.__call__)(block, x),
      in_axes=(nnx.Carry, 0),
      out_axes=nnx.Carry,
    )(x, self.blocks)


class NnxSide(NnxStack):
  def __call__(self, x):
    axes = 0 if TREE else nnx.StateAxes({nnx.Param: 0, nnx.BatchStat: 0})
    call = nnx.vmap(NnxBlock.__call__, in_axes=(axes, None))
    return call(self.blocks, x)


@pytest.mark.parametrize(
  ('model', 'in_turn'),
  [
    (Linen(Stack()), True),
    (Nnx(nnx.jit(NnxStack)), True),
    (Linen(Side()), False),
    (Nnx(nnx.jit(NnxSide)), False),
  ],
  ids=['linen scan', 'nnx scan', 'linen vmap', 'nnx vmap'],
)
def test_layers_of_scan_remat_and_jit_and_models_of_vmap(
  model, in_turn, batches
):
  """They may be compiled already, as they are, and are not changed by it."""
  variables = start(model, batches[0])
  model(variables, batches[0])
  found = model.recalibrate(variables, batches)
  chex.assert_trees_all_equal(found['params'], variables['params'])
  dense = variables['params']['blocks']['dense']
  kernels, biases = (np.float64(dense[key]) for key in ('kernel', 'bias'))
  if in_turn:
    wanted = seen_in_turn(batches, kernels, biases)
  else:
    affine = zip(kernels, biases, strict=True)
    wanted = [by_numpy([x @ w + b for x in batches]) for w, b in affine]
  stats = found['batch_stats']['blocks']['norm']
  for i, expected in enumerate(wanted):
    assert_is({name: u[i] for name, u in stats.items()}, expected, 1e-4)
  _, after = model(found, batches[0])
  chex.assert_trees_all_equal_shapes(after['batch_stats'], found['batch_stats'])
  mean = after['batch_stats']['blocks']['norm']['mean']
  assert np.any(np.asarray(mean) != np.asarray(stats['mean']))


def test_linen_scan_over_time_that_carries_the_averages(batches):
  """One norm, for every step of a sequence."""

  class Step(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
      return carry, optax_ghm.linen.BatchNorm(False)(x)

  scanned = nn.scan(
    Step,
    variable_broadcast='params',
    variable_carry='batch_stats',
    split_rngs={'params': False},
  )()
  sequences = [np.stack([x, 2 * x, -x]) for x in batches]
  zero = np.float32(0)
  found = recalibrate(
    lambda v, x: scanned.apply(v, zero, x, mutable=['batch_stats']),
    start(Linen(Step()), zero, batches[0]),
    sequences,
  )
  wanted = by_numpy([x.reshape(-1, 3) for x in sequences])
  assert_is(found['batch_stats']['BatchNorm_0'], wanted)


def test_the_axis_of_a_vmap_is_pooled(batches):
  """Its parts count like the parts of several devices."""
  face = face_of('linen', use_running_average=False, axis_name='d')
  masks = np.ones((2, 2, 3, 1), bool)
  masks[0, 0] = False
  data = [(x.reshape(2, 3, 3), m) for x, m in zip(batches, masks, strict=True)]

  def apply(variables, batch):
    call = jax.vmap(
      lambda x, mask: face(variables, x, mask=mask), axis_name='d'
    )
    y, updated = call(*batch)
    return y, jax.tree.map(lambda u: u[0], updated)

  found = recalibrate(apply, start(face, batches[0]), data)['batch_stats']
  assert_is(found, by_numpy([batches[0][3:], batches[1]]))


class NoPytree(nnx.BatchNorm, pytree=False):
  pass


@graph_mode
def test_nnx_modules_that_are_no_pytrees(batches):
  model = NoPytree(3, rngs=nnx.Rngs(0))
  optax_ghm.nnx.recalibrate(lambda m, x: m(x), model, batches)
  assert_is(nnx.to_pure_dict(nnx.state(model)), by_numpy(batches))
