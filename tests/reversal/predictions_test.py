"""Scores without labels: laws, bad numbers, and the numbers of skada."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from optax_ghm import reversal

N, C = 12, 3
# Made with skada 0.6.0: a logistic regression of three shifted Gaussians.
SKADA = np.load(
  pathlib.Path(__file__).parents[1] / 'golden' / 'model_selection.npz'
)
WORST = {'entropy': np.log(C), 'information': 0, 'mano': 1 / C, 'density': 0}


@jax.jit
def scores(logits, mask=None):
  sums = reversal.prediction_sums(logits, mask)
  return {
    'entropy': reversal.prediction_entropy(sums),
    'information': reversal.mutual_information(sums),
    'mano': reversal.mano(sums, threshold=5),
    'density': reversal.soft_neighborhood_density(logits, mask),
  }


def by_definition(logits):
  """The scores of finite logits in float64, example by example."""
  z = np.asarray(logits, np.float64)
  n, c = z.shape
  log_p = z - np.logaddexp.reduce(z, 1, keepdims=True)
  p = np.exp(log_p)
  entropy = -(p * log_p).sum(1).mean()
  mean = p.mean(0)
  q = p
  if -log_p.mean() <= 5:
    q = np.square(z + 1) / 2
    q -= q.min(1, keepdims=True)
    equal = q.sum(1) == 0
    q[equal] = 1
    q /= q.sum(1, keepdims=True)
  u = p / np.linalg.norm(p, axis=1, keepdims=True)
  density = []
  for i in range(n):
    similarity = np.delete(u @ u[i], i) / 0.05
    log_s = similarity - np.logaddexp.reduce(similarity)
    density.append(-(np.exp(log_s) * log_s).sum())
  return {
    'entropy': entropy,
    'information': -(mean * np.log(np.maximum(mean, 1e-300))).sum() - entropy,
    'mano': (q**4).mean() ** 0.25,
    'density': np.mean(density),
  }


def assert_scores(actual, expected, atol=2e-5):
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name], value, 2e-5, atol, err_msg=name)


finite = hnp.arrays(
  np.float32,
  (N, C),
  elements=st.floats(-40, 40, width=32),
)
subsets = hnp.arrays(bool, N).filter(lambda mask: mask.sum() >= 2)


@given(finite, subsets, st.sampled_from([np.float32, jnp.bfloat16, np.float16]))
def test_scores_are_those_of_the_definition_whatever_the_masked_ones(
  logits, mask, dtype
):
  logits = logits.astype(dtype)
  expected = by_definition(logits[mask])
  junk = np.array(logits)
  junk[~mask] = np.resize(np.array([np.nan, np.inf, 3e4], dtype), C)
  actual = scores(junk, mask)
  # Beside the threshold of MaNo, rounding decides.
  z = np.asarray(logits[mask], np.float64)
  surprise = (np.logaddexp.reduce(z, 1, keepdims=True) - z).mean()
  if abs(surprise - 5) < 1e-4:
    del expected['mano']
  assert_scores(actual, expected)


def test_sums_of_batches_add_up_to_those_of_all():
  logits = 3 * np.random.default_rng(0).normal(size=(N, C)).astype(np.float32)
  summed = jax.jit(reversal.prediction_sums)
  parts = [summed(part) for part in np.split(logits, 2)]
  whole = summed(logits)
  added = parts[0] + parts[1]
  for a, b in zip(added, whole, strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_broken_model_has_the_worst_score(bad):
  logits = np.zeros((N, C), np.float32)
  logits[:, 1] = bad
  assert_scores(scores(logits), WORST)


def test_a_model_of_one_mind_about_everything_deceives_all_but_one_score():
  logits = np.zeros((N, C), np.float32)
  logits[:, 1] = 30
  collapsed = {'entropy': 0, 'information': 0, 'density': np.log(N - 1)}
  assert_scores(scores(logits), collapsed)


@pytest.mark.parametrize('scale', [1, 8])  # on either side of the threshold
def test_mano_is_that_of_skada(scale):
  actual = scores(np.float32(scale * SKADA['target_logits']))['mano']
  np.testing.assert_allclose(actual, SKADA[f'mano_{scale}'], rtol=1e-5)


def test_entropy_density_and_mano_of_the_softmax_are_those_of_skada():
  logits = np.float32(SKADA['target_logits'])
  actual = scores(logits)
  np.testing.assert_allclose(actual['entropy'], SKADA['entropy'], rtol=1e-5)
  np.testing.assert_allclose(actual['density'], SKADA['snd'], rtol=1e-5)
  softmax = jax.jit(lambda z: reversal.mano(reversal.prediction_sums(z)))
  np.testing.assert_allclose(softmax(logits), SKADA['mano_softmax'], rtol=1e-5)


@pytest.mark.parametrize(
  ('args', 'error', 'match'),
  [
    ((np.zeros((4, 2), np.int32),), TypeError, 'logits must be floating'),
    ((np.zeros(4, np.float32),), ValueError, r'\(N, C\).*got \(4,\)'),
    ((np.zeros((4, 1), np.float32),), ValueError, 'two classes'),
    (
      (np.zeros((4, 2), np.float32), np.zeros(4, np.float32)),
      TypeError,
      'mask must be bool',
    ),
  ],
)
@pytest.mark.parametrize(
  'score',
  [reversal.prediction_sums, reversal.soft_neighborhood_density],
  ids=lambda f: f.__name__,
)
def test_what_does_not_fit_is_named(score, args, error, match):
  with pytest.raises(error, match=match):
    jax.eval_shape(functools.partial(score, *args))
