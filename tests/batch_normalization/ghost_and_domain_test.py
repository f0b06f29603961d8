import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm
from tests.batch_normalization.batch_norm_test import (
  EPSILON,
  Found,
  a_case,
  assert_close,
  assert_same,
  defined,
  definition,
  differentiated,
)


@functools.partial(jax.jit, static_argnames=('size', 'axis', 'second', 'dtype'))
def _ghosts(x, scale, bias, mask, dy, u, *, size, axis, second, dtype):
  norm = functools.partial(
    optax_ghm.ghost_batch_norm,
    ghost_size=size,
    axis=axis,
    epsilon=EPSILON,
    mask=mask,
    dtype=dtype,
  )
  return differentiated(norm, x, scale, bias, dy, u, second)


def ghosts(case, size, second=False, dtype=None):
  args = case.x, case.scale, case.bias, case.mask, case.dy, case.u
  statics = {'size': size, 'axis': case.axis, 'dtype': dtype}
  return jax.device_get(_ghosts(*args, second=second, **statics))


def by_slices(size):
  """The definition of ghosts, for `defined`: a loop over slices."""

  def norm(x, scale, bias, counts, axis):
    ndim = counts.ndim
    none = x[(..., slice(0), *[slice(None)] * (ndim - 1))]
    ys = [none] + [
      definition(
        x[(..., slice(i, i + size), *[slice(None)] * (ndim - 1))],
        scale,
        bias,
        counts[i : i + size],
        axis,
      )[0]
      for i in range(0, len(counts), size)
    ]
    _, moments = definition(x, scale, bias, counts, axis)
    return np.concatenate(ys, -ndim), moments

  return norm


@pytest.mark.parametrize(
  ('shape', 'axis', 'mask', 'size', 'second'),
  [
    ((8, 3), -1, None, 4, False),
    ((8, 3), -1, (8, 1), 2, False),
    ((8, 3), -1, (3,), 8, False),
    ((8, 3), -1, None, 1, False),
    ((6, 2, 3), 1, (6, 2, 3), 3, True),
    ((6, 2, 3), (1, 2), (1, 2, 1), 2, False),
    ((4, 2, 2, 3), -1, (2, 2, 1), 2, False),
    ((0, 3), -1, None, 2, False),
  ],
  ids=str,
)
def test_ghosts_are_a_loop_over_slices(shape, axis, mask, size, second):
  case = a_case(shape, axis, mask)
  case.x += np.arange(len(case.x)).reshape(-1, *[1] * (len(shape) - 1))
  found = ghosts(case, size, second)
  assert found.moments.mean.shape == case.scale.shape
  assert_same(found, defined(case, second, by_slices(size)))


def test_ghosts_without_anything_are_the_bias_and_bad_ones_stay_bad():
  case = a_case((8, 3), -1, (8, 1))
  expected = ghosts(case, 2)
  case.mask[2:4] = False
  case.dy[2] = 0
  case.x[2] = np.nan
  found = ghosts(case, 2)
  np.testing.assert_array_equal(found.y[3], case.bias)
  assert not found.grads[0][2:4].any()
  case.mask[2:4] = True
  found = ghosts(case, 2)
  assert np.isnan(found.y[2:4]).all()
  others = [0, 1, 4, 5, 6, 7]
  np.testing.assert_array_equal(found.y[others], expected.y[others])
  np.testing.assert_array_equal(
    found.grads[0][others], expected.grads[0][others]
  )


def test_moments_of_ghosts_are_of_all_devices():
  """Every ghost batch is normalized by its own moments alone."""
  case = a_case((16, 3), -1, (16, 1))
  case.mask[:2] = False
  sharded = jax.shard_map(
    lambda x, mask: optax_ghm.ghost_batch_norm(
      x, ghost_size=2, mask=mask, axis_name='d', epsilon=EPSILON
    ),
    mesh=jax.make_mesh((8,), ('d',), axis_types=(AxisType.Auto,)),
    in_specs=P('d'),
    out_specs=(P('d'), P()),
  )
  y, moments = jax.jit(sharded)(case.x, case.mask)
  case.scale[:], case.bias[:] = 1, 0
  expected = defined(case, False, by_slices(2))
  assert_close(y, expected.y, 1e-6)
  np.testing.assert_array_equal(moments.count, np.full(3, case.mask.sum()))
  assert_close(moments.mean, expected.moments[0], 1e-6)
  assert_close(moments.variance(), expected.moments[1], 1e-6)


