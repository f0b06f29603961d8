"""Batch norm as modules: in the place of Flax's, and what is new in them."""

import functools
import inspect
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx, serialization
from jax.sharding import AxisType, PartitionSpec as P

import optax_ghm
import optax_ghm.linen
import optax_ghm.nnx
from optax_ghm import flow

STATS = 'batch_norm_stats'
same = np.testing.assert_array_equal


def close(found, expected, rtol=1e-5, atol=1e-6):
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def all_close(found, expected, rtol=1e-5, atol=1e-6):
  chex.assert_trees_all_close(found, expected, rtol=rtol, atol=atol)


# One way to call them all: variables go in, y and the next variables come out.


class Linen(NamedTuple):
  module: nn.Module

  def init(self, x, *args, **kwargs):
    return self.module.init(jax.random.key(0), x, *args, **kwargs)

  def __call__(self, variables, x, *args, **kwargs):
    y, updated = self.module.apply(
      variables, x, *args, mutable=['batch_stats', STATS], **kwargs
    )
    return y, {**variables, **updated}


class Nnx(NamedTuple):
  build: Any  # a new module for every call

  def init(self, x, *args, **kwargs):
    del x, args, kwargs
    return self.read(self.build())

  def __call__(self, variables, x, *args, **kwargs):
    module = self.build()
    for collection in variables.values():
      for name, value in collection.items():
        getattr(module, name).set_value(value)
    return module(x, *args, **kwargs), self.read(module)

  def read(self, module):
    kinds = {
      'params': nnx.Param,
      'batch_stats': nnx.BatchStat,
      STATS: optax_ghm.nnx.BatchNormStats,
    }
    found = {
      collection: {
        path[-1]: variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(module, kind))
      }
      for collection, kind in kinds.items()
    }
    return {name: variables for name, variables in found.items() if variables}


def face_of(name, kind='BatchNorm', features=3, flax=False, **options):
  if name == 'linen':
    home = nn if flax else optax_ghm.linen
    options.pop('measure', None)
    return Linen(getattr(home, kind)(**options))
  home = nnx if flax else optax_ghm.nnx
  return Nnx(lambda: getattr(home, kind)(features, rngs=nnx.Rngs(0), **options))


def widening(step):
  """A schedule."""
  return 1 + step.astype(jnp.float32)


DOMAIN = np.array([0, 2, 0, 2, 2, 0])
both = pytest.mark.parametrize('name', ['linen', 'nnx'])
all_kinds = pytest.mark.parametrize(
  ('kind', 'options', 'args'),
  [
    ('BatchNorm', {'debias': True}, ()),
    ('BatchNorm', {'ghost_size': 2}, ()),
    ('BatchRenorm', {'r_max': widening, 'debias': True}, ()),
    ('DomainBatchNorm', {'num_domains': 4}, (DOMAIN,)),
  ],
  ids=['debias', 'ghost', 'renorm', 'domain'],
)


@pytest.fixture
def x(rng):
  """Six examples of three features."""
  return rng.normal([1, -2, 0], [1, 3, 0.5], size=(6, 3)).astype(np.float32)


MASK = np.array([1, 0, 1, 1, 1, 0], bool)[:, None]


# The modules in the place of Flax's.


def train(face, variables, xs, **kwargs):
  """Three steps with SGD: variables, and what y and the gradients were."""

  def step(variables, x):
    def loss(params, x):
      y, updated = face({**variables, 'params': params}, x, **kwargs)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, updated)

    params = variables.get('params', {})
    grads, (y, updated) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    params = jax.tree.map(
      lambda p, g: p - g * jnp.asarray(0.1, g.dtype), params, grads[0]
    )
    updated = {'params': params, 'batch_stats': updated['batch_stats']}
    return {name: updated[name] for name in variables}, (y, grads)

  return jax.lax.scan(step, variables, xs)


def random(key, shape, dtype=jnp.float32):
  return jax.random.normal(key, shape, dtype)


