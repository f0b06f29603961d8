"""Norms of one, deviations of one, means of zero: against float64 NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from hypothesis import assume, given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
by_dtype = pytest.mark.parametrize('dtype', DTYPES, ids=jnp.dtype)


@functools.cache
def jitted(tx):
  """Compiles the first step."""
  return jax.jit(lambda updates: tx.update(updates, tx.init(updates)))


def wide(tree):
  return jax.tree.map(lambda u: np.asarray(u, np.complex128), tree)


def eps(dtype):
  return float(jnp.finfo(dtype).eps)


# Norms.

GROUPS = optax_ghm.Groups({'conv': 'a', 'dense': 'b'})
SCOPES = {'global': 'global', 'leaf': 'leaf', 'unit': 'unit', 'groups': GROUPS}
BY_NORM = {
  name: optax_ghm.normalize_by_norm(scope=scope)
  for name, scope in SCOPES.items()
}
UNIT_AXES = {
  'conv': {'kernel': (0, 1, 2), 'bias': (0,)},
  'dense': {'kernel': (0,), 'bias': (0,)},
}
by_scope = pytest.mark.parametrize('name', SCOPES)


def make_tree(dtype=jnp.float32, scale=1.0):
  rng = np.random.default_rng(0)
  shapes = {
    'conv': {'kernel': (2, 2, 3, 4), 'bias': (4,)},
    'dense': {'kernel': (5, 3), 'bias': (3,)},
  }

  def leaf(shape):
    x = rng.normal(size=shape) * 10 ** rng.uniform(-1, 1, shape[-1:])
    if dtype == jnp.complex64:
      x = x + 1j * rng.normal(size=shape)
    return jnp.asarray(scale * x, dtype)

  return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def norms_by_hand(tree, name):
  """Returns norms of the shapes to divide by."""
  squares = jax.tree.map(lambda x: np.square(np.abs(x)), wide(tree))
  if name == 'unit':
    return {
      part: {
        key: np.sqrt(leaf.sum(UNIT_AXES[part][key], keepdims=True))
        for key, leaf in leaves.items()
      }
      for part, leaves in squares.items()
    }
  of_leaf = jax.tree.map(np.sum, squares)
  if name == 'leaf':
    return jax.tree.map(np.sqrt, of_leaf)
  if name == 'groups':
    return {
      part: jax.tree.map(lambda _, s=s: np.sqrt(sum(s.values())), s)
      for part, s in of_leaf.items()
    }
  total = np.sqrt(sum(jax.tree.leaves(of_leaf)))
  return jax.tree.map(lambda _: total, of_leaf)


@by_scope
@by_dtype
def test_normalize_by_norm(name, dtype):
  tree = make_tree(dtype)
  norms = norms_by_hand(tree, name)
  updates, state = jitted(BY_NORM[name])(tree)
  expected = jax.tree.map(np.divide, wide(tree), norms)
  # 16 bits round small numbers away, float16 in steps of 6e-8
  chex.assert_trees_all_close(
    wide(updates), expected, rtol=2 * eps(dtype) + 1e-6, atol=1e-7
  )
  assert all(u.dtype == dtype for u in jax.tree.leaves(updates))
  flat = np.concatenate([np.ravel(norm) for norm in jax.tree.leaves(norms)])
  if name in ('unit', 'leaf'):
    np.testing.assert_allclose(state.divisor, flat, rtol=1e-5)
  else:
    np.testing.assert_allclose(
      state.divisor.ravel(), list(dict.fromkeys(flat)), rtol=1e-5
    )
  assert state.divisor.dtype == jnp.float32 and not state.skipped.any()


@by_scope
@pytest.mark.parametrize('scale', [1e-30, 1.0, 1e30])
def test_the_norm_is_one_afterwards(name, scale):
  """The norm is 1 at every scale, and the direction is the same."""
  updates, state = jitted(BY_NORM[name])(make_tree(scale=scale))
  for norm in jax.tree.leaves(norms_by_hand(updates, name)):
    np.testing.assert_allclose(norm, 1, rtol=2e-6)
  expected, _ = jitted(BY_NORM[name])(make_tree())
  chex.assert_trees_all_close(updates, expected, rtol=1e-5)
  assert not state.skipped.any()


@pytest.mark.parametrize('name', ['global', 'leaf', 'unit'])
@pytest.mark.parametrize('size', [1e38, 3e38])
def test_the_largest_norms_are_bad_steps(name, size):
  """Their reciprocal is less than the least normal float32."""
  tree = {'kernel': jnp.array([[0.6], [-0.8]]) * jnp.float32(size)}
  updates, state = jitted(BY_NORM[name])(tree)
  assert not updates['kernel'].any()
  assert state.skipped.all()


def test_what_has_no_direction_becomes_zero_and_is_counted():
  tree = {
    'kernel': jnp.array([[3.0, 0.0, jnp.nan, 1.0], [4.0, 0.0, 1.0, jnp.inf]])
  }
  tx = BY_NORM['unit']
  updates, state = tx.update(tree, tx.init(tree))
  np.testing.assert_allclose(
    updates['kernel'], [[0.6, 0, 0, 0], [0.8, 0, 0, 0]], rtol=1e-6
  )
  np.testing.assert_array_equal(state.skipped, [0, 1, 1, 1])
  np.testing.assert_array_equal(state.divisor, [5, 1, 1, 1])
  _, state = tx.update(
    {'kernel': jnp.array([[jnp.nan, 6.0, 0.0, 0.0], [1.0, 8.0, 0.0, 5.0]])},
    state,
  )
  np.testing.assert_array_equal(state.skipped, [1, 1, 2, 1])
  np.testing.assert_array_equal(state.divisor, [5, 10, 1, 5])


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_one_bad_number_is_the_affair_of_its_scope(bad):
  tree = make_tree()
  tree['conv']['kernel'] = tree['conv']['kernel'].at[1, 0, 2, 3].set(bad)
  expected = {'global': (1, 0), 'leaf': (4, 3), 'unit': (9, 8)}
  for name, (norms, good) in expected.items():
    updates, state = jitted(BY_NORM[name])(tree)
    chex.assert_tree_all_finite(updates)
    assert state.skipped.size == norms and state.skipped.sum() == norms - good
    kept = sum(np.count_nonzero(u) for u in jax.tree.leaves(updates))
    size = {'global': 0, 'leaf': 4 + 15 + 3, 'unit': 36 + 4 + 15 + 3}[name]
    assert kept == size


def test_of_the_whole_tree_it_is_that_of_optax():
  tree = make_tree()
  theirs = optax.normalize_by_update_norm(eps=0.0)
  expected, _ = theirs.update(tree, theirs.init(tree))
  updates, _ = jitted(BY_NORM['global'])(tree)
  chex.assert_trees_all_close(updates, expected, rtol=1e-6)


# The deviation.

STANDARDIZE = optax_ghm.standardize()


def standardized(x):
  """Returns the standardized array and the deviation, in float64."""
  x = np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
  deviation = np.sqrt(np.mean(np.abs(x - x.mean()) ** 2))
  return (x - x.mean()) / deviation, deviation


@pytest.mark.parametrize('shape', [(4, 5), (2, 3, 4), (2, 2, 3, 4)], ids=str)
@pytest.mark.parametrize('scale', [1e-30, 1.0, 1e30])
def test_standardize(shape, scale, rng):
  x = (scale * (rng.normal(size=shape) + 0.5)).astype(np.float32)
  update, state = jitted(STANDARDIZE)(x)
  expected, deviation = standardized(x)
  np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(state.divisor, [deviation], rtol=1e-5)
  assert state.skipped == 0


@pytest.mark.parametrize('offset', [10.0, -1e3, 1e5])
def test_standardize_far_from_zero(offset, rng):
  """The result is right to what float32 holds of the deviations."""
  x = (rng.normal(size=(30, 40)) + offset).astype(np.float32)
  update, state = jitted(STANDARDIZE)(x)
  expected, deviation = standardized(x)
  tolerance = 1e-6 * abs(offset)  # the sum of 1,200 numbers is of float32
  np.testing.assert_allclose(update, expected, rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(state.divisor, [deviation], rtol=tolerance)
  assert state.skipped == 0


def test_standardize_with_one_number_far_out(rng):
  x = rng.normal(size=(30, 40)).astype(np.float32)
  x[3, 4] = -1e30
  update, _ = jitted(STANDARDIZE)(x)
  expected, _ = standardized(x)
  np.testing.assert_allclose(update, expected, rtol=1e-4)


@by_dtype
def test_standardize_of_other_dtypes(dtype, rng):
  x = rng.normal(size=(6, 7)) + 1
  if dtype == jnp.complex64:
    x = x + 3j * rng.normal(size=(6, 7))
  x = jnp.asarray(x, dtype)
  update, state = jitted(STANDARDIZE)(x)
  assert update.dtype == dtype and state.divisor.dtype == jnp.float32
  exact = x if dtype == jnp.complex64 else x.astype(jnp.float32)
  expected, _ = standardized(exact)
  np.testing.assert_allclose(
    *wide((update, expected)), rtol=2 * eps(dtype) + 1e-5, atol=1e-6
  )


REASONABLE = st.floats(-1000, 1000, width=32)


@given(
  hnp.arrays(np.float32, (3, 4), elements=REASONABLE),
  st.floats(-50, 50, width=32),
  st.sampled_from([2.0**-90, 0.5, 3.0, 2.0**90]),
  st.booleans(),
)
def test_neither_scale_nor_offset_matters(x, offset, scale, flipped):
  """A linear function of the numbers has the same standardized numbers."""
  deviation = np.std(x, dtype=np.float64)
  assume(deviation > max(1e-2 * (np.abs(x).max() + abs(offset)), 1e-6))
  sign = -1 if flipped else 1
  moved = (np.float32(sign * scale) * (x + np.float32(offset))).astype('f')
  update, state = jitted(STANDARDIZE)(x)
  other, _ = jitted(STANDARDIZE)(moved)
  assert state.skipped == 0
  exact = np.asarray(update, np.float64)
  np.testing.assert_allclose(exact.mean(), 0, atol=1e-5)
  np.testing.assert_allclose(exact.std(), 1, rtol=1e-5)
  np.testing.assert_allclose(other, sign * update, atol=1e-3)


CONSTANTS = [0.1, -1 / 3, 1e-30, -1e30, 0.0]


@pytest.mark.parametrize('shape', [(1, 1), (3, 4), (1000, 700)], ids=str)
@pytest.mark.parametrize('value', CONSTANTS)
def test_equal_numbers_have_no_deviation(shape, value):
  """Rounding does not make a deviation."""
  x = jnp.full(shape, value, jnp.float32)
  update, state = jitted(STANDARDIZE)(x)
  assert not update.any()
  assert state.skipped == 1 and state.divisor == 1


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_bad_leaf_becomes_zero_and_is_counted(bad, rng):
  good = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
  spoilt = good.at[1, 2].set(bad)
  tree = {'bad': spoilt, 'good': good, 'vector': spoilt[1]}
  updates, state = jitted(STANDARDIZE)(tree)
  assert not updates['bad'].any()
  np.testing.assert_array_equal(updates['vector'], tree['vector'])
  np.testing.assert_allclose(updates['good'], standardized(good)[0], rtol=1e-4)
  np.testing.assert_array_equal(state.skipped, [1, 0, 0])
  np.testing.assert_allclose(
    state.divisor, [1, standardized(good)[1], 1], rtol=1e-5
  )
  # The deviation of the last good step stays.
  _, state = STANDARDIZE.update(tree | {'good': spoilt}, state)
  np.testing.assert_array_equal(state.skipped, [2, 1, 0])
  np.testing.assert_allclose(
    state.divisor, [1, standardized(good)[1], 1], rtol=1e-5
  )


@by_dtype
def test_scalars_and_vectors_pass_unchanged(dtype, rng):
  tree = {
    'scalar': jnp.asarray(-1e4, dtype),
    'vector': jnp.asarray(rng.normal(size=7), dtype),
    'constant': jnp.full(3, 0.1, dtype),
    'int': jnp.arange(6).reshape(2, 3),
    'none': None,
    'empty': jnp.zeros((0, 3)),
  }
  updates, state = jitted(STANDARDIZE)(tree)
  chex.assert_trees_all_equal(updates, tree, strict=True)
  np.testing.assert_array_equal(state.divisor, [1, 1, 1])
  np.testing.assert_array_equal(state.skipped, [0, 0, 0])


# The mean.

CENTRALIZE = optax_ghm.centralize()


def flax_grads(module, shape, seed=0, offset=0.3):
  """Returns gradients of a real layer, whose mean is not 0."""
  variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones(shape))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda p: jnp.asarray(rng.normal(size=p.shape) + offset, p.dtype),
    variables['params'],
  )


LAYERS = {
  'dense': (linen.Dense(4), (2, 6), {'kernel': (0,)}),
  'conv 1d': (linen.Conv(5, (3,)), (1, 8, 4), {'kernel': (0, 1)}),
  'conv 2d': (linen.Conv(5, (3, 2)), (1, 8, 8, 4), {'kernel': (0, 1, 2)}),
  'conv 3d': (
    linen.Conv(2, (3, 2, 2)),
    (1, 4, 4, 4, 3),
    {'kernel': (0, 1, 2, 3)},
  ),
  'attention': (
    linen.MultiHeadDotProductAttention(2, qkv_features=6),
    (1, 8, 4),
    {'query': (0,), 'key': (0,), 'value': (0,), 'out': (0, 1)},
  ),
  'layer norm': (linen.LayerNorm(feature_axes=(-2, -1)), (2, 3, 4), {}),
}


@pytest.mark.parametrize('name', LAYERS)
def test_centralize_takes_the_mean_of_the_fan_in(name):
  module, shape, axes = LAYERS[name]
  grads = flax_grads(module, shape)
  updates, state = jitted(CENTRALIZE)(grads)
  assert state == optax.EmptyState()
  central = 0
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    g = functools.reduce(lambda tree, key: tree[key.key], path, grads)
    own = axes.get(path[0].key) if path[-1].key == 'kernel' else None
    if own is None:
      np.testing.assert_array_equal(update, g)
      continue
    exact = np.asarray(g, np.float64)
    np.testing.assert_allclose(
      update, exact - exact.mean(own, keepdims=True), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
      update.mean(own), 0 * update.mean(own), atol=1e-6
    )
    central += 1
  assert central == len(axes)


def test_centralize_of_an_embedding_is_by_token():
  x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
  updates, _ = jitted(CENTRALIZE)({'embedding': x})
  np.testing.assert_allclose(
    updates['embedding'], x - x.mean(1, keepdims=True), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize('shape', [(6, 4), (3, 4, 5), (2, 3, 4, 5)], ids=str)
def test_on_kernels_the_other_way_round_it_is_that_of_optax(shape, rng):
  """The units of Optax's kernels come first."""
  kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
  updates, _ = jitted(CENTRALIZE)({'kernel': kernel})
  turned = jnp.moveaxis(kernel, -1, 0)
  theirs = optax.centralize()
  expected, _ = theirs.update(turned, theirs.init(turned))
  np.testing.assert_allclose(
    updates['kernel'], jnp.moveaxis(expected, 0, -1), rtol=1e-5, atol=1e-6
  )


