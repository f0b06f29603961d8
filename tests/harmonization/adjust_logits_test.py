"""Adjusted logits: what is left for the raw ones to say is the evidence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import optax_ghm as ghm
from tests.support import strategies_arrays as arrays_of

pytestmark = pytest.mark.device
NUMBERS = st.sampled_from(
  [0.0, 1.0, 3.0, 1e4, 2.0**30, 0.2, 1e-30, 1e30, -2.0, np.nan, np.inf]
)


def test_logits_that_know_nothing_have_no_gradient():
  """On examples with these counts: what is left to learn is the evidence."""
  labels = np.repeat(np.int32([0, 1, 2]), [90, 9, 1])
  one_hot = np.eye(3, dtype=np.float32)[labels]

  @jax.jit
  def gradients(logits, counts):
    def softmax(logits):
      logits = jnp.broadcast_to(ghm.adjust_logits(logits, counts), (100, 3))
      return optax.losses.softmax_cross_entropy(logits, one_hot).mean()

    def sigmoid(adjust, logits):
      logits = jnp.broadcast_to(adjust(logits), (100, 3))
      return optax.sigmoid_binary_cross_entropy(logits, one_hot).mean()

    one_vs_rest = functools.partial(
      sigmoid, lambda z: ghm.adjust_sigmoid_logits(z, counts, 100)
    )
    biased = functools.partial(
      sigmoid, lambda z: z + ghm.prior_bias(counts / 100)
    )
    return [jax.grad(loss)(logits) for loss in (softmax, one_vs_rest, biased)]

  for gradient in gradients(np.zeros(3, np.float32), one_hot.sum(0)):
    np.testing.assert_allclose(gradient, np.zeros(3), atol=1e-7)


@jax.jit
def adjusted(logits, counts, examples, strength):
  def total(logits, counts):
    both = (
      ghm.adjust_logits(logits, counts, strength),
      ghm.adjust_sigmoid_logits(logits, counts, examples, strength),
    )
    return jnp.sum(both[0]) + jnp.sum(both[1]), both

  return jax.grad(total, argnums=(0, 1), has_aux=True)(logits, counts)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float64])
@given(data=st.data(), examples=NUMBERS, strength=st.sampled_from([1, -1, 0.3]))
def test_adjustment_is_its_formula(dtype, data, examples, strength):
  counts = data.draw(arrays_of.arrays(np.float32, (4,), NUMBERS))
  logits = data.draw(
    arrays_of.arrays(dtype, (2, 4), st.sampled_from([0.0, 1.5, -40.0]))
  )
  with arrays_of.x64(dtype):
    (gradient, of_counts), both = jax.device_get(
      adjusted(logits, counts, np.float32(examples), strength)
    )

  def known(x):
    return np.where((x > 0) & np.isfinite(x), x, 0).astype(float)

  n, total = known(counts), known(np.float32(examples))
  least = min([1.0, *n[n > 0]]) / 2
  positive, rest = (np.where(u > 0, u, least) for u in (n, total - n))
  z = logits.astype(float)
  for found, prior in (
    (both[0], np.log(positive) - np.log(positive.sum())),
    (both[1], np.log(positive) - np.log(rest)),
  ):
    assert found.dtype == np.promote_types(dtype, np.float32)
    np.testing.assert_allclose(found, z + strength * prior, 1e-6, atol=2e-5)
  np.testing.assert_array_equal(gradient.astype(float), np.full((2, 4), 2.0))
  assert gradient.dtype == dtype
  np.testing.assert_array_equal(of_counts, np.zeros(4))


def test_adjustment_takes_what_counts_are_and_says_what_they_are_not():
  z = np.zeros((5, 3), np.float32)
  many = np.array([3_000_000_000, 0, 5])  # more than 32 bits hold
  np.testing.assert_allclose(
    jax.jit(lambda z: ghm.adjust_logits(z, many))(z)[0],
    [0, np.log(0.5 / 3e9), np.log(5 / 3e9)],
    atol=1e-5,
  )
  one_number = jax.jit(lambda z: ghm.adjust_sigmoid_logits(z[:, 0], 1, 5))(z)
  np.testing.assert_allclose(one_number, np.full(5, np.log(1 / 4)), rtol=1e-6)
  with pytest.raises(ValueError, match=r'class_counts of shape \(2,\)'):
    ghm.adjust_logits(z, np.ones(2))
  with pytest.raises(ValueError, match=r'examples of shape \(5,\)'):
    ghm.adjust_sigmoid_logits(z, np.ones(3), np.ones(5))
  with pytest.raises(ValueError, match='axis of classes'):
    ghm.adjust_logits(0.0, 1)
  with pytest.raises(TypeError, match='logits must be floating'):
    ghm.adjust_logits(z.astype(int), np.ones(3))