CASES = {
  'default, mask': ({}, 'float32'),
  'axes': (
    {
      'axis': (-1, 1),
      'momentum': 0.3,
      'epsilon': 0.5,
      'scale_init': random,
      'bias_init': random,
    },
    'float32',
  ),
  'no scale': ({'use_scale': False, 'bias_init': random}, 'bfloat16'),
  'neither': ({'use_scale': False, 'use_bias': False}, 'bfloat16'),
  'to bfloat16': (
    {
      'dtype': jnp.bfloat16,
      'param_dtype': jnp.bfloat16,
      'use_bias': False,
      'scale_init': random,
    },
    'float32',
  ),
}


@both
@pytest.mark.parametrize('case', CASES)
def test_trains_as_that_of_flax(name, case, rng):
  options, dtype = CASES[case]
  if name == 'nnx' and case == 'axes':
    options = {**options, 'axis': 1}  # there is one only
  xs = jnp.asarray(rng.normal(1, 2, size=(3, 4, 3, 5)), dtype)
  kwargs = {'use_running_average': False}
  if 'mask' in case:
    kwargs['mask'] = rng.uniform(size=(4, 3, 1)) < 0.7
  features = 3 if case == 'axes' else 5
  theirs, ours = (
    face_of(name, features=features, flax=flax, **options)
    for flax in (True, False)
  )

  @jax.jit
  def program(xs):
    starts, ends, outputs = [], [], []
    for face in (theirs, ours):
      variables = face.init(xs[0], use_running_average=False)
      starts.append(variables)
      end, output = train(face, variables, xs, **kwargs)
      ends.append(end)
      outputs.append(output)
    # Each is evaluated with the variables of the other.
    evaluated = [
      face(variables, xs[0], use_running_average=True)
      for face, variables in ((theirs, ends[1]), (ours, ends[0]))
    ]
    return starts, ends, outputs, evaluated

  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    starts, ends, outputs, ((y, _), (mine, after)) = program(xs)
  chex.assert_trees_all_equal(*starts)
  for pair in (starts, ends, outputs, (y, mine)):
    chex.assert_trees_all_equal_shapes_and_dtypes(*pair)
  half = 'bfloat16' in case or dtype == 'bfloat16'
  tolerance = 0.04 if half else 2e-5
  all_close(outputs[1], outputs[0], tolerance, tolerance)
  # The module of NNX rounds the input first.
  tolerance = 0.01 if name == 'nnx' and case == 'to bfloat16' else 1e-5
  all_close(
    ends[1]['batch_stats'], ends[0]['batch_stats'], tolerance, tolerance
  )
  tolerance = 0.04 if half else 1e-5
  close(*(u.astype(jnp.float32) for u in (mine, y)), tolerance, tolerance)
  chex.assert_trees_all_equal(after, ends[0])


class LinenNet(nn.Module):
  norm: Any

  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(4)(x)
    x = nn.relu(self.norm(use_running_average=not train)(x))
    return nn.Dense(2)(x)


def test_linen_checkpoints_are_those_of_flax(x):
  models = [
    LinenNet(norm) for norm in (nn.BatchNorm, optax_ghm.linen.BatchNorm)
  ]
  key = jax.random.key(1)
  starts = [jax.jit(m.init, static_argnums=2)(key, x, True) for m in models]
  chex.assert_trees_all_equal(*starts)
  for train in (True, False):  # no other collections, however initialized
    shapes = jax.eval_shape(lambda train=train: models[1].init(key, x, train))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, starts[0])

  @functools.partial(jax.jit, static_argnums=0)
  def train_and_evaluate(model, variables):
    _, updated = model.apply(variables, 3 * x, True, mutable=['batch_stats'])
    after = {**variables, **updated}
    return after, model.apply(after, x, False), model.apply(variables, x, False)

  for i in (0, 1):  # one goes on with what the other has saved
    saved, y, _ = train_and_evaluate(models[i], starts[i])
    restored = serialization.from_bytes(
      starts[1 - i], serialization.to_bytes(saved)
    )
    close(train_and_evaluate(models[1 - i], restored)[2], y)


