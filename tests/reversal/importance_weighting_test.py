"""Risks on the target from source examples: laws, and the numbers of skada."""

import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.linear_model import LogisticRegression

from optax_ghm import reversal

N = 12
SKADA = np.load(
  pathlib.Path(__file__).parents[1] / 'golden' / 'model_selection.npz'
)
ratios_of = jax.jit(reversal.density_ratios)


@jax.jit
def risks(losses, ratios):
  return (
    reversal.importance_weighted_risk(losses, ratios),
    reversal.deep_embedded_validation(losses, ratios),
  )


def by_definition(losses, ratios):
  losses, r = np.asarray(losses, np.float64), np.asarray(ratios, np.float64)
  r = np.where(r > 0, r, 0)
  losses = np.where(r > 0, losses, 0)
  weighted = r * losses
  if not (r > 0).any() or not np.isfinite(weighted).all():
    return np.inf, np.inf
  covariance = np.cov(weighted, r)
  eta = -covariance[0, 1] / covariance[1, 1] if r.std() > 1e-6 * r.mean() else 0
  return (
    weighted.sum() / r.sum(),
    weighted.mean() + eta * (r.mean() - 1),
  )


numbers = st.sampled_from([0.0, 0.5, 1.0, 3.0, 40.0])


@given(
  hnp.arrays(
    np.float32, N, elements=numbers | st.sampled_from([np.nan, np.inf])
  ),
  hnp.arrays(np.float32, N, elements=numbers | st.sampled_from([np.nan, -1.0])),
)
def test_risks_are_those_of_the_definition(losses, ratios):
  expected = by_definition(losses, ratios)
  np.testing.assert_allclose(risks(losses, ratios), expected, 1e-4, 1e-4)


def test_a_constant_loss_is_its_own_risk_whatever_the_ratios():
  """The control variate takes all of the noise out."""
  ratios = np.random.default_rng(0).exponential(size=N).astype(np.float32)
  losses = np.full(N, 0.7, np.float32)
  np.testing.assert_allclose(risks(losses, ratios), 0.7, rtol=1e-5)
  heavy = ratios**20 * np.float32(1e10)
  np.testing.assert_allclose(risks(losses, heavy), 0.7, rtol=1e-5)


def test_ratios_are_those_of_a_logistic_regression_of_scikit_learn():
  rng = np.random.default_rng(0)
  source, target = (
    rng.normal(shift, 1, (size, 5)).astype(np.float32)
    for shift, size in ((0, 80), (0.6, 50))
  )
  source[3, 2] = target[0, 0] = np.nan  # are left out
  x = np.concatenate([source, target])
  known = np.isfinite(x).all(1)
  model = LogisticRegression(C=1 / 2.0, tol=1e-12, max_iter=10_000)
  model.fit(x[known].astype(np.float64), (np.arange(130) >= 80)[known])
  features = rng.normal(size=(20, 5)).astype(np.float32)
  z = model.decision_function(features.astype(np.float64))
  features[7, 1] = np.inf
  expected = 79 / 49 * np.exp(z) * (np.arange(20) != 7)
  far = np.float32([1024, 0, 0, 0, 0])  # the bias makes up for it
  for offset in (0 * far, far):
    x = (source + offset, target + offset, features + offset)
    actual = ratios_of(*x, penalty=2.0)
    rtol = 1e-5 if offset[0] == 0 else 1e-3  # digits of the features are lost
    np.testing.assert_allclose(actual, expected, rtol)


def test_deep_embedded_validation_is_that_of_skada():
  @jax.jit
  def validation(train, target, features, logits, labels):
    log_p = jax.nn.log_softmax(logits)
    losses = -(log_p * jax.nn.one_hot(labels, 3)).sum(1)
    ratios = reversal.density_ratios(train, target, features)
    return reversal.deep_embedded_validation(losses, ratios)

  names = 'train_features target_features val_features val_logits'.split()
  given = [np.float32(SKADA[name]) for name in names]
  actual = validation(*given, SKADA['val_labels'].astype(np.int32))
  np.testing.assert_allclose(actual, SKADA['dev'], rtol=1e-5)


def test_the_weighted_risk_is_that_of_skada():
  wrong = SKADA['source_logits'].argmax(1) != SKADA['source_labels']
  risk, _ = risks(np.float32(wrong), np.float32(SKADA['iw_ratios']))
  np.testing.assert_allclose(1 - risk, SKADA['iw_accuracy'], rtol=1e-5)


FOUR = np.zeros(4, np.float32)
GRID = np.zeros((4, 2), np.float32)


@pytest.mark.parametrize(
  ('f', 'args', 'error', 'match'),
  [
    (
      reversal.density_ratios,
      (GRID, GRID, FOUR),
      ValueError,
      r"'features': \(4,",
    ),
    (reversal.density_ratios, (GRID, GRID[:, :1], GRID), ValueError, 'target'),
    (
      reversal.importance_weighted_risk,
      (FOUR, GRID),
      ValueError,
      r'\(N,\) both',
    ),
    (
      reversal.deep_embedded_validation,
      (FOUR, FOUR == 0),
      TypeError,
      'ratios',
    ),
  ],
)
def test_what_does_not_fit_is_named(f, args, error, match):
  with pytest.raises(error, match=match):
    jax.eval_shape(f, *args)
