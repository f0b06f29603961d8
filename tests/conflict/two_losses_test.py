"""Two gradients that point against each other, alone and at a fork."""

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

SHARDS = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))
BLOCKS = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
SPLITS = {'one axis': (SHARDS, 'batch'), 'two axes': (BLOCKS, ('a', 'b'))}
RULES = ['gh', 'gh++']

each_rule = pytest.mark.parametrize('rule', RULES)
each_kind = pytest.mark.parametrize(
  'kind', [AxisType.Auto, AxisType.Explicit], ids=str
)
each_split = pytest.mark.parametrize(
  ('mesh', 'axis_name'), SPLITS.values(), ids=SPLITS
)


# Weights of two gradients in conflict.


conflict_weights = jax.jit(
  conflict.conflict_weights,
  static_argnames=('rule', 'harmonic_range', 'axis_name'),
)


def flat(tree):
  """All floating leaves in one vector, in double precision."""
  leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)]
  kind = np.complex128 if np.iscomplexobj(leaves[0]) else np.float64
  return np.concatenate([u.astype(kind) for u in leaves])


def weights_by_hand(first, second, rule='gh', harmonic_range=0.5):
  one, two = flat(first), flat(second)
  if not (np.isfinite(one).all() and np.isfinite(two).all()):
    return 1.0, 1.0
  dot = np.vdot(one, two).real
  if dot >= 0:
    return 1.0, 1.0
  squares = np.vdot(one, one).real, np.vdot(two, two).real
  if rule == 'gh':
    return 1 - dot / squares[0], 1 - dot / squares[1]
  theta = np.arccos(dot / np.sqrt(squares[0]) / np.sqrt(squares[1]))
  beta = harmonic_range * (theta - np.pi / 2)
  return (
    1 + 2 * np.sin(beta / 2),
    1 + 2 * np.sin((beta + np.pi / 2 - theta) / 2),
  )


def combined_by_hand(first, second, **kwargs):
  one, two = weights_by_hand(first, second, **kwargs)
  return one * flat(first) + two * flat(second)


def random_tree(rng, dtype=np.float32):
  def leaf(*shape):
    x = rng.normal(size=shape)
    if np.issubdtype(dtype, np.complexfloating):
      x = x + 1j * rng.normal(size=shape)
    return jnp.asarray(x, dtype)

  return {'w': leaf(3, 2), 'b': (leaf(4), leaf())}


def turned(rng, dtype, conflict):
  """Two random trees, whose inner product has the sign that is asked for."""
  first, second = random_tree(rng, dtype), random_tree(rng, dtype)
  if (np.vdot(flat(first), flat(second)).real < 0) != conflict:
    second = jax.tree.map(jnp.negative, second)
  return first, second


def multiplied(tree, scale):
  return jax.tree.map(lambda x: x * jnp.asarray(scale, x.dtype), tree)


each_dtype = pytest.mark.parametrize(
  'dtype',
  [jnp.float32, jnp.bfloat16, jnp.complex64],
  ids=['float32', 'bfloat16', 'complex64'],
)


@each_rule
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.complex64])
def test_conflict_weights_are_their_formula(rule, dtype, rng):
  for _ in range(5):
    trees = turned(rng, dtype, conflict=True)
    one, two = conflict_weights(*trees, rule=rule)
    assert one.dtype == two.dtype == jnp.float32
    expected = weights_by_hand(*trees, rule=rule)
    np.testing.assert_allclose((one, two), expected, rtol=1e-5)
    trees = turned(rng, dtype, conflict=False)
    assert conflict_weights(*trees, rule=rule) == (1, 1)