class NnxNet(nnx.Module):
  def __init__(self, norm, **options):
    rngs = nnx.Rngs(1)
    self.first = nnx.Linear(3, 4, rngs=rngs)
    self.norm = norm(4, rngs=rngs, **options)
    self.last = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    return self.last(nnx.relu(self.norm(self.first(x))))


@nnx.jit
def nnx_step(model, optimizer, x):
  grads = nnx.grad(lambda m: jnp.mean(jnp.sin(m(x))))(model)
  optimizer.update(model, grads)


def test_nnx_models_train_and_switch_and_load_as_with_that_of_flax(x):
  models = [NnxNet(norm) for norm in (nnx.BatchNorm, optax_ghm.nnx.BatchNorm)]
  states = []
  for model in models:
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    model.train()
    for i in range(3):
      nnx_step(model, optimizer, x + i)
    model.eval()
    assert model.norm.use_running_average
    states.append(nnx.state(model))
  theirs, ours = (
    {p: v.get_value() for p, v in nnx.to_flat_state(s)} for s in states
  )
  assert list(theirs) == list(ours)
  all_close(ours, theirs)
  assert [type(v) for _, v in nnx.to_flat_state(states[0])] == [
    type(v) for _, v in nnx.to_flat_state(states[1])
  ]
  y, before = models[1](x), jax.tree.map(jnp.copy, nnx.state(models[1]))
  close(y, models[0](x))
  chex.assert_trees_all_equal(nnx.state(models[1]), before)  # of evaluation
  # The state of one in the graph of the other, both ways.
  for i in (0, 1):
    graph = nnx.graphdef(models[i])
    close(nnx.merge(graph, states[1 - i])(x), y)
  models[1].train()
  assert not models[1].norm.use_running_average
  models[1](x)
  assert np.any(models[1].norm.mean.get_value() != ours['norm', 'mean'])


def test_nnx_split_and_merge_keep_everything(x):
  norm = optax_ghm.nnx.BatchRenorm(
    3, r_max=widening, debias=True, measure=True, rngs=nnx.Rngs(0)
  )
  norm(x)
  graph, state = nnx.split(norm)
  copy = nnx.merge(graph, jax.tree.map(jnp.copy, state))
  same(norm(x + 1), copy(x + 1))
  chex.assert_trees_all_equal(nnx.state(norm), nnx.state(copy))
  assert int(copy.steps.get_value()) == 2


def test_where_to_use_running_averages_must_be_said(x):
  linen = optax_ghm.linen.BatchNorm
  with pytest.raises(ValueError, match='use_running_average'):
    linen().init(jax.random.key(0), x)
  with pytest.raises(ValueError, match='use_running_average'):  # as Flax does
    linen(True).init(jax.random.key(0), x, True)
  norm = optax_ghm.nnx.BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='use_running_average'):
    norm(x)
  norm(x, True)
  same(norm.mean.get_value(), np.zeros(3))
  norm.eval()
  norm(x, False)  # the call decides
  assert np.all(norm.mean.get_value() != 0)
  with pytest.raises(ValueError, match=r'scale must .*\(2,\), got \(3,\)'):
    norm(x[:, :2])