@pytest.mark.parametrize('dtype', [None, jnp.float32])
def test_dtype_of_ghosts(dtype):
  case = a_case((8, 3), dtype=jnp.bfloat16)
  found = ghosts(case, 4, dtype=dtype) if dtype is None else None
  y, moments = jax.jit(
    lambda x: optax_ghm.ghost_batch_norm(
      x, case.scale, case.bias, ghost_size=4, epsilon=EPSILON, dtype=dtype
    )
  )(case.x)
  assert y.dtype == (dtype or jnp.bfloat16)
  assert moments.mean.dtype == jnp.float32
  rounding = float(jnp.finfo(y.dtype).eps) / 2
  assert_close(y, defined(case, False, by_slices(4)).y, rounding=rounding)
  if found is not None:
    assert found.grads[0].dtype == jnp.bfloat16


# Domains.


@functools.partial(jax.jit, static_argnames=('count', 'axis', 'second'))
def _domains(x, scale, bias, mask, dy, u, domain, *, count, axis, second):
  def norm(x, scale, bias):
    return optax_ghm.domain_batch_norm(
      x,
      domain,
      scale,
      bias,
      num_domains=count,
      axis=axis,
      epsilon=EPSILON,
      mask=mask,
    )

  return differentiated(norm, x, scale, bias, dy, u, second)


def domains(case, domain, count=3, second=False):
  args = case.x, case.scale, case.bias, case.mask, case.dy, case.u, domain
  statics = {'count': count, 'axis': case.axis, 'second': second}
  return jax.device_get(_domains(*args, **statics))


def by_subsets(domain, rows=False, count=3):
  """The definition of domains, for `defined`: a loop over subsets."""

  def norm(x, scale, bias, counts, axis):
    at = -counts.ndim  # of the examples
    x = np.moveaxis(x, at, 0)
    y, moments = np.zeros(x.shape, x.dtype), []
    for g in range(count):
      own = np.broadcast_to(domain, len(x)) == g
      of_g = (scale, bias)
      if rows:
        of_g = (np.take(u, g, -1 - np.size(axis)) for u in of_g)
      part, of_part = definition(
        np.moveaxis(x[own], 0, at), *of_g, counts[own], axis
      )
      y[own] = np.moveaxis(part, at, 0)
      moments.append(of_part)
    mean, var = (np.stack(u) for u in zip(*moments, strict=True))
    return np.moveaxis(y, 0, at), (mean, var)

  return norm


def with_rows(case, count=3):
  """With a row of parameters per domain."""
  factors = np.arange(1, count + 1, dtype=np.float32)

  def rows(u):
    return factors.reshape(-1, *[1] * u.ndim) * u

  case.scale, case.bias = rows(case.scale), rows(case.bias)
  case.u = (case.u[0], rows(case.u[1]), -rows(case.u[2]))
  return case


DOMAIN = np.array([0, 2, 0, 0, 2, 1, 2, 0])


@pytest.mark.parametrize(
  ('shape', 'axis', 'mask', 'domain', 'rows', 'second'),
  [
    ((8, 3), -1, None, DOMAIN, False, False),
    ((8, 3), -1, (8, 1), DOMAIN, True, True),
    ((8, 3), -1, (8, 3), DOMAIN % 2, True, False),
    ((8, 3), -1, (3,), np.array(1), True, False),
    ((8, 2, 3), -1, (8, 2, 1), DOMAIN, True, False),
    ((8, 2, 3), (1, 2), (2, 1), np.uint8(DOMAIN), True, False),
    ((8, 3, 2), 1, None, np.int8(DOMAIN), False, False),
    ((0, 3), -1, None, np.zeros(0, int), True, False),
  ],
  ids=str,
)
def test_domains_are_a_loop_over_subsets(
  shape, axis, mask, domain, rows, second
):
  case = a_case(shape, axis, mask)
  away = np.broadcast_to(domain, shape[:1]).astype(np.float32)
  case.x += away.reshape(-1, *[1] * (len(shape) - 1))
  if rows:
    case = with_rows(case)
  found = domains(case, domain, second=second)
  expected = defined(case, second, by_subsets(domain, rows))
  assert_same(found, expected, second=1e-3)  # of a few numbers each


