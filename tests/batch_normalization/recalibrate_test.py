"""Running averages replaced by the statistics of a whole data set."""

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import optax_ghm
import optax_ghm.linen
import optax_ghm.nnx
from tests.support import oracles_batch_norm as oracle
from tests.support.faces_batch_norm import Linen, both, face_of, start, widening
from tests.support.oracles_batch_norm import assert_is, by_numpy

PROGRAMS = 115
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


# Errors.


def test_linen_says_what_is_missing(batches):
  model = optax_ghm.linen.BatchNorm()
  variables = start(Linen(model), batches[0], False)

  def applied(by_average, **kwargs):
    return lambda v, x: model.apply(v, x, by_average, **kwargs)

  training = applied(False, mutable=['batch_stats'])
  for apply, variables_, data, match in (
    (training, variables, [], 'batches must'),
    (
      applied(True, mutable=['batch_stats']),
      variables,
      batches,
      'training mode',
    ),
    (applied(True), variables, batches, 'mutable'),
    (applied(True, mutable=['other']), variables, batches, 'mutable'),
    (lambda v, x: training(v, x)[1], variables, batches, 'mutable'),
    (training, {'params': variables['params']}, batches, 'batch_stats'),
    (lambda v, x: (x, v), {'batch_stats': {}}, batches, 'training mode'),
  ):
    with pytest.raises(ValueError, match=match):
      recalibrate(apply, variables_, data)
  with pytest.raises(flax.errors.ModifyScopeVariableError, match='immutable'):
    recalibrate(applied(False), variables, batches)  # as Flax says


@homes
def test_nnx_says_what_is_missing(flax, batches):
  def call(model, x):
    return model(x)

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
