"""MixVal: what is mixed, and the number of skada."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ghm import reversal

SKADA = np.load(
  pathlib.Path(__file__).parents[1] / 'golden' / 'model_selection.npz'
)
KEY = jax.random.key(0)


@jax.jit
def mixed_and_score(x, logits, matrix, share=0.55, mask=None):
  mixed = reversal.mix_examples(KEY, x, logits, mask, share=share)
  return mixed, reversal.mixval(mixed.x @ matrix, mixed)


def test_every_example_is_mixed_with_one_other_of_those_that_count():
  rng = np.random.default_rng(0)
  x, logits = rng.normal(size=(2, 50, 3)).astype(np.float32)
  mask = rng.uniform(size=50) < 0.8
  junk, matrix = np.where(mask[:, None], x, np.nan), np.eye(3, dtype=np.float32)
  mixed, score = mixed_and_score(junk, logits, matrix, mask=mask)
  x, logits = x[mask], logits[mask]
  other = (np.float64(mixed.x[mask]) - 0.55 * x) / 0.45
  distance = np.abs(other[:, None] - x[None]).max(-1)
  index = distance.argmin(1)
  assert distance.min(1).max() < 1e-5
  np.testing.assert_array_equal(np.sort(index), np.arange(len(x)))
  assert (index != np.arange(len(x))).all()
  label = logits.argmax(1)
  np.testing.assert_array_equal(mixed.label[mask], label)
  same = label == label[index]
  np.testing.assert_array_equal(mixed.same_class[mask], same)
  right = np.asarray(mixed.x[mask]).argmax(1) == label
  expected = (right[same].mean() + right[~same].mean()) / 2
  np.testing.assert_allclose(score, expected, rtol=1e-6)


def test_a_model_agrees_with_itself_about_examples_that_are_not_mixed():
  x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
  matrix = np.eye(3, dtype=np.float32)
  mixed, score = mixed_and_score(x, x, matrix, share=1.0)
  np.testing.assert_array_equal(mixed.x, x)
  assert score == 1
  _, broken = mixed_and_score(x, x, matrix * np.nan, share=1.0)
  assert broken == 0


@jax.jit
def of_skada(logits, mixed_logits, permutation):
  label = jnp.argmax(logits, 1)
  same = label == label[permutation]
  examples = reversal.MixedExamples(mixed_logits, label, same, same | ~same)
  return reversal.mixval(mixed_logits, examples)


def test_the_score_is_that_of_skada():
  args = (np.float32(SKADA[f'{name}_logits']) for name in ('target', 'mixed'))
  score = of_skada(*args, SKADA['permutation'].astype(np.int32))
  np.testing.assert_allclose(score, SKADA['mixval'], rtol=1e-5)


@pytest.mark.parametrize(
  ('x', 'share', 'error', 'match'),
  [
    (np.zeros((4, 2), np.uint8), 0.55, TypeError, 'x must be floating'),
    (np.zeros((3, 2), np.float32), 0.55, ValueError, 'same first axis'),
    (np.zeros((4, 2), np.float32), 0.3, ValueError, 'share'),
  ],
)
def test_what_does_not_fit_is_named(x, share, error, match):
  with pytest.raises(error, match=match):
    reversal.mix_examples(KEY, x, np.zeros((4, 2), np.float32), share=share)