@pytest.mark.parametrize('nowhere', [-1, 3, 100])
def test_other_numbers_are_no_domain(nowhere):
  case = with_rows(a_case((8, 3), -1, (8, 1)))
  domain = np.where(np.arange(8) == 2, nowhere, DOMAIN)
  found = domains(case, domain)
  assert not found.y[2].any()
  assert not found.grads[0][2].any()
  assert_same(found, defined(case, False, by_subsets(domain, True)))


def test_all_that_is_wrong_in_one_domain_stays_there():
  case = with_rows(a_case((8, 3)))
  expected = domains(case, DOMAIN)
  own = DOMAIN == 2
  for bad in (np.nan, np.inf, 1e30):
    case.x[4] = bad
    found = domains(case, DOMAIN)
    np.testing.assert_array_equal(found.y[~own], expected.y[~own])
    np.testing.assert_array_equal(found.grads[0][~own], expected.grads[0][~own])
    for a, b in zip(found.moments, expected.moments, strict=True):
      np.testing.assert_array_equal(a[:2], b[:2])
    for i in (1, 2):
      np.testing.assert_array_equal(found.grads[i][:2], expected.grads[i][:2])
    assert np.isnan(found.y[own]).all() == (bad != 1e30)


def test_a_domain_that_is_far_and_one_that_is_not():
  case = with_rows(a_case((64, 3), std=1.0))
  domain = np.arange(64) % 3
  case.x[domain == 1] += 1e4
  found = domains(case, domain)
  expected = defined(case, False, by_subsets(domain, True))
  assert_same(found, expected)


def test_domains_whose_numbers_do_not_count():
  case = with_rows(a_case((8, 3), -1, (8, 1)))
  case.mask[DOMAIN == 0] = False
  found = domains(case, DOMAIN)
  np.testing.assert_array_equal(
    found.y[DOMAIN == 0], np.tile(case.bias[0], (4, 1))
  )
  assert_same(found, defined(case, False, by_subsets(DOMAIN, True)))


def test_domains_over_devices():
  """Domains are on any devices; on one device nothing counts."""
  case = with_rows(a_case((16, 3), -1, (16, 1)))
  case.mask[:2] = False
  domain = np.arange(16) * 7 % 5  # two of five are no domain
  sharded = jax.shard_map(
    lambda x, domain, mask, dy, scale, bias: differentiated(
      lambda x, scale, bias: optax_ghm.domain_batch_norm(
        x,
        domain,
        scale,
        bias,
        num_domains=3,
        mask=mask,
        axis_name='d',
        epsilon=EPSILON,
      ),
      x,
      scale,
      bias,
      dy,
      None,
      second=False,
    )[:3],
    mesh=jax.make_mesh((8,), ('d',), axis_types=(AxisType.Auto,)),
    in_specs=(P('d'), P('d'), P('d'), P('d'), P(), P()),
    out_specs=(P('d'), P(), (P('d'), P(), P())),
  )
  found = Found(
    *jax.jit(sharded)(
      case.x, domain, case.mask, case.dy, case.scale, case.bias
    ),
    None,
  )
  expected = defined(case, False, by_subsets(domain, True))
  assert_same(found, expected, 1e-6)


