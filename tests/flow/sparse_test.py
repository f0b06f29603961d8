"""Measurements at some steps only, among many with a loss alone."""

import jax
import jax.numpy as jnp
import optax
import pytest

from optax_ghm import flow

EMPTY_TAPS = flow.Taps.empty(['before', 'after'])


@jax.jit
def cut_off(x):
  def loss(taps):
    y = jax.lax.stop_gradient(flow.tap(x, taps['before']))
    return jnp.sum(flow.tap(y, taps['after']))

  return jax.grad(loss)(EMPTY_TAPS)


def sparse(offset, every=25, steps=600, capacity=100):
  record = flow.Record(capacity=capacity)
  for i in range(steps):
    taps = cut_off(jnp.ones(3)) if i % every == offset else None
    record.add(i, taps=taps, loss=1.0)
  return record


@pytest.mark.parametrize('offset', [0, 5, 24])
def test_thinning_keeps_measurements_of_all_times(offset):
  record = sparse(offset)
  assert len(record) <= 100
  kept = record.having('tapped').steps
  assert kept.tolist() == list(range(offset, 600, 25))


@pytest.mark.parametrize('offset', [0, 5])
def test_verdicts_are_about_measured_steps(offset):
  (verdict,) = flow.diagnose(sparse(offset, every=50))
  assert verdict.kind == 'disconnected'
  assert verdict.layers == ('before',)
  assert verdict.since == offset


def test_spikes_are_found_among_measured_steps():
  tx = flow.watch(optax.sgd(0.0))
  params = {'w': jnp.ones(4)}
  state, record = tx.init(params), flow.Record(params)
  for i in range(300):
    opt_state = None
    if i % 10 == 3:
      scale = 1000.0 if i == 283 else 1 + 0.01 * i
      _, state = tx.update({'w': jnp.full(4, scale)}, state, params)
      opt_state = state
    record.add(i, opt_state=opt_state, loss=0.5)
  (verdict,) = flow.diagnose(record)
  assert verdict.kind == 'spikes' and verdict.since == 283
  assert 'at 1 of 30 recorded steps' in verdict.evidence
