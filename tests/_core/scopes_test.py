"""Units of real Flax layers, and what a scope measures and scales."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import given, strategies as st

import optax_ghm
from optax_ghm._core import scopes

# The layouts of Flax.


def names(path):
  """Returns the names in a path, without boxes such as an nnx.Param."""
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
  """Returns positive numbers, so that no derivative is 0 by chance."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.uniform(0.5, 1, x.shape).astype(x.dtype), shapes
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
  actual = axes_of(linen_params(module, np.ones(shape, np.float32)))
  if 'conv' in name:
    expected = expected | {'bias': (0,)}
  assert actual == expected


def test_units_of_an_embedding_are_its_tokens():
  tokens = np.zeros(1, np.int32)
  params = linen_params(linen.Embed(7, 3), tokens)
  assert axes_of(params) == {'embedding': (1,)}
  params = nnx_params(lambda rngs: nnx.Embed(7, 3, rngs=rngs))
  assert axes_of(params) == {'embedding': (1,)}


def test_units_of_a_recurrent_cell():
  """The gates of the cell have names such as ``if``."""
  carry, x = (np.ones((1, 3), np.float32),) * 2, np.ones((1, 4), np.float32)
  params = linen_params(linen.OptimizedLSTMCell(3), carry, x)
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
  """The tree is a state, as in ``nnx.Optimizer``, or made of dicts."""
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
  params = linen_params(module, np.ones((1, 8, 4), np.float32))
  assert isinstance(params['kernel'], linen.Partitioned)
  assert axes_of(params) == {'kernel': (0, 1), 'bias': (0,)}


@pytest.mark.parametrize('name', ['bias', 'scale', 'embedding'])
def test_a_layer_may_be_named_as_a_parameter_is(name):
  """A layer may have any name: ViT calls a convolution ``embedding``."""

  class Model(linen.Module):
    @linen.compact
    def __call__(self, x):
      return linen.Conv(5, (3, 2), name=name)(x)

  params = linen_params(Model(), np.ones((1, 8, 8, 4), np.float32))
  expected = {f'{name}/kernel': (0, 1, 2), f'{name}/bias': (0,)}
  assert axes_of(params) == expected


def test_a_kernel_somewhere_within_value_has_no_heads():
  """The value network of an actor and critic has such kernels."""

  class Model(linen.Module):
    @linen.compact
    def __call__(self, x):
      return linen.Sequential([linen.Conv(5, (3,))], name='value')(x)

  params = linen_params(Model(), np.ones((1, 8, 4), np.float32))
  assert set(axes_of(params).values()) == {(0, 1), (0,)}


ONE_OUTPUT = ['dense', 'conv 2d', 'grouped conv', 'transposed conv']


@pytest.mark.parametrize('name', [*ONE_OUTPUT, 'dense general', 'attention'])
def test_a_unit_of_linen_is_what_computes_one_output(name):
  """Output i depends on all numbers of unit i, and on no other."""
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
  graph, params, others = nnx.split(nnx_model(NNX[name][0]), nnx.Param, ...)
  assert_units_are_outputs(
    lambda params: nnx.merge(graph, params, others)(x),
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
  """Returns the axes of Flax's layouts behind a first axis for the layers."""
  layer = jax.eval_shape(lambda leaf: leaf[0], leaf)
  return tuple(i + 1 for i in optax_ghm.calibration.flax_unit_axes(path, layer))


def test_stacked_layers_are_clipped_as_each_by_itself(rng):
  stack = linen.scan(
    Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=3
  )()
  x = np.ones((1, 4, 6), np.float32)
  params = filled(linen_params(stack, x, None))

  def uneven(x):
    sizes = 10 ** rng.uniform(-4, 1, x.shape[-1:])
    return (rng.normal(size=x.shape) * sizes).astype(x.dtype)

  def clip(grads, params, **kwargs):
    tx = optax_ghm.clip_by_parameter_norm(**kwargs)
    return tx.update(grads, tx.init(params), params)

  @jax.jit
  def both(*args):
    return clip(*args, scope=optax_ghm.Units(layered)), jax.vmap(clip)(*args)

  found = both(jax.tree.map(uneven, params), params)
  (updates, state), (expected, states) = jax.device_get(found)
  chex.assert_trees_all_close(updates, expected, rtol=1e-6)
  np.testing.assert_allclose(
    np.sort(state.factor), np.sort(states.factor.ravel()), rtol=1e-5
  )
  assert 0 < state.clipped.sum() < state.clipped.size


def test_units_may_count_their_axes_from_the_end():
  """Negative axes count from the end, as in NumPy and JAX."""

  @jax.jit
  def both(tree):
    scoped = [
      scopes.scoped(optax_ghm.Units(lambda path, leaf, i=i: (i,)), tree)
      for i in (-2, 0)
    ]
    return [(s.norms(tree), s.sizes(tree)) for s in scoped]

  tree = {'a': np.arange(1, 7, dtype=np.float32).reshape(2, 3)}
  chex.assert_trees_all_equal(*both(tree))


# What a scope measures and scales.


DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64)
OTHERS = [None, np.arange(3), np.ones((0, 2), np.float32), optax.MaskedNode()]
SHAPES_AND_AXES = [
  ((), ()),
  ((1,), (0,)),
  ((3,), ()),
  ((3,), (0,)),
  ((2, 3), (0,)),
  ((3, 1), (1,)),
  ((3, 2, 2), (0, 2)),
  ((2, 1, 3, 2), (1, 3)),
  ((2, 1, 3, 2), (0, 1, 2, 3)),
]
TREES = {  # few: each is compiled
  'nothing counts': [],
  'one leaf': [((2, 3), (1,), jnp.float32)],
  'every dtype': [
    (*leaf, DTYPES[(i + j) % 4])
    for i, leaf in enumerate(SHAPES_AND_AXES)
    for j in (0, 1)
  ],
}


