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
from tests.support import oracles_batch_norm as oracle
from tests.support.faces_batch_norm import (
  Linen,
  Nnx,
  both,
  face_of,
  start,
  widening,
)
from tests.support.oracles_batch_norm import (
  assert_is,
  by_numpy,
  normalized,
  seen_in_turn,
)

PROGRAMS = 170
recalibrate = optax_ghm.linen.recalibrate
same = np.testing.assert_array_equal
homes = pytest.mark.parametrize('flax', [True, False], ids=['flax', 'ours'])


@pytest.fixture
def masks(rng):
  masks = [rng.uniform(size=(6, 1)) < 0.7 for _ in range(2)]
  masks[0][0] = False
  return masks


# One layer.


@both
@homes
def test_unequal_batches_with_and_without_masks(name, flax, batches, masks):
  """The last is smaller, and nothing is left of what was before."""
  face = face_of(name, flax=flax, use_running_average=False)
  variables = start(face, batches[0])
  before = jax.tree.map(np.array, variables)
  batches = [*batches, batches[0][:2] - 7]
  masks = [*masks, np.ones((2, 1), bool)]
  data, expected = batches, by_numpy(batches)
  if flax == (name == 'nnx'):
    data = [(x, {'mask': m}) for x, m in zip(batches, masks, strict=True)]
    expected = by_numpy(batches, masks)
  found = face.recalibrate(variables, iter(data))
  assert_is(found['batch_stats'], expected)
  chex.assert_trees_all_equal(found['params'], before['params'])
  chex.assert_trees_all_equal(variables, before)
  chex.assert_trees_all_equal_shapes_and_dtypes(found, before)
  again = face.recalibrate(found, data)
  chex.assert_trees_all_equal(again, found)


@both
@pytest.mark.parametrize(
  ('kind', 'options'),
  [
    ('BatchNorm', {'debias': True, 'unbiased': True, 'ghost_size': 2}),
    ('BatchRenorm', {'r_max': widening}),
  ],
)
def test_our_options_change_nothing_but_the_weight(
  name, kind, options, batches
):
  """Renormalization keeps its steps."""
  face = face_of(name, kind, use_running_average=False, **options)
  variables = start(face, batches[0])
  if 'r_max' in options:
    variables['batch_stats']['steps'] += 1
  found = face.recalibrate(variables, batches)['batch_stats']
  assert_is(found, by_numpy(batches))
  if 'r_max' in options:
    assert found['steps'] == 1 and found['steps'].dtype == jnp.int32
  else:
    same(found['weight'], np.ones(3))


DOMAINS = [np.array([0, 2, 2, 0, 2, 0]), np.array([2, 0, 0, 0, 0, 2])]


@both
def test_domains_have_their_own(name, batches, masks):
  face = face_of(
    name,
    'DomainBatchNorm',
    use_running_average=False,
    num_domains=4,
    debias=True,
  )
  data = [
    (x, {'domain': d, 'mask': m})
    for x, d, m in zip(batches, DOMAINS, masks, strict=True)
  ]
  found = face.recalibrate(start(face, batches[0], DOMAINS[0]), data)
  stats = jax.device_get(found['batch_stats'])
  for d in (0, 2):
    own = [m & (of == d)[:, None] for m, of in zip(masks, DOMAINS, strict=True)]
    assert_is({k: u[d] for k, u in stats.items()}, by_numpy(batches, own))
    same(stats['weight'][d], np.ones(3))
  for d in (1, 3):  # of which there was nothing
    same(stats['mean'][d], np.zeros(3))
    same(stats['var'][d], np.ones(3))
    same(stats['weight'][d], np.zeros(3))


@pytest.mark.parametrize(
  ('name', 'flax', 'axis'), [('linen', False, (-1, 1)), ('nnx', True, 1)]
)
def test_other_feature_axes(name, flax, axis, rng):
  x = rng.normal(2, 3, size=(8, 3, 2)).astype(np.float32)
  face = face_of(name, flax=flax, axis=axis, use_running_average=False)
  with jax.numpy_rank_promotion('allow'):  # in Flax
    found = face.recalibrate(start(face, x[:4]), np.split(x, 2))['batch_stats']
  wanted = oracle.moments_of(x.astype(np.float64), axis)
  assert_is(found, {'mean': wanted.mean, 'var': wanted.var})


