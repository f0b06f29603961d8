"""Clips with a given limit, and the clips of units, against NumPy."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm

CLIPS = {
  'norm': optax_ghm.clip_by_norm(1.0),
  'percentile': optax_ghm.clip_by_percentile(50.0),
  'zscore': optax_ghm.clip_by_zscore(0.5, warmup_steps=2),
  'norm_ema': optax_ghm.clip_by_norm_ema(
    0.9, max_norm=1e9, warmup_steps=2, scope='global'
  ),
  'parameter_norm': optax_ghm.clip_by_parameter_norm(scope='global'),
}
OF_UNITS = {
  'norm': optax_ghm.clip_by_norm(1.0, scope='unit'),
  'percentile': optax_ghm.clip_by_percentile(50.0, scope='unit'),
  'zscore': optax_ghm.clip_by_zscore(0.5, warmup_steps=2, scope='unit'),
  'norm_ema': optax_ghm.clip_by_norm_ema(
    0.9, max_norm=1e9, warmup_steps=2, scope='unit'
  ),
  'parameter_norm': optax_ghm.clip_by_parameter_norm(),
}


@pytest.mark.parametrize('name', CLIPS)
def test_units_are_clipped_as_columns_by_themselves(name, rng):
  steps = rng.lognormal(size=(6, 1, 4)) * rng.normal(size=(6, 3, 4))
  steps[3, 1, 2] = np.nan  # a bad step of one column
  steps = jnp.asarray(steps, jnp.float32)
  params = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)

  def run(tx, steps, params):
    def step(state, grads):
      return tx.update(grads, state, params)[::-1]

    return jax.lax.scan(step, tx.init(params), steps)

  state, updates = jax.jit(lambda *args: run(OF_UNITS[name], *args))(
    steps, params
  )
  expected_state, expected = jax.jit(
    jax.vmap(
      lambda *args: run(CLIPS[name], *args), in_axes=(2, 1), out_axes=(0, 2)
    )
  )(steps, params)
  chex.assert_trees_all_close(updates, expected, rtol=1e-5)
  chex.assert_trees_all_close(state, expected_state, rtol=1e-5)
  np.testing.assert_array_equal(state.skipped, [0, 0, 1, 0])
  assert state.clipped.sum() > 0


# Clipping by the norm of the parameters.


def trees(rng, scale=1.0):
  """Parameters and gradients, of which about half are clipped."""
  shapes = {
    'conv': {'kernel': (2, 3, 4, 5), 'bias': (5,)},
    'embed': {'embedding': (7, 3)},
    'gain': (),
  }
  params = jax.tree.map(
    lambda shape: rng.normal(size=shape), shapes, is_leaf=is_tuple
  )
  grads = jax.tree.map(
    lambda x: x * 10 ** rng.uniform(-4, 0, x.shape[-1:]), params
  )
  return jax.tree.map(
    lambda x: jnp.asarray(scale * x, jnp.float32), (params, grads)
  )


def is_tuple(x):
  return isinstance(x, tuple)


BY_KIND = optax_ghm.Groups(
  {'conv': 'hidden', 'embed': 'input', 'gain': 'input'}
)
UNIT_AXES = {
  'conv': {'kernel': (0, 1, 2), 'bias': (0,)},
  'embed': {'embedding': (1,)},
  'gain': (),
}


def norms_by_hand(tree, scope):
  """Returns a norm for every leaf, broadcastable to it."""
  squares = jax.tree.map(
    lambda x: np.square(np.abs(np.asarray(x, np.complex128))), tree
  )
  if scope == 'unit':
    return jax.tree.map(
      lambda x, axes: np.sqrt(x.sum(axes, keepdims=True)),
      squares,
      jax.tree.map(lambda axes: axes, UNIT_AXES, is_leaf=is_tuple),
    )
  of_leaf = jax.tree.map(np.sum, squares)
  if scope == 'leaf':
    return jax.tree.map(np.sqrt, of_leaf)
  if scope == 'global':
    total = sum(jax.tree.leaves(of_leaf))
    return jax.tree.map(lambda _: np.sqrt(total), of_leaf)
  labels = jax.tree.leaves(jax.tree.broadcast(scope.labels, tree))
  leaves, structure = jax.tree.flatten(of_leaf)
  return structure.unflatten(
    np.sqrt(
      sum(x for x, own in zip(leaves, labels, strict=True) if own == label)
    )
    for label in labels
  )


SCOPES = {
  'unit': 'unit',
  'leaf': 'leaf',
  'global': 'global',
  'groups': BY_KIND,
}


@functools.cache
def by_parameter_norm(name):
  scope = SCOPES[name]

  @jax.jit
  def update(grads, params, eps, ratio=0.02):
    tx = optax_ghm.clip_by_parameter_norm(ratio, eps=eps, scope=scope)
    return tx.update(grads, tx.init(params), params)

  return update


@pytest.mark.parametrize(
  'name, dtype',
  [
    *itertools.product(SCOPES, [jnp.float32]),
    ('unit', jnp.bfloat16),
    ('unit', jnp.complex64),
    ('groups', jnp.complex64),
  ],
)
def test_clip_by_parameter_norm(name, dtype, rng):
  eps, scope = 0.5, SCOPES[name]
  params, grads = trees(rng)
  if dtype == jnp.complex64:
    grads = jax.tree.map(lambda g: jax.lax.complex(0.6 * g, -0.8 * g), grads)
  if dtype == jnp.bfloat16:
    params, grads = optax.tree.cast((params, grads), dtype)
  updates, state = by_parameter_norm(name)(grads, params, eps)

  factors = jax.tree.map(
    lambda g, w: np.minimum(1, 0.02 * np.maximum(w, eps) / g),
    norms_by_hand(grads, scope),
    norms_by_hand(params, scope),
  )
  expected = jax.tree.map(lambda g, f: np.asarray(g) * f, grads, factors)
  rtol = 1e-2 if dtype == jnp.bfloat16 else 1e-5
  wide = jax.tree.map(lambda u: np.asarray(u, np.complex128), updates)
  chex.assert_trees_all_close(
    wide, jax.tree.map(np.complex128, expected), rtol=rtol
  )
  assert all(u.dtype == dtype for u in jax.tree.leaves(updates))
  # Every norm of the scope is that of the transcription, in its order.
  distinct = jax.tree.map(np.ravel, norms_by_hand(grads, scope))
  flat = np.concatenate(jax.tree.leaves(distinct))
  if scope in ('unit', 'leaf'):
    np.testing.assert_allclose(state.norm, flat, rtol=1e-5)
  else:
    np.testing.assert_allclose(
      np.sort(state.norm.ravel()), np.unique(flat.round(12)), rtol=1e-5
    )
  assert 0 < state.clipped.sum()


@pytest.mark.parametrize('name', SCOPES)
@pytest.mark.parametrize('scale', [1e-30, 1e30])
def test_clip_by_parameter_norm_of_any_scale(name, scale, rng):
  """The update is homogeneous in parameters and gradients."""
  params, grads = trees(rng)
  expected, plain = by_parameter_norm(name)(grads, params, 0.0)
  large = jax.tree.map(lambda x: np.float32(scale) * x, (params, grads))
  updates, state = by_parameter_norm(name)(large[1], large[0], 0.0)
  chex.assert_trees_all_close(
    jax.tree.map(lambda u: u / np.float32(scale), updates), expected, rtol=1e-5
  )
  np.testing.assert_array_equal(state.clipped, plain.clipped)
  assert plain.clipped.sum() > 0


@pytest.mark.parametrize('shape', [(6, 4), (2, 3, 4, 5), (5,), ()], ids=str)
def test_equals_adaptive_grad_clip_where_the_layouts_agree(shape, rng):
  params = {'kernel': rng.normal(size=shape)}
  sizes = 10 ** rng.uniform(-4, 1, shape[-1:])
  grads = {'kernel': rng.normal(size=shape) * sizes}
  params, grads = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.float32),
    [
      params,
      grads,
    ],
  )
  updates, state = by_parameter_norm('unit')(grads, params, 1e-3, 1e-3)
  theirs = optax.adaptive_grad_clip(1e-3, eps=1e-3)
  expected, _ = jax.jit(theirs.update)(grads, theirs.init(params), params)
  chex.assert_trees_all_close(updates, expected, rtol=1e-5)
  assert 0 < state.clipped.sum()


def test_parameters_at_zero_can_move_by_epsilon():
  params = {'kernel': jnp.zeros((4, 3))}
  grads = {'kernel': jnp.array([[3.0, 0, 1e-6]] * 4)}
  updates, state = by_parameter_norm('unit')(grads, params, 0.1, 0.5)
  np.testing.assert_allclose(
    jnp.linalg.norm(updates['kernel'], axis=0), [0.05, 0, 2e-6], rtol=1e-5
  )
  np.testing.assert_array_equal(state.clipped, [1, 0, 0])
  np.testing.assert_array_equal(state.skipped, [0, 1, 0])


@pytest.mark.parametrize(
  'scope', ['unit', 'leaf', 'global', optax_ghm.Groups('one')], ids=str
)
def test_params_must_be_given(scope):
  grads = {'kernel': jax.ShapeDtypeStruct((3, 2), jnp.float32)}
  tx = optax_ghm.clip_by_parameter_norm(scope=scope)
  state = jax.eval_shape(tx.init, grads)
  for update in (tx.update, jax.jit(tx.update)):
    with pytest.raises(ValueError, match='params'):
      jax.eval_shape(update, grads, state)


@pytest.mark.parametrize(
  'make',
  [
    optax_ghm.clip_by_parameter_norm,
    optax_ghm.clip_by_rms,
    optax_ghm.normalize_by_norm,
  ],
)
@pytest.mark.parametrize('scope', ['units', 'layer', None, 3])
def test_unknown_scopes_are_named(make, scope):
  with pytest.raises(ValueError, match='scope') as error:
    make(scope=scope).init({'a': jnp.ones(2)})
  assert repr(scope) in str(error.value)


def test_leaves_without_a_norm_are_left_alone(rng):
  """Such leaves have no place in the state."""
  params, grads = trees(rng)
  others = {
    'a none': None,
    'd int': jnp.arange(3),
    'dense_empty': jnp.ones((0, 2)),
    'z masked': optax.MaskedNode(),
  }
  update = by_parameter_norm('unit')
  expected, expected_state = update(grads, params, 0.5)
  updates, state = update(grads | others, params | others, 0.5)
  chex.assert_trees_all_equal(state, expected_state)
  chex.assert_trees_all_equal(updates, expected | others)


@pytest.mark.parametrize('size', [1e30, 1e35, 3e38])
@pytest.mark.parametrize(
  'make',
  [
    optax_ghm.clip_by_parameter_norm,
    lambda: optax_ghm.clip_by_norm(1.0),
    lambda: optax_ghm.clip_by_rms(1e-3),
  ],
  ids=['parameter_norm', 'norm', 'update_rms'],
)
def test_what_is_finite_is_clipped_or_counted(make, size):
  """A step is not clipped if float32 does not hold its factor."""
  tx, grads = make(), jnp.array([0.6, -0.8]) * jnp.float32(size)
  updates, state = tx.update(grads, tx.init(grads), jnp.zeros(2))
  if jnp.all(state.skipped):
    assert size > 1e30 and jnp.all(state.clipped == 0)
    np.testing.assert_array_equal(updates, [0, 0])
  else:
    expected = np.array([0.6, -0.8]) * float(jnp.squeeze(state.threshold))
    np.testing.assert_allclose(updates, expected, rtol=1e-5)
    assert jnp.all(state.clipped == 1)


# The root mean square of updates.


@functools.cache
def by_rms(max_rms):
  tx, theirs = optax_ghm.clip_by_rms(max_rms), optax.clip_by_block_rms
  return (
    jax.jit(lambda tree: tx.update(tree, tx.init(tree))),
    jax.jit(lambda tree: theirs(max_rms).update(tree, optax.EmptyState())[0]),
  )


ORDINARY = st.floats(0.125, 100, width=32) | st.floats(-100, -0.125, width=32)


@given(
  hnp.arrays(np.float32, (2, 3), elements=ORDINARY | st.just(0.0)),
  hnp.arrays(np.float32, (), elements=ORDINARY),
  st.sampled_from([0.0625, 1.0, 30.0]),
)
def test_clip_by_rms_equals_optax(matrix, scalar, max_rms):
  ours, theirs = by_rms(max_rms)
  tree = {'a': matrix, 'b': scalar}
  updates, state = ours(tree)
  chex.assert_trees_all_close(updates, theirs(tree), rtol=1e-5)
  for rms, leaf in zip(
    state.norm / state.threshold * max_rms, tree.values(), strict=True
  ):
    expected = np.sqrt(np.mean(np.square(leaf, dtype=np.float64)))
    if expected > 0:  # a step of zeros is skipped
      np.testing.assert_allclose(rms, expected, rtol=1e-5)


@functools.cache
def by_rms_in(name):
  scope = SCOPES[name]

  @jax.jit
  def update(updates, max_rms):
    tx = optax_ghm.clip_by_rms(max_rms, scope=scope)
    return tx.update(updates, tx.init(updates))

  return update


@pytest.mark.parametrize('name', SCOPES)
@pytest.mark.parametrize('scale', [1e-30, 1.0, 1e30])
def test_clip_by_rms_in_every_scope(name, scale, rng):
  _, updates = trees(rng, scale)
  limit = 0.05 * scale
  clipped, state = by_rms_in(name)(updates, limit)
  ones = jax.tree.map(jnp.ones_like, updates)
  expected = jax.tree.map(
    lambda u, norm, root: np.asarray(u) / np.maximum(1, norm / root / limit),
    updates,
    norms_by_hand(updates, SCOPES[name]),
    norms_by_hand(ones, SCOPES[name]),  # the roots of the sizes
  )
  chex.assert_trees_all_close(
    jax.tree.map(lambda u: u / np.float32(scale), clipped),
    jax.tree.map(lambda u: np.float32(u / scale), expected),
    rtol=1e-5,
  )
  assert 0 < state.clipped.sum()


def test_it_is_adafactors_rule_behind_the_second_moment(rng):
  """A spike of one leaf is clipped to a root mean square of 1."""
  params = {'kernel': jnp.zeros((4, 3)), 'bias': jnp.zeros(3)}
  tx = optax.chain(optax.scale_by_rms(0.99), optax_ghm.clip_by_rms())
  state, update = tx.init(params), jax.jit(tx.update)
  for size in (1.0, 1.0, 1.0, 50.0):
    grads = jax.tree.map(
      lambda p, size=size: jnp.asarray(
        size * rng.normal(size=p.shape), jnp.float32
      ),
      params,
    )
    updates, state = update(grads, state)
  for leaf in updates.values():
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(leaf**2)), 1, rtol=1e-5)


# Devices.


def sharded_trees(scale=1.0):
  rng = np.random.default_rng(0)
  shapes = {
    'conv': {'kernel': (3, 8, 16), 'bias': (16,)},
    'embed': {'embedding': (16, 8)},
  }
  params = jax.tree.map(
    lambda shape: rng.normal(size=shape), shapes, is_leaf=is_tuple
  )
  grads = jax.tree.map(
    lambda x: x * 10 ** rng.uniform(-4, 0, x.shape[-1:]), params
  )
  return jax.tree.map(
    lambda x: jnp.asarray(scale * x, jnp.float32), (params, grads)
  )


FAN_IN = {
  'conv': {'kernel': P(None, 'model'), 'bias': P('model')},
  'embed': {'embedding': P(None, 'model')},
}
FAN_OUT = {
  'conv': {'kernel': P(None, None, 'model'), 'bias': P()},
  'embed': {'embedding': P('model')},
}
SPLIT = {'fan-in': FAN_IN, 'fan-out': FAN_OUT}


def split(name, scope, axis_name=None):
  if name == 'agc':
    return optax_ghm.clip_by_parameter_norm(
      0.02, eps=0.0, scope=scope, axis_name=axis_name
    )
  return optax_ghm.clip_by_rms(0.05, scope=scope, axis_name=axis_name)


@functools.cache
def unsharded(name, scope):
  return jax.jit(split(name, scope).update)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
  'name, along', [('agc', 'fan-in'), ('agc', 'fan-out'), ('rms', 'fan-in')]
)
def test_sharded_jit(name, along, kind):
  mesh = jax.make_mesh((8,), ('model',), axis_types=(kind,))
  params, grads = sharded_trees()
  tx = split(name, 'unit')
  state = tx.init(params)
  expected = unsharded(name, 'unit')(grads, state, params)
  with jax.set_mesh(mesh):
    shardings = jax.tree.map(
      lambda spec: NamedSharding(mesh, spec), SPLIT[along]
    )
    params, grads = (
      jax.device_put(tree, shardings) for tree in (params, grads)
    )
    actual = jax.jit(tx.update)(grads, state, params)
    for leaf, sharding in zip(
      jax.tree.leaves(actual[0]), jax.tree.leaves(shardings), strict=True
    ):
      assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
  chex.assert_trees_all_close(
    jax.device_get(actual), jax.device_get(expected), rtol=1e-5
  )


@functools.cache
def with_split_fan_in(name, scope):
  mesh = jax.make_mesh((8,), ('model',), axis_types=(AxisType.Auto,))
  return jax.jit(
    jax.shard_map(
      split(name, scope, 'model').update,
      mesh=mesh,
      in_specs=(FAN_IN, P(), FAN_IN),
      out_specs=(FAN_IN, P()),
    )
  )


@pytest.mark.parametrize(
  'name, scope, scale',
  [
    ('agc', 'unit', 1.0),
    ('agc', 'unit', 1e30),
    ('agc', 'unit', 1e-30),
    ('agc', 'leaf', 1e30),
    ('rms', 'leaf', 1.0),
  ],
)
def test_shard_map_where_the_fan_in_is_split(name, scope, scale):
  params, grads = sharded_trees(scale)
  state = split(name, scope).init(params)
  expected, expected_state = unsharded(name, scope)(grads, state, params)
  actual, state = with_split_fan_in(name, scope)(grads, state, params)
  chex.assert_trees_all_close(
    *(
      jax.tree.map(lambda u: u / np.float32(scale), updates)
      for updates in (actual, expected)
    ),
    rtol=1e-5,
  )
  chex.assert_trees_all_close(state, expected_state, rtol=1e-5)
  assert state.clipped.sum() > 0


def test_shard_map_over_two_axes_and_with_a_bad_unit():
  """NaN on one device makes the unit 0 on all."""
  mesh = jax.make_mesh(
    (4, 2), ('a', 'b'), axis_types=(AxisType.Auto, AxisType.Auto)
  )
  local = optax_ghm.clip_by_parameter_norm(0.02, axis_name=('a', 'b'))
  whole = optax_ghm.clip_by_parameter_norm(0.02)
  params, grads = ({'kernel': t['conv']['kernel'][0]} for t in sharded_trees())
  grads['kernel'] = grads['kernel'].at[5, 3].set(jnp.nan)
  state, spec = whole.init(params), P(('a', 'b'))
  mapped = jax.jit(
    jax.shard_map(
      local.update,
      mesh=mesh,
      in_specs=(spec, P(), spec),
      out_specs=(spec, P()),
    )
  )
  updates, state = mapped(grads, state, params)
  chex.assert_trees_all_close(
    (updates, state),
    jax.jit(whole.update)(grads, whole.init(params), params),
    rtol=1e-5,
  )
  np.testing.assert_array_equal(updates['kernel'][:, 3], np.zeros(8))
  np.testing.assert_array_equal(state.skipped, np.arange(16) == 3)
