"""Units of real Flax layers, and the clips that take any scope, in NumPy."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm
from optax_ghm._core import scopes

# The layouts of Flax.


def names(path):
  """The names in a path; an nnx.Param or a box of Linen adds none."""
  keys = [getattr(key, 'key', getattr(key, 'name', None)) for key in path]
  return [key for i, key in enumerate(keys) if i == 0 or key != 'value']


def axes_of(tree):
  return {
    '/'.join(names(path)): optax_ghm.calibration.flax_unit_axes(path, leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def linen_params(module, *inputs):
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']


def nnx_model(make):
  return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def nnx_params(make):
  return nnx.state(nnx_model(make), nnx.Param)


def filled(shapes, seed=0):
  """Positive numbers, so that no derivative is 0 by chance."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.uniform(0.5, 1, x.shape), x.dtype), shapes
  )


VECTORS = {'bias': (0,), 'scale': (0,)}
ATTENTION = {
  f'{name}/{leaf}': axes
  for name in ('query', 'key', 'value')
  for leaf, axes in (('kernel', (0,)), ('bias', (0, 1)))
} | {'out/kernel': (0, 1), 'out/bias': (0,)}
GATES = [f'{a}{b}' for a in ('i', 'h') for b in 'ifgo']

LINEN = {
  'dense': (linen.Dense(4), (2, 6), {'kernel': (0,), 'bias': (0,)}),
  'conv 1d': (linen.Conv(5, (3,)), (1, 8, 4), {'kernel': (0, 1)}),
  'conv 2d': (linen.Conv(5, (3, 2)), (1, 8, 8, 4), {'kernel': (0, 1, 2)}),
  'conv 3d': (
    linen.Conv(5, (3, 2, 2)),
    (1, 4, 4, 4, 4),
    {'kernel': (0, 1, 2, 3)},
  ),
  'grouped conv': (
    linen.Conv(8, (3, 2), feature_group_count=2),
    (1, 8, 8, 4),
    {'kernel': (0, 1, 2)},
  ),
  'transposed conv': (
    linen.ConvTranspose(5, (3, 2)),
    (1, 8, 8, 4),
    {'kernel': (0, 1, 2)},
  ),
  'dense general': (
    linen.DenseGeneral(5, axis=(-2, -1)),
    (1, 8, 4),
    {'kernel': (0, 1), 'bias': (0,)},
  ),
  'attention': (
    linen.MultiHeadDotProductAttention(2, qkv_features=6),
    (1, 8, 4),
    ATTENTION,
  ),
  'attention with normalized queries': (
    linen.MultiHeadDotProductAttention(2, qkv_features=6, normalize_qk=True),
    (1, 8, 4),
    ATTENTION | {'query_ln/scale': (0,), 'key_ln/scale': (0,)},
  ),
  'layer norm': (linen.LayerNorm(), (2, 6), VECTORS),
  'layer norm of two axes': (
    linen.LayerNorm(feature_axes=(-2, -1)),
    (2, 3, 6),
    {'bias': (0, 1), 'scale': (0, 1)},
  ),
  'batch norm': (linen.BatchNorm(use_running_average=True), (2, 6), VECTORS),
  'scalar': (linen.PReLU(), (2, 6), {'negative_slope': ()}),
}


@pytest.mark.parametrize('name', LINEN)
def test_units_of_linen(name):
  module, shape, expected = LINEN[name]
  actual = axes_of(linen_params(module, jnp.ones(shape)))
  if 'conv' in name:
    expected = expected | {'bias': (0,)}
  assert actual == expected


def test_units_of_an_embedding_are_its_tokens():
  tokens = jnp.zeros(1, jnp.int32)
  params = linen_params(linen.Embed(7, 3), tokens)
  assert axes_of(params) == {'embedding': (1,)}
  params = nnx_params(lambda rngs: nnx.Embed(7, 3, rngs=rngs))
  assert axes_of(params) == {'embedding': (1,)}


