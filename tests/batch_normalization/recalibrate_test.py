"""Running averages replaced by the statistics of a whole data set."""

from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import optax_ghm
import optax_ghm.linen
import optax_ghm.nnx

recalibrate = optax_ghm.linen.recalibrate
same = np.testing.assert_array_equal
KEY = jax.random.key(0)
linen_norms = pytest.mark.parametrize(
  'norm', [nn.BatchNorm, optax_ghm.linen.BatchNorm], ids=['flax', 'ours']
)
nnx_norms = pytest.mark.parametrize(
  'norm', [nnx.BatchNorm, optax_ghm.nnx.BatchNorm], ids=['flax', 'ours']
)


def close(found, expected, rtol=2e-5):
  np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol / 10)


@pytest.fixture
def batches(rng):
  """Unequal ones, that are far from 0 and differ."""
  return [
    rng.normal([9 + i, -3, 0], [1, 2 + i, 0.5], size=(n, 3)).astype(np.float32)
    for i, n in enumerate((6, 2, 6))
  ]


@pytest.fixture
def masks(rng):
  masks = [rng.uniform(size=(n, 1)) < 0.7 for n in (6, 2, 6)]
  masks[0][0] = False
  return masks


def training(model, **kwargs):
  """A function that runs a Linen model in training mode."""

  def apply(variables, batch):
    x, options = batch if isinstance(batch, tuple) else (batch, {})
    return model.apply(
      variables, x, mutable=['batch_stats'], **options, **kwargs
    )

  return apply


def call(model, batch):
  """Runs an NNX model in training mode."""
  x, options = batch if isinstance(batch, tuple) else (batch, {})
  return model(x, **options)


def by_numpy(batches, masks=None):
  """Mean and variance of everything, in float64."""
  x = np.concatenate(batches).astype(np.float64)
  if masks is not None:
    x = x[np.concatenate(masks)[:, 0]]
  return {'mean': x.mean(0), 'var': x.var(0)}


def assert_is(stats, expected, rtol=2e-5):
  for name, value in expected.items():
    assert stats[name].dtype == jnp.float32
    close(stats[name], value, rtol)


def nnx_stats(norm):
  found = nnx.to_flat_state(nnx.state(norm, nnx.BatchStat))
  return {path[-1]: variable.get_value() for path, variable in found}


# One layer.


@pytest.mark.parametrize(
  ('norm', 'masked'),
  [
    (nn.BatchNorm, False),
    (optax_ghm.linen.BatchNorm, True),
  ],
)
def test_linen_of_unequal_batches(norm, masked, batches, masks):
  model = norm(use_running_average=False)
  variables = model.init(KEY, batches[0])
  before = jax.tree.map(jnp.copy, variables)
  data = batches
  if masked:
    data = [(x, {'mask': m}) for x, m in zip(batches, masks, strict=True)]
  found = recalibrate(training(model), variables, iter(data))
  expected = by_numpy(batches, masks if masked else None)
  assert_is(found['batch_stats'], expected)
  chex.assert_trees_all_equal(found['params'], before['params'])
  chex.assert_trees_all_equal(variables, before)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, variables)
  again = recalibrate(training(model), found, data)  # nothing is left of before
  chex.assert_trees_all_equal(again, found)


@pytest.mark.parametrize(
  ('norm', 'masked'),
  [
    (nnx.BatchNorm, True),
    (optax_ghm.nnx.BatchNorm, False),
  ],
)
def test_nnx_of_unequal_batches(norm, masked, batches, masks):
  model = norm(3, rngs=nnx.Rngs(0))
  data = batches
  if masked:
    data = [(x, {'mask': m}) for x, m in zip(batches, masks, strict=True)]
  graph, kept = nnx.graphdef(model), jax.tree.map(jnp.copy, nnx.state(model))
  assert optax_ghm.nnx.recalibrate(call, model, iter(data)) is None
  assert_is(nnx_stats(model), by_numpy(batches, masks if masked else None))
  assert type(model) is norm and nnx.graphdef(model) == graph
  chex.assert_trees_all_equal(
    nnx.state(model, nnx.Param), nnx.filter_state(kept, nnx.Param)
  )