def test_a_jit_of_a_batch_split_by_domains():
  """Explicit sharding needs no axis name."""
  case = with_rows(a_case((8, 3)))
  devices = jax.make_mesh((8,), ('d',), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(devices):
    over = jax.NamedSharding(devices, P('d'))
    x, domain = jax.device_put((case.x, DOMAIN), over)
    y, moments = jax.jit(
      lambda x, domain: optax_ghm.domain_batch_norm(
        x,
        domain,
        jnp.asarray(case.scale),
        jnp.asarray(case.bias),
        num_domains=3,
        epsilon=EPSILON,
      )
    )(x, domain)
  expected = defined(case, False, by_subsets(DOMAIN, True))
  assert_close(jax.device_get(y), expected.y, 1e-6)
  assert_close(jax.device_get(moments.mean), expected.moments[0], 1e-6)


def test_dtype_of_domains():
  case = a_case((8, 3), dtype=jnp.bfloat16)
  expected = defined(case, False, by_subsets(DOMAIN)).y
  for dtype in (None, jnp.float32):
    y, moments = jax.jit(
      functools.partial(
        optax_ghm.domain_batch_norm,
        num_domains=3,
        epsilon=EPSILON,
        dtype=dtype,
      )
    )(case.x, DOMAIN, case.scale, case.bias)
    assert y.dtype == (dtype or jnp.bfloat16)
    assert moments.mean.dtype == jnp.float32
    assert_close(y, expected, rounding=float(jnp.finfo(y.dtype).eps) / 2)


def test_epsilon_is_1e_5_unless_said():
  x = np.float32([[0], [0.01], [1], [1.01]])
  half = 0.005 / np.sqrt(0.005**2 + 1e-5)
  expected = half * np.float32([[-1], [1], [-1], [1]])
  norm = jax.jit(optax_ghm.ghost_batch_norm, static_argnames='ghost_size')
  y, _ = norm(x, ghost_size=2)
  np.testing.assert_allclose(y, expected, rtol=1e-4)
  norm = jax.jit(optax_ghm.domain_batch_norm, static_argnames='num_domains')
  y, _ = norm(x, np.int32([0, 0, 1, 1]), num_domains=2)
  np.testing.assert_allclose(y, expected, rtol=1e-4)


# Errors.

X = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
  ('kwargs', 'error', 'match'),
  [
    ({'ghost_size': 3}, ValueError, r'ghost_size must .* 4 examples, got 3'),
    ({'ghost_size': 0}, ValueError, 'ghost_size must'),
    ({'ghost_size': -2}, ValueError, 'ghost_size must'),
    ({'axis': 0}, ValueError, 'axis 0 of x holds the examples, got axis=0'),
    ({'axis': (-2, 1)}, ValueError, 'axis 0 of x'),
    ({'axis': 3}, ValueError, 'axis must'),
    ({'mask': np.ones((2, 1), bool)}, ValueError, r'mask of shape \(2, 1\)'),
    ({'scale': np.ones((2, 2))}, ValueError, 'scale must'),
    ({'bias': np.ones(4)}, ValueError, 'bias must'),
    ({'x': np.ones((4, 3), int)}, TypeError, 'x must be a real'),
  ],
  ids=str,
)
def test_arguments_of_ghosts_that_do_not_fit(kwargs, error, match):
  kwargs = {'x': X, 'ghost_size': 2, **kwargs}
  with pytest.raises(error, match=match):
    optax_ghm.ghost_batch_norm(**kwargs)


@pytest.mark.parametrize(
  ('kwargs', 'error', 'match'),
  [
    (
      {'domain': np.zeros(4)},
      TypeError,
      'domain must be integers or bool, got float',
    ),
    ({'domain': np.zeros(3, int)}, ValueError, r'domain must .*\(3,\)'),
    ({'domain': np.zeros((4, 1), int)}, ValueError, 'domain must'),
    ({'axis': 0}, ValueError, 'axis 0 of x holds the examples'),
    ({'axis': -3}, ValueError, 'axis must'),
    ({'mask': np.ones((2, 1), bool)}, ValueError, 'mask of shape'),
    ({'scale': np.ones((3, 3))}, ValueError, r'scale must .*\(2, 3\)'),
    ({'bias': np.ones((2, 1))}, ValueError, 'bias must'),
    ({'x': np.ones((4, 3), np.complex64)}, TypeError, 'x must be a real'),
  ],
  ids=str,
)
def test_arguments_of_domains_that_do_not_fit(kwargs, error, match):
  kwargs = {'x': X, 'domain': np.zeros(4, int), 'num_domains': 2, **kwargs}
  with pytest.raises(error, match=match):
    optax_ghm.domain_batch_norm(**kwargs)