def test_units_of_a_recurrent_cell():
  """Whose gates have names such as ``if``."""
  carry = (jnp.ones((1, 3)), jnp.ones((1, 3)))
  params = linen_params(
    linen.OptimizedLSTMCell(3), carry, jnp.ones((1, 4), jnp.float32)
  )
  expected = {f'{gate}/kernel': (0,) for gate in GATES}
  expected |= {f'{gate}/bias': (0,) for gate in GATES if gate[0] == 'h'}
  assert axes_of(params) == expected


NNX = {
  'linear': (lambda r: nnx.Linear(3, 4, rngs=r), {'kernel': (0,)}),
  'conv 1d': (lambda r: nnx.Conv(3, 4, (3,), rngs=r), {'kernel': (0, 1)}),
  'conv 2d': (
    lambda r: nnx.Conv(3, 4, (3, 2), rngs=r),
    {'kernel': (0, 1, 2)},
  ),
  'conv 3d': (
    lambda r: nnx.Conv(3, 4, (3, 2, 2), rngs=r),
    {'kernel': (0, 1, 2, 3)},
  ),
  'linear general': (
    lambda r: nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=r),
    {'kernel': (0, 1)},
  ),
  'attention': (
    lambda r: nnx.MultiHeadAttention(2, 4, 6, rngs=r, decode=False),
    ATTENTION,
  ),
  'layer norm': (lambda r: nnx.LayerNorm(3, rngs=r), VECTORS),
  'batch norm': (lambda r: nnx.BatchNorm(3, rngs=r), VECTORS),
}


@pytest.mark.parametrize('pure', [False, True], ids=['state', 'dict'])
@pytest.mark.parametrize('name', NNX)
def test_units_of_nnx(name, pure):
  """The state, as ``nnx.Optimizer`` hands it to Optax, and as dicts."""
  make, expected = NNX[name]
  params = nnx_params(make)
  actual = axes_of(nnx.to_pure_dict(params) if pure else params)
  if 'out/bias' not in expected:
    expected = expected | {'bias': (0,)}
  assert actual == expected


def test_units_of_boxed_params():
  """Linen's metadata for sharding is one more level in the path."""
  init = linen.with_partitioning(linen.initializers.ones, (None, None, None))
  module = linen.Conv(5, (3,), kernel_init=init)
  params = linen_params(module, jnp.ones((1, 8, 4)))
  assert isinstance(params['kernel'], linen.Partitioned)
  assert axes_of(params) == {'kernel': (0, 1), 'bias': (0,)}


@pytest.mark.parametrize('name', ['bias', 'scale', 'embedding'])
def test_a_layer_may_be_named_as_a_parameter_is(name):
  """A kernel is one wherever it is: ViT calls a convolution ``embedding``."""

  class Model(linen.Module):
    @linen.compact
    def __call__(self, x):
      return linen.Conv(5, (3, 2), name=name)(x)

  params = linen_params(Model(), jnp.ones((1, 8, 8, 4)))
  expected = {f'{name}/kernel': (0, 1, 2), f'{name}/bias': (0,)}
  assert axes_of(params) == expected


def test_a_kernel_somewhere_within_value_has_no_heads():
  """Such as that of the value network of an actor and critic."""

  class Model(linen.Module):
    @linen.compact
    def __call__(self, x):
      return linen.Sequential([linen.Conv(5, (3,))], name='value')(x)

  params = linen_params(Model(), jnp.ones((1, 8, 4)))
  assert set(axes_of(params).values()) == {(0, 1), (0,)}


ONE_OUTPUT = [name for name in LINEN if 'conv' in name or 'dense' in name]


@pytest.mark.parametrize('name', [*ONE_OUTPUT, 'attention'])
def test_a_unit_of_linen_is_what_computes_one_output(name):
  """Output i hangs on all numbers of unit i, and on no other."""
  module, shape, _ = LINEN[name]
  x = filled(jax.ShapeDtypeStruct(shape, jnp.float32), seed=1)
  params = filled(linen_params(module, x))
  assert_units_are_outputs(
    lambda params: module.apply({'params': params}, x),
    params,
    lambda params: (params['out'] if 'out' in params else params)['kernel'],
  )


