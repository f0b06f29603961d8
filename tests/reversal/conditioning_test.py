"""Conditioning on the predicted class, and entropy weights, by formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm import reversal

DTYPES = {'float32': np.float32, 'bfloat16': jnp.bfloat16, 'float16': 'e'}
of_dtypes = pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)


def precision(dtype):
  return max(4 * float(jnp.finfo(dtype).eps), 1e-5)


FEATURES = st.sampled_from([(), (0,), (2, 3)]).flatmap(
  lambda leading: st.tuples(
    *[
      hnp.arrays(
        np.float32, (*leading, size), elements=st.floats(-8, 8, width=16)
      )
      for size in (3, 2)
    ]
  )
)


@jax.jit
def mapped(f, g, c, projections):
  """Both maps, and the gradient of the first."""
  product, pull = jax.vjp(optax_ghm.multilinear_map, f, g)
  random = optax_ghm.randomized_multilinear_map(f, g, projections)
  return product, pull(c), random


@of_dtypes
@given(FEATURES, st.integers(0, 99))
def test_both_maps_are_their_formulas(dtype, both, seed):
  rng = np.random.default_rng(seed)
  f, g = (x.astype(dtype) for x in both)
  c = rng.integers(-8, 8, (*f.shape[:-1], 6)).astype(dtype)
  projections = [rng.normal(size=(n, 4)).astype(np.float32) for n in (3, 2)]
  found = jax.device_get(mapped(f, g, c, projections))
  for leaf in jax.tree.leaves(found):
    assert leaf.dtype == f.dtype
  product, (of_f, of_g), random = jax.tree.map(np.float64, found)
  f, g, c = map(np.float64, (f, g, c))
  by_hand = c.reshape(*f.shape[:-1], 3, 2)
  rtol = precision(dtype)
  for actual, expected in (
    (product, np.einsum('...f,...c->...fc', f, g).reshape(c.shape)),
    (of_f, np.einsum('...fc,...c->...f', by_hand, g)),
    (of_g, np.einsum('...fc,...f->...c', by_hand, f)),
  ):
    size = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * size)
  of_features, of_classes = (np.float64(p.astype(dtype)) for p in projections)
  left, right = f @ of_features, g @ of_classes
  assert random.shape == left.shape
  bound = np.linalg.norm(f, axis=-1) * np.linalg.norm(g, axis=-1)
  atol = 16 * rtol * bound.max(initial=1)
  np.testing.assert_allclose(random, left * right / 2, rtol=rtol, atol=atol)


def test_random_products_keep_inner_products_on_average(rng):
  """Of equal pairs, too, which would show two projections that are one."""
  f, g = rng.normal(size=(2, 4, 3)).astype(np.float32)
  f[0] = g[0] = [1.0, 0.0, 0.0]

  @jax.jit
  def both(f, g):
    key = jax.random.key(1)
    projections = reversal.multilinear_projections(key, 3, 3, 65536)
    return (
      optax_ghm.multilinear_map(f, g),
      optax_ghm.randomized_multilinear_map(f, g, projections),
    )

  exact, random = map(np.asarray, both(f, g))
  size = np.linalg.norm(exact, axis=1)
  error = (random @ random.T - exact @ exact.T) / np.outer(size, size)
  assert np.abs(error).max() < 0.05


projections = jax.jit(
  reversal.multilinear_projections, static_argnums=(1, 2, 3)
)


def test_projections_are_two_standard_normals():
  one, two = projections(jax.random.key(3), 20, 20, 1024)
  assert one.shape == two.shape == (20, 1024)
  both = np.stack([np.ravel(one), np.ravel(two)])
  np.testing.assert_allclose(both.mean(1), 0, atol=0.02)
  np.testing.assert_allclose(np.cov(both), np.eye(2), atol=0.03)
  np.testing.assert_allclose((both**4).mean(1), 3, atol=0.2)
  default = jax.eval_shape(
    lambda key: reversal.multilinear_projections(key, 2, 3), jax.random.key(0)
  )
  assert [u.shape for u in default] == [(2, 1024), (3, 1024)]


def test_projections_are_of_float32_always():
  with jax.enable_x64(True):
    for one in projections(jax.random.key(0), 2, 3, 5):
      assert one.dtype == jnp.float32


def test_wrong_shapes_are_named():
  f, g, one, two = (
    np.ones(shape, np.float32) for shape in ((4, 5), (4, 3), (5, 8), (3, 8))
  )
  for shape in ((3, 3), (3,), (1, 4, 3)):
    wrong = np.ones(shape, np.float32)
    with pytest.raises(ValueError, match='the same leading axes'):
      optax_ghm.multilinear_map(f, wrong)
    with pytest.raises(ValueError, match='the same leading axes'):
      optax_ghm.randomized_multilinear_map(f, wrong, (one, two))
  for wrong in ((two, one), (one, two[:, 1:]), (one[1:], two), (one, two[1:])):
    with pytest.raises(ValueError, match=r'projections.*\(F, d\)'):
      optax_ghm.randomized_multilinear_map(f, g, wrong)


@jax.jit
def entropy_weights(z):
  """The weights, and that no derivative flows back from them."""
  grad = jax.grad(lambda z: jnp.sum(optax_ghm.entropy_weights(z)))(z)
  ones = jnp.ones_like(z)
  weights, tangent = jax.jvp(optax_ghm.entropy_weights, (z,), (ones,))
  return weights, grad, tangent


LOGITS = st.one_of(
  st.floats(-30, 30, width=16),
  st.sampled_from([-6e4, 6e4, 0.0, 1e4, -np.inf, np.inf, np.nan]),
)
RULED_OUT = [[1e4, 0, 0], [0, -1e4, -1e4], [-np.inf, -np.inf, 5]]


@pytest.mark.device
@of_dtypes
@given(
  hnp.arrays(
    np.float64,
    st.sampled_from([(0, 3), (4, 1), (3, 3), (3,)]),
    elements=LOGITS,
  )
)
@example(np.array(RULED_OUT))
@example(np.array([[-np.inf, 2, 2], [-np.inf, 0, 1], [np.nan, 0, 1]]))
@example(np.full((3, 3), -6e4))
def test_entropy_weights_are_their_formula(dtype, z):
  """From 1 to 2: sure predictions count twice, equal logits the least."""
  z = z.astype(dtype)
  weights, *derivatives = entropy_weights(z)
  assert weights.dtype == z.dtype and weights.shape == z.shape[:-1]
  exact = np.float64(z)
  sound = (exact < np.inf).all(-1) & (exact > -np.inf).any(-1)
  p = np.where(sound[..., None], exact, 0)
  p = np.exp(p - p.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  expected = np.where(sound, 1 + np.prod(p**p, axis=-1), 0)  # 0**0 is 1
  actual = np.asarray(weights, np.float64)
  np.testing.assert_allclose(actual, expected, rtol=precision(z.dtype))
  least = 1 + 1 / z.shape[-1] - precision(z.dtype)
  assert ((actual[sound] >= least) & (actual[sound] <= 2)).all()
  for derivative in derivatives:
    np.testing.assert_array_equal(derivative, np.zeros(derivative.shape))


@of_dtypes
def test_entropy_weights_are_rounded_once(dtype, rng):
  z = rng.normal(size=(64, 5)).astype(dtype)
  actual, full = (entropy_weights(u)[0] for u in (z, z.astype(np.float32)))
  np.testing.assert_array_equal(actual, np.asarray(full).astype(dtype))
