"""The loss of a domain classifier."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
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
def domain_loss(logits, domains, omega=None, weights=None, axis_name=None):
  """The losses, and the gradient of their sum."""
  losses, pull = jax.vjp(
    lambda z: optax_ghm.domain_loss(
      z,
      domains,
      domain_weights=omega,
      weights=weights,
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
  'domains', [jnp.array(d) for d in DOMAINS.values()], ids=DOMAINS
)


@pytest.fixture(params=['binary', 'multi-class'])
def logits(request, rng):
  shape = (N,) if request.param == 'binary' else (N, 3)
  return jnp.asarray(rng.normal(size=shape) * 2, jnp.float32)


@each_domains
@pytest.mark.parametrize('weighted', [False, True])
def test_domain_loss_is_its_formula(domains, weighted, logits, rng):
  omega = weights = None
  if weighted:
    count = 2 if logits.ndim == 1 else 3
    omega = jnp.asarray(rng.uniform(size=count) * 3, jnp.float32)
    weights = jnp.asarray(rng.uniform(size=N), jnp.float32).at[4].set(0)
  assert_both_close(
    domain_loss(logits, domains, omega, weights),
    domain_loss_by_hand(logits, domains, omega, weights),
  )


@each_domains
def test_mean_is_the_domains_weighted_means_by_their_share(domains, rng):
  z = rng.normal(size=(N, 3)).astype(np.float32) * 2
  omega = np.array([0.2, 1.5, 0.7], np.float32)
  weights = rng.uniform(0.1, 3, size=N).astype(np.float32)
  losses, _ = domain_loss(z, domains, omega, weights)
  expected = 0
  for d in range(3):
    here = np.asarray(domains) == d
    if here.any():
      p = np.exp(np.float64(z[here]))
      expected += omega[d] * np.average(
        -np.log(p[:, d] / p.sum(1)), weights=weights[here]
      )
  np.testing.assert_allclose(np.mean(losses), expected, rtol=1e-5)


def test_a_sigmoid_is_a_softmax_of_zero_and_the_logit(rng):
  z = jnp.asarray(rng.normal(size=N) * 20, jnp.float32)
  others = jnp.array(DOMAINS['unknown ones']), jnp.array([0.3, 0.9])
  one, grad_one = domain_loss(z, *others, jnp.linspace(0, 1, N))
  two, grad_two = domain_loss(
    jnp.stack([jnp.zeros_like(z), z], -1), *others, jnp.linspace(0, 1, N)
  )
  assert_both_close((one, grad_one), (two, grad_two[:, 1]))


@pytest.mark.parametrize('size', [1e4, -1e4])
def test_extreme_domain_logits_are_finite(size, logits):
  logits = jnp.round(logits) * size
  for domains in (jnp.arange(N) % 2, jnp.arange(N) // 2 % 2):
    losses, grads = domain_loss(logits, domains)
    expected, expected_grads = domain_loss_by_hand(logits, domains)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=2e-3)
    np.testing.assert_allclose(grads, expected_grads, rtol=1e-5, atol=1e-6)


@given(
  z=hnp.arrays(
    np.float32,
    (6, 3),
    elements=st.one_of(
      st.floats(-50, 50, width=32),
      st.sampled_from([np.nan, np.inf, -np.inf]),
    ),
  ),
  domains=hnp.arrays(np.int32, 6, elements=st.integers(-2, 4)),
  weights=hnp.arrays(
    np.float32, 6, elements=st.sampled_from([0, 0.25, 1, 1e-20, 1e20])
  ),
)
def test_bad_domain_logits_harm_no_other_example(z, domains, weights):
  losses, grads = domain_loss(z, domains, None, weights)
  known = (domains >= 0) & (domains < 3)
  good = np.isfinite(z).all(1)
  expected, expected_grads = domain_loss_by_hand(
    np.where(good[:, None], z, 0), domains, None, weights
  )
  assert_both_close(
    (losses[good], grads[good]),
    (expected[good], expected_grads[good]),
    rtol=1e-4,
    atol=1e-4,
  )
  np.testing.assert_array_equal(losses[~known], 0)
  np.testing.assert_array_equal(grads[~known], 0)
  nan = np.isnan(z).any(1) & known & (weights > 0)
  assert np.isnan(losses[nan]).all()


def test_a_bad_example_weight_is_of_its_own_domain_only():
  z, domains = jnp.arange(6.0), jnp.array([0, 0, 1, 1, -1, 0])
  first = np.asarray(domains) == 0
  expected, _ = domain_loss_by_hand(z, domains)
  for run in (domain_loss, domain_loss.__wrapped__):
    for i in (4, 2):  # of no domain, of domain 1
      losses, grads = run(z, domains, None, jnp.ones(6).at[i].set(jnp.nan))
      np.testing.assert_allclose(losses[first], expected[first], rtol=1e-5)
      assert np.isfinite(grads[first]).all() and losses[4] == 0


def test_no_gradient_reaches_the_weights(rng):
  z = jnp.asarray(rng.normal(size=N), jnp.float32)
  domains = jnp.arange(N) % 2

  @jax.jit
  def total(weights):
    return jnp.sum(
      optax_ghm.domain_loss(z, domains, weights=weights)
      * jnp.arange(1.0, N + 1)
    )

  weights = jnp.linspace(1, 2, N)
  assert abs(total(weights) - total(weights.at[3].set(9))) > 1
  np.testing.assert_array_equal(jax.grad(total)(weights), jnp.zeros(N))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_low_precision_logits_are_rounded_once_at_the_end(dtype, rng):
  logits = jnp.asarray(rng.normal(size=(N, 3)) * 2, dtype)
  domains, weights = jnp.arange(N) % 3, jnp.linspace(0, 1, N)
  losses, grads = domain_loss(logits, domains, jnp.ones(3), weights)
  full = domain_loss(logits.astype(jnp.float32), domains, jnp.ones(3), weights)
  assert losses.dtype == grads.dtype == dtype
  np.testing.assert_array_equal(losses, full[0].astype(dtype))
  np.testing.assert_allclose(
    grads.astype(jnp.float32), full[1], rtol=float(jnp.finfo(dtype).eps)
  )


@pytest.mark.parametrize('count', [2, 200])
def test_domains_of_small_integers(count, rng):
  domains = np.array([0, 1, 1, 100, 127, 127], np.int8)
  z = jnp.asarray(rng.normal(size=(6, count)), jnp.float32)
  assert_both_close(domain_loss(z, domains), domain_loss_by_hand(z, domains))


def test_numpy_arrays_are_as_good(rng):
  z, domains = rng.normal(size=N).astype(np.float32), np.arange(N) % 2
  assert domains.dtype == np.int64
  actual = optax_ghm.domain_loss(
    z, domains, domain_weights=np.ones(2), weights=np.ones(N)
  )
  expected, _ = domain_loss_by_hand(z, domains, np.ones(2))
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_an_empty_batch_and_no_weight_at_all_are_finite(logits):
  empty = domain_loss(logits[:0], jnp.zeros(0, jnp.int32))
  chex.assert_trees_all_equal(empty, (jnp.zeros(0), logits[:0]))
  nothing = domain_loss(logits, jnp.arange(N) % 2, None, jnp.zeros(N))
  chex.assert_trees_all_equal(nothing, (jnp.zeros(N), jnp.zeros_like(logits)))


def test_domain_loss_names_wrong_arguments():
  z, domains = jnp.ones(4), jnp.zeros(4, jnp.int32)
  with pytest.raises(TypeError, match='integers or bool.*float32'):
    optax_ghm.domain_loss(z, z)
  for shape in ((3,), (3, 2), (4, 2, 2), (4, 0), ()):
    with pytest.raises(ValueError, match='logits must be of shape'):
      optax_ghm.domain_loss(jnp.ones(shape), domains)
  for shape in ((4, 2), (4, 1)):
    with pytest.raises(ValueError, match='logits must be of shape'):
      optax_ghm.domain_loss(jnp.ones(shape), domains[:, None])
  for omega in (jnp.ones(3), jnp.ones((1, 2))):
    with pytest.raises(ValueError, match=r'domain_weights.*\(2,\)'):
      optax_ghm.domain_loss(z, domains, domain_weights=omega)
  with pytest.raises(ValueError, match=r'domain_weights.*\(2,\).*\(3,\)'):
    optax_ghm.domain_loss(jnp.ones((4, 3)), domains, domain_weights=jnp.ones(2))
  for weights in (jnp.ones(3), jnp.ones((4, 1))):
    with pytest.raises(ValueError, match=r'weights.*\(4,\)'):
      optax_ghm.domain_loss(z, domains, weights=weights)
    with pytest.raises(ValueError, match=r'mask.*\(4,\)'):
      optax_ghm.domain_loss(z, domains, mask=weights > 0)
  with pytest.raises(TypeError, match='mask must be bool'):
    optax_ghm.domain_loss(z, domains, mask=z)
  with pytest.raises(TypeError, match='weights must be real'):
    optax_ghm.domain_loss(z, domains, weights=z > 0)


def test_labels_may_be_bool_and_the_logit_of_a_dense_layer(rng):
  z = jnp.asarray(rng.normal(size=N), jnp.float32)
  domains = jnp.arange(N) % 3 == 0
  expected = domain_loss(z, domains.astype(jnp.int32))
  chex.assert_trees_all_equal(domain_loss(z, domains), expected)
  losses, grads = domain_loss(z[:, None], domains)
  chex.assert_trees_all_equal((losses, grads[:, 0]), expected)


@pytest.mark.parametrize('shape', [(1,), (1, 1), (1, 2), (1, 3)], ids=str)
def test_one_example_has_the_share_of_its_domain(shape):
  count = max(*shape[1:], 2) if shape[1:] else 2
  losses, grads = domain_loss(jnp.zeros(shape), jnp.ones(1, jnp.int32))
  np.testing.assert_allclose(losses, [np.log(count) / count], rtol=1e-6)
  assert grads.shape == shape


def test_what_is_masked_is_as_of_no_domain(logits):
  domains, mask = jnp.arange(N) % 2, jnp.arange(N) % 5 > 0
  masked = jax.jit(jax.vjp, static_argnums=0)(
    lambda z: optax_ghm.domain_loss(z, domains, mask=mask), logits
  )
  expected = domain_loss(logits, jnp.where(mask, domains, -1))
  assert (expected[0][mask] > 0).all()
  losses, pull = masked
  chex.assert_trees_all_equal((losses, *pull(jnp.ones(N))), expected)


@pytest.fixture
def batch(logits, rng):
  """Shards without one of the domains, and what the whole gives."""
  domains = jnp.asarray(DOMAINS['unknown ones'])
  weights = jnp.asarray(rng.uniform(size=N), jnp.float32)
  omega = jnp.array([0.5, 2.0, 1.0])[: 2 if logits.ndim == 1 else 3]
  return logits, domains, omega, weights


def test_a_named_vmap_is_one_batch_of_domains(batch):
  logits, domains, omega, weights = batch
  expected = domain_loss(*batch)
  shards = [x.reshape(8, 2, *x.shape[1:]) for x in (logits, domains, weights)]

  def mapped(axis_name):
    losses, grads = jax.vmap(
      lambda z, d, w: domain_loss(z, d, omega, w, axis_name=axis_name),
      axis_name='i',
    )(*shards)
    return losses.reshape(N), grads.reshape(logits.shape)

  assert_both_close(mapped('i'), expected)
  assert not np.allclose(mapped(None)[0], expected[0], rtol=0.1)


@each_split
def test_domain_loss_in_shard_map_with_an_axis_name(mesh, axis_name, batch):
  split = P(axis_name)
  mapped = jax.jit(
    jax.shard_map(
      functools.partial(domain_loss, axis_name=axis_name),
      mesh=mesh,
      in_specs=(split, split, P(), split),
      out_specs=split,
    )
  )
  assert_both_close(mapped(*batch), domain_loss(*batch))


@each_kind
def test_domain_loss_in_jit_of_a_sharded_batch(kind, batch):
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(kind,))
  sharding = NamedSharding(mesh, P('batch'))
  expected = jax.device_get(domain_loss(*batch))
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
