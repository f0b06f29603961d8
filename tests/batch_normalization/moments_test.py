"""Count, mean and squared deviations, and how those of parts merge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from jax.sharding import AxisType, PartitionSpec as P

from optax_ghm import Moments
from tests.support import (
  oracles_batch_norm as oracle,
  strategies_arrays as arrays_of,
)
from tests.support.oracles_batch_norm import assert_moments

same = np.testing.assert_array_equal
measured = jax.jit(Moments.of, static_argnames='axis')
merged = jax.jit(Moments.merge)
pooled = jax.jit(Moments.pool, static_argnames='axis')


def defined(x, axis=-1, mask=True):
  x = np.asarray(x).astype(np.float64)
  return oracle.moments_of(x, axis, np.broadcast_to(mask, x.shape))


@pytest.mark.device
@pytest.mark.parametrize(
  ('shape', 'axis', 'mask'),
  [
    ((5,), (), None),
    ((7, 3), -1, None),
    ((4, 5, 3), (-1, -3), (5, 1)),
    ((4, 2, 3, 5), 1, (4, 2, 3, 1)),
    ((4, 2, 3, 5), -1, (5,)),
    ((2, 3, 2, 2, 3), (1, -1), (2, 1, 1, 2, 1)),
    ((0, 3), -1, None),
    ((3, 0), -1, (3, 1)),
  ],
  ids=str,
)
def test_moments_are_those_of_float64(shape, axis, mask, rng):
  x = (3 + rng.normal(size=shape)).astype(np.float32)
  if mask is not None:
    mask = np.arange(np.prod(mask)).reshape(mask) % 3 != 1
  wanted = defined(x, axis, True if mask is None else mask)
  assert_moments(measured(x, axis=axis, mask=mask), wanted)


@pytest.mark.device
@pytest.mark.parametrize('n', [256, 250, 7])
@pytest.mark.parametrize('offset', [0.0, 1e2, -1e4, 1e5])
def test_a_mean_of_many_standard_deviations(offset, n, rng):
  x = (offset + rng.normal(size=(n, 4))).astype(np.float32)
  moments, wanted = measured(x), defined(x)
  np.testing.assert_allclose(moments.mean, wanted.mean, rtol=1e-7, atol=1e-7)
  rtol = 1e-5 if offset < 1e5 else 1e-4
  np.testing.assert_allclose(moments.m2 / np.float32(n), wanted.var, rtol=rtol)


def test_the_mean_s_own_rounding_is_made_up_for():
  """The mean of 3 numbers around 2**24 is no float32, and only m2 shows it."""
  x = np.float32([[2**24], [2**24 + 2], [2**24 + 6]])
  over = jax.vmap(functools.partial(Moments.of, axis_name='d'), axis_name='d')
  for m2 in (measured(x).m2, jax.jit(over)(x[:, None]).m2[0]):
    np.testing.assert_allclose(m2, defined(x).m2, rtol=1e-5)


@pytest.mark.device
def test_bad_numbers_reach_their_feature_only_and_none_if_masked_out(rng):
  x = rng.normal(size=(4, 4)).astype(np.float32)
  for mask in (np.ones((4, 1), bool), np.array([[1], [0], [1], [1]], bool)):
    before = measured(x, mask=mask)
    assert_moments(before, defined(x, mask=mask))
    bad = x.copy()
    bad[1, 1:3] = np.nan, np.inf
    moments = measured(bad, mask=mask)
    if not mask.all():
      jax.tree.map(same, moments, before)
      continue
    same(moments.count, np.full(4, 4))
    assert not np.isfinite(moments.mean[1:3]).any()
    assert np.isnan(moments.m2[1:3]).all()
    for a, b in zip(moments, before, strict=True):
      same(a[::3], b[::3])


@pytest.mark.device
def test_moments_of_nothing():
  init = jax.jit(Moments.init, static_argnums=(0, 1))
  for dtype, moments in (
    (jnp.float32, init((2,))),
    (jnp.float32, measured(np.zeros((0, 2), np.float32))),
    (jnp.bfloat16, init((2,), jnp.bfloat16)),
  ):
    assert {u.dtype for u in moments} == {np.dtype(dtype)}
    same(np.float32(moments), np.zeros((3, 2)))


@pytest.mark.device
def test_variance():
  moments = Moments(
    *map(np.float32, ([0, 1, 2, 5], [0, 1, 1, 1], [0, 0, 4, 20]))
  )
  variances = jax.jit(lambda m: (m.var, m.variance(), m.variance(True)))
  biased, again, unbiased = variances(moments)
  same(biased, [0, 0, 2, 4])
  same(again, biased)
  same(unbiased, [0, 0, 4, 5])


@pytest.mark.device
@pytest.mark.parametrize('offset', [1.0, 1e3])
def test_differentiable_both_ways(offset, rng):
  """The moments of a batch norm are not; the mean may be far from 0."""
  x = (offset + rng.normal(size=(6, 2))).astype(np.float32)
  mask = np.arange(6)[:, None] != 2
  x[2] = np.nan, 1  # has no part in it
  tangent, dy = rng.normal(size=(2, 6, 2)).astype(np.float32)

  def f(x):
    moments = Moments.of(x, mask=mask)
    return moments.mean * dy[0] + moments.variance() * dy[1]

  @jax.jit
  def program(x):
    _, forward = jax.jvp(f, (x,), (tangent,))
    return forward, jax.grad(lambda x: jnp.sum(f(x)))(x)

  forward, backward = program(x)
  wide = np.where(mask, x, 0).astype(np.float64)
  deviations = wide - wide[mask[:, 0]].mean(0)
  wanted = mask / 5 * (dy[0] + 2 * deviations * dy[1])
  np.testing.assert_allclose(backward, wanted, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(
    forward, (wanted * tangent).sum(0), rtol=1e-4, atol=1e-4
  )


# Merging and pooling.


@pytest.mark.device
@given(
  sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
  offset=st.sampled_from([0.0, 1e3]),
  scale=st.sampled_from([1e-30, 1.0, 1e18, 1e30]),
  random=st.randoms(use_true_random=False),
)
@example(sizes=[1, 0], offset=0.0, scale=1e30, random=None)
@example(sizes=[0, 0], offset=0.0, scale=1.0, random=None)
def test_any_partition_in_any_order_is_the_whole(sizes, offset, scale, random):
  """In some of the parts nothing may count, and squares may be too large."""
  rng = np.random.default_rng(0)
  with np.errstate(over='ignore'):
    parts = [
      Moments(
        *map(
          np.float32, defined(scale * (offset + n * rng.normal(size=(n, 2))))
        )
      )
      for n in sizes
    ]
  n, mean, m2 = (
    np.stack(u).astype(np.float64) for u in zip(*parts, strict=True)
  )
  count = n.sum(0)
  total = (n * mean).sum(0) / np.maximum(count, 1)
  m2 = (m2 + n * (mean - total) ** 2).sum(0)
  fill = ((0, 5 - len(sizes)), (0, 0))  # so that all have one shape
  stacked = [np.pad(np.stack(u), fill) for u in zip(*parts, strict=True)]
  results = [pooled(Moments(*stacked), axis=0)]
  if random:
    random.shuffle(parts)
  results += [
    functools.reduce(merged, parts),
    functools.reduce(merged, parts, Moments(*np.zeros((3, 2), np.float32))),
  ]
  tree = parts
  while len(tree) > 1:
    tree = [*map(merged, tree[::2], tree[1::2]), *tree[len(tree) // 2 * 2 :]]
  # Rounding of means at an offset is that of their squared differences, too.
  rtol = 1e-5 if offset == 0 else 1e-3
  for found in (*results, *tree):
    same(found.count, count)
    arrays_of.assert_close(found.mean, total, 1e-6, 1e-6 * scale)
    atol = 1e-6 * min(scale, 1e18) ** 2
    arrays_of.assert_close(found.m2, m2, rtol, atol)


@pytest.mark.device
def test_nothing_changes_nothing(rng):
  moments = measured(rng.normal(size=(7, 2)).astype(np.float32))
  nothing = Moments(*np.zeros((3, 2), np.float32))
  for together in (merged(moments, nothing), merged(nothing, moments)):
    jax.tree.map(same, together, moments)
  for u in merged(nothing, nothing):
    same(u, np.zeros(2))
  for a, b in zip(pooled(moments), moments, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.device
def test_merging_is_exact_far_from_zero(rng):
  x = (1e4 + rng.normal(size=(300, 3))).astype(np.float32)
  parts = [measured(x[i : i + 100]) for i in (0, 100, 200)]
  for of in (parts, parts[::-1]):
    assert_moments(functools.reduce(merged, of), defined(x), rtol=1e-4)


@pytest.mark.device
@pytest.mark.parametrize('axis', [0, 1, -1])
def test_pooling_along_an_axis(axis, rng):
  x = rng.normal(size=(4, 9, 3)) * np.arange(1, 5)[:, None, None]
  x = x.astype(np.float32)
  parts = [Moments(*map(np.float32, defined(u))) for u in x]
  stacked = jax.tree.map(lambda *u: np.stack(u, axis), *parts)
  assert_moments(pooled(stacked, axis=axis), defined(x.reshape(-1, 3)))


@pytest.mark.parametrize('mapped', ['vmap', 'shard_map'])
def test_devices_whose_parts_differ_are_one_batch(mapped, rng):
  """Over one or more named axes, and along an axis as well."""
  x = (2 + rng.normal(size=(4, 2, 5, 3))).astype(np.float32)
  mask = np.arange(40).reshape(4, 2, 5, 1) % 3 != 1
  mask[1, 1] = False  # all of one device
  far = x + np.float32(1e3)

  def of_each(x, far, mask):
    names = ('a', 'b')
    halves = jax.tree.map(
      lambda *u: jnp.stack(u),
      Moments.of(x[:2], mask=mask[:2]),
      Moments.of(x[2:], mask=mask[2:]),
    )
    return (
      Moments.of(far, mask=mask, axis_name=names),
      halves.pool(axis=0, axis_name=names),
      halves.pool(axis=0).pool(axis_name='b').pool(axis_name='a'),
    )

  if mapped == 'vmap':
    f = jax.vmap(of_each, axis_name='b', out_axes=None)
    f = jax.vmap(f, axis_name='a', out_axes=None)
  else:
    f = jax.shard_map(
      lambda *parts: of_each(*(u[0, 0] for u in parts)),
      mesh=jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2),
      in_specs=P('a', 'b'),
      out_specs=P(),
    )
  whole, *pooled_ = jax.jit(f)(x, far, mask)
  wanted, of_far = (
    defined(u.reshape(-1, 3), mask=mask.reshape(-1, 1)) for u in (x, far)
  )
  assert_moments(whole, of_far, rtol=1e-5)
  for found in pooled_:
    assert_moments(found, wanted)
