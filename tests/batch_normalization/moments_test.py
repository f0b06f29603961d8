import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.sharding import AxisType, PartitionSpec as P

from optax_ghm import Moments

measured = jax.jit(Moments.of, static_argnames=('axis', 'axis_name'))
merged = jax.jit(Moments.merge)
pooled = jax.jit(Moments.pool, static_argnames=('axis', 'axis_name'))


def defined(x, axis=-1, mask=True):
  """Count, mean and squared deviations, in float64."""
  x = np.asarray(x).astype(np.float64)
  features = {a % x.ndim for a in np.atleast_1d(axis).astype(int)}
  over = tuple(a for a in range(x.ndim) if a not in features)
  counts = np.broadcast_to(mask, x.shape)
  n = counts.sum(over, keepdims=True)
  x = np.where(counts, x, 0)
  mean = x.sum(over, keepdims=True) / np.maximum(n, 1)
  m2 = (counts * (x - mean) ** 2).sum(over, keepdims=True)
  return Moments(*(np.squeeze(u, over) for u in (n, mean, m2)))


def assert_moments(actual, expected, rtol=1e-6):
  """The mean to rounding, the squares to ``rtol``, the count exactly."""
  assert {u.shape for u in actual} == {np.shape(expected.mean)}
  np.testing.assert_array_equal(actual.count, expected.count)
  np.testing.assert_allclose(actual.mean, expected.mean, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(actual.m2, expected.m2, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(
  ('shape', 'axis', 'mask'),
  [
    ((5,), -1, None),
    ((5,), (), None),
    ((7, 3), -1, None),
    ((7, 3), 0, None),
    ((4, 5, 3), (0, 2), None),
    ((4, 5, 3), (-1, -3), (5, 1)),
    ((4, 2, 3, 5), -1, (4, 1, 1, 1)),
    ((4, 2, 3, 5), 1, (4, 2, 3, 1)),
    ((4, 2, 3, 5), -1, (5,)),
    ((4, 2, 3, 5), -1, (4, 2, 3, 5)),
    ((2, 3, 2, 2, 3), -1, (2, 1, 1, 2, 1)),
    ((0, 3), -1, None),
    ((3, 0), -1, (3, 1)),
  ],
  ids=str,
)
def test_moments_are_those_of_float64(shape, axis, mask, rng):
  x = (3 + rng.normal(size=shape)).astype(np.float32)
  if mask is not None:
    mask = np.arange(np.prod(mask)).reshape(mask) % 3 != 1
  expected = defined(x, axis, True if mask is None else mask)
  assert_moments(measured(x, axis=axis, mask=mask), expected)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, np.float64])
def test_in_at_least_float32(dtype, rng):
  x = np.asarray(100 + rng.normal(size=(500, 2)), dtype)
  wide = np.float64 if dtype == np.float64 else np.float32
  with jax.enable_x64(dtype == np.float64):
    moments = measured(x)
    assert {u.dtype for u in moments} == {np.dtype(wide)}
    variance = np.asarray(moments.variance())
  rtol = 1e-12 if dtype == np.float64 else 1e-6
  np.testing.assert_allclose(moments.mean, defined(x).mean, rtol=rtol)
  np.testing.assert_allclose(
    variance, x.astype(np.float64).var(0), rtol=10 * rtol
  )


@pytest.mark.parametrize('n', [256, 250, 7])
@pytest.mark.parametrize('offset', [0.0, 1e2, -1e4, 1e5])
def test_a_mean_of_many_standard_deviations(offset, n, rng):
  x = (offset + rng.normal(size=(n, 4))).astype(np.float32)
  moments = measured(x)
  expected = defined(x)
  np.testing.assert_allclose(moments.mean, expected.mean, rtol=1e-7, atol=1e-7)
  np.testing.assert_allclose(
    moments.variance(), expected.m2 / n, rtol=1e-5 if offset < 1e5 else 1e-4
  )


@pytest.mark.parametrize('where', ['batch', 'vmap'])
def test_the_mean_s_own_rounding_is_made_up_for(where):
  """The mean of 3 numbers around 2**24 is no float32, and only m2 shows it."""
  x = np.float32([[2**24], [2**24 + 2], [2**24 + 6]])
  if where == 'batch':
    moments = measured(x)
  else:
    moments = jax.vmap(
      functools.partial(Moments.of, axis_name='d'),
      axis_name='d',
    )(x[:, None])
    moments = jax.tree.map(lambda u: u[0], moments)
  np.testing.assert_allclose(moments.m2, defined(x).m2, rtol=1e-5)


