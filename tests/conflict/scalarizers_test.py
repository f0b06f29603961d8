"""Several losses made one, by formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from optax_ghm import conflict

LOSSES = hnp.arrays(np.float32, 3, elements=st.floats(0.125, 64, width=32))
NUMBERS = hnp.arrays(np.float32, 3, elements=st.floats(-4, 4, width=32))


@jax.jit
def every(losses, numbers):
  """Values and gradients."""
  weights = jnp.exp(numbers)
  return {
    name: jax.value_and_grad(f)(losses)
    for name, f in {
      'uncertainty': lambda x: conflict.uncertainty_weighted(x, numbers),
      'geometric': conflict.geometric_mean,
      'tchebycheff': lambda x: conflict.smooth_tchebycheff(
        x, weights, ideal=0.125, smoothing=0.5
      ),
      'famo': lambda x: conflict.famo_loss(x, numbers),
    }.items()
  }


@pytest.mark.device
@given(losses=LOSSES, numbers=NUMBERS)
def test_values_and_gradients_are_their_formulas(losses, numbers):
  found = every(losses, numbers)
  x, s = np.float64(losses), np.float64(numbers)
  z = np.exp(s) / np.exp(s).sum()
  mean = np.exp(np.log(x).mean())
  excess = np.exp(s) * (x - 0.125) / 0.5
  top = excess.max()
  total = np.exp(excess - top).sum()
  relative = z / x / np.sum(z / x)
  expected = {
    'uncertainty': ((np.exp(-s) * x + s).sum() / 2, np.exp(-s) / 2),
    'geometric': (mean, mean / x / 3),
    'tchebycheff': (
      0.5 * (top + np.log(total)),
      np.exp(s) * np.exp(excess - top) / total,
    ),
    'famo': (np.sum(z / np.sum(z / x) * np.log(x)), relative),
  }
  for name, (value, slope) in expected.items():
    np.testing.assert_allclose(found[name][0], value, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[name][1], slope, rtol=1e-4, atol=1e-5)


def test_losses_of_zero_have_no_gradient_and_no_nan():
  found = every(np.float32([0, 1, 2]), np.zeros(3, np.float32))
  for name, (value, slope) in found.items():
    assert np.isfinite(value) and np.isfinite(slope).all(), name


@pytest.mark.device
@given(numbers=NUMBERS, before=LOSSES, after=LOSSES)
def test_the_gradient_of_the_logits_is_the_pulled_back_fall(
  numbers, before, after
):
  @jax.jit
  def both(numbers, before, after):
    fell = jnp.log(before) - jnp.log(after)
    _, pull = jax.vjp(jax.nn.softmax, numbers)
    found = conflict.famo_logits_gradient(numbers, before, after)
    return found, pull(fell)[0]

  found, expected = both(numbers, before, after)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_moves_no_logit():
  one = np.ones(3, np.float32)
  found = jax.jit(conflict.famo_logits_gradient)(
    0 * one, one, np.float32([1, np.nan, 1])
  )
  np.testing.assert_array_equal(found, 0)


def test_famo_brings_losses_of_any_scale_down_at_one_rate():
  of_logits = optax.chain(optax.add_decayed_weights(1e-3), optax.adam(0.025))

  def losses_fn(w):
    return jnp.array([1.0, 1e4]) * jnp.square(w - 1) + 1e-3

  def step(carry, _):
    w, logits, state = carry

    def loss(w):
      losses = losses_fn(w)
      return conflict.famo_loss(losses, logits), losses

    grads, before = jax.grad(loss, has_aux=True)(w)
    w = w - 0.01 * grads
    grads = conflict.famo_logits_gradient(logits, before, losses_fn(w))
    updates, state = of_logits.update(grads, state, logits)
    return (w, optax.apply_updates(logits, updates), state), None

  @jax.jit
  def train(w):
    start = w, jnp.zeros(2), of_logits.init(jnp.zeros(2))
    (w, *_), _ = jax.lax.scan(step, start, length=300)
    return jnp.log(losses_fn(jnp.zeros(2)) / losses_fn(w))

  with jax.numpy_dtype_promotion('standard'):  # Optax needs it
    fell = train(np.zeros(2, np.float32))
  assert fell.min() > 1 and fell.max() < 2 * fell.min()