def test_the_inner_product_of_complex_gradients_is_hermitian():
  first = jnp.array([1.0, 1j])
  for second, expected in ((-1, 2), (1, 1), (1j, 1), (-1j, 1)):
    weights = conflict_weights(first, first * second)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_gh_takes_from_each_what_points_against_the_other(rng):
  first, second = turned(rng, np.float32, conflict=True)
  one, two = np.float64(conflict_weights(first, second))
  a, b = flat(first), flat(second)
  combined = one * a + two * b
  np.testing.assert_allclose(
    combined,
    (a - b * (b @ a) / (b @ b)) + (b - a * (a @ b) / (a @ a)),
    rtol=1e-4,
    atol=1e-5,
  )
  assert (a + 9 * b) @ a < 0  # as the sum of the two losses would have it
  one, two = np.float64(conflict_weights(first, multiplied(second, 9)))
  combined = one * a + two * 9 * b
  assert combined @ a > 0 and combined @ b > 0


SCALES = [(1e25, 1e25), (1e-25, 1e-25), (1e15, 1e-15), (1e-15, 1e15)]


@each_rule
@pytest.mark.parametrize('scales', SCALES, ids=str)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.complex64])
def test_no_gradient_is_too_large_or_too_small(rule, scales, dtype, rng):
  trees = turned(rng, dtype, conflict=True)
  trees = [multiplied(*pair) for pair in zip(trees, scales, strict=True)]
  expected = weights_by_hand(*trees, rule=rule)
  np.testing.assert_allclose(
    conflict_weights(*trees, rule=rule), expected, rtol=1e-4
  )


@each_rule
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.complex64])
def test_zero_and_bad_gradients_are_left_alone(rule, bad, dtype):
  against = [-jnp.ones(2, dtype), -jnp.ones(1, dtype)]
  for values in ([1, bad], [bad, bad], [bad, 0], [0, 0]):
    tree = [-x * u for x, u in zip(values, against, strict=True)]
    assert conflict_weights(tree, against, rule=rule) == (1, 1)
    assert conflict_weights(against, tree, rule=rule) == (1, 1)
    assert conflict_weights(tree, tree, rule=rule) == (1, 1)


ANY = hnp.arrays(np.float32, (5,), elements=st.floats(width=32))


@given(first=ANY, second=ANY)
@example(
  first=1e25 * np.float32([1.0, 1.3, 0.7, 0.0, 0.0]),
  second=-1e-25 * np.float32([1.0, 1.3, 0.7, 0.0, 0.0]),
)
@example(
  first=np.float32([1e38, 0, 0, 0, 0]),
  second=np.float32([-1e38, 1e38, 0, 0, 0]),
)
def test_weights_of_any_gradients_are_numbers(first, second):
  for rule in RULES:
    one, two = conflict_weights(first, second, rule=rule)
    assert np.isfinite(one) and np.isfinite(two)
    if rule == 'gh':
      assert one >= 1 and two >= 1
    else:
      assert 1 <= one < 1.8 and 0.2 < two <= 1
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
      assert (one, two) == (1, 1)


@pytest.mark.parametrize('harmonic_range', [0.0, 0.25, 0.5, 1.0])
def test_gh_plus_plus_over_angles(harmonic_range):
  for degrees in (0, 45, 89, 91, 100, 120, 150, 175, 180):
    angle = np.deg2rad(degrees)
    first = jnp.array([2.0, 0.0])
    second = jnp.array([np.cos(angle), np.sin(angle)], jnp.float32) * 7
    actual = conflict_weights(
      first, second, rule='gh++', harmonic_range=harmonic_range
    )
    excess = max(angle - np.pi / 2, 0)
    expected = (
      1 + 2 * np.sin(harmonic_range * excess / 2),
      1 - 2 * np.sin((1 - harmonic_range) * excess / 2),
    )
    # Near 180 degrees the angle has half of the digits of its cosine.
    np.testing.assert_allclose(actual, expected, atol=5e-4)


@each_rule
def test_weights_are_continuous_at_a_right_angle(rule):
  first = jnp.array([1.0, 0.0])
  for excess in (-1e-3, 0.0, 1e-5, 1e-3):
    second = jnp.array([-np.sin(excess), np.cos(excess)], jnp.float32)
    weights = np.array(conflict_weights(first, second, rule=rule))
    assert (np.abs(weights - 1) <= 1.01 * max(excess, 0)).all()
    assert (weights != 1).all() == (excess > 0)