@both
def test_momentum_and_constructor_or_call(name, x):
  ours = face_of(name, momentum=0.25, use_running_average=False)
  y, variables = ours(ours.init(x), x)
  close(variables['batch_stats']['mean'], 0.75 * x.mean(0))
  close(variables['batch_stats']['var'], 0.25 + 0.75 * x.var(0))
  called = face_of(name, momentum=0.25)
  same(called(called.init(x, False), x, False)[0], y)
  evaluating = face_of(name, momentum=0.25, use_running_average=True)
  close(
    evaluating(variables, x)[0],
    (x - 0.75 * x.mean(0, keepdims=True))
    / np.sqrt(0.25 + 0.75 * x.var(0, keepdims=True) + 1e-5),
  )


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('linen', {'axis_index_groups': [[0, 1], [2, 3]]}),
    ('linen', {'force_float32_reductions': False}),
    ('nnx', {'axis_index_groups': [[0, 1], [2, 3]]}),
    ('nnx', {'promote_dtype': lambda args, dtype: args}),
  ],
)
def test_arguments_of_flax_that_mean_something_else_are_refused(
  name, options, x
):
  (argument,) = options
  with pytest.raises(ValueError, match=f'{argument} must have its default'):
    face_of(name, **options).init(x, False)


@pytest.mark.parametrize(
  ('ours', 'theirs'),
  [
    (optax_ghm.linen.BatchNorm, nn.BatchNorm),
    (optax_ghm.nnx.BatchNorm, nnx.BatchNorm),
  ],
)
def test_the_arguments_are_those_of_flax_in_their_order(ours, theirs):
  ours, theirs = (
    inspect.signature(kind.__init__).parameters for kind in (ours, theirs)
  )
  assert [name for name in ours if name in theirs] == list(theirs)
  for name, parameter in theirs.items():
    assert ours[name].kind == parameter.kind
    # Initializers and empty metadata have other objects of the same meaning.
    if not (callable(parameter.default) or name.endswith('metadata')):
      assert ours[name].default == parameter.default
  kinds = {parameter.kind for parameter in ours.values()}
  assert inspect.Parameter.VAR_KEYWORD not in kinds


# One update per step, under any transformation.

MOMENTUM = 0.9


def assert_updated_once(stats, mean, rows=()):
  shape = (*rows, mean.shape[-1])
  close(stats['weight'], np.full(shape, 1 - MOMENTUM))  # how often, that is
  close(stats['mean'], mean, 1e-4, 1e-5)


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    norm = optax_ghm.linen.BatchNorm(False, momentum=MOMENTUM, debias=True)
    return norm(nn.Dense(3, name='dense')(x)), None


def linen_step(model, variables, x, checkpoint=lambda f: f):
  """The gradient and the next variables."""

  @jax.jit
  def step(variables, x):
    @checkpoint
    def loss(params):
      (y, _), updated = model.apply(
        {**variables, 'params': params}, x, None, mutable=['batch_stats', STATS]
      )
      return jnp.sum(jnp.sin(y)), updated

    return jax.grad(loss, has_aux=True)(variables['params'])

  return step(variables, x)


@pytest.mark.parametrize('around', ['nothing', 'nn.remat', 'jax.checkpoint'])
def test_linen_updates_once_under_remat(around, x):
  layer = nn.remat(Layer) if around == 'nn.remat' else Layer
  variables = jax.jit(Layer().init)(jax.random.key(0), x)
  checkpoint = jax.checkpoint if around == 'jax.checkpoint' else lambda f: f
  grads, updated = linen_step(layer(), variables, x, checkpoint)
  hidden = x @ variables['params']['dense']['kernel']
  assert_updated_once(updated['batch_stats']['BatchNorm_0'], hidden.mean(0))
  assert updated[STATS]['BatchNorm_0']['stats'].numbers.shape == (5,)
  assert np.any(grads['dense']['kernel'] != 0)


def means_in_turn(x, kernels):
  """The means of the inputs of three layers with these kernels."""
  means, h = [], np.float64(x)
  for kernel in np.float64(kernels):
    h = h @ kernel
    means.append(h.mean(0))
    h = (h - means[-1]) / np.sqrt(h.var(0) + 1e-5)
  return np.stack(means)


