"""Conditioning on the predicted class, and entropy weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm import reversal


def assert_both_close(actual, expected, rtol=2e-5, atol=2e-5):
  for a, b in zip(actual, expected, strict=True):
    assert np.shape(a) == np.shape(b)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


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
  projections = reversal.multilinear_projections(jax.random.key(1), 3, 3, 65536)
  t = np.asarray(optax_ghm.randomized_multilinear_map(f, g, projections))
  exact = np.asarray(optax_ghm.multilinear_map(f, g))
  size = np.linalg.norm(exact, axis=1)
  error = (t @ t.T - exact @ exact.T) / np.outer(size, size)
  assert np.abs(error).max() < 0.05


def test_projections_are_two_standard_normals():
  one, two = reversal.multilinear_projections(jax.random.key(3), 20, 20)
  assert one.shape == two.shape == (20, 1024)
  both = np.stack([one.ravel(), two.ravel()])
  np.testing.assert_allclose(both.mean(1), 0, atol=0.02)
  np.testing.assert_allclose(np.cov(both), np.eye(2), atol=0.03)
  np.testing.assert_allclose((both**4).mean(1), 3, atol=0.2)


def test_projections_are_of_float32_always():
  with jax.enable_x64(True):
    for one in reversal.multilinear_projections(jax.random.key(0), 2, 3, 5):
      assert one.dtype == jnp.float32


def test_conditioning_keeps_the_dtype(rng):
  f, g = pairs((4,), rng)
  projections = reversal.multilinear_projections(jax.random.key(0), 5, 3, 8)

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