@each_rule
def test_only_floating_leaves_count(rule):
  others = {'key': jax.random.key(0), 'bool': jnp.array([True])}
  first = {'x': jnp.array([1.0, 0.0]), 'none': None, 'n': jnp.array([5, 6])}
  second = {'x': jnp.array([-1.0, 1.0]), 'none': None, 'n': jnp.array([-7, -9])}
  np.testing.assert_allclose(
    conflict_weights(first | others, second | others, rule=rule),
    weights_by_hand(first['x'], second['x'], rule=rule),
    rtol=1e-6,
  )
  assert conflict_weights(others, others, rule=rule) == (1, 1)


def test_conflict_weights_name_wrong_arguments():
  x = jnp.ones(3)
  with pytest.raises(ValueError, match="rule.*'gh'.*'GH'"):
    conflict.conflict_weights(x, x, rule='GH')
  wrong = [(x, jnp.ones(4)), ([x], [x, x]), ([x, x[:2]], [x[:2], x])]
  for first, second in wrong:
    with pytest.raises(ValueError, match='the same structure'):
      conflict.conflict_weights(first, second)


@pytest.mark.parametrize(
  ('first', 'second'),
  [
    ({'a': jnp.ones(3)}, {'b': jnp.ones(3)}),
    ((jnp.ones(3), None), (None, jnp.ones(3))),
    ((jnp.ones(3), jnp.ones(3)), [jnp.ones(3), jnp.ones(3)]),
  ],
  ids=['names', 'places', 'containers'],
)
def test_other_structures_of_the_same_shapes_are_named(first, second):
  with pytest.raises(ValueError, match='the same structure'):
    conflict.conflict_weights(first, second)


@each_rule
@pytest.mark.parametrize('scale', [1.0, 1e25, 1e-25])
def test_a_named_vmap_is_one_gradient(rule, scale, rng):
  first, second = rng.normal(size=(2, 8, 3)).astype(np.float32)
  first, second = (
    jnp.asarray(first) * scale,
    jnp.asarray(second - first) * scale,
  )

  def mapped(axis_name):
    return jax.vmap(
      functools.partial(conflict_weights, rule=rule, axis_name=axis_name),
      axis_name='i',
    )(first, second)

  expected = np.outer(weights_by_hand(first, second, rule=rule), np.ones(8))
  np.testing.assert_allclose(mapped('i'), expected, rtol=1e-5)
  assert np.abs(mapped(None) - expected).max() > 0.1


@each_rule
@each_split
def test_conflict_weights_in_shard_map(rule, mesh, axis_name, rng):
  first, second = rng.normal(size=(2, 16, 3)).astype(np.float32)
  second -= first
  mapped = jax.jit(
    jax.shard_map(
      functools.partial(
        conflict.conflict_weights, rule=rule, axis_name=axis_name
      ),
      mesh=mesh,
      in_specs=P(axis_name),
      out_specs=P(),
    )
  )
  np.testing.assert_allclose(
    mapped(first, second), weights_by_hand(first, second, rule=rule), rtol=1e-5
  )


# The fork.


X = jnp.asarray(np.random.default_rng(5).normal(size=(8, 3)), jnp.float32)


def for_domain(x):
  return jnp.sum(jnp.square(x) * x / 3 + x)


def for_task(x):
  return jnp.sum(jnp.sin(x) * jnp.array([[-2.0, 1.0, -1.0]]))


def for_agreement(x):
  return for_domain(x) + for_task(x) / 4


FIRST, SECOND = jax.grad(for_domain)(X), jax.grad(for_task)(X)


def forked(x, first=for_domain, second=for_task, **kwargs):
  one, two = conflict.fork(x, **kwargs)
  return first(one) + second(two)


def expected_gradient(**kwargs):
  return combined_by_hand(FIRST, SECOND, **kwargs).reshape(X.shape)


def expected_by_row(rule):
  rows = zip(FIRST, SECOND, strict=True)
  return np.stack([combined_by_hand(*row, rule=rule) for row in rows])


