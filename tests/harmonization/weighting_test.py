"""One weighting, and the losses that are its corners."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ghm
from optax_ghm import harmonization

pytestmark = pytest.mark.device

EXACT = harmonization.ExactDensity(width=0.1)


def weighting(exponent=0.0, robustness=0.0, focus=0.0, **kwargs):
  return optax_ghm.HarmonyWeighting(
    exponent=exponent, robustness=robustness, focus=focus, **kwargs
  )


def test_the_weights_are_the_formula(rng):
  g = rng.beta(0.5, 1.0, size=40).clip(1e-3, 0.999).astype(np.float32)
  cases = [(1, 0, 0), (0.25, 0.25, 0), (0.5, 0.7, 2), (0.3, 0.1, 0.5)]

  @jax.jit
  def found(g):
    regions, _ = EXACT.update(g, EXACT.init())
    return regions.density, [
      optax_ghm.harmony_weights(g, weighting=weighting(*case, density=EXACT))[0]
      for case in cases
    ]

  density, weights = jax.device_get(found(g))
  for (tau, q, gamma), w in zip(cases, weights, strict=True):
    expected = (len(g) / density) ** tau * (1.0 - g) ** q * g**gamma
    np.testing.assert_allclose(w, expected / expected.mean(), rtol=1e-4)


@pytest.mark.parametrize('q', [0.25, 0.7])
def test_robustness_alone_is_the_generalized_cross_entropy(rng, q):
  labels = rng.integers(0, 5, size=30)
  robust = weighting(robustness=q, normalize=False)

  @jax.jit
  def gradients(x):
    def of_class(x):
      return jnp.take_along_axis(jax.nn.softmax(x), labels[:, None], 1)

    def by_harmonize(x):
      x = optax_ghm.harmonize(
        x[:, 0], reduction='sum', weighting=dataclasses.replace(robust)
      )
      return optax.sigmoid_binary_cross_entropy(x, np.ones(30, 'f')).sum()

    return (
      jax.grad(lambda x: jnp.sum((1 - of_class(x) ** q) / q))(x),
      jax.grad(
        lambda x: optax_ghm.softmax_ghm_loss_with_integer_labels(
          x, labels, weighting=robust
        ).sum()
      )(x),
      jax.grad(lambda x: jnp.sum((1 - jax.nn.sigmoid(x[:, 0]) ** q) / q))(x),
      jax.grad(by_harmonize)(x),
    )

  expected, found, of_sigmoid, before_any_loss = gradients(
    rng.normal(size=(30, 5)).astype(np.float32)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(before_any_loss, of_sigmoid, rtol=1e-4, atol=1e-6)


def test_focus_alone_is_the_weight_of_the_focal_loss(rng):
  y = (rng.random(30) < 0.3).astype(np.float32)
  focal = weighting(focus=2.0, normalize=False)

  @jax.jit
  def losses(x):
    return (
      optax_ghm.sigmoid_ghm_loss(x, y, weighting=focal),
      optax.sigmoid_focal_loss(x, y, gamma=2.0),
      optax_ghm.sigmoid_ghm_loss(x, y, weighting=weighting()),
      optax.sigmoid_binary_cross_entropy(x, y),
    )

  found, expected, plain, cross_entropy = losses(
    rng.normal(size=30).astype(np.float32)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  np.testing.assert_allclose(plain, cross_entropy, rtol=1e-5)


def test_weights_average_to_one_also_at_the_ends_of_the_range(rng):
  batches = [
    rng.beta(0.1, 0.3, size=500),
    np.full(20, 1e-9),
    np.full(20, 1.0),
    np.full(20, 1e9),  # a range that does not fit
  ]

  @jax.jit
  def averages(batches):
    both = optax_ghm.HarmonyWeighting(), weighting(0.5, 0.7, 2.0)
    return [
      optax_ghm.harmony_weights(g, weighting=w)[0].mean()
      for w in both
      for g in batches
    ]

  found = averages([np.float32(g) for g in batches])
  np.testing.assert_allclose(found, 1, rtol=0.02)


def test_a_region_that_is_left_for_good_spoils_nothing():
  """Its past decays until N / GD would overflow."""
  density = optax_ghm.BinnedDensity(bins=4, momentum=0.5)
  published = dataclasses.replace(optax_ghm.GHM, density=density)

  @jax.jit
  def run(first, then):
    _, state = optax_ghm.harmony_weights(first, weighting=published)

    def step(state, _):
      weights, state = optax_ghm.harmony_weights(
        then, state, weighting=published
      )
      return state, weights

    return jax.lax.scan(step, state, length=300)[1]

  weights = run(np.float32([0.1, 0.9]), np.float32([0.1, 0.4]))
  assert np.isfinite(weights).all()
  np.testing.assert_allclose(weights[-1], 1, rtol=1e-5)