@given(hnp.arrays(np.float32, (3, 4), elements=REASONABLE))
def test_centralize_is_a_projection(kernel):
  """Centralizing twice changes nothing, and no unit gets longer."""
  once = jitted(CENTRALIZE)({'kernel': kernel})[0]
  size = np.abs(kernel).max()
  chex.assert_trees_all_close(
    jitted(CENTRALIZE)(once)[0], once, rtol=1e-5, atol=2e-7 * size
  )
  norms = np.linalg.norm(kernel.astype(np.float64), axis=0)
  after = np.linalg.norm(np.asarray(once['kernel'], np.float64), axis=0)
  assert (after <= norms * (1 + 1e-6)).all()


@by_dtype
@pytest.mark.parametrize('scale', [1e-30, 1.0, 1e30])
def test_centralize_of_every_dtype(dtype, scale, rng):
  if dtype == jnp.float16 and scale != 1:
    scale = 100 * min(max(scale, 1e-2), 1e2)
  x = scale * (rng.normal(size=(5, 3)) + 2)
  if dtype == jnp.complex64:
    x = x - 1j * scale * rng.normal(size=(5, 3))
  x = jnp.asarray(x, dtype)
  updates, _ = jitted(CENTRALIZE)({'kernel': x})
  assert updates['kernel'].dtype == dtype
  exact = wide(x)
  np.testing.assert_allclose(
    wide(updates['kernel']) / scale,
    (exact - exact.mean(0)) / scale,
    rtol=eps(dtype),
    atol=1e-6,
  )


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_bad_number_stays_in_its_unit_and_shows(bad, rng):
  kernel = rng.normal(size=(3, 4)).astype(np.float32)
  kernel[1, 2] = bad
  updates, _ = jitted(CENTRALIZE)({'kernel': kernel})
  good = np.arange(4) != 2
  with np.errstate(invalid='ignore'):
    expected = kernel - kernel.mean(0)
  np.testing.assert_allclose(
    updates['kernel'][:, good], expected[:, good], rtol=1e-5, atol=1e-6
  )
  assert np.isnan(updates['kernel'][1, 2])
  assert not np.isfinite(updates['kernel'][:, 2]).any()


