import functools

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm import flow, linen, nnx
from tests.support import strategies_arrays as arrays_of

EPSILON = 1e-3
CASES = [  # few: each is compiled; dtype, shape, feature axes, shape of a mask
  (jnp.float16, (6, 2), -1, (6, 1)),
  (jnp.bfloat16, (4, 3), -1, (4, 3)),
  (jnp.float32, (6, 1, 2, 1, 1, 2), (-1, 2), (6, 1, 1, 1, 1, 2)),
  (jnp.float32, (0, 3), -1, (1, 3)),
  (jnp.float64, (4, 2), -1, (2,)),
]


def batch(x, scale, bias, mask, domain, axis, dtype):
  return optax_ghm.batch_norm(
    x, scale, bias, axis=axis, epsilon=EPSILON, mask=mask
  )


def ghosts(x, scale, bias, mask, domain, axis, dtype):
  return optax_ghm.ghost_batch_norm(
    x, scale, bias, ghost_size=2, axis=axis, epsilon=EPSILON, mask=mask
  )


def domains(x, scale, bias, mask, domain, axis, dtype):
  return optax_ghm.domain_batch_norm(
    x,
    domain,
    scale,
    bias,
    num_domains=2,
    axis=axis,
    epsilon=EPSILON,
    mask=mask,
  )


RUNNING = {'mean': 0.5, 'var': 4.0}
LIMITS = {'r_max': 1.5, 'd_max': 0.25}


def renorm(x, scale, bias, mask, domain, axis, dtype):
  running = optax_ghm.RunningMoments(
    *(jnp.full(scale.shape, u, jnp.float32) for u in (0.5, 4.0, 1.0))
  )
  return optax_ghm.batch_renorm(
    x, running, scale, bias, axis=axis, epsilon=EPSILON, mask=mask, **LIMITS
  )


@jax.jit(static_argnames=('norm', 'axis'))
def differentiated(norm, x, scale, bias, mask, domain, dy, axis):
  y, vjp, moments = jax.vjp(
    lambda x, scale, bias: norm(x, scale, bias, mask, domain, axis, x.dtype),
    x,
    scale,
    bias,
    has_aux=True,
  )
  return y, moments, vjp(dy)