def test_our_options_change_nothing_but_the_weight(batches):
  batches = batches[::2]
  expected = by_numpy(batches)
  options = {'debias': True, 'unbiased': True, 'ghost_size': 2}
  linen = optax_ghm.linen.BatchNorm(False, **options)
  variables = linen.init(KEY, batches[0])
  stats = recalibrate(training(linen), variables, batches)['batch_stats']
  model = optax_ghm.nnx.BatchNorm(3, **options, rngs=nnx.Rngs(0))
  optax_ghm.nnx.recalibrate(call, model, batches)
  for found in (stats, nnx_stats(model)):
    assert_is(found, expected)
    same(found['weight'], np.ones(3))


def widening(step):
  return 1 + step.astype(jnp.float32)


def test_renorm_keeps_its_steps(batches):
  batches = batches[::2]
  linen = optax_ghm.linen.BatchRenorm(False, r_max=widening)
  variables = linen.init(KEY, batches[0])
  _, updated = linen.apply(variables, batches[0], mutable=['batch_stats'])
  variables = {**variables, **updated}
  stats = recalibrate(training(linen), variables, batches)['batch_stats']
  model = optax_ghm.nnx.BatchRenorm(3, r_max=widening, rngs=nnx.Rngs(0))
  model(batches[0])
  optax_ghm.nnx.recalibrate(call, model, batches)
  for found in (stats, nnx_stats(model)):
    assert_is(found, by_numpy(batches))
    assert found['steps'] == 1 and found['steps'].dtype == jnp.int32


DOMAINS = [
  np.array([0, 2, 2, 0, 2, 0]),
  np.array([2, 0, 0, 0, 0, 2]),
]


@pytest.mark.parametrize('face', ['linen', 'nnx'])
def test_domains_have_their_own(face, batches, masks):
  batches = batches[::2]
  data = [
    (x, {'domain': d, 'mask': m})
    for x, d, m in zip(batches, DOMAINS, masks[::2], strict=True)
  ]
  if face == 'linen':
    norm = optax_ghm.linen.DomainBatchNorm(False, num_domains=4, debias=True)
    variables = norm.init(KEY, batches[0], DOMAINS[0])
    stats = recalibrate(training(norm), variables, data)['batch_stats']
  else:
    norm = optax_ghm.nnx.DomainBatchNorm(
      3, num_domains=4, debias=True, rngs=nnx.Rngs(0)
    )
    optax_ghm.nnx.recalibrate(call, norm, data)
    stats = nnx_stats(norm)
  for d in (0, 2):
    own = [
      m & (of == d)[:, None] for m, of in zip(masks[::2], DOMAINS, strict=True)
    ]
    expected = by_numpy(batches, own)
    assert_is({name: u[d] for name, u in stats.items()}, expected)
    same(stats['weight'][d], np.ones(3))
  for d in (1, 3):  # of which there was nothing
    same(stats['mean'][d], np.zeros(3))
    same(stats['var'][d], np.ones(3))
    same(stats['weight'][d], np.zeros(3))


def test_other_feature_axes(rng):
  x = rng.normal(2, 3, size=(8, 3, 2)).astype(np.float32)
  linen = optax_ghm.linen.BatchNorm(False, axis=(-1, 1))
  found = recalibrate(training(linen), linen.init(KEY, x[:4]), np.split(x, 2))[
    'batch_stats'
  ]
  wide = x.astype(np.float64)
  assert_is(found, {'mean': wide.mean(0), 'var': wide.var(0)})
  model = nnx.BatchNorm(3, axis=1, rngs=nnx.Rngs(0))
  with jax.numpy_rank_promotion('allow'):  # in Flax
    optax_ghm.nnx.recalibrate(call, model, np.split(x, 2))
  expected = {'mean': wide.mean((0, 2)), 'var': wide.var((0, 2))}
  assert_is(nnx_stats(model), expected)


# Networks.


def normalized(x):
  """x by its own mean and variance."""
  mean, var = x.mean(0), x.var(0)
  return (x - mean) / np.sqrt(var + 1e-5)


def by_hand(batches, first, second):
  """The inputs of the norms of two layers (W, b), in float64."""
  seen = [], []
  for x in batches:
    h = x.astype(np.float64) @ first[0] + first[1]
    seen[0].append(h)
    h = np.maximum(normalized(h), 0) @ second[0] + second[1]
    seen[1].append(h)
  return [by_numpy(s) for s in seen]