def test_centralize_of_other_layouts(rng):
  """The kernels have the layout (out, in)."""
  tx = optax_ghm.centralize(
    units=optax_ghm.Units(lambda path, leaf: tuple(range(1, leaf.ndim)))
  )
  kernel = jnp.asarray(rng.normal(size=(4, 3, 2)), jnp.float32)
  theirs = optax.centralize()
  expected, _ = theirs.update(kernel, theirs.init(kernel))
  updates, _ = tx.update(kernel, tx.init(kernel))
  np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)


def test_the_layout_of_layers_in_a_row_leaves_their_biases_alone(rng):
  """A bias is not centralized over its only axis."""
  stacked = optax_ghm.Units(lambda path, leaf: tuple(range(1, leaf.ndim - 1)))
  tx = optax_ghm.centralize(units=stacked)
  grads = {
    'kernel': jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.float32),
    'bias': jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
  }
  updates, _ = tx.update(grads, tx.init(grads))
  np.testing.assert_allclose(
    updates['kernel'],
    grads['kernel'] - grads['kernel'].mean(1, keepdims=True),
    rtol=1e-5,
    atol=1e-6,
  )
  np.testing.assert_array_equal(updates['bias'], grads['bias'])


# Devices.


TRANSFORMATIONS = {
  'normalize_by_norm': optax_ghm.normalize_by_norm,
  'normalize_by_norm of leaves': lambda **kw: optax_ghm.normalize_by_norm(
    scope='leaf', **kw
  ),
  'normalize_by_norm of units': lambda **kw: optax_ghm.normalize_by_norm(
    scope='unit', **kw
  ),
  'standardize': optax_ghm.standardize,
  'centralize': optax_ghm.centralize,
}
SPECS = {'kernel': P(None, 'model'), 'bias': P('model')}


