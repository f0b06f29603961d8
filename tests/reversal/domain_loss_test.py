"""The loss of a domain classifier."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm

N = 16
SHARDS = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))
BLOCKS = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
SPLITS = {'one axis': (SHARDS, 'batch'), 'two axes': (BLOCKS, ('a', 'b'))}

each_kind = pytest.mark.parametrize(
  'kind', [AxisType.Auto, AxisType.Explicit], ids=str
)
each_split = pytest.mark.parametrize(
  ('mesh', 'axis_name'), SPLITS.values(), ids=SPLITS
)


@functools.partial(jax.jit, static_argnames='axis_name')
def domain_loss(
  logits, domains, omega=None, weights=None, mask=None, axis_name=None
):
  """The losses, and the gradient of their sum."""
  losses, pull = jax.vjp(
    lambda z: optax_ghm.domain_loss(
      z,
      domains,
      domain_weights=omega,
      weights=weights,
      mask=mask,
      axis_name=axis_name,
    ),
    logits,
  )
  return losses, *pull(jnp.ones_like(losses))


def domain_loss_by_hand(logits, domains, omega=None, weights=None):
  """The formula, example by example, in float64; and its gradient."""
  z, domains = np.asarray(logits, np.float64), np.asarray(domains)
  binary = z.ndim == 1
  if binary:
    z = np.stack([np.zeros_like(z), z], -1)
  z = z - z.max(1, keepdims=True)
  n, count = z.shape
  omega = np.full(count, 1 / count) if omega is None else np.float64(omega)
  weights = np.ones(n) if weights is None else np.float64(weights)
  losses, grads = np.zeros(n), np.zeros((n, count))
  for i, d in enumerate(domains):
    total = weights[domains == d].sum()
    if 0 <= d < count and total > 0:
      factor = n * omega[d] * weights[i] / total
      log_sum = np.logaddexp.reduce(z[i])
      losses[i] = factor * (log_sum - z[i, d])
      grads[i] = factor * (np.exp(z[i] - log_sum) - (np.arange(count) == d))
  return losses, grads[:, 1] if binary else grads


def assert_both_close(actual, expected, rtol=2e-5, atol=2e-5):
  for a, b in zip(actual, expected, strict=True):
    assert np.shape(a) == np.shape(b)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


DOMAINS = {
  'unbalanced': [0, 0, 0, 2, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 2, 0],
  'one absent': [1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
  'one only': [1] * N,
  'unknown ones': [0, -1, 3, 2, 0, 1, 7, 2, -9, 1, 0, 2, 99, 0, 0, 1],
  'none known': [-1, 3, 4, -2] * 4,
}
each_domains = pytest.mark.parametrize(
  'domains', [np.int32(d) for d in DOMAINS.values()], ids=DOMAINS
)


@pytest.fixture(params=['binary', 'multi-class'])
def logits(request, rng):
  shape = (N,) if request.param == 'binary' else (N, 3)
  return 2 * rng.normal(size=shape).astype(np.float32)


@each_domains
def test_it_is_its_formula(domains, logits, rng):
  """With weights, or without any."""
  omega = 3 * rng.uniform(size=(*logits.shape, 2)[1]).astype(np.float32)
  weights = rng.uniform(size=N).astype(np.float32)
  weights[4] = 0
  for options in ((), (omega, weights)):
    assert_both_close(
      domain_loss(logits, domains, *options),
      domain_loss_by_hand(logits, domains, *options),
    )


@each_domains
def test_its_mean_is_that_of_the_domains_by_their_share(domains, rng):
  z = 2 * rng.normal(size=(N, 3)).astype(np.float32)
  omega = np.float32([0.2, 1.5, 0.7])
  weights = rng.uniform(0.1, 3, size=N).astype(np.float32)
  losses, _ = domain_loss(z, domains, omega, weights)
  expected = 0
  for d in set(domains) & {0, 1, 2}:
    p = np.exp(np.float64(z[domains == d]))
    expected += omega[d] * np.average(
      -np.log(p[:, d] / p.sum(1)), weights=weights[domains == d]
    )
  np.testing.assert_allclose(np.mean(losses), expected, rtol=1e-5)


DTYPES = {'float32': np.float32, 'bfloat16': jnp.bfloat16, 'float16': 'e'}
LOGITS = st.one_of(
  st.floats(-30, 30, width=16),
  st.sampled_from([-6e4, 6e4, -1e4, 1e4, 0.0, np.nan, np.inf, -np.inf]),
)


@st.composite
def batches(draw):
  """Logits, domains, their weights, and those of the examples."""
  size, count = draw(st.sampled_from([(5, 1), (5, 3), (0, 2), (1, 2)]))
  shape = (size,) if count == 1 else (size, count)

  def of(elements, shape, dtype=np.float32):
    return draw(hnp.arrays(dtype, shape, elements=elements))

  return (
    of(LOGITS, shape, np.float64),
    of(st.integers(-1, 3), size, np.int32),
    of(st.sampled_from([0, 0.5, 2.0]), max(count, 2)),
    of(st.sampled_from([0, 0.25, 1, 1e-20, 1e20]), size),
  )


@pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)
@given(batches())
@example(
  (
    np.full((1, 2), -6e4),
    np.zeros(1, np.int32),
    np.full(2, 0.5, np.float32),
    np.ones(1, np.float32),
  )
)
def test_bad_logits_of_any_dtype_harm_no_other_example(dtype, batch):
  """Losses are computed in float32 at least, and rounded once."""
  z, domains, omega, weights = batch
  z = z.astype(dtype)
  losses, grads = jax.device_get(domain_loss(z, domains, omega, weights))
  assert losses.dtype == grads.dtype == z.dtype
  assert losses.shape == domains.shape and grads.shape == z.shape
  rows = z.astype(float).reshape(len(z), math.prod(z.shape[1:]))
  good, nan = np.isfinite(rows).all(1), np.isnan(rows).any(1)
  sound = np.where(good[:, None], rows, 0).reshape(z.shape)
  expected, expected_grads = domain_loss_by_hand(sound, domains, omega, weights)
  eps = float(jnp.finfo(z.dtype).eps)
  small = expected < 0.9 * float(jnp.finfo(z.dtype).max)
  assert_both_close(
    (losses[good & small].astype(float), grads[good].astype(float)),
    (expected[good & small], expected_grads[good]),
    rtol=max(4 * eps, 1e-4),
    atol=max(4 * eps, 1e-4) if z.dtype == np.float32 else 2 * eps,
  )
  known = (domains >= 0) & (domains < len(omega))
  np.testing.assert_array_equal(losses[~known], 0)
  np.testing.assert_array_equal(grads[~known], 0)
  share = (weights > 0) & known
  share[known] &= omega[domains[known]] > 0
  assert np.isnan(losses[nan & share].astype(float)).all()


def test_a_sigmoid_is_a_softmax_of_zero_and_the_logit(rng):
  z = 20 * rng.normal(size=N).astype(np.float32)
  options = (
    np.int32(DOMAINS['unknown ones']),
    np.float32([0.3, 0.9]),
    np.linspace(0, 1, N, dtype=np.float32),
  )
  one, grad_one = domain_loss(z, *options)
  two, grad_two = domain_loss(np.stack([0 * z, z], -1), *options)
  assert_both_close((one, grad_one), (two, np.asarray(grad_two)[:, 1]))


def test_a_bad_example_weight_is_of_its_own_domain_only():
  z, domains = np.arange(6, dtype=np.float32), np.int32([0, 0, 1, 1, -1, 0])
  first = domains == 0
  expected, _ = domain_loss_by_hand(z, domains)
  for i in (4, 2):  # of no domain, of domain 1
    weights = np.ones(6, np.float32)
    weights[i] = np.nan
    losses, grads = map(np.asarray, domain_loss(z, domains, None, weights))
    np.testing.assert_allclose(losses[first], expected[first], rtol=1e-5)
    assert np.isfinite(grads[first]).all() and losses[4] == 0


def test_no_gradient_reaches_the_weights(rng):
  z = rng.normal(size=N).astype(np.float32)

  @jax.jit
  @jax.value_and_grad
  def total(weights):
    losses = optax_ghm.domain_loss(z, np.arange(N) % 2, weights=weights)
    return jnp.sum(losses * np.arange(1.0, N + 1, dtype=np.float32))

  weights = np.linspace(1, 2, N, dtype=np.float32)
  one, grad = total(weights)
  weights[3] = 9
  assert abs(float(one) - float(total(weights)[0])) > 1
  np.testing.assert_array_equal(grad, np.zeros(N))


def test_domains_of_any_integers_and_bool_and_logits_of_a_dense_layer(rng):
  z = rng.normal(size=N).astype(np.float32)
  binary = np.arange(N) % 3 == 0
  expected = domain_loss_by_hand(z, binary.astype(int))
  for domains in (binary, binary.astype(np.int64), binary.astype(np.uint8)):
    assert_both_close(domain_loss(z, domains), expected)
  losses, grads = domain_loss(z[:, None], binary)
  assert_both_close((losses, np.asarray(grads)[:, 0]), expected)
  small = np.int8([0, 1, 1, 100, 127, 127])
  for count in (2, 200):
    z = rng.normal(size=(6, count)).astype(np.float32)
    assert_both_close(domain_loss(z, small), domain_loss_by_hand(z, small))


def test_no_weight_at_all_is_a_loss_of_0(logits):
  domains, zeros = np.arange(N) % 2, np.zeros(N, np.float32)
  losses, grads = domain_loss(logits, domains, None, zeros)
  assert not np.any(losses) and not np.any(grads)


@pytest.mark.parametrize('shape', [(1,), (1, 1), (1, 2), (1, 3)], ids=str)
def test_one_example_has_the_share_of_its_domain(shape):
  count = max(*shape[1:], 2) if shape[1:] else 2
  losses, grads = domain_loss(np.zeros(shape, 'f'), np.ones(1, np.int32))
  np.testing.assert_allclose(losses, [np.log(count) / count], rtol=1e-6)
  assert grads.shape == shape


def test_what_is_masked_is_as_of_no_domain(logits):
  domains, mask = np.arange(N) % 2, np.arange(N) % 5 > 0
  masked = domain_loss(logits, domains, mask=mask)
  expected = domain_loss(logits, np.where(mask, domains, -1))
  assert (np.asarray(expected[0])[mask] > 0).all()
  assert_both_close(masked, expected, rtol=1e-6, atol=0)


def test_wrong_arguments_are_named():
  def ones(*shape):
    return np.ones(shape, np.float32)

  z, domains = ones(4), np.zeros(4, np.int32)
  shapes, omega = 'logits must be of shape', r'domain_weights.*\(2,\)'
  for error, match, args, options in [
    (TypeError, 'integers or bool.*float32', (z, z), {}),
    (TypeError, 'logits must be floating', (domains, domains), {}),
    *(
      (ValueError, shapes, (ones(*shape), domains), {})
      for shape in ((3,), (3, 2), (4, 2, 2), (4, 0), ())
    ),
    (ValueError, shapes, (ones(4, 2), domains[:, None]), {}),
    (ValueError, shapes, (ones(4, 1), domains[:, None]), {}),
    (ValueError, omega, (z, domains), {'domain_weights': ones(3)}),
    (ValueError, omega, (z, domains), {'domain_weights': ones(1, 2)}),
    (
      ValueError,
      omega + r'.*\(3,\)',
      (ones(4, 3), domains),
      {'domain_weights': ones(2)},
    ),
    *(
      (ValueError, name + r'.*\(4,\)', (z, domains), {name: wrong})
      for u in (ones(3), ones(4, 1))
      for name, wrong in (('weights', u), ('mask', u > 0))
    ),
    (TypeError, 'mask must be bool', (z, domains), {'mask': z}),
    (TypeError, 'weights must be real', (z, domains), {'weights': z > 0}),
  ]:
    with pytest.raises(error, match=match):
      jax.eval_shape(functools.partial(optax_ghm.domain_loss, *args, **options))


# Split batches.


@pytest.fixture
def batch(logits, rng):
  """Shards without one of the domains, and the weights of all."""
  omega = np.float32([0.5, 2.0, 1.0])[: (*logits.shape, 2)[1]]
  weights = rng.uniform(size=N).astype(np.float32)
  return logits, np.int32(DOMAINS['unknown ones']), omega, weights


def test_a_named_vmap_is_one_batch(batch):
  logits, domains, omega, weights = batch
  expected = domain_loss_by_hand(*batch)
  shards = [x.reshape(8, 2, *x.shape[1:]) for x in (logits, domains, weights)]

  @functools.partial(jax.jit, static_argnames='axis_name')
  def mapped(z, d, w, axis_name):
    losses, grads = jax.vmap(
      lambda z, d, w: domain_loss(z, d, omega, w, axis_name=axis_name),
      axis_name='i',
    )(z, d, w)
    return losses.reshape(N), grads.reshape(logits.shape)

  assert_both_close(mapped(*shards, 'i'), expected)
  assert not np.allclose(mapped(*shards, None)[0], expected[0], rtol=0.1)


@each_split
def test_in_shard_map_with_an_axis_name(mesh, axis_name, batch):
  split = P(axis_name)
  mapped = jax.jit(
    jax.shard_map(
      functools.partial(domain_loss, axis_name=axis_name),
      mesh=mesh,
      in_specs=(split, split, P(), split),
      out_specs=split,
    )
  )
  assert_both_close(mapped(*batch), domain_loss_by_hand(*batch))


@each_kind
def test_in_jit_of_a_sharded_batch(kind, batch):
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(kind,))
  sharding = NamedSharding(mesh, P('batch'))
  expected = domain_loss_by_hand(*batch)
  logits, domains, omega, weights = batch
  with jax.set_mesh(mesh):
    actual = domain_loss(
      *jax.device_put((logits, domains), sharding),
      omega,
      jax.device_put(weights, sharding),
    )
  assert_both_close(jax.device_get(actual), expected)
  for x in actual:
    assert x.sharding.is_equivalent_to(sharding, x.ndim)