@both
def test_features_that_are_not_finite_or_never_counted_keep_theirs(
  name, batches
):
  batches[1][0, 1], batches[0][3, 2] = np.nan, np.inf
  face = face_of(name, use_running_average=False, debias=True)
  variables = start(face, batches[0])
  before = {
    'mean': np.float32([5, 6, 7]),
    'var': np.float32([2, 3, 4]),
    'weight': np.full(3, 0.5, np.float32),
  }
  variables['batch_stats'] = before
  found = face.recalibrate(variables, batches)['batch_stats']
  for key, u in before.items():
    same(found[key][1:], u[1:])
  wanted = by_numpy([x[:, :1] for x in batches])
  assert_is({k: np.asarray(found[k])[:1] for k in wanted}, wanted)
  same(found['weight'][:1], np.ones(1))
  mask = np.array([[True, False, False]])
  data = [(x, {'mask': mask}) for x in batches]
  masked = face.recalibrate(variables, data)['batch_stats']
  chex.assert_trees_all_equal(masked, found)


def test_averages_of_16_bits():
  x = np.ones((600, 1), jnp.bfloat16)
  face = face_of(
    'linen',
    flax=True,
    use_running_average=False,
    force_float32_reductions=False,
    param_dtype=jnp.bfloat16,
  )
  found = face.recalibrate(start(face, x), [x, 3 * x])['batch_stats']
  for key, value in (('mean', 2), ('var', 1)):
    assert found[key].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found[key]), value)


# Networks.


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


@pytest.mark.parametrize('model', [Linen(Shared()), Nnx(NnxShared)])
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


# Errors.


def test_linen_says_what_is_missing(batches):
  model = LinenNet(optax_ghm.linen.BatchNorm)
  variables = start(Linen(model), batches[0])

  def applied(**kwargs):
    return lambda v, x: model.apply(v, x, **kwargs)

  training = applied(mutable=['batch_stats'])
  for apply, data, match in (
    (training, [], 'batches must'),
    (applied(train=False, mutable=['batch_stats']), batches, 'training mode'),
    (applied(train=False), batches, 'mutable'),
    (applied(train=False, mutable=['other']), batches, 'mutable'),
    (lambda v, x: training(v, x)[1], batches, 'mutable'),
  ):
    with pytest.raises(ValueError, match=match):
      recalibrate(apply, variables, data)
  with pytest.raises(ValueError, match='batch_stats'):
    recalibrate(training, {'params': variables['params']}, batches)
  with pytest.raises(ValueError, match='training mode'):
    recalibrate(
      lambda v, x: (x, {'batch_stats': v['batch_stats']}),
      {'batch_stats': {}},
      batches,
    )
  with pytest.raises(flax.errors.ModifyScopeVariableError, match='immutable'):
    recalibrate(applied(), variables, batches)  # as Flax says


@homes
def test_nnx_says_what_is_missing(flax, batches):
  model = (nnx if flax else optax_ghm.nnx).BatchNorm(3, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='batches must'):
    optax_ghm.nnx.recalibrate(call, model, [])
  model.eval()
  with pytest.raises(ValueError, match='training mode'):
    optax_ghm.nnx.recalibrate(call, model, batches)
  same(model.mean.get_value(), np.zeros(3))
  optax_ghm.nnx.recalibrate(lambda m, x: m(x, False), model, batches)
  assert_is(nnx.to_pure_dict(nnx.state(model)), by_numpy(batches))
  with pytest.raises(ValueError, match='training mode'):
    optax_ghm.nnx.recalibrate(call, nnx.Linear(3, 2, rngs=nnx.Rngs(0)), batches)


def test_linen_subclasses_are_measured_where_they_normalize(batches):
  class Doubling(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
      return super().__call__(2 * x, use_running_average=False)

  model = Linen(Doubling())
  found = model.recalibrate(start(model, batches[0]), batches)
  assert_is(found['batch_stats'], by_numpy([2 * x for x in batches]))


def test_nnx_subclasses_with_calls_of_their_own_are_refused(batches):
  class Doubling(nnx.BatchNorm):
    def __call__(self, x, train):
      return super().__call__(2 * x, use_running_average=not train)

  model = Doubling(3, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='Doubling has a __call__ of its own'):
    optax_ghm.nnx.recalibrate(lambda m, x: m(x, True), model, batches)