def test_the_two_losses_of_these_tests_are_in_conflict():
  assert np.vdot(FIRST, SECOND) < 0
  rows = np.sum(FIRST * SECOND, axis=1)
  assert (rows < 0).any() and (rows > 0).any()
  assert np.vdot(FIRST, jax.grad(for_agreement)(X)) > 0
  for rule in RULES:
    plain, whole = np.asarray(FIRST + SECOND), expected_gradient(rule=rule)
    assert np.abs(whole - plain).max() > 0.3
    assert np.abs(whole - expected_by_row(rule)).max() > 0.3


@given(
  bits=hnp.arrays(np.uint32, st.sampled_from([(), (0,), (5,), (2, 3)])),
)
def test_both_branches_are_bit_for_bit_the_input(bits):
  x = bits.view(np.float32)
  for run in (conflict.fork, jax.jit(conflict.fork)):
    for y in run(jnp.asarray(x)):
      np.testing.assert_array_equal(np.asarray(y).view(np.uint32), bits)


@pytest.mark.parametrize('harmonic_range', [0.0, 0.5, 1.0])
@each_rule
def test_gradient_is_that_of_two_backward_passes(rule, harmonic_range):
  kwargs = {'rule': rule, 'harmonic_range': harmonic_range}
  grad = jax.jit(jax.grad(functools.partial(forked, **kwargs)))
  np.testing.assert_allclose(grad(X), expected_gradient(**kwargs), rtol=1e-4)


@functools.partial(jax.jit, static_argnames='rule')
def pulled(first, second, rule='gh'):
  """The cotangent of the features for those of the two branches."""
  x = jax.tree.map(jnp.zeros_like, first)
  fork = functools.partial(conflict.fork, rule=rule)
  _, pull = jax.vjp(fork, x)
  return pull((first, second))[0]


@each_rule
@each_dtype
def test_a_tree_of_features_has_one_pair_of_weights(rule, dtype, rng):
  first, second = turned(rng, dtype, conflict=True)
  actual = pulled(first, second, rule)
  chex.assert_trees_all_equal_shapes_and_dtypes(actual, first)
  np.testing.assert_allclose(
    flat(actual),
    combined_by_hand(first, second, rule=rule),
    rtol=float(jnp.finfo(dtype).eps),
    atol=1e-5,
  )


@each_rule
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_without_conflict_it_is_bit_for_bit_the_sum(rule, dtype, rng):
  first = jnp.asarray(rng.normal(size=50), dtype).at[:2].set(-0.0)
  second = jnp.asarray(rng.normal(size=50), dtype).at[:1].set(-0.0)
  second = jnp.where(first @ second < 0, -second, second)
  actual = np.asarray(pulled(first, second, rule))
  assert actual.tobytes() == np.asarray(first + second).tobytes()


@each_rule
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_bad_cotangents_are_added_up_as_ever(rule, bad):
  first = jnp.array([1.0, bad, 2.0])
  actual = pulled(first, -jnp.ones(3), rule)
  np.testing.assert_array_equal(actual, first - 1)


@each_rule
def test_float64_gradients_are_welcome(rule):
  with jax.enable_x64(True):
    first = {'w': jnp.array([1.0, 0.5]), 'b': jnp.ones(2, jnp.float32)}
    second = {'w': jnp.array([-1.0, 1.0]), 'b': -jnp.ones(2, jnp.float32)}
    weights = conflict_weights(first, second, rule=rule)
    expected = weights_by_hand(first, second, rule=rule)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    combined = pulled(first, second, rule)
    chex.assert_trees_all_equal_shapes_and_dtypes(combined, first)
    np.testing.assert_allclose(
      flat(combined), combined_by_hand(first, second, rule=rule), rtol=1e-5
    )


def test_a_branch_that_is_not_used_changes_nothing():
  one = jax.grad(forked)(X, second=lambda x: 0.0)
  two = jax.grad(forked)(X, first=lambda x: 0.0)
  np.testing.assert_array_equal(one, FIRST)
  np.testing.assert_array_equal(two, SECOND)