@pytest.mark.parametrize(
  'name, shape',
  [
    ('linear', (2, 3)),
    ('conv 1d', (1, 8, 3)),
    ('conv 2d', (1, 8, 8, 3)),
    ('linear general', (1, 2, 3)),
    ('attention', (1, 8, 4)),
  ],
)
def test_a_unit_of_nnx_is_what_computes_one_output(name, shape):
  x = filled(jax.ShapeDtypeStruct(shape, jnp.float32), seed=1)
  graph, params, rest = nnx.split(nnx_model(NNX[name][0]), nnx.Param, ...)
  assert_units_are_outputs(
    lambda params: nnx.merge(graph, params, rest)(x),
    filled(params),
    lambda state: (state['out'] if 'out' in state else state)['kernel'][...],
  )


def assert_units_are_outputs(apply, params, kernel):
  def outputs(params):
    y = apply(params)
    return y.sum(range(y.ndim - 1))

  jacobian = np.asarray(kernel(jax.jit(jax.jacrev(outputs))(params)))
  [axes] = [
    optax_ghm.calibration.flax_unit_axes(path, leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if names(path)[-1] == 'kernel'
    and (len(names(path)) == 1 or names(path)[-2] == 'out')
  ]
  within = tuple(axis + 1 for axis in axes)
  eye = np.eye(len(jacobian), dtype=bool)
  np.testing.assert_array_equal((jacobian != 0).any(within), eye)
  np.testing.assert_array_equal((jacobian != 0).all(within), eye)


class Block(linen.Module):
  @linen.compact
  def __call__(self, x, _):
    y = linen.MultiHeadDotProductAttention(2, qkv_features=6)(x)
    return linen.LayerNorm()(linen.Dense(6)(y)), None


def layered(path, leaf):
  """Flax's layouts behind a first axis that counts the layers."""
  layer = jax.eval_shape(lambda leaf: leaf[0], leaf)
  return tuple(i + 1 for i in optax_ghm.calibration.flax_unit_axes(path, layer))


def test_stacked_layers_are_clipped_as_each_by_itself():
  stack = linen.scan(
    Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=3
  )()
  params = filled(linen_params(stack, jnp.ones((1, 4, 6)), None))
  grads = spread_like(params)
  tx = optax_ghm.clip_by_parameter_norm(scope=optax_ghm.Units(layered))
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
  one = optax_ghm.clip_by_parameter_norm()

  @jax.jit
  @jax.vmap
  def each(grads, params):
    return one.update(grads, one.init(params), params)

  expected, states = each(grads, params)
  chex.assert_trees_all_close(updates, expected, rtol=1e-6)
  np.testing.assert_allclose(
    jnp.sort(state.factor), jnp.sort(states.factor.ravel()), rtol=1e-5
  )
  assert 0 < state.clipped.sum() < state.clipped.size


def spread_like(tree, seed=0):
  """Normal numbers, in every unit of another size."""
  rng = np.random.default_rng(seed)

  def leaf(x):
    sizes = 10 ** rng.uniform(-4, 1, x.shape[-1:])
    return jnp.asarray(rng.normal(size=x.shape) * sizes, x.dtype)

  return jax.tree.map(leaf, tree)


def test_units_may_count_their_axes_from_the_end():
  """As all of NumPy and JAX do."""
  tree = {'a': jnp.arange(1.0, 7).reshape(2, 3)}
  back, front = (
    optax_ghm.normalize_by_norm(scope=optax_ghm.Units(layout))
    for layout in (lambda path, leaf: (-2,), lambda path, leaf: (0,))
  )
  chex.assert_trees_all_equal(
    back.update(tree, back.init(tree)), front.update(tree, front.init(tree))
  )


# What a scope measures and scales.


SHAPES = ((), (1,), (3,), (2, 3), (3, 1), (3, 2, 2), (2, 1, 3, 2))
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64)