def parts_of(norm, x, domain):
  """The examples that are normalized together, and whether they are known."""
  n = len(x)
  if norm is ghosts:
    return [np.arange(n) // 2 == i for i in range(n // 2)]
  if norm is domains:
    return [domain == i for i in range(2)]
  return [np.ones(n, bool)]


def defined(norm, x, scale, bias, counts, domain, dy, over, largest):
  """Y, moments of every part, and the gradient of x: in float64."""
  y, dx, moments = np.zeros(x.shape), np.zeros(x.shape), []
  for part in parts_of(norm, x, domain):
    u, w, d = x[part], counts[part], dy[part]
    kept = np.where(w, u, 0)
    n = w.sum(over, keepdims=True)
    with np.errstate(all='ignore'):
      mean = kept.sum(over, keepdims=True) / np.maximum(n, 1)
      mean = np.where(np.isfinite(mean), mean, np.nan)
      m2 = np.where(w, (kept - mean) ** 2, 0).sum(over, keepdims=True)
      m2 = np.where(m2 > largest, np.inf, m2)
      var = m2 / np.maximum(n, 1)
      rstd = (n > 0) / np.sqrt(var + EPSILON)
      r, shift = 1.0, 0.0
      if norm is renorm:
        std = np.sqrt(RUNNING['var'] + EPSILON)
        r_max, d_max = LIMITS['r_max'], LIMITS['d_max']
        r = np.clip(np.sqrt(var + EPSILON) / std, 1 / r_max, r_max)
        shift = np.clip((mean - RUNNING['mean']) / std, -d_max, d_max)
      x_hat = (u - mean) * rstd
      y[part] = scale * (r * x_hat + shift) + bias
      gain = scale * r * rstd
      counted = np.where(w, x_hat, 0)
      means = [
        v.sum(over, keepdims=True) / np.maximum(n, 1) for v in (d, d * x_hat)
      ]
      dx[part] = gain * (d - w * means[0] - counted * means[1])
    moments.append((n, mean, m2))
  return y, dx, moments


@pytest.mark.parametrize('norm', [batch, ghosts, domains, renorm])
@given(
  case=st.sampled_from(CASES),
  layout=st.sampled_from(arrays_of.LAYOUTS),
  offset=st.sampled_from([0.0, 30.0]),
  bad=st.sampled_from([0.0, 0.0, np.nan, np.inf, -np.inf, 1e30]),
  data=st.data(),
)
def test_batch_norms_are_their_formula(norm, case, layout, offset, bad, data):
  dtype, shape, axis, mask_shape = case
  features = sorted(a % len(shape) for a in np.atleast_1d(axis))
  over = tuple(a for a in range(len(shape)) if a not in features)
  of_features = [shape[a] for a in features]
  ordinary = st.integers(-32, 32).map(lambda n: n / 16)

  def draw(shape, dtype=jnp.float32):
    return data.draw(arrays_of.arrays(dtype, shape, ordinary))

  wide = np.promote_types(dtype, np.float32)
  x = np.asarray(draw(shape)) + offset
  if x.size:
    x.ravel()[data.draw(st.integers(0, x.size - 1))] += bad
  x, dy = arrays_of.cast(x, dtype), draw(shape, dtype)
  scale, bias = draw(of_features, wide), draw(of_features, wide)
  mask = data.draw(hnp.arrays(bool, mask_shape))
  domain = data.draw(
    hnp.arrays(np.int8, shape[:1], elements=st.integers(-1, 2))
  )
  counts = np.broadcast_to(mask, shape)
  dy = np.where(counts, dy, 0).astype(dtype)
  with arrays_of.x64(dtype):
    given_ = [
      arrays_of.laid_out(u, layout) for u in (x, scale, bias, mask, domain)
    ]
    y, moments, grads = jax.device_get(
      differentiated(norm, *given_, dy, axis=axis)
    )
  x, scale, bias, dy = (np.asarray(u, np.float64) for u in (x, scale, bias, dy))
  affine = [np.expand_dims(u, over) for u in (scale, bias)]
  expected, dx, parts = defined(
    norm, x, *affine, counts, domain, dy, over, float(jnp.finfo(wide).max)
  )
  assert y.dtype == dtype and grads[0].dtype == dtype
  rtol = max(arrays_of.rounding(jnp.float32), arrays_of.rounding(dtype))
  rtol = rtol * (1 + offset) if dtype != jnp.float64 else 1e-9
  # Where x is not finite but masked out, so is y, and the gradient is 0.
  own = ~counts & ~np.isfinite(x)
  y, expected = (np.where(own, 0, u) for u in (y.astype(float), expected))
  np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
  far = ~counts & (np.abs(x) > 1e4)  # 16 bits may not hold it
  y, expected = (np.where(far, 0, u) for u in (y, expected))
  np.testing.assert_allclose(y, expected, rtol=rtol, atol=8 * rtol)
  sound = np.isfinite(dx)
  found = grads[0].astype(float)
  assert np.isfinite(found[sound]).all()
  largest = 1 / np.sqrt(EPSILON)
  np.testing.assert_allclose(
    found[sound], dx[sound], rtol=rtol, atol=4 * rtol * largest
  )
  np.testing.assert_allclose(
    grads[2],
    dy.sum(over)
    if norm is not domains
    else dy[(domain >= 0) & (domain < 2)].sum(over),
    rtol=rtol,
    atol=rtol,
  )
  assert_moments(norm, moments, parts, over, wide)


@given(
  large=st.sampled_from([1e20, 1e30, -1e30]),
  other=st.floats(-1e4, 1e4, width=32),
)
@example(large=1e30, other=30.0)
def test_a_feature_with_too_large_numbers_is_the_bias(large, other):
  x = np.float32([[large, other], [0, other + 1], [1, other - 1], [2, other]])
  arrays = x, np.ones(2, np.float32), np.float32([0.5, 0.5])
  mask, domain = np.ones((4, 1), bool), np.zeros(4, np.int8)
  y, moments, grads = differentiated(
    batch, *arrays, mask, domain, x * 0 + 1, axis=-1
  )
  np.testing.assert_array_equal(y[:, 0], [0.5] * 4)
  assert np.isfinite(grads[0]).all() and np.isfinite(y).all()
  assert moments.m2[0] == np.inf


def assert_moments(norm, moments, parts, over, dtype):
  """Compares the moments of all parts together, or of each domain."""
  n, mean, m2 = (
    np.stack([np.squeeze(u, over) for u in us])
    if parts
    else np.zeros((0, *moments.mean.shape))
    for us in (zip(*parts, strict=True) if parts else ((),) * 3)
  )
  if norm is not domains:
    total = np.maximum(n.sum(0), 1)
    whole = (n * mean).sum(0) / total
    with np.errstate(all='ignore'):
      m2 = (m2 + n * (mean - whole) ** 2).sum(0)
    n, mean = n.sum(0), whole
  assert {u.dtype for u in moments} == {dtype}
  rtol = 1e-4 if dtype == np.float32 else 1e-9
  np.testing.assert_array_equal(moments.count, n)
  arrays_of.assert_close(moments.mean, mean, rtol, rtol)
  arrays_of.assert_close(moments.m2, m2, rtol, rtol)


@pytest.mark.parametrize('norm', [batch, ghosts, domains, renorm])
def test_numpy_arrays_of_64_bits_are_taken_as_jax_takes_them(norm, rng):
  x, scale, bias = rng.normal(size=(4, 2)), np.ones(2), np.zeros(2)
  domain = np.zeros(4, int)
  y, moments = norm(x, scale, bias, None, domain, -1, None)
  expected, same = norm(
    jnp.asarray(x), *map(jnp.asarray, (scale, bias)), None, domain, -1, None
  )
  jax.tree.map(np.testing.assert_array_equal, (y, moments), (expected, same))
  running = optax_ghm.RunningMoments(bias, scale, scale)
  optax_ghm.Moments.of(x)
  optax_ghm.batch_norm_inference(x, running)
  optax_ghm.fold_batch_norm(x, None, running)


@jax.jit(static_argnames='norm')
def without_epsilon(norm, x, mean):
  bias, domain = jnp.full(1, 0.5), jnp.zeros(len(x), int)
  running = optax_ghm.RunningMoments(mean, jnp.ones(1), jnp.ones(1))
  options = {
    'ghost_batch_norm': {'ghost_size': 2},
    'domain_batch_norm': {'domain': domain, 'num_domains': 1},
    'batch_renorm': {'running': running},
  }.get(norm, {})
  f = functools.partial(
    getattr(optax_ghm, norm), bias=bias, epsilon=0.0, **options
  )
  y, vjp, _ = jax.vjp(f, x, has_aux=True)
  return y, *vjp(jnp.ones_like(y))


@pytest.mark.parametrize(
  'norm',
  ['batch_norm', 'ghost_batch_norm', 'domain_batch_norm', 'batch_renorm'],
)
@given(value=st.sampled_from([0.0, -3.0, 1e-30, 1e30]) | st.floats(-9, 9))
def test_a_constant_becomes_the_bias_also_without_epsilon(norm, value):
  x = np.full((4, 1), value, np.float32)
  y, dx = without_epsilon(norm, x, x[0])
  np.testing.assert_allclose(y, np.full((4, 1), 0.5), rtol=1e-6)
  np.testing.assert_array_equal(dx, np.zeros((4, 1)))


def moments_of(x, dtype=np.float32):
  x = np.asarray(x, np.float64)
  if not len(x):
    return optax_ghm.Moments(*np.zeros(3, dtype))
  mean = x.mean()
  with np.errstate(over='ignore'):
    parts = (len(x), mean, ((x - mean) ** 2).sum())
    return optax_ghm.Moments(*(dtype(u) for u in parts))


merge, pool = map(
  jax.jit,
  (optax_ghm.Moments.merge, functools.partial(optax_ghm.Moments.pool, axis=0)),
)


@given(
  scale=st.sampled_from([1e-30, 1.0, 1e18, 1e30]),
  parts=st.lists(
    st.lists(st.integers(-8, 8), max_size=4), min_size=3, max_size=3
  ),
)
@example(scale=1e30, parts=[[1, 1], [], []])
def test_moments_merge_to_those_of_the_whole(scale, parts):
  split = [moments_of(scale * np.asarray(part, float)) for part in parts]
  whole = scale * np.asarray(sum(parts, []), float)
  stacked = jax.tree.map(lambda *u: np.stack(u), *split)
  merged = functools.reduce(merge, split)
  for found in (merged, pool(stacked), functools.reduce(merge, split[::-1])):
    assert found.count == float(len(whole))
    mean = whole.mean() if len(whole) else 0.0
    arrays_of.assert_close(found.mean, mean, 1e-5, 1e-5 * scale)
    m2 = ((whole - mean) ** 2).sum()
    if len({*whole.tolist()}) <= 1 and scale > 1e18:
      m2 = 0.0 if float(found.m2) < np.inf else np.inf  # of rounded means
    arrays_of.assert_close(found.m2, m2, 1e-4, 1e-4 * min(scale, 1e18) ** 2)
    for unbiased in (False, True):
      divisor = max(len(whole) - unbiased, 1)
      arrays_of.assert_close(
        found.variance(unbiased), float(found.m2) / divisor, 1e-6
      )


@given(
  shape=st.sampled_from([(3, 2), (2, 1, 3, 2), (0, 2)]),
  layout=st.sampled_from(arrays_of.LAYOUTS),
  data=st.data(),
)
def test_inference_is_its_formula_and_folds_into_the_layer_before(
  shape, layout, data
):
  ordinary = st.integers(-32, 32).map(lambda n: n / 16)

  def draw(*shape):
    return data.draw(arrays_of.arrays(np.float32, shape, ordinary))

  x, kernel = arrays_of.laid_out(draw(*shape), layout), draw(2, 3)
  kernel_bias, mean, bias, scale = (draw(3) for _ in range(4))
  var = np.square(draw(3))
  running = optax_ghm.RunningMoments(mean, var, np.ones_like(mean))
  y = optax_ghm.batch_norm_inference(
    jnp.dot(x, kernel) + np.broadcast_to(kernel_bias, (*shape[:-1], 3)),
    running,
    scale,
    bias,
    epsilon=EPSILON,
  )
  wide = np.asarray(x, float) @ kernel + kernel_bias
  expected = (wide - mean) / np.sqrt(var + EPSILON) * scale + bias
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)
  folded, shift = optax_ghm.fold_batch_norm(
    kernel, kernel_bias, running, scale, bias, epsilon=EPSILON
  )
  found = np.asarray(x, float) @ np.asarray(folded, float) + np.asarray(shift)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


