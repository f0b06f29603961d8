"""Batch norm modules update once per step, under any transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from jax.sharding import AxisType, PartitionSpec as P

import optax_ghm.linen
import optax_ghm.nnx
from tests.support.faces_batch_norm import STATS, both, face_of

MOMENTUM = 0.9
OPTIONS = {'momentum': MOMENTUM, 'debias': True}
same = np.testing.assert_array_equal


def close(found, expected, rtol=1e-5, atol=1e-6):
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def means_in_turn(x, kernels):
  """The means of the inputs of layers with these kernels, one upon another."""
  means, h = [], np.float64(x)
  for kernel in np.float64(kernels):
    h = h @ kernel
    means.append(h.mean(-2))
    h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
  return np.stack(means)


def assert_updated_once(found, means):
  """Of which nothing is 0: ``found`` are averages, statistics and gradients."""
  stats, numbers, kernel = found
  close(stats['weight'], np.full(means.shape, 1 - MOMENTUM))  # how often
  close(stats['mean'], means, 1e-4, 1e-5)
  assert numbers.shape == (*means.shape[:-1], 5)
  assert np.any(kernel != 0)


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    norm = optax_ghm.linen.BatchNorm(False, **OPTIONS)
    return norm(nn.Dense(3, name='dense')(x)), None


AXES = {'params': 0, 'batch_stats': 0, STATS: 0}
LINEN = {
  'nothing': Layer(),
  'nn.remat': nn.remat(Layer)(),
  'jax.checkpoint': Layer(),
  'scan': nn.scan(
    nn.remat(Layer), AXES, split_rngs={'params': True}, length=3
  )(),
  'vmap': nn.vmap(
    Layer, AXES, split_rngs={'params': True}, in_axes=(0, None)
  )(),
}


def linen_step(around, x):
  """Kernels, and what one step makes of a model."""
  model = LINEN[around]
  plain = Layer() if 'remat' in around else model
  variables = plain.init(jax.random.key(0), x, None)
  assert variables.keys() == {'params', 'batch_stats'}

  def loss(params):
    (y, _), updated = model.apply(
      {**variables, 'params': params}, x, None, mutable=['batch_stats', STATS]
    )
    return jnp.sum(jnp.sin(y)), updated

  loss = jax.checkpoint(loss) if around == 'jax.checkpoint' else loss
  grads, updated = jax.grad(loss, has_aux=True)(variables['params'])
  return variables['params']['dense']['kernel'], (
    updated['batch_stats']['BatchNorm_0'],
    updated[STATS]['BatchNorm_0']['stats'].numbers,
    grads['dense']['kernel'],
  )


class NnxLayer(nnx.Module):
  def __init__(self, key):
    rngs = nnx.Rngs(key)
    self.dense = nnx.Linear(3, 3, rngs=rngs)
    self.norm = optax_ghm.nnx.BatchNorm(3, **OPTIONS, measure=True, rngs=rngs)

  def __call__(self, x):
    return self.norm(self.dense(x))


def scanned(stack, x):
  return nnx.scan(
    lambda x, layer: nnx.remat(NnxLayer.__call__)(layer, x),
    in_axes=(nnx.Carry, 0),
    out_axes=nnx.Carry,
  )(x, stack)


NNX = {
  'nothing': (None, NnxLayer.__call__),
  'nnx.remat': (None, nnx.remat(NnxLayer.__call__)),
  'scan': (3, scanned),
  'vmap': (2, nnx.vmap(NnxLayer.__call__)),
}


def nnx_step(around, x):
  count, call = NNX[around]
  key = jax.random.key(0)
  if count is None:
    model = NnxLayer(key)
  else:
    model = nnx.vmap(NnxLayer)(jax.random.split(key, count))
  kernel = model.dense.kernel[...]
  _, grads = optax_ghm.nnx.value_and_grad(
    lambda m, x: jnp.sum(jnp.sin(call(m, x)))
  )(model, x)
  return kernel, (
    {name: getattr(model.norm, name)[...] for name in ('mean', 'weight')},
    model.norm.stats.get_value().numbers,
    grads['dense']['kernel'][...],
  )


@pytest.mark.parametrize(
  ('step', 'around'),
  [*((linen_step, a) for a in LINEN), *((nnx_step, a) for a in NNX)],
)
def test_updates_once_per_step(step, around, x):
  xs = np.stack([x, 3 * x + 1]) if around == 'vmap' else x
  kernel, found = jax.device_get(jax.jit(step, static_argnums=0)(around, xs))
  if around == 'vmap':
    means = (xs @ kernel).mean(1)
  else:
    means = means_in_turn(x, kernel if around == 'scan' else kernel[None])
    means = means if around == 'scan' else means[0]
  assert_updated_once(found, means)


def call(norm, x):
  return norm(x)


OVER_DATA = {'in_axes': (None, 0)}
SHARED = {
  'nnx.eval_shape': functools.partial(nnx.eval_shape, call),
  'nnx.remat': nnx.remat(call),
  'nnx.vmap': nnx.vmap(call, **OVER_DATA, axis_name='i'),
  'nnx.vmap of nnx.vmap': nnx.vmap(
    nnx.vmap(call, **OVER_DATA, axis_name='j'), **OVER_DATA, axis_name='i'
  ),
  'nnx.scan': nnx.scan(
    lambda norm, x: (norm, norm(x)),
    in_axes=(nnx.Carry, 0),
    out_axes=(nnx.Carry, 0),
  ),
}
SHARED['evaluated nnx.scan'] = SHARED['nnx.scan']
AXIS_NAMES = {'nnx.vmap': 'i', 'nnx.vmap of nnx.vmap': ('i', 'j')}


@pytest.mark.parametrize('around', SHARED)
def test_one_nnx_module_under_a_transformation(around, rng):
  """Flax's issues 4734, 4760, 3319, 2052 and 3602."""
  x = rng.normal(3, 2, size=(2, 4, 5, 3)).astype(np.float32)

  @jax.jit
  def program(x):
    norm = optax_ghm.nnx.BatchNorm(
      3, **OPTIONS, axis_name=AXIS_NAMES.get(around), rngs=nnx.Rngs(0)
    )
    if around == 'evaluated nnx.scan':
      norm.eval()
    for _ in range(2):  # the variables are whole after the first call
      y = SHARED[around](norm, x)
    if 'scan' in around:
      _, y = y
    elif around == 'nnx.eval_shape':
      y = jnp.zeros(y.shape, y.dtype)
    return y, {name: getattr(norm, name)[...] for name in ('mean', 'weight')}

  y, found = jax.device_get(program(x))
  assert y.shape == x.shape
  calls = {'nnx.scan': 4, 'nnx.eval_shape': 0, 'evaluated nnx.scan': 0}
  calls = calls.get(around, 2)
  close(found['weight'], np.full(3, 1 - MOMENTUM**calls))
  parts = x if around == 'nnx.scan' else [x]
  mean = np.zeros(3)
  for part in [*parts, *parts][:calls]:
    mean += (1 - MOMENTUM) * (part.reshape(-1, 3).mean(0) - mean)
  if calls:
    close(found['mean'], mean / found['weight'])
    axes = (1, 2) if around == 'nnx.scan' else (0, 1, 2)
    centered = x - x.mean(axes, keepdims=True)
    expected = centered / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    close(y, expected, 1e-4, 1e-5)