SIZES = st.floats(2.0**-50, 2.0**50, width=32)
COTANGENTS = hnp.arrays(
  np.float32,
  (4,),
  elements=st.one_of(st.just(0.0), SIZES, SIZES.map(lambda size: -size)),
)


def assert_raises_neither(combined, first, second):
  combined = np.float64(combined)
  unit = np.linalg.norm(np.float64(first)) + np.linalg.norm(np.float64(second))
  for gradient in (first, second):
    norm = np.linalg.norm(np.float64(gradient))
    assert combined @ np.float64(gradient) >= -1e-5 * unit * norm


@given(first=COTANGENTS, second=COTANGENTS)
@example(first=np.float32([1, 0, 0, 0]), second=np.float32([-9, 1, 0, 0]))
def test_the_combined_cotangent_raises_neither_loss(first, second):
  combined = pulled(first, second)
  assert_raises_neither(combined, first, second)
  np.testing.assert_allclose(
    combined,
    combined_by_hand(first, second),
    rtol=1e-5,
    atol=1e-5 * (np.linalg.norm(first) + np.linalg.norm(second)),
  )


@pytest.mark.parametrize('scales', SCALES, ids=str)
def test_the_law_holds_for_losses_of_any_two_sizes(scales):
  first = np.float32([1.0, 1.3, 0.7, 0.1]) * np.float32(scales[0])
  for other in ([-1.0, -1.3, -0.7, -0.1], [-1.0, 1.0, -2.0, 0.0]):
    second = np.float32(other) * np.float32(scales[1])
    assert np.float64(first) @ np.float64(second) < 0
    combined = pulled(first, second)
    assert np.isfinite(combined).all()
    assert_raises_neither(combined, first, second)


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


def rows_mapped(x, rule):
  return jnp.sum(jax.vmap(lambda row: forked(row[None], rule=rule))(x))


def mapped_with_a_name(x, rule):
  return jnp.sum(
    jax.vmap(
      lambda row: forked(row[None], rule=rule, axis_name='i'), axis_name='i'
    )(x)
  )


WHOLE = {
  'remat': rematted,
  'cond': by_cond,
  'named vmap': mapped_with_a_name,
}
BY_ROW = {'scan': scanned, 'vmap': rows_mapped}


@each_rule
@pytest.mark.parametrize('f', WHOLE.values(), ids=WHOLE)
def test_transformations_that_keep_the_batch_whole(f, rule):
  np.testing.assert_allclose(
    jax.jit(jax.grad(f), static_argnums=1)(X, rule),
    expected_gradient(rule=rule),
    rtol=1e-4,
  )


@each_rule
@pytest.mark.parametrize('f', BY_ROW.values(), ids=BY_ROW)
def test_transformations_that_weigh_every_example_alone(f, rule):
  np.testing.assert_allclose(
    jax.jit(jax.grad(f), static_argnums=1)(X, rule),
    expected_by_row(rule),
    rtol=1e-4,
    atol=1e-5,
  )


@each_rule
def test_fork_in_shard_map_with_an_axis_name(rule):
  loss = functools.partial(forked, rule=rule, axis_name='batch')
  shards = functools.partial(jax.shard_map, mesh=SHARDS, in_specs=P('batch'))
  inside = shards(jax.grad(loss), out_specs=P('batch'))
  around = jax.grad(
    shards(lambda x: jax.lax.psum(loss(x), 'batch'), out_specs=P())
  )
  for grad in (inside, around):
    np.testing.assert_allclose(
      jax.jit(grad)(X), expected_gradient(rule=rule), rtol=1e-4, atol=1e-5
    )


@each_kind
def test_fork_in_jit_of_a_sharded_batch(kind):
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(kind,))
  sharding = NamedSharding(mesh, P('batch'))
  with jax.set_mesh(mesh):
    actual = jax.jit(jax.grad(forked))(jax.device_put(X, sharding))
  assert actual.sharding.is_equivalent_to(sharding, 2)
  np.testing.assert_allclose(
    jax.device_get(actual), expected_gradient(), rtol=1e-4
  )