update = jax.jit(optax_ghm.RunningMoments.update, static_argnames=('unbiased',))


@given(
  momentum=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
  unbiased=st.booleans(),
  debias=st.booleans(),
  data=st.data(),
)
def test_running_moments_are_their_formula(momentum, unbiased, debias, data):
  running = optax_ghm.RunningMoments.init((3,), debias)
  mean, var, weight = (np.asarray(u, float) for u in running)
  for _ in range(3):
    count = data.draw(hnp.arrays(float, 3, elements=st.integers(0, 3)))
    batch_mean, m2 = (
      data.draw(hnp.arrays(float, 3, elements=elements))
      for elements in (
        st.integers(-9, 9) | st.sampled_from([np.nan, np.inf]),
        st.integers(0, 9) | st.sampled_from([np.nan, np.inf]),
      )
    )
    found = optax_ghm.Moments(*map(np.float32, (count, batch_mean, m2)))
    running = update(running, found, momentum=momentum, unbiased=unbiased)
    seen = (count > 0) & np.isfinite(batch_mean) & np.isfinite(m2)
    batch_var = m2 / np.maximum(count - unbiased, 1)
    after = momentum * weight + 1 - momentum
    rate = (1 - momentum) / np.where(after == 0, 1, after)
    with np.errstate(invalid='ignore'):
      mean = np.where(seen, mean + rate * (batch_mean - mean), mean)
      var = np.where(seen, var + rate * (batch_var - var), var)
    weight = np.where(seen, after, weight)
  for u, expected in zip(running, (mean, var, weight), strict=True):
    np.testing.assert_allclose(u, expected, rtol=1e-5, atol=1e-5)


