"""A fork whose branches send back gradients that are reconciled."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, PartitionSpec as P

import optax_ghm
from optax_ghm import conflict
from tests.support import oracles_conflict as oracles, strategies_arrays

X = np.random.default_rng(5).normal(size=(8, 3)).astype(np.float32)
SIGNS = np.array([[-2.0, 1.0, -1.0]])
FIRST, SECOND = np.square(X.astype(float)) + 1, np.cos(X.astype(float)) * SIGNS


def first(x):
  return jnp.sum(jnp.square(x) * x / 3 + x)


def second(x):
  return jnp.sum(jnp.sin(x) * SIGNS.astype(np.float32))


def forked(x, losses=(first, second), **kwargs):
  branches = conflict.fork(x, len(losses), **kwargs)
  return sum(loss(y) for loss, y in zip(losses, branches, strict=True))


def expected(*gradients):
  """The reconciled gradient, by its definition, in float64."""
  rows = np.stack([np.asarray(g, float).ravel() for g in gradients])
  return oracles.upgrad(rows).reshape(gradients[0].shape)


WHOLE = expected(FIRST, SECOND)
BY_ROW = np.stack([expected(*row) for row in zip(FIRST, SECOND, strict=True)])


def test_the_two_losses_of_these_tests_are_in_conflict():
  assert np.vdot(FIRST, SECOND) < 0 < np.vdot(FIRST, FIRST + SECOND / 4)
  for found in (WHOLE, BY_ROW):
    assert np.abs(found - (FIRST + SECOND) / 2).max() > 0.1
  assert np.abs(WHOLE - BY_ROW).max() > 0.1


TREE = {
  'a': (jnp.float32, (2, 1, 2)),
  'b': (jnp.bfloat16, (3,)),
  'c': (jnp.complex64, (1, 2)),
  'e': (jnp.float32, (0, 2)),
  's': (jnp.float32, ()),
}


@jax.jit
def pulled(cotangents):
  """What the fork of the first sends back for these cotangents."""
  y, pull = jax.vjp(lambda x: conflict.fork(x, len(cotangents)), cotangents[0])

  def float0(leaf):
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return leaf if inexact else np.zeros(leaf.shape, jax.dtypes.float0)

  return y, pull(jax.tree.map(float0, cotangents))[0]


def reals(x):
  x = np.asarray(x)
  width = np.complex128 if np.iscomplexobj(x) else np.float64
  return x.astype(width).ravel().view(np.float64)


@pytest.mark.device
@given(
  scale=st.sampled_from([1e-15, 1.0, 1e15]),
  bad=st.sampled_from([0.0, 0.0, 0.0, np.nan, np.inf]),
  seed=st.integers(0, 999),
)
def test_any_tree_is_reconciled_in_its_own_dtypes(scale, bad, seed):
  rng = np.random.default_rng(seed)

  def draw(dtype, shape):
    x = rng.normal(size=shape) * scale
    x = x * (0.6 + 0.8j) if dtype == jnp.complex64 else x
    return np.asarray(x).astype(dtype)

  trees = [{name: draw(*leaf) for name, leaf in TREE.items()} for _ in range(3)]
  trees[1]['s'] = (trees[1]['s'] + np.float32(bad)).astype(np.float32)
  n = np.arange(3, dtype=np.int32)
  y, dx = pulled(tuple({**tree, 'n': n} for tree in trees))
  for branch in y:
    jax.tree.map(np.testing.assert_array_equal, branch, {**trees[0], 'n': n})
  assert dx.pop('n').dtype == jax.dtypes.float0
  chex.assert_trees_all_equal_shapes_and_dtypes(dx, trees[0])
  rows = np.stack(
    [
      np.concatenate([reals(tree[name]) for name in sorted(TREE)])
      for tree in (trees if np.isfinite(bad) else trees[::2])
    ]
  )
  found = np.concatenate([reals(dx[name]) for name in sorted(TREE)])
  rtol = 4 * strategies_arrays.rounding(jnp.bfloat16)
  np.testing.assert_allclose(
    found, oracles.upgrad(rows), rtol=rtol, atol=1e-4 * scale
  )


@given(bits=hnp.arrays(np.uint32, (2, 3)))
def test_all_branches_are_bit_for_bit_the_input(bits):
  x = bits.view(np.float32)
  for y in pulled((x, x, x))[0]:
    np.testing.assert_array_equal(np.asarray(y).view(np.uint32), bits)


def scanned(x):
  def body(total, row):
    return total + forked(row[None]), None

  return jax.lax.scan(body, jnp.zeros(()), x)[0]


def rematted(x):
  one, two = jax.checkpoint(conflict.fork)(x)
  return jax.checkpoint(first)(one) + second(two)


def by_cond(x):
  return jax.lax.cond(x[0, 0] < 99, forked, lambda x: 0 * jnp.sum(x), x)


def rows_mapped(x, axis_name=None):
  def of_row(row):
    return forked(row[None], axis_name=axis_name)

  return jnp.sum(jax.vmap(of_row, axis_name='i')(x))


TRANSFORMED = {
  'grad': (forked, WHOLE),
  'remat': (rematted, WHOLE),
  'cond': (by_cond, WHOLE),
  'named vmap': (functools.partial(rows_mapped, axis_name='i'), WHOLE),
  'scan': (scanned, BY_ROW),
  'vmap': (rows_mapped, BY_ROW),
}


@pytest.mark.parametrize('name', TRANSFORMED)
def test_under_the_transformations_of_jax(name):
  """Scan and vmap weigh every example alone, others the whole batch."""
  f, wanted = TRANSFORMED[name]
  found = jax.jit(jax.grad(f))(X)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_around_and_inside_shard_map():
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))
  shards = functools.partial(jax.shard_map, mesh=mesh, in_specs=P('batch'))
  own = functools.partial(forked, axis_name='batch')
  around = shards(lambda x: jax.lax.psum(own(x), 'batch'), out_specs=P())
  inside = shards(jax.grad(own), out_specs=P('batch'))
  for found in jax.jit(lambda x: (inside(x), jax.grad(around)(x)))(X):
    np.testing.assert_allclose(found, WHOLE, rtol=1e-4, atol=1e-4)


def penalty(x, **kwargs):
  """The squared norm of the gradient."""
  return jnp.sum(jnp.square(jax.grad(forked)(x, **kwargs)))


def test_a_gradient_of_a_gradient_keeps_the_rule():
  def reconciled(one, two):
    rows = jnp.stack([one.ravel(), two.ravel()])
    weights = conflict.gh_weights(rows @ rows.T)
    return (weights @ rows).reshape(one.shape)

  def of_the_branches(one, two):
    gradients = jax.grad(first)(one), jax.grad(second)(two)
    return jnp.sum(jnp.square(reconciled(*gradients)))

  @jax.jit
  def grads(x):
    # The branches' cotangents of the second pass meet at the same fork.
    wanted = reconciled(*jax.grad(of_the_branches, (0, 1))(x, x))
    found = jax.grad(penalty)(x, weights=conflict.gh_weights)
    return found, wanted, jax.grad(penalty)(x, enabled=False)

  found, wanted, plain = grads(X)
  np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
  assert np.abs(found - plain).max() > 0.1


def test_a_branch_that_is_not_used_has_no_gradient():
  @jax.jit
  def grads(x):
    return (
      jax.grad(forked)(x, (first, lambda x: 0.0)),
      jax.grad(forked)(x, (lambda x: 0.0, second)),
      jax.grad(forked)(x, (lambda x: 0.0, lambda x: 0.0)),
    )

  for found, wanted in zip(grads(X), (FIRST, SECOND, 0 * X), strict=True):
    np.testing.assert_allclose(found, wanted / 2, rtol=1e-6)


def test_with_a_reversal_before_the_domain_branch():
  """The losses agree; the reversed one is against the task's."""

  def agreeing(x):
    return first(x) + second(x) / 4

  def reversed_first(x):
    return first(optax_ghm.reverse_gradient(x, 0.25))

  found = jax.jit(jax.grad(forked), static_argnums=1)(
    X, (reversed_first, agreeing)
  )
  wanted = expected(-0.25 * FIRST, FIRST + SECOND / 4)
  np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_forward_mode_needs_it_disabled():
  with pytest.raises(TypeError, match='forward-mode'):
    jax.jvp(conflict.fork, (X,), (X,))

  @jax.jit
  def disabled(x):
    fork = functools.partial(conflict.fork, enabled=False)
    return jax.jvp(fork, (x,), (2 * x,)), jax.grad(forked)(x, enabled=False)

  found, grad = disabled(X)
  chex.assert_trees_all_equal(found, ((X, X), (2 * X, 2 * X)))
  np.testing.assert_allclose(grad, FIRST + SECOND, rtol=1e-5)


def test_leaves_of_every_kind_pass():
  tree = {
    'integer': np.arange(3),
    'key': jax.random.key(0),
    'nothing': None,
    'bool': np.array(True),
    'number': 1.5,
    'float0': np.zeros(2, jax.dtypes.float0),
    'empty': np.zeros((0, 2), np.float32),
  }
  for branch in conflict.fork({**tree, 'x': X}, 3):
    assert jax.tree.structure(branch) == jax.tree.structure({**tree, 'x': X})
    for name in ('integer', 'key', 'bool', 'number', 'float0'):
      assert branch[name] is tree[name]

  @jax.jit
  @jax.grad
  def grad(x):
    one, two = conflict.fork({**tree, 'x': x})
    return first(one['x']) + second(two['x'])

  np.testing.assert_allclose(grad(X), WHOLE, rtol=1e-4, atol=1e-4)


def test_no_branch_is_an_error():
  with pytest.raises(ValueError, match='branches must be from 1'):
    conflict.fork(X, 0)