@both
@pytest.mark.parametrize('mapped', ['shard_map', 'vmap'])
def test_masked_shards_are_one_batch(name, mapped, rng):
  x = rng.normal(3, 2, size=(16, 3)).astype(np.float32)
  mask = rng.uniform(size=(16, 1)) < 0.6
  mask[:2] = False  # a shard with nothing
  options = {**OPTIONS, 'measure': True}
  whole = face_of(name, **options)
  face = face_of(name, axis_name='d', **options)

  def call(variables, x, mask):
    return face(variables, x, False, mask=mask)

  @jax.jit
  def program(x, mask):
    # There is no such axis where variables are made.
    variables, same_variables = whole.init(x, False), face.init(x, False)
    expected = whole(variables, x, False, mask=mask)
    if mapped == 'vmap':
      parts = (u.reshape(8, 2, -1) for u in (x, mask))
      axes = (None, 0, 0)
      y, state = jax.vmap(call, axes, axis_name='d')(variables, *parts)
      found = y.reshape(x.shape), state
    else:
      mesh = jax.make_mesh((8,), ('d',), axis_types=(AxisType.Auto,))
      found = jax.shard_map(
        call, mesh=mesh, in_specs=(P(), P('d'), P('d')), out_specs=(P('d'), P())
      )(variables, x, mask)
    return variables, same_variables, expected, found

  variables, same_variables, expected, found = jax.device_get(program(x, mask))
  jax.tree.map(same, variables, same_variables)
  (expected_y, expected), (y, state) = expected, found
  close(y, expected_y)
  if mapped == 'vmap':
    for u in jax.tree.leaves(state['batch_stats']):
      same(u, np.broadcast_to(u[:1], u.shape))
    state = jax.tree.map(lambda u: u[0], state)
  jax.tree.map(close, state, expected)