class LinenNet(nn.Module):
  norm: Any

  @nn.compact
  def __call__(self, x, train=True):
    x = nn.Dense(4)(x)
    x = nn.relu(self.norm(use_running_average=not train)(x))
    return self.norm(use_running_average=not train)(nn.Dense(2)(x))


@linen_norms
def test_linen_layers_are_normalized_by_their_batches(norm, batches):
  batches = batches[::2]
  model = LinenNet(norm)
  variables = jax.jit(model.init)(KEY, batches[0])
  variables['other'] = {'kept': jnp.ones(2)}
  found = recalibrate(training(model), variables, batches)
  dense = jax.tree.map(np.float64, variables['params'])
  layers = [
    (dense[f'Dense_{i}']['kernel'], dense[f'Dense_{i}']['bias']) for i in (0, 1)
  ]
  for i, expected in enumerate(by_hand(batches, *layers)):
    assert_is(found['batch_stats'][f'BatchNorm_{i}'], expected, 1e-4)
  assert set(found) == set(variables)
  chex.assert_trees_all_equal(
    {**found, 'batch_stats': None}, {**variables, 'batch_stats': None}
  )


class NnxNet(nnx.Module):
  def __init__(self, norm):
    rngs = nnx.Rngs(0)
    self.first = nnx.Linear(3, 4, rngs=rngs)
    self.norms = nnx.List([norm(4, rngs=rngs), norm(2, rngs=rngs)])
    self.last = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    return self.norms[1](self.last(nnx.relu(self.norms[0](self.first(x)))))


@nnx_norms
def test_nnx_layers_are_normalized_by_their_batches(norm, batches):
  batches = batches[::2]
  model = NnxNet(norm)
  layers = [
    (np.float64(u.kernel[...]), np.float64(u.bias[...]))
    for u in (model.first, model.last)
  ]
  kept = jax.tree.map(jnp.copy, nnx.state(model, nnx.Not(nnx.BatchStat)))
  optax_ghm.nnx.recalibrate(call, model, batches)
  for i, expected in enumerate(by_hand(batches, *layers)):
    assert_is(nnx_stats(model.norms[i]), expected, 1e-4)
  chex.assert_trees_all_equal(nnx.state(model, nnx.Not(nnx.BatchStat)), kept)