@functools.partial(
  jax.jit, static_argnames=('first', 'second', 'rule', 'enabled')
)
@jax.grad
def penalty(x, first=for_domain, second=for_task, **kwargs):
  """The gradient of the squared norm of the gradient."""
  return jnp.sum(jnp.square(jax.grad(forked)(x, first, second, **kwargs)))


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


@each_rule
def test_a_gradient_of_a_gradient_keeps_the_rule(rule):
  def of_the_branches(one, two):
    gradients = jax.grad(for_domain)(one), jax.grad(for_task)(two)
    return jnp.sum(jnp.square(combine(*gradients, rule)))

  # The branches' cotangents of this second pass meet at the same fork.
  @jax.jit
  def expected():
    return combine(*jax.grad(of_the_branches, (0, 1))(X, X), rule)

  actual = penalty(X, rule=rule)
  np.testing.assert_allclose(actual, expected(), rtol=1e-3, atol=1e-3)
  assert np.abs(actual - penalty(X, enabled=False)).max() > 0.1


@each_rule
@pytest.mark.parametrize(
  'other', [for_domain, lambda x: 0 * jnp.sum(x)], ids=['equal', 'zero']
)
def test_a_gradient_of_a_gradient_without_conflict_is_plain(rule, other):
  """Also of equal gradients, where the angle has a cusp, and of zero."""
  x = X[:1, :1]
  np.testing.assert_allclose(
    penalty(x, second=other, rule=rule),
    penalty(x, second=other, enabled=False),
    rtol=1e-5,
  )


@each_rule
def test_forward_mode_needs_it_disabled(rule):
  with pytest.raises(TypeError, match='forward-mode'):
    jax.jvp(functools.partial(conflict.fork, rule=rule), (X,), (X,))
  fork = functools.partial(conflict.fork, rule=rule, enabled=False)
  primals, tangents = jax.jvp(fork, (X,), (2 * X,))
  chex.assert_trees_all_equal(primals, (X, X))
  chex.assert_trees_all_equal(tangents, (2 * X, 2 * X))
  np.testing.assert_allclose(
    jax.grad(forked)(X, rule=rule, enabled=False), FIRST + SECOND, rtol=1e-6
  )


def test_leaves_of_every_kind_pass():
  tree = {
    'integer': jnp.arange(3),
    'key': jax.random.key(0),
    'nothing': None,
    'bool': jnp.array(True),
    'number': 1.5,
    'float0': np.zeros(2, jax.dtypes.float0),
    'empty': jnp.zeros((0, 2)),
    'x': X,
  }
  for branch in conflict.fork(tree):
    assert jax.tree.structure(branch) == jax.tree.structure(tree)
    for name in ('integer', 'key', 'bool', 'number', 'float0'):
      assert branch[name] is tree[name]

  def loss(x):
    one, two = conflict.fork({**tree, 'x': x})
    return for_domain(one['x']) + for_task(two['x'])

  np.testing.assert_allclose(jax.grad(loss)(X), expected_gradient(), rtol=1e-4)


@each_rule
@pytest.mark.parametrize('scale', [1.0, 0.25])
def test_with_a_reversal_before_the_domain_branch(rule, scale):
  """The losses agree; the reversed one is against the task's."""

  def loss(x):
    one, two = conflict.fork(x, rule=rule)
    one = optax_ghm.reverse_gradient(one, scale)
    return for_domain(one) + for_agreement(two)

  second = jax.grad(for_agreement)(X)
  expected = combined_by_hand(-scale * FIRST, second, rule=rule)
  assert np.abs(expected - flat(-scale * FIRST + second)).max() > 0.1
  np.testing.assert_allclose(
    flat(jax.jit(jax.grad(loss))(X)), expected, rtol=1e-3, atol=1e-3
  )


@pytest.mark.parametrize('enabled', [True, False])
def test_fork_names_a_wrong_rule(enabled):
  with pytest.raises(ValueError, match="rule.*'gh'.*'pcgrad'"):
    conflict.fork(X, rule='pcgrad', enabled=enabled)