def test_masked_out_numbers_do_not_count(rng):
  x = rng.normal(size=(4, 3)).astype(np.float32)
  mask = np.array([[True], [False], [True], [True]])
  expected = measured(x, mask=mask)
  assert_moments(expected, defined(x, mask=mask))
  x[1] = [np.nan, np.inf, -np.inf]
  for a, b in zip(measured(x, mask=mask), expected, strict=True):
    np.testing.assert_array_equal(a, b)


def test_bad_numbers_reach_their_feature_only(rng):
  x = rng.normal(size=(4, 4)).astype(np.float32)
  expected = measured(x)
  x[1, 1:3] = np.nan, np.inf
  moments = measured(x)
  np.testing.assert_array_equal(moments.count, np.full(4, 4))
  assert not np.isfinite(moments.mean[1:3]).any()
  assert np.isnan(moments.m2[1:3]).all()
  assert np.isnan(moments.variance()[1:3]).all()
  for a, b in zip(moments, expected, strict=True):
    np.testing.assert_array_equal(a[::3], b[::3])


def test_no_rows_and_nothing_that_counts():
  mask = np.zeros((3, 1), bool)
  for moments in (
    measured(np.ones((0, 2), np.float32)),
    measured(np.ones((3, 2), np.float32), mask=mask),
    Moments.init((2,)),
  ):
    for u in moments:
      assert u.dtype == np.float32
      np.testing.assert_array_equal(u, np.zeros(2))
    for unbiased in (False, True):
      np.testing.assert_array_equal(moments.variance(unbiased), np.zeros(2))
  assert Moments.init((1,), jnp.bfloat16).m2.dtype == jnp.bfloat16


def test_variance():
  moments = Moments(
    *map(jnp.float32, ([0, 1, 2, 5], [0, 1, 1, 1], [0, 0, 4, 20]))
  )
  np.testing.assert_array_equal(moments.variance(), [0, 0, 2, 4])
  np.testing.assert_array_equal(moments.var, moments.variance())
  np.testing.assert_array_equal(moments.variance(unbiased=True), [0, 0, 4, 5])


