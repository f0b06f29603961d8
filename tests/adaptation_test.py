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

N = 16
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


# The loss of the domains.


@functools.partial(jax.jit, static_argnames='axis_name')
def domain_loss(logits, domains, omega=None, weights=None, axis_name=None):
  """The losses, and the gradient of their sum."""
  losses, pull = jax.vjp(
    lambda z: optax_ghm.domain_loss(
      z,
      domains,
      domain_weights=omega,
      example_weights=weights,
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


def test_no_gradient_reaches_the_example_weights(rng):
  z = jnp.asarray(rng.normal(size=N), jnp.float32)
  domains = jnp.arange(N) % 2

  @jax.jit
  def total(weights):
    return jnp.sum(
      optax_ghm.domain_loss(z, domains, example_weights=weights)
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
    z, domains, domain_weights=np.ones(2), example_weights=np.ones(N)
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
  for wrong in (jnp.zeros(4), jnp.zeros(4, bool)):
    with pytest.raises(TypeError, match=f'integers.*{wrong.dtype}'):
      optax_ghm.domain_loss(z, wrong)
  for logits in (jnp.ones(3), jnp.ones((3, 2)), jnp.ones((4, 2, 2)), z[0]):
    with pytest.raises(ValueError, match='logits must be of shape'):
      optax_ghm.domain_loss(logits, domains)
  with pytest.raises(ValueError, match='logits must be of shape'):
    optax_ghm.domain_loss(jnp.ones((4, 2)), domains[:, None])
  for omega in (jnp.ones(3), jnp.ones((1, 2)), jnp.ones(())):
    with pytest.raises(ValueError, match=r'domain_weights.*\(2,\)'):
      optax_ghm.domain_loss(z, domains, domain_weights=omega)
  with pytest.raises(ValueError, match=r'domain_weights.*\(3,\).*\(2,\)'):
    optax_ghm.domain_loss(jnp.ones((4, 3)), domains, domain_weights=jnp.ones(2))
  for weights in (jnp.ones(3), jnp.ones((4, 1)), jnp.ones(())):
    with pytest.raises(ValueError, match=r'example_weights.*\(4,\)'):
      optax_ghm.domain_loss(z, domains, example_weights=weights)


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


# Conditioning on the prediction.


each_leading = pytest.mark.parametrize('leading', [(), (2, 3), (0,)], ids=str)


def pairs(leading, rng, features=5):
  return (
    jnp.asarray(rng.normal(size=(*leading, features)), jnp.float32),
    jnp.asarray(rng.uniform(size=(*leading, 3)), jnp.float32),
  )


@each_leading
def test_multilinear_map_is_the_outer_product(leading, rng):
  f, g = pairs(leading, rng)
  c = jnp.asarray(rng.normal(size=(*leading, 15)), jnp.float32)
  product, pull = jax.vjp(optax_ghm.multilinear_map, f, g)
  np.testing.assert_array_equal(
    product, np.einsum('...i,...j->...ij', f, g).reshape(*leading, 15)
  )
  by_hand = np.reshape(c, (*leading, 5, 3))
  assert_both_close(
    pull(c),
    (
      np.einsum('...ij,...j->...i', by_hand, g),
      np.einsum('...ij,...i->...j', by_hand, f),
    ),
  )


@each_leading
def test_randomized_map_is_its_formula(leading, rng):
  f, g = pairs(leading, rng)
  one = jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)
  two = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)
  actual = optax_ghm.randomized_multilinear_map(f, g, (one, two))
  left = np.einsum('...i,id->...d', f, one)
  right = np.einsum('...i,id->...d', g, two)
  np.testing.assert_allclose(
    actual, left * right / np.sqrt(7), rtol=1e-5, atol=1e-5
  )


def test_randomized_map_keeps_inner_products_on_average(rng):
  f, g = pairs((4,), rng, features=3)
  # Of equal pairs, which would show two projections that are one.
  f, g = (x.at[0].set(jnp.array([1.0, 0.0, 0.0])) for x in (f, g))
  projections = optax_ghm.multilinear_projections(
    jax.random.key(1), 3, 3, 65536
  )
  t = np.asarray(optax_ghm.randomized_multilinear_map(f, g, projections))
  exact = np.asarray(optax_ghm.multilinear_map(f, g))
  size = np.linalg.norm(exact, axis=1)
  error = (t @ t.T - exact @ exact.T) / np.outer(size, size)
  assert np.abs(error).max() < 0.05


def test_projections_are_two_standard_normals():
  one, two = optax_ghm.multilinear_projections(jax.random.key(3), 20, 20)
  assert one.shape == two.shape == (20, 1024)
  both = np.stack([one.ravel(), two.ravel()])
  np.testing.assert_allclose(both.mean(1), 0, atol=0.02)
  np.testing.assert_allclose(np.cov(both), np.eye(2), atol=0.03)
  np.testing.assert_allclose((both**4).mean(1), 3, atol=0.2)


def test_projections_are_of_float32_always():
  with jax.enable_x64(True):
    for one in optax_ghm.multilinear_projections(jax.random.key(0), 2, 3, 5):
      assert one.dtype == jnp.float32


def test_conditioning_keeps_the_dtype(rng):
  f, g = pairs((4,), rng)
  projections = optax_ghm.multilinear_projections(jax.random.key(0), 5, 3, 8)

  @jax.jit
  def both(f, g):
    return (
      optax_ghm.multilinear_map(f, g),
      optax_ghm.randomized_multilinear_map(f, g, projections),
    )

  actual = both(f.astype(jnp.bfloat16), g.astype(jnp.bfloat16))
  assert actual[0].dtype == actual[1].dtype == jnp.bfloat16
  actual = [x.astype(jnp.float32) for x in actual]
  assert_both_close(actual, both(f, g), rtol=0.05, atol=0.05)


def test_conditioning_names_wrong_shapes():
  f, g = jnp.ones((4, 5)), jnp.ones((4, 3))
  one, two = jnp.ones((5, 8)), jnp.ones((3, 8))
  for wrong in (jnp.ones((3, 3)), jnp.ones(3), jnp.ones((1, 4, 3))):
    with pytest.raises(ValueError, match='the same leading axes'):
      optax_ghm.multilinear_map(f, wrong)
    with pytest.raises(ValueError, match='the same leading axes'):
      optax_ghm.randomized_multilinear_map(f, wrong, (one, two))
  for wrong in ((two, one), (one, two[:, 1:]), (one[1:], two), (one, two[1:])):
    with pytest.raises(ValueError, match=r'projections.*\(F, d\)'):
      optax_ghm.randomized_multilinear_map(f, g, wrong)


# Entropy weights.


def entropy_weights_by_hand(z):
  z = np.asarray(z, np.float64)
  p = np.exp(z - z.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  return 1 + np.prod(p**p, axis=-1)  # 0**0 is 1


entropy_weights = jax.jit(optax_ghm.entropy_weights)


@each_leading
def test_entropy_weights_are_their_formula(leading, rng):
  z = rng.normal(size=(*leading, 5)).astype(np.float32) * 3
  z[..., 0] += 2
  actual = entropy_weights(z)
  assert actual.shape == leading
  np.testing.assert_allclose(actual, entropy_weights_by_hand(z), rtol=1e-5)


@pytest.mark.parametrize('classes', [1, 2, 1000])
@pytest.mark.parametrize('logit', [0.0, 1e4, -3e38])
def test_equal_logits_weigh_the_least(classes, logit):
  np.testing.assert_allclose(
    entropy_weights(jnp.full((2, classes), logit)), 1 + 1 / classes, rtol=1e-5
  )


def test_sure_predictions_count_twice_and_classes_may_be_ruled_out():
  inf = jnp.inf
  z = [
    [1e4, 0, 0],
    [0, -1e4, -1e4],
    [-inf, -inf, 5],
    [-inf, 2, 2],
    [-inf, 0, 1],
  ]
  z = jnp.array(z)
  expected = entropy_weights_by_hand(z)
  np.testing.assert_allclose(expected[:4], [2, 2, 2, 1.5])
  np.testing.assert_allclose(entropy_weights(z), expected, rtol=1e-6)


def test_no_gradient_flows_back_from_entropy_weights():
  z = jnp.array([[1.0, 2.0, 3.0], [-jnp.inf, 0.0, 1.0], [jnp.nan, 0.0, 1.0]])
  grad = jax.grad(lambda z: jnp.sum(optax_ghm.entropy_weights(z)))(z)
  np.testing.assert_array_equal(grad, jnp.zeros_like(z))
  _, tangent = jax.jvp(optax_ghm.entropy_weights, (z,), (jnp.ones_like(z),))
  np.testing.assert_array_equal(tangent, jnp.zeros(3))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_entropy_weights_keep_the_dtype_and_are_rounded_once(dtype, rng):
  z = jnp.asarray(rng.normal(size=(64, 5)), dtype)
  actual = entropy_weights(z)
  assert actual.dtype == dtype
  full = entropy_weights(z.astype(jnp.float32))
  np.testing.assert_array_equal(actual, full.astype(dtype))


LOGITS = st.floats(max_value=2.0**100, width=32)  # and -inf


@given(z=hnp.arrays(np.float32, (5, 4), elements=LOGITS))
def test_entropy_weights_of_any_logits_are_in_range(z):
  weights = entropy_weights(z)
  possible = z.max(1) > -np.inf
  assert (weights[possible] >= 1.25 - 1e-6).all() and (weights <= 2).all()
  np.testing.assert_allclose(
    weights[possible], entropy_weights_by_hand(z[possible]), rtol=1e-5
  )


# Weights of two gradients in conflict.


conflict_weights = jax.jit(
  optax_ghm.conflict_weights,
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
    optax_ghm.conflict_weights(x, x, rule='GH')
  wrong = [(x, jnp.ones(4)), ([x], [x, x]), ([x, x[:2]], [x[:2], x])]
  for first, second in wrong:
    with pytest.raises(ValueError, match='the same structure'):
      optax_ghm.conflict_weights(first, second)


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
    optax_ghm.conflict_weights(first, second)


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
        optax_ghm.conflict_weights, rule=rule, axis_name=axis_name
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
  one, two = optax_ghm.harmonized_fork(x, **kwargs)
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
  for run in (optax_ghm.harmonized_fork, jax.jit(optax_ghm.harmonized_fork)):
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
  fork = functools.partial(optax_ghm.harmonized_fork, rule=rule)
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
  fork = jax.checkpoint(functools.partial(optax_ghm.harmonized_fork, rule=rule))
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
    jax.jvp(functools.partial(optax_ghm.harmonized_fork, rule=rule), (X,), (X,))
  fork = functools.partial(optax_ghm.harmonized_fork, rule=rule, enabled=False)
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
  for branch in optax_ghm.harmonized_fork(tree):
    assert jax.tree.structure(branch) == jax.tree.structure(tree)
    for name in ('integer', 'key', 'bool', 'number', 'float0'):
      assert branch[name] is tree[name]

  def loss(x):
    one, two = optax_ghm.harmonized_fork({**tree, 'x': x})
    return for_domain(one['x']) + for_task(two['x'])

  np.testing.assert_allclose(jax.grad(loss)(X), expected_gradient(), rtol=1e-4)


@each_rule
@pytest.mark.parametrize('scale', [1.0, 0.25])
def test_with_a_reversal_before_the_domain_branch(rule, scale):
  """The losses agree; the reversed one is against the task's."""

  def loss(x):
    one, two = optax_ghm.harmonized_fork(x, rule=rule)
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
    optax_ghm.harmonized_fork(X, rule='pcgrad', enabled=enabled)