@st.composite
def leaf_and_axes(draw):
  shape = draw(st.sampled_from(SHAPES))
  axes = draw(st.sets(st.integers(0, 3))) & set(range(len(shape)))
  dtype = draw(st.sampled_from(DTYPES))
  half = dtype == jnp.float16
  scale = draw(st.sampled_from([1.0] if half else [1e-30, 1.0, 1e30]))
  rng = np.random.default_rng(draw(st.integers(0, 2**16)))
  x = scale * rng.normal(size=shape)
  if dtype == jnp.complex64:
    x = x + 1j * scale * rng.normal(size=shape)
  units = [1 if i in axes else n for i, n in enumerate(shape)]
  x = x * (rng.uniform(size=units) < 0.8)  # some units are all zero
  return jnp.asarray(x, dtype), tuple(sorted(axes))


OTHERS = [None, jnp.arange(3), jnp.ones((0, 2)), optax.MaskedNode()]


@settings(max_examples=25)
@given(st.lists(leaf_and_axes(), max_size=4), st.randoms())
def test_units_of_every_kind(leaves_and_axes, random):
  """Norms, sizes and factors of any axes, with leaves between that have none.

  The axes stand in for a layout; float64 NumPy for the rest.
  """
  queue = [axes for _, axes in leaves_and_axes]
  tree = [leaf for leaf, _ in leaves_and_axes]
  for other in OTHERS:
    tree.insert(random.randrange(len(tree) + 1), other)
  units = optax_ghm.Units(lambda path, leaf: taken.pop(0))
  taken = list(queue)
  scoped = scopes.scoped(units, tree)

  wide = [np.asarray(leaf, np.complex128) for leaf, _ in leaves_and_axes]
  norms = [
    np.sqrt((np.abs(x) ** 2).sum(axes, keepdims=True))
    for x, axes in zip(wide, queue, strict=True)
  ]
  flat = np.concatenate([np.zeros(0), *(n.ravel() for n in norms)])

  @jax.jit
  def measured_and_scaled(tree, factors):
    return scoped.norms(tree), scoped.scale(tree, factors)

  factors = np.array([random.choice([0.0, 0.5, 3.0]) for _ in flat])
  actual, result = measured_and_scaled(tree, jnp.float32(factors))
  assert actual.shape == scoped.shape == flat.shape
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, flat, rtol=2e-6)

  sizes = [
    np.full(n.size, x.size // n.size) for n, x in zip(norms, wide, strict=True)
  ]
  np.testing.assert_array_equal(
    scoped.sizes(tree), np.concatenate([np.zeros(0), *sizes])
  )

  assert jax.tree.structure(result) == jax.tree.structure(tree)
  offset, of_leaf = 0, iter(zip(wide, norms, strict=True))
  for leaf, scaled in zip(
    jax.tree.leaves(tree), jax.tree.leaves(result), strict=True
  ):
    assert scaled.dtype == leaf.dtype
    if not jnp.issubdtype(leaf.dtype, jnp.inexact) or not leaf.size:
      np.testing.assert_array_equal(scaled, leaf)
      continue
    x, norm = next(of_leaf)
    factor = factors[offset : offset + norm.size].reshape(norm.shape)
    offset += norm.size
    np.testing.assert_allclose(
      np.asarray(scaled, np.complex128),
      x * factor,
      rtol=float(jnp.finfo(leaf.dtype).eps),
    )


def test_a_factor_of_zero_erases_bad_numbers():
  tree = {'kernel': jnp.array([[jnp.nan, 2.0], [jnp.inf, 4.0]])}
  scoped = scopes.scoped('unit', tree)
  np.testing.assert_allclose(
    scoped.norms(tree), [np.nan, np.sqrt(20.0)], rtol=1e-6
  )
  scaled = scoped.scale(tree, jnp.array([0.0, 0.5]))
  np.testing.assert_array_equal(scaled['kernel'], [[0, 1], [0, 2]])


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
  """Of every leaf, to be multiplied with it."""
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
  """It is homogeneous: both times 1e30 is the update times 1e30."""
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
  """They have no place in the state, and their neighbours keep theirs."""
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
  """The factor may be below the least float32: that is no clipped step."""
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
    if expected > 0:  # a step of zeros is none
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
  """A spike of one leaf is held back to a root mean square of 1."""
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
