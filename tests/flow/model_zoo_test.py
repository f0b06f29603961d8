"""The verdicts about models that others train: none without an illness."""

import chex
import jax
import numpy as np
import pytest

from optax_ghm import flow
from tests.support import model_zoo_trainings as zoo

PROGRAMS = 110
pytestmark = pytest.mark.usefixtures('as_users_run_jax')
SEEDS = range(5)


@pytest.mark.parametrize('name', zoo.ZOO)
def test_taps_change_neither_loss_nor_gradients(name):
  start, step, plain = zoo.compiled(name)
  batch = zoo.ZOO[name].data(np.random.default_rng(0))
  carry, key = start(0, batch), jax.random.key(0)
  _, loss, grads, taps = step(carry, batch, key, np.float32(0))
  expected_loss, expected_grads = plain(carry, batch, key)
  np.testing.assert_array_equal(loss, expected_loss)
  chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=1e-6)
  assert len(taps) > 3


@pytest.mark.parametrize('name', zoo.ZOO)
def test_nothing_is_said_of_a_usual_training(name):
  for seed in SEEDS:
    record, losses = zoo.train(name, seed)
    for step in (0, 1, 4, 11, 49):
      assert flow.diagnose(record.until(step)) == [], (seed, step)
    assert np.isfinite(losses).all()
    assert record.layer_stats['calls'].all()


def in_path(part, function):
  return lambda path, u: function(u) if part in path else u


def from_step_30(function):
  return lambda i, batch: function(*batch) if i >= 30 else batch


FOUR_OF_FIVE_OFF = np.where(np.arange(32) % 5 == 0, 0, -9).astype(np.float32)
ILL = {
  'ImageNet ResNet': (
    'no gradient',
    {'change': in_path("'BatchNorm_0']['bias']", lambda u: u - 20)},
  ),
  'lm1b': ('small updates', {'rate': 1e-8}),
  'wmt': (  # a mean over no words
    'not finite',
    {'batch': from_step_30(lambda source, target: (source, 0 * target))},
  ),
  'nlp_seq, post-LN': ('vanishing', {'rate': 1.0}),
  'seq2seq': ('diverging', {'rate': 3.0}),
  'ogbg': (
    'dead units',
    {'change': in_path("'Dense_1']['bias']", lambda u: u + FOUR_OF_FIVE_OFF)},
  ),
  'vae': (  # the exponential of a log-variance overflows
    'not finite',
    {'change': in_path("'log_variance']['bias']", lambda u: u + 200)},
  ),
  'sst2': (  # attention over no words
    'not finite',
    {'batch': from_step_30(lambda words, labels: (0 * words, labels))},
  ),
  'ppo': (  # returns that are not scaled
    'spikes',
    {'batch': from_step_30(lambda *batch: (*batch[:4], 1000 * batch[4]))},
  ),
  'mnist, NNX': ('diverging', {'rate': 10.0}),
  'gemma, NNX': (  # hidden layers all of whose kernels are 0
    'no gradient',
    {'change': in_path('_proj', lambda u: 0 * u)},
  ),
}


@pytest.mark.parametrize('name', zoo.ZOO)
def test_an_illness_is_named(name):
  kind, changes = ILL[name]
  for seed in range(2):
    record, _ = zoo.train(name, seed, **changes)
    verdicts = {v.kind: v for v in flow.diagnose(record)}
    assert kind in verdicts, seed
    assert 0.5 <= verdicts[kind].severity <= 1
    if kind in ('not finite', 'diverging'):  # what follows stands behind it
      assert next(iter(verdicts)) == kind