@pytest.mark.parametrize('dtype', [bool, jnp.uint8, jnp.int8, jnp.int32])
def test_small_integers_and_bool_name_domains(dtype):
  x = jnp.array([[1.0], [3.0], [5.0], [70.0]])
  y, _ = optax_ghm.domain_batch_norm(
    x, jnp.array([0, 0, 1, 1], dtype), num_domains=257, epsilon=0.0
  )
  np.testing.assert_allclose(y[:, 0], [-1, 1, -1, 1])


def test_what_is_of_no_domain_is_0_whatever_it_is():
  x = jnp.array([[1.0, 2.0], [3.0, 5.0], [jnp.nan, jnp.inf]])
  domain = jnp.array([0, 0, 5])

  def normalized(x):
    y, _ = optax_ghm.domain_batch_norm(x, domain, num_domains=2)
    return y

  assert not normalized(x)[2].any()
  gradient = jax.grad(lambda x: (normalized(x) ** 2).sum())(x)
  assert not gradient[2].any()
  assert jnp.isfinite(gradient).all()
  y = optax_ghm.batch_norm_inference(
    x, optax_ghm.RunningMoments.init((2, 2)), domain=domain
  )
  assert not y[2].any()


def test_without_domains_there_is_nothing_to_do():
  with pytest.raises(ValueError, match='num_domains must be at least 1'):
    optax_ghm.domain_batch_norm(
      jnp.ones((2, 2)), jnp.zeros(2, int), num_domains=0
    )


def test_ghosts_without_features():
  y, moments = optax_ghm.ghost_batch_norm(jnp.zeros((4, 0)), ghost_size=2)
  assert y.shape == (4, 0)
  assert moments.mean.shape == (0,)


@pytest.mark.parametrize(
  'kind', [None, AxisType.Auto, AxisType.Explicit], ids=str
)
def test_many_domains(rng, kind):
  """There are more domains than are compared one by one."""
  x = rng.normal(size=(64, 3)).astype(np.float32)
  domain = rng.permutation(np.arange(64, dtype=np.int32) % 21 - 1)
  expected = np.zeros((64, 3))
  for d in range(20):
    of = x[domain == d].astype(np.float64)  # one example at least
    expected[domain == d] = (of - of.mean(0)) / np.sqrt(of.var(0) + 1e-5)

  @jax.jit
  def normalized(x, domain):
    ones, zeros = jnp.ones(3, jnp.float32), jnp.zeros(3, jnp.float32)
    return optax_ghm.domain_batch_norm(x, domain, ones, zeros, num_domains=20)[
      0
    ]

  inputs = jnp.asarray(x), jnp.asarray(domain)
  slope = jax.grad(lambda x: (normalized(x, inputs[1]) ** 3).sum())(inputs[0])
  if kind is not None:
    mesh = jax.make_mesh((8,), ('d',), axis_types=(kind,))
    with jax.set_mesh(mesh):
      inputs = jax.device_put(inputs, NamedSharding(mesh, P('d')))
      np.testing.assert_allclose(normalized(*inputs), expected, atol=1e-5)
      sharded = jax.grad(lambda x: (normalized(x, inputs[1]) ** 3).sum())
      np.testing.assert_allclose(sharded(inputs[0]), slope, atol=1e-4)
  np.testing.assert_allclose(normalized(*inputs), expected, atol=1e-5)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('count', [2, 20])
def test_a_bad_cotangent_stays_what_it_is_in_its_domain(rng, bad, count):
  x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
  domain = jnp.arange(8, dtype=jnp.int32) % 2

  def pulled(cotangent):
    _, pull = jax.vjp(
      lambda bias: optax_ghm.domain_batch_norm(
        x, domain, None, bias, num_domains=count
      )[0],
      jnp.zeros((count, 3), jnp.float32),
    )
    return pull(cotangent)[0]

  cotangent = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
  expected = np.asarray(pulled(cotangent)).copy()
  expected[1, 2] = bad
  np.testing.assert_allclose(
    pulled(cotangent.at[3, 2].set(bad)), expected, rtol=1e-5
  )