def sharded_tree(scale=1.0):
  rng = np.random.default_rng(0)
  devices = np.arange(16.0).reshape(16, 1)  # each another mean
  return {
    'kernel': jnp.asarray(
      scale * (rng.normal(size=(3, 16, 8)) + devices), jnp.float32
    ),
    'bias': jnp.asarray(scale * rng.normal(size=8), jnp.float32),
  }


@functools.cache
def whole(name):
  return TRANSFORMATIONS[name]()


def assert_close(actual, expected, scale):
  """Only the updates of ``centralize`` have the scale of the gradients."""
  chex.assert_trees_all_close(
    jax.device_get(actual),
    jax.device_get(expected),
    rtol=1e-5,
    atol=2e-6 * scale,
  )


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_sharded_jit(name, kind):
  mesh = jax.make_mesh((8,), ('model',), axis_types=(kind,))
  tx, tree = TRANSFORMATIONS[name](), sharded_tree()
  expected = jitted(whole(name))(tree)
  with jax.set_mesh(mesh):
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    split = jax.device_put(tree, shardings)
    step = jax.jit(tx.update)
    compiled = step.lower(split, tx.init(tree)).compile()
    actual = compiled(split, tx.init(tree))
    for key, leaf in actual[0].items():
      assert leaf.sharding.is_equivalent_to(shardings[key], leaf.ndim)
  assert 'all-gather' not in compiled.as_text()
  assert_close(actual, expected, 1.0)


