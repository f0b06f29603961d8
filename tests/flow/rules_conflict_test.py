"""Verdicts on several losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_ghm import conflict, flow
from tests.support.hand_made import kinds, losses, only, record_of

STEPS, SIZE = 30, 64


@functools.cache
def states_of(weights):
  """A program that trains on two losses, and gives the states of all steps."""
  tx = optax.chain(
    conflict.reconciled_aggregate(2, weights), flow.watch(optax.sgd(0.02))
  )

  def loss(w, target, pull, noise):
    return pull * jnp.sum(jnp.square(w - target)) + jnp.sum(noise * w)

  grads = jax.vmap(jax.grad(loss), in_axes=(None, 0, None, 0))

  @jax.jit
  def train(targets, pull, noises):
    def step(carry, noise):
      w, state = carry
      rows = grads(w, targets, pull, noise)
      updates, state = tx.update(rows, state, w)
      return (optax.apply_updates(w, updates), state), state

    w = jnp.zeros(SIZE)
    return jax.lax.scan(step, (w, tx.init(w)), noises)[1]

  return train


def trained(targets, pull, seed, weights=conflict.mean_weights, bad=()):
  noises = np.random.default_rng(seed).normal(size=(STEPS, 2, SIZE))
  noises[list(bad), 1] = np.nan
  states = jax.device_get(
    states_of(weights)(targets, np.float32(pull), np.float32(noises))
  )
  record = flow.Record(np.zeros(SIZE))
  for i in range(STEPS):
    record.add(i, opt_state=jax.tree.map(lambda u, i=i: u[i], states))
  return record


def targets(seed, *signs):
  target = np.random.default_rng(100 + seed).normal(size=SIZE)
  return np.float32([sign * target for sign in signs])


SEEDS = range(5)


def test_losses_that_are_planted_in_conflict_are_named():
  for seed in SEEDS:
    record = trained(targets(seed, 1, -1), 2.0, seed)
    verdict = only(record, 'losses in conflict')
    assert verdict.layers == ('loss 0', 'loss 1') and verdict.since == 0
    assert 'losses 0 and 1 point against each other in 100%' in verdict.evidence
    assert 'weights 0.5 and 0.5' in verdict.evidence
    assert verdict.suggestion.startswith('they are averaged: reconcile them')


def test_reconciled_losses_may_need_parameters_of_their_own():
  record = trained(targets(0, 1, -1), 2.0, 0, conflict.upgrad_weights)
  verdict = only(record, 'losses in conflict')
  assert verdict.suggestion.startswith('they are reconciled')
  assert 'weights 0.5 and 0.5' not in verdict.evidence


def test_nothing_is_said_of_losses_that_agree_or_do_not_care():
  for seed in SEEDS:
    assert flow.diagnose(trained(targets(seed, 1, 1), 2.0, seed)) == []
    assert flow.diagnose(trained(targets(seed, 1, -1), 0.0, seed)) == []


def recorded(*rows):
  return record_of(*[{'losses': row} for row in rows])


@pytest.mark.parametrize(
  ('cosine', 'expected'),
  [(-0.25, ['losses in conflict']), (-0.15, []), (0.5, []), (0.0, [])],
)
def test_a_mild_conflict_is_none(cosine, expected):
  assert kinds(recorded(*[losses(cosine)] * 10)) == expected
  assert kinds(recorded(*[losses(cosine)] * 9)) == []
  assert kinds(recorded(*[losses(cosine, [1.0], [1.0], [0])] * 10)) == []


def test_most_of_the_recent_steps_decide_and_since_when_is_said():
  good, bad = losses(0.3), losses(-0.6)
  assert kinds(recorded(*[bad] * 40, *[good] * 20)) == []
  assert kinds(recorded(*[bad, bad, good] * 10)) == []
  assert kinds(recorded(*[bad, bad, bad, good] * 10)) == ['losses in conflict']
  verdict = only(recorded(*[good] * 7, *[bad] * 15), 'losses in conflict')
  assert verdict.since == 7
  assert 'in 75% of the last 20 recorded steps' in verdict.evidence
  steps = [{'losses': bad}, {'loss': 1.0}] * 12
  assert kinds(record_of(*steps)) == ['losses in conflict']


def test_the_worst_pair_is_told_and_all_that_take_part():
  cosines = np.ones((4, 4))
  for i, j, cosine in ((0, 1, 0.4), (0, 2, -0.5), (2, 3, -0.8), (0, 3, -0.1)):
    cosines[i, j] = cosines[j, i] = cosine
  row = losses(cosines, [0.25] * 4, [1, 2, 30, 0.4], [0] * 4)
  verdict = only(recorded(*[row] * 12), 'losses in conflict')
  assert verdict.layers == ('loss 0', 'loss 2', 'loss 3')
  said = 'losses 2 and 3, the worst of 2 pairs, point against each other'
  assert said in verdict.evidence
  assert 'cosine is -0.80, their norms are 30 and 0.4' in verdict.evidence


def test_a_loss_that_was_left_out_is_told():
  counts = [0, 0, 1, 1, 3, 3]
  rows = [losses(0.5, non_finite=[4, n]) for n in counts]
  verdict = only(recorded(*rows), 'not finite')
  assert verdict.layers == ('loss 1',) and verdict.since == 2
  assert verdict.evidence == (
    'at 2 of the last 5 recorded steps, loss 1 had NaN or inf in the gradient,'
    ' and was left out'
  )
  assert kinds(recorded(*rows, *[rows[-1]] * 20)) == []
  verdict = only(trained(targets(0, 1, 1), 2.0, 0, bad=(12, 20)), 'not finite')
  assert verdict.layers == ('loss 1',) and verdict.since == 12
  assert verdict.evidence.startswith('at 2 of the last 20')
  assert kinds(recorded(*rows[-1:], *rows[:1])) == []  # begun anew
