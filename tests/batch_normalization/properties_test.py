"""Batch norms of any numbers, in any layout, of any dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from tests.support import (
  oracles_batch_norm as oracle,
  strategies_arrays as arrays_of,
)
from tests.support.oracles_batch_norm import EPSILON

pytestmark = pytest.mark.device
CASES = [  # few: each is compiled; dtype, shape, feature axes, shape of a mask
  (jnp.float16, (6, 2), -1, (6, 1)),
  (jnp.bfloat16, (4, 3), -1, (4, 3)),
  (jnp.float32, (6, 1, 2, 1, 1, 2), (-1, 2), (6, 1, 1, 1, 1, 2)),
  (jnp.float32, (0, 3), -1, (1, 3)),
  (jnp.float64, (4, 2), -1, (2,)),
]
NORMS = ['batch_norm', 'ghost_batch_norm', 'domain_batch_norm', 'batch_renorm']
LIMITS = {'r_max': 1.5, 'd_max': 0.25}


@pytest.mark.parametrize('name', NORMS)
@given(
  case=st.sampled_from(CASES),
  layout=st.sampled_from(arrays_of.LAYOUTS),
  offset=st.sampled_from([0.0, 30.0]),
  bad=st.sampled_from([0.0, 0.0, 1e15, np.nan, np.inf, -np.inf, 1e30]),
  data=st.data(),
)
def test_batch_norms_are_their_formula(name, case, layout, offset, bad, data):
  dtype, shape, axis, mask_shape = case
  ordinary = st.integers(-32, 32).map(lambda n: n / 16)

  def draw(shape, dtype=jnp.float32):
    return data.draw(arrays_of.arrays(dtype, shape, ordinary))

  wide = np.promote_types(dtype, np.float32)
  case = oracle.a_case(shape, axis)
  x = np.asarray(draw(shape)) + offset
  if x.size:
    x.ravel()[data.draw(st.integers(0, x.size - 1))] += bad
  case.x, case.dy = arrays_of.cast(x, dtype), draw(shape, dtype)
  case.scale, case.bias = (draw(case.scale.shape, wide) for _ in range(2))
  case.mask = data.draw(hnp.arrays(bool, mask_shape))
  domain = data.draw(
    hnp.arrays(np.int8, shape[:1], elements=st.integers(-1, 2))
  )
  counts = np.broadcast_to(case.mask, shape)
  case.dy = np.where(counts, case.dy, 0).astype(dtype)
  options = {'largest': float(jnp.finfo(wide).max)}
  norm, traced, static = oracle.definition, {}, {}
  if name == 'ghost_batch_norm':
    norm, static = oracle.by_slices(2), {'ghost_size': 2}
  elif name == 'domain_batch_norm':
    norm, static = oracle.by_subsets(domain, count=2), {'num_domains': 2}
    traced = {'domain': arrays_of.laid_out(domain, layout)}
  elif name == 'batch_renorm':
    ones = np.ones(case.scale.shape, np.float32)
    running = optax_ghm.RunningMoments(ones / 2, 4 * ones, ones)
    traced = {'running': running, **LIMITS}
    moments = oracle.expected(case, **options).moments
    options['constants'] = oracle.renorm_constants(moments, running, **LIMITS)
  wanted = oracle.expected(case, norm=norm, **options)
  x = case.x.astype(float)
  with arrays_of.x64(dtype):
    for key in ('x', 'scale', 'bias', 'mask'):
      setattr(case, key, arrays_of.laid_out(getattr(case, key), layout))
    found = oracle.found(case, name, traced=traced, **static)
  assert found.y.dtype == found.grads[0].dtype == dtype
  assert {u.dtype for u in (*found.moments, *found.grads[1:])} == {wide}

  rtol = max(arrays_of.rounding(jnp.float32), arrays_of.rounding(dtype))
  rtol = rtol * (1 + offset) if dtype != jnp.float64 else 1e-9
  # Where x is not finite but masked out, so is y, and the gradient is 0.
  own = ~counts & ~np.isfinite(x)
  y, expected = (np.where(own, 0, u.astype(float)) for u in (found.y, wanted.y))
  np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
  far = ~counts & (np.abs(x) > 1e4)  # 16 bits may not hold it
  y, expected = (np.where(far, 0, u) for u in (y, expected))
  np.testing.assert_allclose(y, expected, rtol=rtol, atol=8 * rtol)
  sound = ~np.isnan(expected)
  dx = found.grads[0].astype(float)
  assert np.isfinite(dx[sound]).all()
  atol = 4 * rtol / np.sqrt(EPSILON)
  np.testing.assert_allclose(dx[sound], wanted.grads[0][sound], rtol, atol)
  over = tuple(a for a in range(x.ndim) if a not in np.arange(x.ndim)[[axis]])
  d_scale, d_bias = (np.float64(u) for u in found.grads[1:])
  bad = np.isnan(np.where(counts, expected, 0)).any(over)
  assert np.isnan(d_scale[bad]).all()
  np.testing.assert_allclose(
    d_scale[~bad], wanted.grads[1][~bad], rtol=rtol, atol=atol
  )
  belongs = (domain >= 0) & (domain < 2) | (name != 'domain_batch_norm')
  d_bias_expected = case.dy[belongs].astype(float).sum(over)
  np.testing.assert_allclose(d_bias, d_bias_expected, rtol=rtol, atol=rtol)
  rtol = 1e-4 if wide == np.float32 else 1e-9
  np.testing.assert_array_equal(found.moments.count, wanted.moments.count)
  arrays_of.assert_close(found.moments.mean, wanted.moments.mean, rtol, rtol)
  arrays_of.assert_close(found.moments.m2, wanted.moments.m2, rtol, rtol)


@given(
  large=st.sampled_from([1e20, 1e30, -1e30]),
  other=st.floats(-1e4, 1e4, width=32),
)
@example(large=1e30, other=30.0)
def test_a_feature_with_too_large_numbers_is_the_bias(large, other):
  case = oracle.a_case((4, 2), mask=(4, 1))
  x = [[large, other], [0, other + 1], [1, other - 1], [2, other]]
  case.x, case.mask[:] = np.float32(x), True
  found = oracle.found(case)
  np.testing.assert_array_equal(found.y[:, 0], case.bias[[0] * 4])
  assert np.isfinite(found.grads[0]).all() and np.isfinite(found.y).all()
  assert found.moments.m2[0] == np.inf


def each(domain, running):
  """Every norm, of one domain if of any, as a function of x and the affine."""
  options = {
    'ghost_batch_norm': {'ghost_size': 2},
    'domain_batch_norm': {'domain': domain, 'num_domains': 1},
    'batch_renorm': {'running': running},
  }
  return [
    functools.partial(getattr(optax_ghm, name), **options.get(name, {}))
    for name in NORMS
  ]


def test_numpy_arrays_of_64_bits_are_taken_as_jax_takes_them(rng):
  x, ones, zeros = rng.normal(size=(4, 2)), np.ones(2), np.zeros(2)
  running = optax_ghm.RunningMoments(zeros, ones, ones)
  args = x, ones, zeros, np.zeros(4, int), running

  def program(x, scale, bias, domain, running):
    norms = each(domain, running)
    return [
      *(norm(x, scale=scale, bias=bias) for norm in norms),
      optax_ghm.Moments.of(x),
      optax_ghm.batch_norm_inference(x, running, scale, bias),
      optax_ghm.fold_batch_norm(x, None, running, scale, bias),
    ]

  narrow = jax.tree.map(
    lambda u: u.astype(np.int32 if u.dtype == int else np.float32), args
  )
  found, wanted = jax.jit(lambda of: (program(*args), program(*of)))(narrow)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  jax.tree.map(close, found, wanted)


@jax.jit
def without_epsilon(x):
  bias, domain = jnp.full(1, 0.5), jnp.zeros(len(x), int)
  running = optax_ghm.RunningMoments(x[0], jnp.ones(1), jnp.ones(1))
  found = []
  for norm in each(domain, running):
    f = functools.partial(norm, bias=bias, epsilon=0.0)
    y, vjp, _ = jax.vjp(f, x, has_aux=True)
    found.append((y, *vjp(jnp.ones_like(y))))
  return found


@given(value=st.sampled_from([0.0, -3.0, 1e-30, 1e30]) | st.floats(-9, 9))
@example(value=0.1)
@example(value=-3e4)
def test_a_constant_becomes_the_bias_also_without_epsilon(value):
  for y, dx in without_epsilon(np.full((4, 1), value, np.float32)):
    np.testing.assert_allclose(y, np.full((4, 1), 0.5), rtol=1e-6)
    np.testing.assert_array_equal(dx, np.zeros((4, 1)))