@given(
  start=st.integers(0, 20),
  r_after=st.integers(0, 20),
  d_after=st.integers(0, 20),
)
@example(start=5, r_after=0, d_after=0)
def test_limits_widen_from_start_to_end(start, r_after, d_after):
  schedules = optax_ghm.renorm_schedules(
    start=start, r_end=start + r_after, d_end=start + d_after
  )
  for schedule, first, last, after in zip(
    schedules, (1.0, 0.0), (3.0, 5.0), (r_after, d_after), strict=True
  ):
    values = [float(schedule(step)) for step in range(start + after + 3)]
    assert values[: start + 1] == [first] * (start + 1)
    assert values[-1] == values[-2] == last
    assert (np.diff(values) >= 0).all()


@given(
  epsilon=st.sampled_from([1e-5, 1e-3]),
  counts=hnp.arrays(np.float32, 4, elements=st.integers(0, 3)),
  means=hnp.arrays(np.float32, 4, elements=st.integers(-9, 9)),
  m2=hnp.arrays(np.float32, 4, elements=st.integers(0, 9)),
  x64=st.booleans(),
)
def test_batch_norm_stats_are_their_formula(epsilon, counts, means, m2, x64):
  means, m2 = (np.where(counts > 0, u, 0) for u in (means, m2))
  running = optax_ghm.RunningMoments(
    *(np.float32(u) for u in ([0, 1, 2, 3], [1, 2, 0, 4], [1] * 4))
  )
  limits = {'r_max': 1.5, 'd_max': 2.0}
  with jax.enable_x64(x64):
    wide = np.float64 if x64 else np.float32
    found = optax_ghm.Moments(
      *(jnp.asarray(u, wide) for u in (counts, means, m2))
    )
    stats = flow.batch_norm_stats(
      found, jax.tree.map(jnp.asarray, running), epsilon=epsilon, **limits
    )
  var = m2 / np.maximum(counts, 1)
  std, running_std = np.sqrt(var + epsilon), np.sqrt(running.var + epsilon)
  d, r = (means - running.mean) / running_std, std / running_std
  seen = counts > 0

  def mean(u):
    return u[seen].sum() / max(seen.sum(), 1)

  clipped = (np.abs(d) > 2) | (np.abs(np.log(r)) > np.log(1.5))
  expected = [
    (np.abs(means) / std)[seen].max(initial=0),
    np.sqrt(mean(d**2)),
    np.sqrt(mean(np.log(r) ** 2)),
    mean(clipped),
    mean(var < epsilon),
  ]
  assert stats.numbers.dtype == jnp.float32
  np.testing.assert_allclose(stats.numbers, expected, rtol=1e-4, atol=1e-4)