def test_linen_scan_over_layers(x):
  stack = nn.scan(
    nn.remat(Layer),
    variable_axes={'params': 0, 'batch_stats': 0, STATS: 0},
    split_rngs={'params': True},
    length=3,
  )()
  variables = jax.jit(stack.init)(jax.random.key(0), x, None)
  assert set(variables) == {'params', 'batch_stats'}
  grads, updated = linen_step(stack, variables, x)

  dense = variables['params']['dense']
  stats = updated['batch_stats']['BatchNorm_0']
  assert_updated_once(stats, means_in_turn(x, dense['kernel']), (3,))
  assert updated[STATS]['BatchNorm_0']['stats'].numbers.shape == (3, 5)
  assert all(np.any(u != 0) for u in jax.tree.leaves(grads['BatchNorm_0']))


def test_linen_vmap(x):
  models = nn.vmap(
    Layer,
    variable_axes={'params': 0, 'batch_stats': 0, STATS: 0},
    split_rngs={'params': True},
    in_axes=(0, None),
  )()
  xs = np.stack([x, 3 * x + 1])
  variables = jax.jit(models.init)(jax.random.key(0), xs, None)
  _, updated = linen_step(models, variables, xs)
  hidden = xs @ variables['params']['dense']['kernel']
  assert_updated_once(
    updated['batch_stats']['BatchNorm_0'], hidden.mean(1), (2,)
  )


class NnxLayer(nnx.Module):
  def __init__(self, key):
    rngs = nnx.Rngs(key)
    self.dense = nnx.Linear(3, 3, rngs=rngs)
    self.norm = optax_ghm.nnx.BatchNorm(
      3, momentum=MOMENTUM, debias=True, measure=True, rngs=rngs
    )

  def __call__(self, x):
    return self.norm(self.dense(x))


def nnx_stats(layer):
  return {name: getattr(layer.norm, name)[...] for name in ('mean', 'weight')}


@pytest.mark.parametrize('around', ['nothing', 'nnx.remat'])
def test_nnx_updates_once_under_remat(around, x):
  layer = NnxLayer(0)
  call = (
    NnxLayer.__call__ if around == 'nothing' else nnx.remat(NnxLayer.__call__)
  )
  grads = nnx.jit(nnx.grad(lambda m, x: jnp.sum(jnp.sin(call(m, x)))))(layer, x)
  hidden = x @ layer.dense.kernel[...]
  assert_updated_once(nnx_stats(layer), hidden.mean(0))
  assert np.any(grads['dense']['kernel'][...] != 0)


def nnx_stack(count):
  keys = jax.random.split(jax.random.key(0), count)
  return nnx.vmap(NnxLayer)(keys)


def test_nnx_scan_over_layers(x):
  stack = nnx_stack(3)

  @nnx.jit
  def step(stack, x):
    scanned = nnx.scan(
      lambda x, layer: nnx.remat(NnxLayer.__call__)(layer, x),
      in_axes=(nnx.Carry, 0),
      out_axes=nnx.Carry,
    )
    return nnx.grad(lambda m: jnp.sum(jnp.sin(scanned(x, m))))(stack)

  step(stack, x)
  means = means_in_turn(x, stack.dense.kernel[...])
  assert_updated_once(nnx_stats(stack), means, (3,))
  assert stack.norm.stats.get_value().numbers.shape == (3, 5)


def test_nnx_vmap(x):
  models = nnx_stack(2)
  xs = np.stack([x, 3 * x + 1])
  call = nnx.vmap(NnxLayer.__call__)
  nnx.jit(nnx.grad(lambda m, xs: jnp.sum(jnp.sin(call(m, xs)))))(models, xs)
  hidden = xs @ models.dense.kernel[...]
  assert_updated_once(nnx_stats(models), hidden.mean(1), (2,))


# Over devices.