@pytest.mark.parametrize('offset', [1.0, 1e3])
def test_differentiable_both_ways(offset, rng):
  """The moments of a batch norm are not; the mean may be far from 0."""
  x = (offset + rng.normal(size=(6, 2))).astype(np.float32)
  mask = np.arange(6)[:, None] != 2
  tangent, dy = rng.normal(size=(2, 6, 2)).astype(np.float32)

  def f(x):
    moments = Moments.of(x, mask=mask)
    return moments.mean * dy[0] + moments.variance() * dy[1]

  _, forward = jax.jit(lambda x: jax.jvp(f, (x,), (tangent,)))(x)
  backward = jax.jit(jax.grad(lambda x: jnp.sum(f(x))))(x)
  wide = x.astype(np.float64)
  deviations = wide - wide[mask[:, 0]].mean(0)
  expected = mask / 5 * (dy[0] + 2 * deviations * dy[1])
  np.testing.assert_allclose(backward, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(
    forward, (expected * tangent).sum(0), rtol=1e-4, atol=1e-4
  )


# Merging and pooling.


@given(
  st.lists(st.integers(0, 6), min_size=1, max_size=5),
  st.sampled_from([0.0, 1e3]),
  st.randoms(use_true_random=False),
)
def test_any_partition_in_any_order_is_the_whole(sizes, offset, random):
  """The parts may be stacked, and in some of them nothing counts."""
  rng = np.random.default_rng(0)
  parts = [
    Moments(*map(np.float32, defined(offset + rng.normal(size=(n, 2)) * n)))
    for n in sizes
  ]
  n, mean, m2 = (
    np.stack(u).astype(np.float64) for u in zip(*parts, strict=True)
  )
  count = n.sum(0)
  total = (n * mean).sum(0) / np.maximum(count, 1)
  expected = Moments(count, total, (m2 + n * (mean - total) ** 2).sum(0))
  stacked = Moments(*map(np.stack, zip(*parts, strict=True)))
  # Rounding of means at an offset is that of their squared differences, too.
  close = functools.partial(
    assert_moments, expected=expected, rtol=1e-5 if offset == 0 else 1e-3
  )
  close(pooled(stacked_to(stacked, 5), axis=0))
  random.shuffle(parts)
  close(functools.reduce(merged, parts))
  close(functools.reduce(merged, parts, Moments.init((2,))))
  tree = parts
  while len(tree) > 1:
    tree = [*map(merged, tree[::2], tree[1::2]), *tree[len(tree) // 2 * 2 :]]
  close(tree[0])


def stacked_to(moments, n):
  """Adds empty parts, so that all have one shape and compile once."""
  fill = ((0, n - len(moments.count)), (0, 0))
  return Moments(*(np.pad(u, fill) for u in moments))


def test_nothing_changes_nothing(rng):
  moments = measured(rng.normal(size=(7, 2)).astype(np.float32))
  nothing = Moments.init((2,))
  for together in (merged(moments, nothing), merged(nothing, moments)):
    for a, b in zip(together, moments, strict=True):
      np.testing.assert_array_equal(a, b)
  for u in merged(nothing, nothing):
    np.testing.assert_array_equal(u, np.zeros(2))


def test_merging_is_exact_far_from_zero(rng):
  x = (1e4 + rng.normal(size=(300, 3))).astype(np.float32)
  parts = [measured(x[i : i + 100]) for i in (0, 100, 200)]
  together = functools.reduce(merged, parts)
  assert_moments(together, defined(x), rtol=1e-4)
  assert_moments(functools.reduce(merged, parts[::-1]), defined(x), rtol=1e-4)


@pytest.mark.parametrize('axis', [0, 1, -1])
def test_pooling_along_an_axis(axis, rng):
  x = rng.normal(size=(4, 9, 3)) * np.arange(1, 5)[:, None, None]
  parts = [measured(u.astype(np.float32)) for u in x]
  stacked = jax.tree.map(lambda *u: np.stack(u, axis), *parts)
  expected = defined(x.astype(np.float32).reshape(-1, 3))
  assert_moments(pooled(stacked, axis=axis), expected)


def test_pooling_devices(rng):
  """Over a named axis, under shard_map, and along an axis as well."""
  x = (2 + rng.normal(size=(16, 5, 3))).astype(np.float32)
  mask = np.arange(80).reshape(16, 5, 1) % 3 != 1
  mask[2:4] = False  # all of one device
  expected = defined(x.reshape(-1, 3), mask=mask.reshape(-1, 1))

  def of_each(x, mask):
    moments = jax.vmap(lambda x, m: Moments.of(x, mask=m))(x, mask)
    both = moments.pool(axis=0, axis_name='d')
    return both, moments.pool(axis=0).pool(axis_name='d')

  sharded = jax.shard_map(
    of_each,
    mesh=jax.make_mesh((8,), ('d',), axis_types=(AxisType.Auto,)),
    in_specs=P('d'),
    out_specs=P(),
  )
  named = jax.vmap(of_each, axis_name='d', out_axes=None)
  in_parts = (u.reshape(8, 2, *u.shape[1:]) for u in (x, mask))
  for found in (*jax.jit(sharded)(x, mask), *jax.jit(named)(*in_parts)):
    assert_moments(found, expected)


def test_pooling_nothing_is_the_identity(rng):
  moments = measured(rng.normal(size=(7, 2)).astype(np.float32))
  for a, b in zip(pooled(moments), moments, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_devices_whose_parts_differ_are_one_batch(rng):
  """Named axes, both of vmap and of a mesh, one shard without anything."""
  x = (1e3 + rng.normal(size=(4, 2, 5, 3))).astype(np.float32)
  mask = np.arange(40).reshape(4, 2, 5, 1) % 3 != 1
  mask[1, 1] = False

  def measure(x, mask):
    return Moments.of(x, mask=mask, axis_name=('a', 'b'))

  expected = defined(x.reshape(-1, 3), mask=mask.reshape(-1, 1))
  named = jax.vmap(
    jax.vmap(measure, axis_name='b', out_axes=None),
    axis_name='a',
    out_axes=None,
  )
  sharded = jax.shard_map(
    lambda x, mask: measure(x[0, 0], mask[0, 0]),
    mesh=jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2),
    in_specs=P('a', 'b'),
    out_specs=P(),
  )
  for f in (named, sharded):
    assert_moments(jax.jit(f)(x, mask), expected, rtol=1e-5)


# Errors.


@pytest.mark.parametrize('dtype', [np.int32, np.complex64, bool])
def test_x_must_be_real_and_floating(dtype):
  with pytest.raises(TypeError, match='x must be a real floating array'):
    Moments.of(jnp.ones((4, 3), dtype))


@pytest.mark.parametrize(
  ('kwargs', 'match'),
  [
    ({'axis': 2}, r'axis must .*\(4, 3\), got 2'),
    ({'axis': -3}, 'axis must'),
    ({'axis': (0, 5)}, 'axis must'),
    ({'mask': np.ones((4, 2), bool)}, r'mask of shape \(4, 2\)'),
    ({'mask': np.ones((1, 4, 3), bool)}, 'mask of shape'),
  ],
  ids=str,
)
def test_arguments_that_do_not_fit(kwargs, match):
  with pytest.raises(ValueError, match=match):
    Moments.of(jnp.ones((4, 3)), **kwargs)


def test_a_mask_does_not_make_x_larger():
  with pytest.raises(ValueError, match=r'mask of shape \(4, 3\)'):
    Moments.of(jnp.ones((4, 1)), mask=np.ones((4, 3), bool))