@functools.cache
def mapped(name):
  mesh = jax.make_mesh((8,), ('model',), axis_types=(AxisType.Auto,))
  return jax.jit(
    jax.shard_map(
      TRANSFORMATIONS[name](axis_name='model').update,
      mesh=mesh,
      in_specs=(SPECS, P()),
      out_specs=(SPECS, P()),
    )
  )


@pytest.mark.parametrize('scale', [1.0, 1e30, 1e-30])
@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_shard_map_where_the_fan_in_is_split(name, scale):
  tree = sharded_tree(scale)
  actual = mapped(name)(tree, whole(name).init(tree))
  expected = jitted(whole(name))(tree)
  assert_close(actual, expected, scale if name == 'centralize' else 1.0)


@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_shard_map_with_a_bad_number_on_one_device(name):
  tree = sharded_tree()
  tree['kernel'] = tree['kernel'].at[1, 5, 2].set(jnp.nan)
  actual = mapped(name)(tree, whole(name).init(tree))
  expected = jitted(whole(name))(tree)
  assert_close(actual, expected, 1.0)
  if name == 'centralize':
    assert jnp.isnan(actual[0]['kernel'][..., 2]).all()
  else:
    chex.assert_tree_all_finite(actual)
    assert actual[1].skipped.sum() == 1