@both
@pytest.mark.parametrize('mapped', ['shard_map', 'vmap'])
def test_masked_shards_are_one_batch(name, mapped, rng):
  x = rng.normal(3, 2, size=(16, 3)).astype(np.float32)
  mask = rng.uniform(size=(16, 1)) < 0.6
  mask[:2] = False  # a shard with nothing
  options = {'debias': True, 'momentum': MOMENTUM, 'measure': True}
  whole = face_of(name, **options)
  variables = whole.init(x, False)  # and of the other: there is no such axis
  expected, updated = whole(variables, x, False, mask=mask)
  face = face_of(name, axis_name='d', **options)
  chex.assert_trees_all_equal(face.init(x, False), variables)

  def call(variables, x, mask):
    return face(variables, x, False, mask=mask)

  if mapped == 'vmap':
    parts = (u.reshape(8, 2, -1) for u in (x, mask))
    axes = (None, 0, 0)
    y, state = jax.jit(jax.vmap(call, axes, axis_name='d'))(variables, *parts)
    y = y.reshape(x.shape)
    for u in jax.tree.leaves(state['batch_stats']):
      same(u, np.broadcast_to(u[:1], u.shape))
    state = jax.tree.map(lambda u: u[0], state)
  else:
    mesh = jax.make_mesh((8,), ('d',), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
      call,
      mesh=mesh,
      in_specs=(P(), P('d'), P('d')),
      out_specs=(P('d'), P()),
    )
    y, state = jax.device_get(jax.jit(sharded)(variables, x, mask))
  close(y, expected)
  all_close(state, jax.device_get(updated))


# Statistics that are left alone.


@both
@all_kinds
def test_no_update_leaves_the_state_bit_for_bit(name, kind, options, args, x):
  face = face_of(name, kind, **options)
  variables = face.init(x, *args, False)
  _, variables = face(variables, x, *args, False)
  variables.pop(STATS, None)
  expected, updated = face(variables, 2 * x, *args, False)
  y, after = face(variables, 2 * x, *args, False, update_running_average=False)
  after.pop(STATS, None)
  close(y, expected)
  chex.assert_trees_all_equal(after, variables)
  assert np.any(updated['batch_stats']['mean'] != after['batch_stats']['mean'])
  _, after = face(variables, 2 * x, *args, True)
  chex.assert_trees_all_equal(after, variables)
  if name == 'linen':  # where nothing is mutable
    same(
      face.module.apply(
        variables, 2 * x, *args, False, update_running_average=False
      ),
      expected,
    )


def test_initializing_linen_updates_nothing(x):
  for kind, options, args in (
    ('BatchNorm', {}, ()),
    ('BatchRenorm', {'d_max': widening}, ()),
    ('DomainBatchNorm', {'num_domains': 4}, (DOMAIN,)),
  ):
    face = face_of('linen', kind, **options)
    variables = face.init(x, *args, False)
    chex.assert_trees_all_equal(face.init(x, *args, True), variables)
    stats = variables['batch_stats']
    assert ('steps' in stats) == (kind == 'BatchRenorm')
    same(stats['mean'], np.zeros_like(stats['mean']))
    same(stats['var'], np.ones_like(stats['var']))
    if 'steps' in stats:
      assert stats['steps'] == 0 and stats['steps'].dtype == jnp.int32


# Options that Flax does not have.


@both
def test_masked_examples_do_not_count(name, x):
  face = face_of(name, debias=True)
  variables = face.init(x, False)
  spoilt = np.where(MASK, x, np.nan)
  y, updated = face(variables, spoilt, False, mask=MASK)
  expected, without = face(variables, x, False, mask=MASK)
  chex.assert_trees_all_equal(updated, without)
  counted = x[MASK[:, 0]]
  close(updated['batch_stats']['mean'], counted.mean(0))
  close(updated['batch_stats']['var'], counted.var(0))
  close(y[MASK[:, 0]], expected[MASK[:, 0]])
  close(
    expected, (x - counted.mean(0)[None]) / np.sqrt(counted.var(0) + 1e-5)[None]
  )