KINDS = {
  'BatchNorm': (optax_ghm.batch_norm, {}),
  'BatchRenorm': (optax_ghm.batch_renorm, {}),
  'DomainBatchNorm': (optax_ghm.domain_batch_norm, {'num_domains': 2}),
}


@jax.jit(static_argnames=('kind', 'debias'))
def by_all_three(x, mask, domain, kind, debias):
  """Y and the running averages of both modules and of the function."""
  function, options = KINDS[kind]
  rows = (2,) if kind == 'DomainBatchNorm' else ()
  more = (domain,) if rows else ()
  module = getattr(linen, kind)(
    use_running_average=False, debias=debias, **options
  )
  y, state = module.apply(
    module.init(jax.random.key(0), x, *more),
    x,
    *more,
    mask=mask,
    mutable=['batch_stats'],
  )
  of_linen = y, state['batch_stats']
  module = getattr(nnx, kind)(
    2, debias=debias, rngs=flax.nnx.Rngs(0), **options
  )
  y = module(x, *more, mask=mask)
  averages = flax.nnx.state(module, flax.nnx.BatchStat)
  of_nnx = y, flax.nnx.to_pure_dict(averages)
  running = optax_ghm.RunningMoments.init((*rows, 2), debias)
  more = (running,) if kind == 'BatchRenorm' else more
  y, moments = function(
    x, *more, jnp.ones(2), jnp.zeros(2), mask=mask, **options
  )
  running = running.update(moments)._asdict()
  if not debias:
    running.pop('weight')
  return of_linen, of_nnx, (y, running)


@pytest.mark.parametrize('kind', KINDS)
@given(
  layout=st.sampled_from(arrays_of.LAYOUTS),
  debias=st.booleans(),
  bad=st.sampled_from([0.0, np.nan, np.inf, 1e30]),
  data=st.data(),
)
def test_modules_are_the_functions(kind, layout, debias, bad, data):
  ordinary = st.integers(-32, 32).map(lambda n: n / 16)
  x = data.draw(arrays_of.arrays(np.float32, (4, 2), ordinary))
  x[0, 0] += np.float32(bad)
  mask = data.draw(hnp.arrays(bool, (4, 1)))
  x, mask = (arrays_of.laid_out(u, layout) for u in (x, mask))
  of_linen, of_nnx, (y, running) = by_all_three(
    x, mask, np.array([0, 1, 1, 5]), kind, debias
  )
  for found, averages in (of_linen, of_nnx):
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-6)
    assert averages.keys() == running.keys()
    for name, value in running.items():
      assert np.isfinite(value).all()
      np.testing.assert_allclose(averages[name], value, rtol=1e-6)
