"""Domain loss and conditioning, as formulas in float64 NumPy."""

import functools

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
SIZES = st.sampled_from([0, 1, 5])
LOGITS = st.one_of(
  st.floats(-30, 30, width=16), st.sampled_from([-6e4, 6e4, 0.0])
)


def precision(dtype):
  return max(4 * float(jnp.finfo(dtype).eps), 1e-5)


def log_softmax(z):
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


@st.composite
def of_domains(draw):
  """Logits, domains, their weights, and those of the examples."""
  size, count = draw(SIZES), draw(st.sampled_from([1, 2, 3]))
  shape = (size,) if count == 1 else (size, count)
  return (
    draw(hnp.arrays(np.float64, shape, elements=LOGITS)),
    draw(hnp.arrays(np.int32, size, elements=st.integers(-1, 3))),
    draw(
      hnp.arrays(
        np.float32,
        max(count, 2),
        elements=st.sampled_from([0, 0.5, 2.0]),
      )
    ),
    draw(
      hnp.arrays(
        np.float32, size, elements=st.sampled_from([0, 0.25, 1, 1e-20, 1e20])
      )
    ),
  )


domain_loss = jax.jit(
  lambda z, domains, of_domains, of_examples: optax_ghm.domain_loss(
    z, domains, domain_weights=of_domains, weights=of_examples
  )
)


@of_dtypes
@given(of_domains())
@example(
  (
    np.full((1, 2), -6e4),
    np.zeros(1, np.int32),
    np.full(2, 0.5, np.float32),
    np.ones(1, np.float32),
  )
)
def test_domain_loss(dtype, batch):
  z, domains, of_each, weights = batch
  z = z.astype(dtype)
  losses = domain_loss(z, domains, of_each, weights)
  exact = np.float64(z)
  if exact.ndim == 1:
    exact = np.stack([np.zeros_like(exact), exact], axis=-1)
  assert losses.dtype == z.dtype and losses.shape == domains.shape
  count = exact.shape[1]
  log_p = log_softmax(exact) if exact.size else exact
  for i, d in enumerate(domains):
    expected = 0.0
    if 0 <= d < count:
      total = np.float64(weights[domains == d]).sum()
      share = weights[i] / total if total else 0
      expected = -len(domains) * of_each[d] * share * log_p[i, d]
    if expected < 0.9 * float(jnp.finfo(z.dtype).max):
      np.testing.assert_allclose(
        float(losses[i]), expected, rtol=precision(z.dtype), atol=1e-6
      )


entropy_weights = jax.jit(optax_ghm.entropy_weights)


@of_dtypes
@given(
  hnp.arrays(
    np.float64,
    st.sampled_from([(0, 3), (4, 1), (2, 3), (3,)]),
    elements=st.one_of(LOGITS, st.just(-np.inf)),
  ),
  st.floats(-20, 20, width=16),
)
def test_entropy_weights(dtype, z, shift):
  z = z.astype(dtype)
  weights = entropy_weights(z)
  assert weights.dtype == z.dtype and weights.shape == z.shape[:-1]
  exact = np.float64(z)
  sound = np.isfinite(exact).any(-1)
  exact = np.where(sound[..., None], exact, 0)
  log_p = log_softmax(exact)
  p = np.exp(log_p)
  entropy = -np.sum(p * np.where(p > 0, log_p, 0), axis=-1)
  expected = np.where(sound, 1 + np.exp(-entropy), 0)
  actual = np.asarray(weights, np.float64)
  np.testing.assert_allclose(actual, expected, rtol=precision(z.dtype))
  assert ((actual[sound] > 1) & (actual[sound] <= 2)).all()


FEATURES = st.sampled_from([(), (0,), (2,), (2, 1)]).flatmap(
  lambda leading: st.tuples(
    *[
      hnp.arrays(
        np.float32, (*leading, size), elements=st.floats(-8, 8, width=16)
      )
      for size in (3, 2)
    ]
  )
)


@of_dtypes
@given(FEATURES)
def test_multilinear_map(dtype, both):
  features, predictions = (x.astype(dtype) for x in both)
  actual = optax_ghm.multilinear_map(features, predictions)
  f, g = np.float64(features), np.float64(predictions)
  expected = np.einsum('...f,...c->...fc', f, g).reshape(*f.shape[:-1], 6)
  assert actual.dtype == features.dtype and actual.shape == expected.shape
  np.testing.assert_allclose(
    np.float64(actual), expected, rtol=precision(features.dtype), atol=1e-7
  )


@functools.cache
def projections(outputs):
  return reversal.multilinear_projections(jax.random.key(1), 3, 2, outputs)


randomized = jax.jit(optax_ghm.randomized_multilinear_map)


@given(FEATURES, st.sampled_from([1, 4]))
def test_randomized_multilinear_map(both, outputs):
  of_features, of_classes = map(np.float64, projections(outputs))
  assert of_features.shape == (3, outputs) and of_classes.shape == (2, outputs)
  f, g = map(np.float64, both)
  expected = (f @ of_features) * (g @ of_classes) / np.sqrt(outputs)
  actual = randomized(*both, projections(outputs))
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


def test_random_products_have_the_inner_product_of_the_outer_one():
  """In the mean: to 5 standard errors of 2**16 products."""
  f, g = np.float32([1, -2, 3]), np.float32([0.5, -1])
  exact = float(np.sum(np.square(f)) * np.sum(np.square(g)))
  t = randomized(f, g, projections(2**16))
  error = exact * np.sqrt(8 / 2**16)
  np.testing.assert_allclose(np.sum(np.square(t)), exact, atol=5 * error)