@functools.partial(jax.jit, static_argnames='all_axes')
def measured_and_scaled(tree, factors, all_axes):
  axes = iter(all_axes)
  scoped = scopes.scoped(optax_ghm.Units(lambda path, leaf: next(axes)), tree)
  norms = scoped.norms(tree)
  assert scoped.shape == norms.shape
  return norms, scoped.sizes(tree), scoped.scale(tree, factors)


@pytest.mark.parametrize('name', TREES)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-30, 1.0, 1e30]))
def test_units_of_every_kind(name, seed, scale):
  """Norms, sizes and factors are right for any axes and leaves without norms.

  The axes stand in for a layout, and the numbers are those of float64 NumPy.
  """
  rng, leaves = np.random.default_rng(seed), []
  for shape, axes, dtype in TREES[name]:
    x = rng.normal(size=shape) * (1.0 if dtype == jnp.float16 else scale)
    if dtype == jnp.complex64:
      x = x * (1 + rng.normal() * 1j)
    units = [1 if i in axes else n for i, n in enumerate(shape)]
    # Some units are all zero.
    leaves.append(np.asarray(x * (rng.uniform(size=units) < 0.8)).astype(dtype))
  wide = [np.asarray(leaf, np.complex128) for leaf in leaves]
  all_axes = tuple(axes for _, axes, _ in TREES[name])
  norms = [
    np.sqrt((np.abs(x) ** 2).sum(axes, keepdims=True))
    for x, axes in zip(wide, all_axes, strict=True)
  ]
  flat = np.concatenate([np.zeros(0), *(n.ravel() for n in norms)])
  factors = rng.choice(np.float32([0.0, 0.5, 3.0]), flat.shape)
  tree = [*OTHERS[:2], *leaves, *OTHERS[2:]]
  actual, sizes, result = measured_and_scaled(tree, factors, all_axes)

  assert actual.shape == flat.shape and actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, flat, rtol=2e-6)
  each = [
    np.full(n.size, x.size // n.size) for n, x in zip(norms, wide, strict=True)
  ]
  np.testing.assert_array_equal(sizes, np.concatenate([np.zeros(0), *each]))

  assert jax.tree.structure(result) == jax.tree.structure(tree)
  offset, of_leaf = 0, iter(zip(wide, norms, strict=True))
  for leaf, scaled in zip(
    jax.tree.leaves(tree), jax.tree.leaves(result), strict=True
  ):
    if not jnp.issubdtype(leaf.dtype, jnp.inexact) or not leaf.size:
      np.testing.assert_array_equal(scaled, leaf)
      continue
    assert scaled.dtype == leaf.dtype
    x, norm = next(of_leaf)
    factor = factors[offset : offset + norm.size].reshape(norm.shape)
    offset += norm.size
    np.testing.assert_allclose(
      np.asarray(scaled, np.complex128),
      x * factor,
      rtol=float(jnp.finfo(leaf.dtype).eps),
    )


def test_a_factor_of_zero_erases_bad_numbers():
  tree = {'kernel': np.float32([[np.nan, 2.0], [np.inf, 4.0]])}

  @jax.jit
  def both(tree, factors):
    scoped = scopes.scoped('unit', tree)
    return scoped.norms(tree), scoped.scale(tree, factors)

  norms, scaled = both(tree, np.float32([0.0, 0.5]))
  np.testing.assert_allclose(norms, [np.nan, np.sqrt(20.0)], rtol=1e-6)
  np.testing.assert_array_equal(scaled['kernel'], [[0, 1], [0, 2]])
