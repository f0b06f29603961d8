"""A fork whose two branches send back harmonized gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm
from optax_ghm import conflict
from tests.support import oracles_conflict as oracles, strategies_arrays
from tests.support.oracles_conflict import RULES, flat

X = np.random.default_rng(5).normal(size=(8, 3)).astype(np.float32)
SIGNS = np.array([[-2.0, 1.0, -1.0]])
FIRST, SECOND = np.square(X.astype(float)) + 1, np.cos(X.astype(float)) * SIGNS


def for_domain(x):
  return jnp.sum(jnp.square(x) * x / 3 + x)


def for_task(x):
  return jnp.sum(jnp.sin(x) * SIGNS.astype(np.float32))


def for_agreement(x):
  return for_domain(x) + for_task(x) / 4


def forked(x, first=for_domain, second=for_task, **kwargs):
  one, two = conflict.fork(x, **kwargs)
  return first(one) + second(two)


def by_both_rules(f):
  """Jitted gradients of f(x, rule), by rule."""
  return jax.jit(
    lambda x: {rule: jax.grad(f)(x, rule) for rule in RULES},
  )


def combined(first, second, **kwargs):
  return oracles.combined(first, second, **kwargs).reshape(first.shape)


def test_the_two_losses_of_these_tests_are_in_conflict():
  assert np.vdot(FIRST, SECOND) < 0 < np.vdot(FIRST, FIRST + SECOND / 4)
  rows = np.sum(FIRST * SECOND, axis=1)
  assert (rows < 0).any() and (rows > 0).any()
  for rule in RULES:
    whole, by_row = expected_gradients(rule)
    assert np.abs(whole - FIRST - SECOND).max() > 0.3
    assert np.abs(whole - by_row).max() > 0.3


def expected_gradients(rule):
  """Of the whole batch, and of every row alone."""
  rows = zip(FIRST, SECOND, strict=True)
  by_row = [combined(*row, rule=rule) for row in rows]
  return combined(FIRST, SECOND, rule=rule), np.stack(by_row)


@functools.partial(jax.jit, static_argnames='rule')
def pulled(first, second, rule, harmonic_range=0.5):
  """The branches, and the cotangent of x = first for those of the two."""
  fork = functools.partial(
    conflict.fork, rule=rule, harmonic_range=harmonic_range
  )
  y, pull = jax.vjp(fork, first)

  def float0(leaf):
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return leaf if inexact else np.zeros(leaf.shape, jax.dtypes.float0)

  return y, pull(jax.tree.map(float0, (first, second)))[0]


TREE = {
  'a': (jnp.float32, (2, 1, 2)),
  'b': (jnp.bfloat16, (3,)),
  'c': (jnp.complex64, (1, 2)),
  'e': (jnp.float32, (0, 2)),
  's': (jnp.float32, ()),
}


@pytest.mark.device
@given(
  rule=st.sampled_from(RULES),
  scale=st.sampled_from([1e-18, 1.0, 1e18]),
  bad=st.sampled_from([0.0, 0.0, 0.0, np.nan, np.inf]),
  against=st.sampled_from([0.0, 1.0, 4.0]),
  data=st.data(),
)
def test_gradients_are_harmonized(rule, scale, bad, against, data):
  ordinary = st.integers(-64, 64).map(lambda n: n / 16)

  def draw(name):
    dtype, shape = TREE[name]
    u = data.draw(strategies_arrays.arrays(np.float32, shape, ordinary))
    return u * np.complex64(0.6 + 0.8j) if dtype == jnp.complex64 else u

  g1, g2 = {}, {}
  for name, (dtype, _) in TREE.items():
    first, other = draw(name), draw(name)
    second = other - first * np.float32(against)
    g1[name] = np.asarray(first * np.float32(scale)).astype(dtype)
    g2[name] = np.asarray(second * np.float32(1 / scale)).astype(dtype)
  g1['s'] = (g1['s'] + np.float32(bad)).astype(np.float32)
  n = np.arange(3, dtype=np.int32)
  y, dx = pulled({**g1, 'n': n}, {**g2, 'n': n}, rule, 0.25)
  for branch in y:
    jax.tree.map(np.testing.assert_array_equal, branch, {**g1, 'n': n})
  assert dx.pop('n').dtype == jax.dtypes.float0
  one, two = oracles.weights(g1, g2, rule, 0.25)
  for name, found in dx.items():
    # The angle of almost opposite gradients has half of the digits.
    rtol = max(4 * strategies_arrays.rounding(found.dtype), 1e-3)
    assert found.dtype == g1[name].dtype and found.shape == g1[name].shape
    parts = one * flat(g1[name]), two * flat(g2[name])
    size = sum(np.nan_to_num(abs(u)).max(initial=0) for u in parts)
    size = size if np.isfinite(bad) else 0
    np.testing.assert_allclose(
      flat(found), sum(parts), rtol=rtol, atol=rtol * size
    )


SIZES = st.floats(2.0**-50, 2.0**50, width=32)
COTANGENTS = hnp.arrays(
  np.float32,
  (4,),
  elements=st.one_of(st.just(0.0), SIZES, SIZES.map(lambda size: -size)),
)
ONE = np.float32([1.0, 1.3, 0.7, 0.1])
TWO = np.float32([-1.0, 1.0, -2.0, 0.0])


@pytest.mark.device
@given(first=COTANGENTS, second=COTANGENTS)
@example(first=np.float32([1, 0, 0, 0]), second=np.float32([-9, 1, 0, 0]))
@example(first=ONE * np.float32(1e25), second=TWO * np.float32(1e25))
@example(first=ONE * np.float32(1e-25), second=-ONE * np.float32(1e-25))
@example(first=ONE * np.float32(1e15), second=TWO * np.float32(1e-15))
@example(first=ONE * np.float32(1e-15), second=-ONE * np.float32(1e15))
def test_the_combined_cotangent_raises_neither_loss(first, second):
  found = np.float64(pulled(first, second, 'gh')[1])
  lengths = [np.linalg.norm(np.float64(g)) for g in (first, second)]
  for gradient, length in zip((first, second), lengths, strict=True):
    assert found @ np.float64(gradient) >= -1e-5 * sum(lengths) * length
  np.testing.assert_allclose(
    found, combined(first, second), rtol=1e-5, atol=1e-5 * sum(lengths)
  )


@given(bits=hnp.arrays(np.uint32, (2, 3)), rule=st.sampled_from(RULES))
def test_both_branches_are_bit_for_bit_the_input(bits, rule):
  x = bits.view(np.float32)
  for y in pulled(x, x, rule)[0]:
    np.testing.assert_array_equal(np.asarray(y).view(np.uint32), bits)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_without_conflict_it_is_bit_for_bit_the_sum(dtype, rng):
  first, second = rng.normal(size=(2, 50))
  second = second if first @ second > 0 else -second
  first[:2] = second[:1] = -0.0
  first, second = first.astype(dtype), second.astype(dtype)
  for rule in RULES:
    _, found = pulled(first, second, rule)
    assert np.asarray(found).tobytes() == (first + second).tobytes()


@pytest.mark.parametrize('rule', RULES)
def test_float64_gradients_are_welcome(rule):
  with jax.enable_x64(True):
    first = {'w': np.array([1.0, 0.5]), 'b': np.ones(2, np.float32)}
    second = {'w': np.array([-1.0, 1.0]), 'b': -np.ones(2, np.float32)}
    found = pulled(first, second, rule)[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(found, first)
    expected = oracles.combined(first, second, rule=rule)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-6)


def scanned(x, rule):
  def body(total, row):
    return total + forked(row[None], rule=rule), None

  return jax.lax.scan(body, jnp.zeros(()), x)[0]


def rematted(x, rule):
  fork = jax.checkpoint(functools.partial(conflict.fork, rule=rule))
  one, two = fork(x)
  return jax.checkpoint(for_domain)(one) + for_task(two)


def by_cond(x, rule):
  return jax.lax.cond(
    x[0, 0] < 99, lambda x: forked(x, rule=rule), lambda x: 0 * jnp.sum(x), x
  )


def rows_mapped(x, rule, axis_name=None):
  def of_row(row):
    return forked(row[None], rule=rule, axis_name=axis_name)

  return jnp.sum(jax.vmap(of_row, axis_name='i')(x))


TRANSFORMED = {
  'grad': lambda x, rule: forked(x, rule=rule),
  'remat': rematted,
  'cond': by_cond,
  'named vmap': functools.partial(rows_mapped, axis_name='i'),
  'scan': scanned,
  'vmap': rows_mapped,
}


@pytest.mark.parametrize('name', TRANSFORMED)
def test_under_the_transformations_of_jax(name):
  """Scan and vmap weigh every example alone, others the whole batch."""
  for rule, found in by_both_rules(TRANSFORMED[name])(X).items():
    expected = expected_gradients(rule)[name in ('scan', 'vmap')]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_in_shard_map_with_an_axis_name():
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))
  shards = functools.partial(jax.shard_map, mesh=mesh, in_specs=P('batch'))

  def loss(x, rule):
    return forked(x, rule=rule, axis_name='batch')

  @jax.jit
  def grads(x):
    of_rules = {}
    for rule in RULES:
      own = functools.partial(loss, rule=rule)
      around = shards(
        lambda x, own=own: jax.lax.psum(own(x), 'batch'), out_specs=P()
      )
      inside = shards(jax.grad(own), out_specs=P('batch'))
      of_rules[rule] = inside(x), jax.grad(around)(x)
    return of_rules

  for rule, found in grads(X).items():
    expected, _ = expected_gradients(rule)
    for grad in found:
      np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
def test_in_jit_of_a_sharded_batch(kind):
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(kind,))
  sharding = NamedSharding(mesh, P('batch'))
  with jax.set_mesh(mesh):
    found = jax.jit(jax.grad(forked))(jax.device_put(X, sharding))
  assert found.sharding.is_equivalent_to(sharding, 2)
  expected, _ = expected_gradients('gh')
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def penalty(x, rule, first=for_domain, second=for_task, **kwargs):
  """The squared norm of the gradient."""
  grad = jax.grad(forked)(x, first, second, rule=rule, **kwargs)
  return jnp.sum(jnp.square(grad))


def combine(one, two, rule):
  """The combination in jnp, so that it can be differentiated."""
  dot = jnp.sum(one * two)
  if rule == 'gh':
    weights = 1 - dot / jnp.sum(one * one), 1 - dot / jnp.sum(two * two)
  else:
    size = jnp.sqrt(jnp.sum(one * one) * jnp.sum(two * two))
    quarter = (jnp.arccos(dot / size) - jnp.pi / 2) / 4
    weights = 1 + 2 * jnp.sin(quarter), 1 - 2 * jnp.sin(quarter)
  against = dot < 0
  return jnp.where(against, weights[0] * one + weights[1] * two, one + two)


def test_a_gradient_of_a_gradient_keeps_the_rule():
  def of_the_branches(one, two, rule):
    gradients = jax.grad(for_domain)(one), jax.grad(for_task)(two)
    return jnp.sum(jnp.square(combine(*gradients, rule)))

  @jax.jit
  def grads(x):
    # The branches' cotangents of the second pass meet at the same fork.
    expected = {
      rule: combine(*jax.grad(of_the_branches, (0, 1))(x, x, rule), rule)
      for rule in RULES
    }
    found = {rule: jax.grad(penalty)(x, rule) for rule in RULES}
    return found, expected, jax.grad(penalty)(x, 'gh', enabled=False)

  found, expected, plain = grads(X)
  for rule in RULES:
    np.testing.assert_allclose(
      found[rule], expected[rule], rtol=1e-3, atol=1e-3
    )
    assert np.abs(found[rule] - plain).max() > 0.1


def test_a_gradient_of_a_gradient_without_conflict_is_plain():
  """Also of equal gradients, where the angle has a cusp, and of zero."""

  @jax.jit
  def pairs(x):
    grad = jax.grad(penalty)
    return [
      (
        grad(x, rule, second=second),
        grad(x, rule, second=second, enabled=False),
      )
      for rule in RULES
      for second in (for_domain, lambda x: 0 * jnp.sum(x))
    ]

  for found, plain in pairs(X[:1, :1]):
    np.testing.assert_allclose(found, plain, rtol=1e-5)


def test_a_branch_that_is_not_used_changes_nothing():
  @jax.jit
  def grads(x):
    return (
      jax.grad(forked)(x, second=lambda x: 0.0),
      jax.grad(forked)(x, first=lambda x: 0.0),
    )

  for found, expected in zip(grads(X), (FIRST, SECOND), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_with_a_reversal_before_the_domain_branch():
  """The losses agree; the reversed one is against the task's."""

  @by_both_rules
  def grads(x, rule):
    one, two = conflict.fork(x, rule=rule)
    one = optax_ghm.reverse_gradient(one, 0.25)
    return for_domain(one) + for_agreement(two)

  first, second = -0.25 * FIRST, FIRST + SECOND / 4
  for rule, found in grads(X).items():
    expected = combined(first, second, rule=rule)
    assert np.abs(expected - first - second).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_forward_mode_needs_it_disabled():
  for rule in RULES:
    with pytest.raises(TypeError, match='forward-mode'):
      jax.jvp(functools.partial(conflict.fork, rule=rule), (X,), (X,))

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
  branches = conflict.fork({**tree, 'x': X})
  for branch in branches:
    assert jax.tree.structure(branch) == jax.tree.structure({**tree, 'x': X})
    for name in ('integer', 'key', 'bool', 'number', 'float0'):
      assert branch[name] is tree[name]

  @jax.jit
  @jax.grad
  def grad(x):
    one, two = conflict.fork({**tree, 'x': x})
    return for_domain(one['x']) + for_task(two['x'])

  expected, _ = expected_gradients('gh')
  np.testing.assert_allclose(grad(X), expected, rtol=1e-4)


@pytest.mark.parametrize('enabled', [True, False])
def test_a_wrong_rule_is_named(enabled):
  with pytest.raises(ValueError, match="rule.*'gh'.*'pcgrad'"):
    conflict.fork(X, rule='pcgrad', enabled=enabled)