@both
def test_ghosts_are_by_themselves_but_their_averages_are_not(name, x):
  face, plain = face_of(name, ghost_size=2, debias=True), face_of(name)
  y, updated = face(face.init(x, False), x, False)
  variables = plain.init(x, False)
  for i in range(0, 6, 2):
    one = (np.arange(6) // 2 == i // 2)[:, None]
    expected, _ = plain(variables, x, False, mask=one)
    close(y[i : i + 2], expected[i : i + 2])
  close(updated['batch_stats']['mean'], x.mean(0))
  close(updated['batch_stats']['var'], x.var(0))
  evaluated, _ = face(updated, x, True)
  expected, _ = plain(
    {
      'params': updated['params'],
      'batch_stats': {'mean': x.mean(0), 'var': x.var(0)},
    },
    x,
    True,
  )
  close(evaluated, expected)


@both
def test_unbiased_variances(name, x):
  face = face_of(name, unbiased=True, momentum=0.5)
  _, updated = face(face.init(x, False), x, False)
  close(updated['batch_stats']['var'], 0.5 + 0.5 * x.var(0, ddof=1))


@both
@pytest.mark.parametrize('kind', ['BatchNorm', 'BatchRenorm'])
def test_debias_begins_with_the_first_batch(name, kind, x):
  face = face_of(name, kind, debias=True, momentum=0.9)
  variables = face.init(x, False)
  same(variables['batch_stats']['weight'], np.zeros(3))
  assert variables['batch_stats']['weight'].dtype == jnp.float32
  _, variables = face(variables, x, False)
  moments = optax_ghm.Moments.of(x)
  same(variables['batch_stats']['mean'], moments.mean)
  same(variables['batch_stats']['var'], moments.variance())
  _, variables = face(variables, x + 1, False)
  close(variables['batch_stats']['weight'], np.full(3, 0.19))
  close(variables['batch_stats']['mean'], x.mean(0) + 0.1 / 0.19)
  plain = face_of(name, kind)
  assert set(plain.init(x, False)['batch_stats']) == {'mean', 'var'}


def schedules():
  return optax_ghm.renorm_schedules(start=0, r_end=2, d_end=2)


@both
def test_renorm_follows_its_schedules(name, x):
  r_max, d_max = schedules()
  face = face_of(name, 'BatchRenorm', r_max=r_max, d_max=d_max, epsilon=0.1)
  variables = face.init(x, False)
  call = jax.jit(lambda v, x: face(v, x, False))
  for step in range(3):
    stats = variables['batch_stats']
    assert int(stats['steps']) == step
    running = optax_ghm.RunningMoments(stats['mean'], stats['var'], jnp.ones(3))
    batch = x + step
    expected, _ = optax_ghm.batch_renorm(
      batch, running, r_max=1.0 + step, d_max=2.5 * step, epsilon=0.1
    )
    y, updated = call(variables, batch)
    close(y, expected)
    _, evaluated = face(variables, batch, True)
    assert int(evaluated['batch_stats']['steps']) == step
    variables = updated
  assert variables['batch_stats']['steps'].dtype == jnp.int32


@both
def test_renorm_by_numbers_counts_nothing(name, x):
  face = face_of(name, 'BatchRenorm', r_max=1.5, d_max=0.25)
  variables = face.init(x, False)
  assert set(variables['batch_stats']) == {'mean', 'var'}
  y, _ = face(variables, x, False)
  running = optax_ghm.RunningMoments.init((3,))
  expected, _ = optax_ghm.batch_renorm(x, running, r_max=1.5, d_max=0.25)
  close(y, expected)
  default = face_of(name, 'BatchRenorm')
  expected, _ = optax_ghm.batch_renorm(2 * x, running)
  close(default(default.init(x, False), 2 * x, False)[0], expected)


@both
def test_one_limit_may_be_a_schedule(name, x):
  for options in ({'r_max': widening}, {'d_max': widening}):
    face = face_of(name, 'BatchRenorm', **options)
    variables = face.init(x, False)
    y, updated = face(variables, x, False)
    assert int(updated['batch_stats']['steps']) == 1
    limits = {key: float(f(jnp.array(0))) for key, f in options.items()}
    expected, _ = optax_ghm.batch_renorm(
      x, optax_ghm.RunningMoments.init((3,)), **limits
    )
    close(y, expected)


@both
@pytest.mark.parametrize('shared', [True, False])
def test_domains_are_kept_apart(name, shared, x):
  face = face_of(
    name,
    'DomainBatchNorm',
    num_domains=4,
    shared_affine=shared,
    debias=True,
    scale_init=random,
    bias_init=random,
  )
  variables = face.init(x, DOMAIN, False)
  shape = (3,) if shared else (4, 3)
  params = variables['params']
  assert {u.shape for u in params.values()} == {shape}
  assert {u.shape for u in variables['batch_stats'].values()} == {(4, 3)}
  y, updated = face(variables, x, DOMAIN, False)
  evaluated, _ = face(updated, x, DOMAIN, True)
  stats = updated['batch_stats']
  plain = face_of(name, debias=True)
  for d in (0, 2):
    own = {
      'params': params if shared else {k: u[d] for k, u in params.items()},
      'batch_stats': {k: u[d] for k, u in variables['batch_stats'].items()},
    }
    one = DOMAIN == d
    expected, plainly = plain(own, x, False, mask=one[:, None])
    close(y[one], expected[one])
    all_close({k: u[d] for k, u in stats.items()}, plainly['batch_stats'])
    close(evaluated[one], plain(plainly, x, True)[0][one])
  same(stats['mean'][1], np.zeros(3))  # nothing of it came
  same(stats['weight'][1], np.zeros(3))
  # One domain for all, traced.
  call = jax.jit(lambda d: face(updated, x, d, False))
  y, only = call(jnp.array(1))
  expected, one = face(updated, x, np.full(6, 1), False)
  close(y, expected)
  all_close(only, one)
  same(only['batch_stats']['mean'][::2], stats['mean'][::2])


# Statistics for the record.


@both
@all_kinds
def test_stats_of_the_batch_are_kept_if_asked_for(name, kind, options, args, x):
  options = {**options, 'epsilon': 0.7, 'measure': True}
  face = face_of(name, kind, **options)
  variables = face.init(x, *args, False)
  before = {k: v for k, v in variables['batch_stats'].items() if k != 'steps'}
  running = optax_ghm.RunningMoments(
    before['mean'],
    before['var'],
    before.get('weight', jnp.ones_like(before['mean'])),
  )
  _, updated = face(variables, x, *args, False, mask=MASK)
  limits = {'r_max': 1.0, 'd_max': 5.0} if kind == 'BatchRenorm' else {}
  if kind == 'DomainBatchNorm':
    _, moments = optax_ghm.domain_batch_norm(x, *args, num_domains=4, mask=MASK)
  else:
    moments = optax_ghm.Moments.of(x, mask=MASK)
  expected = flow.batch_norm_stats(moments, running, epsilon=0.7, **limits)
  close(updated[STATS]['stats'].numbers, expected.numbers)
  assert isinstance(updated[STATS]['stats'], flow.BatchNormStats)
  # Also while the averages stay, but not in evaluation.
  for kwargs in (
    {'use_running_average': False, 'update_running_average': False},
    {'use_running_average': True},
  ):
    _, again = face(variables, 3 * x, *args, **kwargs)
    measured = STATS in again and np.any(again[STATS]['stats'].numbers != 0)
    assert measured == (not kwargs['use_running_average'])


def test_stats_are_measured_only_if_asked_for(x):
  norm = optax_ghm.linen.BatchNorm(False)
  variables = norm.init(jax.random.key(0), x)
  _, updated = norm.apply(variables, x, mutable=['batch_stats'])
  assert set(updated) == {'batch_stats'}
  norm = optax_ghm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
  norm(x)
  assert set(nnx.state(norm)) == {'scale', 'bias', 'mean', 'var'}
  kept = optax_ghm.nnx.BatchNorm(3, measure=True, rngs=nnx.Rngs(0))
  kept.eval()
  kept(x)
  same(kept.stats.get_value().numbers, np.zeros(5))