def test_layers_with_frozen_averages_keep_them(batches):
  """Such a layer normalizes by its averages."""
  batches = batches[::2]
  frozen = nnx.BatchNorm(3, rngs=nnx.Rngs(0), use_running_average=True)
  frozen.mean.set_value(jnp.full(3, 7.0))
  model = nnx.Sequential(frozen, optax_ghm.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
  optax_ghm.nnx.recalibrate(call, model, batches)
  same(frozen.mean.get_value(), np.full(3, 7.0))
  same(frozen.var.get_value(), np.ones(3))
  seen = [(x - np.float64(7)) / np.sqrt(1 + 1e-5) for x in batches]
  assert_is(nnx_stats(model.layers[1]), by_numpy(seen))

  linen = nn.Sequential([nn.BatchNorm(True), optax_ghm.linen.BatchNorm(False)])
  variables = linen.init(KEY, batches[0])
  before = variables['batch_stats']['layers_0']
  before['mean'] = jnp.full(3, 7.0)
  found = recalibrate(training(linen), variables, batches)['batch_stats']
  chex.assert_trees_all_equal(found['layers_0'], before)
  assert_is(found['layers_1'], by_numpy(seen))


class Shared(nn.Module):
  @nn.compact
  def __call__(self, x):
    norm = optax_ghm.linen.BatchNorm(False)
    norm(x)
    return norm(2 * x[:2])


class NnxShared(nnx.Module):
  def __init__(self):
    self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    self.same = self.norm

  def __call__(self, x):
    self.norm(x)
    return self.same(2 * x[:2])


def test_a_module_that_is_called_twice_counts_both(batches):
  batches = batches[::2]
  expected = by_numpy([*batches, *(2 * x[:2] for x in batches)])
  variables = Shared().init(KEY, batches[0])
  found = recalibrate(training(Shared()), variables, batches)
  assert_is(found['batch_stats']['BatchNorm_0'], expected)
  model = NnxShared()
  optax_ghm.nnx.recalibrate(call, model, batches)
  assert_is(nnx_stats(model.norm), expected)


class Dropping(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dropout(0.5, deterministic=False)(x)
    nn.BatchNorm(False)(x)
    return x


class NnxDropping(nnx.Module):
  def __init__(self):
    self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    self.norm = optax_ghm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return self.norm(self.dropout(x))


def test_other_models_in_apply_are_let_alone(batches):
  """A teacher, say, with variables of its own."""
  batches = batches[::2]
  teacher, model = nn.BatchNorm(False), optax_ghm.linen.BatchNorm(False)
  its, variables = (m.init(KEY, batches[0]) for m in (teacher, model))

  def apply(variables, x):
    x, _ = teacher.apply(its, 3 * x, mutable=['batch_stats'])
    return model.apply(variables, x, mutable=['batch_stats'])

  found = recalibrate(apply, variables, batches)['batch_stats']
  assert_is(found, by_numpy([normalized(3 * x) for x in batches]), 1e-4)


def test_dropout_in_the_model(batches):
  data = [
    (x, {'rngs': {'dropout': jax.random.key(i)}})
    for i, x in enumerate(batches[::2])
  ]
  apply = training(Dropping())
  variables = Dropping().init({'params': KEY, 'dropout': KEY}, batches[0])
  dropped = [np.asarray(apply(variables, batch)[0]) for batch in data]
  assert np.any((dropped[0] == 0) != (dropped[1] == 0))
  found = recalibrate(apply, variables, data)['batch_stats']
  assert_is(found['BatchNorm_0'], by_numpy(dropped))

  model = NnxDropping()
  kept = jax.tree.map(jnp.copy, nnx.state(model, nnx.RngCount))
  optax_ghm.nnx.recalibrate(call, model, batches[::2])
  chex.assert_trees_all_equal(nnx.state(model, nnx.RngCount), kept)
  assert np.all(model.norm.var.get_value()[:1] > 50)  # of 0 and about 20


# Under transformations.


class Block(nn.Module):
  norm: Any

  @nn.compact
  def __call__(self, x, _=None):
    return self.norm(use_running_average=False)(nn.Dense(3)(x)), None


def seen_in_turn(batches, kernels, biases):
  """The inputs of the norms of two blocks, in float64."""
  seen = [], []
  for x in batches:
    h = np.float64(x) @ np.float64(kernels[0]) + np.float64(biases[0])
    seen[0].append(h)
    h = normalized(h) @ np.float64(kernels[1]) + np.float64(biases[1])
    seen[1].append(h)
  return seen


def test_linen_scan_remat_and_jit(batches):
  norm = nn.BatchNorm
  batches = batches[::2]
  stack = nn.scan(
    nn.remat(nn.jit(Block)),
    variable_axes={'params': 0, 'batch_stats': 0},
    split_rngs={'params': True},
    length=2,
  )(norm)
  variables = jax.jit(stack.init)(KEY, batches[0], None)
  stack.apply(variables, batches[0], None, mutable=['batch_stats'])  # compiled

  found = recalibrate(
    lambda v, x: stack.apply(v, x, None, mutable=['batch_stats']),
    variables,
    batches,
  )
  chex.assert_trees_all_equal(found['params'], variables['params'])
  dense = variables['params']['Dense_0']
  seen = seen_in_turn(batches, dense['kernel'], dense['bias'])
  (stats,) = found['batch_stats'].values()
  for i in (0, 1):
    own = {name: u[i] for name, u in stats.items()}
    assert_is(own, by_numpy(seen[i]), 1e-4)
  _, after = stack.apply(found, batches[0], None, mutable=['batch_stats'])
  chex.assert_trees_all_equal_shapes(after['batch_stats'], found['batch_stats'])


def test_linen_vmap(batches):
  norm = optax_ghm.linen.BatchNorm
  batches = batches[::2]
  models = nn.vmap(
    norm,
    variable_axes={'params': 0, 'batch_stats': 0},
    split_rngs={'params': True},
  )(use_running_average=False)
  pairs = [np.stack([x, 3 - x]) for x in batches]
  found = recalibrate(training(models), models.init(KEY, pairs[0]), pairs)[
    'batch_stats'
  ]
  for i in (0, 1):
    own = {name: u[i] for name, u in found.items()}
    assert_is(own, by_numpy([pair[i] for pair in pairs]))


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
  sequences = [np.stack([x, 2 * x, -x]) for x in batches[::2]]
  zero = jnp.zeros([])
  variables = Step().init(KEY, zero, batches[0])
  found = recalibrate(
    lambda v, x: scanned.apply(v, zero, x, mutable=['batch_stats']),
    variables,
    sequences,
  )
  assert_is(
    found['batch_stats']['BatchNorm_0'],
    by_numpy([x.reshape(-1, 3) for x in sequences]),
  )


def test_the_axis_of_a_vmap_is_pooled(batches):
  """Its parts count like the parts of several devices."""
  batches = batches[::2]
  data = [
    (x.reshape(2, -1, 3), {'mask': np.ones((2, len(x) // 2, 1), bool)})
    for x in batches
  ]
  data[0][1]['mask'][0] = False
  counted = [batches[0][3:], *batches[1:]]

  def devices(variables, x, mask):
    norm = optax_ghm.linen.BatchNorm(False, axis_name='d')
    return norm.apply(variables, x, mask=mask, mutable=['batch_stats'])

  def apply(variables, batch):
    x, options = batch
    y, updated = jax.vmap(devices, (None, 0, 0), axis_name='d')(
      variables, x, options['mask']
    )
    return y, jax.tree.map(lambda u: u[0], updated)

  start = optax_ghm.linen.BatchNorm(False).init(KEY, batches[0])
  assert_is(recalibrate(apply, start, data)['batch_stats'], by_numpy(counted))


class NnxBlock(nnx.Module):
  def __init__(self, norm, key):
    rngs = nnx.Rngs(key)
    self.dense = nnx.Linear(3, 3, rngs=rngs)
    self.norm = norm(3, rngs=rngs)

  @nnx.jit
  def __call__(self, x):
    return self.norm(self.dense(x))


def nnx_stack(norm):
  keys = jax.random.split(KEY, 2)
  return nnx.vmap(lambda key: NnxBlock(norm, key))(keys)


def test_nnx_scan_remat_and_jit(batches):
  norm = optax_ghm.nnx.BatchNorm
  batches = batches[::2]
  stack = nnx_stack(norm)

  def apply(stack, x):
    return nnx.scan(
      lambda x, block: nnx.remat(NnxBlock.__call__)(block, x),
      in_axes=(nnx.Carry, 0),
      out_axes=nnx.Carry,
    )(x, stack)

  seen = seen_in_turn(batches, stack.dense.kernel[...], stack.dense.bias[...])
  apply(stack, batches[0])  # compiled, as it is
  optax_ghm.nnx.recalibrate(apply, stack, batches)
  found = nnx_stats(stack)
  for i in (0, 1):
    own = {name: u[i] for name, u in found.items()}
    assert_is(own, by_numpy(seen[i]), 1e-4)
  apply(stack, batches[0])
  assert np.any(stack.norm.mean.get_value() != found['mean'])


def test_nnx_vmap(batches):
  norm = nnx.BatchNorm
  batches = batches[::2]
  models = nnx_stack(norm)
  kernels, biases = (
    np.float64(u[...]) for u in (models.dense.kernel, models.dense.bias)
  )
  axes = nnx.StateAxes({nnx.Param: 0, nnx.BatchStat: 0})
  optax_ghm.nnx.recalibrate(
    nnx.vmap(NnxBlock.__call__, in_axes=(axes, None)), models, batches
  )
  for i in (0, 1):
    own = {name: u[i] for name, u in nnx_stats(models).items()}
    assert_is(own, by_numpy([x @ kernels[i] + biases[i] for x in batches]))


class NoPytree(nnx.BatchNorm, pytree=False):
  pass


def test_modules_that_are_no_pytrees(batches):
  model = NoPytree(3, rngs=nnx.Rngs(0))
  optax_ghm.nnx.recalibrate(call, model, batches[::2])
  assert_is(nnx_stats(model), by_numpy(batches[::2]))


# Uses, and training that continues afterwards.


def test_it_undoes_a_shift_of_the_data(rng):
  """AdaBN."""
  model = nnx.Sequential(
    optax_ghm.nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
    nnx.Linear(3, 2, rngs=nnx.Rngs(1)),
  )
  source = rng.normal(size=(200, 3)).astype(np.float32)
  target = 5 * source + np.array([[100, -7, 0]], np.float32)

  def evaluated(x):
    view = nnx.clone(model)
    view.eval()
    return np.asarray(view(x))

  optax_ghm.nnx.recalibrate(call, model, np.split(source, 4))
  expected = evaluated(source)
  assert np.abs(evaluated(target) - expected).max() > 10
  optax_ghm.nnx.recalibrate(call, model, np.split(target, 4))
  np.testing.assert_allclose(evaluated(target), expected, atol=1e-3)


def test_nnx_models_train_on_as_if_nothing_had_been(batches):
  batches = batches[::2]
  model = NnxNet(optax_ghm.nnx.BatchNorm)
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, x):
    grads = nnx.grad(lambda m: jnp.mean(jnp.sin(m(x))))(model)
    optimizer.update(model, grads)

  step(model, optimizer, batches[0])
  twin, its = nnx.clone((model, optimizer))
  paths = list(nnx.to_flat_state(nnx.state(model)).paths)
  optax_ghm.nnx.recalibrate(call, model, batches)
  assert list(nnx.to_flat_state(nnx.state(model)).paths) == paths
  for pair in ((model, optimizer), (twin, its)):
    step(*pair, batches[1])
  chex.assert_trees_all_equal(
    nnx.state(model, nnx.Param), nnx.state(twin, nnx.Param)
  )
  assert [type(m) for m in model.norms] == [optax_ghm.nnx.BatchNorm] * 2


def test_it_is_compiled_once_for_batches_of_a_shape(batches):
  data = [batches[0]] * 3 + [batches[1]] * 2
  model, calls = nn.BatchNorm(False), []
  variables = model.init(KEY, batches[0])

  def apply(variables, x):
    calls.append(x.shape)
    assert isinstance(x, jax.core.Tracer)
    return model.apply(variables, x, mutable=['batch_stats'])

  for _ in range(2):
    recalibrate(apply, variables, data)
    assert calls == [(6, 3), (2, 3)]
  calls.clear()

  def nnx_apply(model, x):
    calls.append(x.shape)
    return model(x)

  twin = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
  for _ in range(2):
    optax_ghm.nnx.recalibrate(nnx_apply, twin, data)
    assert calls == [(6, 3), (2, 3)]
  twin.eval()  # another model, to the compiler
  with pytest.raises(ValueError, match='training mode'):
    optax_ghm.nnx.recalibrate(nnx_apply, twin, data)


def test_features_that_are_not_finite_keep_what_they_had(batches):
  batches = batches[::2]
  batches[1][0, 1], batches[0][3, 2] = np.nan, np.inf
  expected = by_numpy([x[:, :1] for x in batches])
  linen = optax_ghm.linen.BatchNorm(False, debias=True)
  variables = linen.init(KEY, batches[0])
  _, updated = linen.apply(variables, batches[0], mutable=['batch_stats'])
  before = updated['batch_stats']
  stats = recalibrate(training(linen), {**variables, **updated}, batches)
  model = optax_ghm.nnx.BatchNorm(3, debias=True, rngs=nnx.Rngs(0))
  model(batches[0])
  optax_ghm.nnx.recalibrate(call, model, batches)
  for found in (stats['batch_stats'], nnx_stats(model)):
    for name in ('mean', 'var', 'weight'):
      same(found[name][1:], before[name][1:])
    assert_is({n: found[n][:1] for n in expected}, expected)
    same(found['weight'][:1], np.ones(1))


def test_features_that_never_counted_keep_theirs(batches):
  batches, masks = batches[::2], [np.array([[True, False, True]])] * 2
  model = nn.BatchNorm(False)
  variables = model.init(KEY, batches[0])
  variables['batch_stats']['var'] = jnp.full(3, 4.0)
  data = [(x, {'mask': m}) for x, m in zip(batches, masks, strict=True)]
  found = recalibrate(training(model), variables, data)['batch_stats']
  assert (found['mean'][1], found['var'][1]) == (0, 4)
  expected = by_numpy([x[:, ::2] for x in batches])
  assert_is({name: u[::2] for name, u in found.items()}, expected)


# Errors.


def test_linen_says_what_is_missing(batches):
  model = LinenNet(optax_ghm.linen.BatchNorm)
  variables = jax.jit(model.init)(KEY, batches[0])
  with pytest.raises(ValueError, match='batches must'):
    recalibrate(training(model), variables, [])
  with pytest.raises(ValueError, match='training mode'):
    recalibrate(training(model, train=False), variables, batches)
  with pytest.raises(ValueError, match='mutable'):
    recalibrate(lambda v, x: model.apply(v, x, False), variables, batches)
  with pytest.raises(ValueError, match='mutable'):
    recalibrate(
      lambda v, x: model.apply(v, x, False, mutable=['other']),
      variables,
      batches,
    )
  with pytest.raises(ValueError, match='mutable'):
    recalibrate(lambda v, x: training(model)(v, x)[1], variables, batches)
  with pytest.raises(ValueError, match='batch_stats'):
    recalibrate(training(model), {'params': variables['params']}, batches)
  dense = nn.Dense(2)
  with pytest.raises(ValueError, match='training mode'):
    recalibrate(
      training(dense),
      {**dense.init(KEY, batches[0]), 'batch_stats': {}},
      batches,
    )


@pytest.mark.parametrize('norm', [nnx.BatchNorm, optax_ghm.nnx.BatchNorm])
def test_nnx_says_what_is_missing(norm, batches):
  model = norm(3, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='batches must'):
    optax_ghm.nnx.recalibrate(call, model, [])
  model.eval()
  with pytest.raises(ValueError, match='training mode'):
    optax_ghm.nnx.recalibrate(call, model, batches)
  same(model.mean.get_value(), np.zeros(3))
  optax_ghm.nnx.recalibrate(lambda m, x: m(x, False), model, batches)
  assert_is(nnx_stats(model), by_numpy(batches))
  with pytest.raises(ValueError, match='training mode'):
    optax_ghm.nnx.recalibrate(call, nnx.Linear(3, 2, rngs=nnx.Rngs(0)), batches)


def test_linen_subclasses_are_measured_where_they_normalize(batches):
  class Doubling(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, train):
      return super().__call__(2 * x, use_running_average=not train)

  model = Doubling()
  variables = model.init(KEY, batches[0], False)
  found = recalibrate(
    lambda v, x: model.apply(v, x, True, mutable=['batch_stats']),
    variables,
    batches,
  )
  close(found['batch_stats']['mean'], 2 * np.concatenate(batches).mean(0))


def test_nnx_subclasses_with_calls_of_their_own_are_refused(batches):
  class Doubling(nnx.BatchNorm):
    def __call__(self, x, train):
      return super().__call__(2 * x, use_running_average=not train)

  model = Doubling(3, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='Doubling has a __call__ of its own'):
    optax_ghm.nnx.recalibrate(lambda m, x: m(x, True), model, batches)


def test_nnx_dropout_differs_from_batch_to_batch():
  class Dropping(nnx.Module):
    def __init__(self):
      self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
      self.norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return self.norm(self.dropout(x))

  model = Dropping()
  optax_ghm.nnx.recalibrate(call, model, [np.ones((4, 1), np.float32)] * 100)
  # The mean of 400 numbers that are 0 or 2; with 4 it would be 0, 0.5, ...
  np.testing.assert_allclose(model.norm.mean.get_value(), 1, atol=0.2)
  assert float(model.norm.mean.get_value()[0] * 2) % 1 != 0


def test_flax_says_that_nothing_is_mutable(batches):
  model = optax_ghm.linen.BatchNorm(False)
  variables = model.init(KEY, batches[0])
  with pytest.raises(flax.errors.ModifyScopeVariableError, match='immutable'):
    recalibrate(model.apply, variables, batches)


def test_averages_of_16_bits(rng):
  x = jnp.ones((600, 1), jnp.bfloat16)
  model = nn.BatchNorm(
    False, force_float32_reductions=False, param_dtype=jnp.bfloat16
  )
  variables = model.init(KEY, x)
  found = recalibrate(training(model), variables, [x, 3 * x])
  assert found['batch_stats']['mean'].dtype == jnp.bfloat16
  close(np.float32(found['batch_stats']['mean']), 2)
  close(np.float32(found['batch_stats']['var']), 1)


def test_views_of_nnx_models_reach_our_modules():
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(
    nnx.BatchNorm(3, rngs=rngs), optax_ghm.nnx.BatchNorm(3, rngs=rngs)
  )
  view = nnx.view(model, use_running_average=True)
  assert [norm.use_running_average for norm in view.layers] == [True, True]
