"""Verdicts on updates, dead units and spikes."""

import numpy as np
import pytest

from tests.support.hand_made import (
  KERNEL,
  add,
  kernel,
  kinds,
  only,
  record_of,
  tapped,
  watched,
  watching,
)

KERNELS = {'a': kernel(), 'b': kernel(), 'c': kernel()}


@pytest.mark.parametrize(
  ('ratio', 'expected'),
  [
    (0.9e-5, ['small updates']),
    (1.1e-5, []),
    (1e-3, []),
    (0.09, []),
    (0.11, ['large updates']),
    (0.0, []),  # a learning rate of 0 is meant
  ],
)
def test_updates_are_small_or_large_beside_the_parameters(ratio, expected):
  row = {'update_norm': 2 * ratio, 'parameter_norm': 2.0}
  assert kinds(watching(*[row] * 10)) == expected
  assert kinds(watching(*[row] * 9)) == []  # too few steps
  for params, judged in (
    ({'w': kernel(1, 2, 3)}, True),
    ({'w': kernel(2)}, False),
    # Those of a stack and of attention have two axes.
    ({'layers': {'bias': kernel()}}, False),
    ({'scale': kernel()}, False),
  ):
    found = kinds(watching(*[row] * 10, params=params))
    assert found == (expected if judged else [])


def test_one_huge_update_is_told_at_once():
  huge, larger = {'update_norm': 11.0}, {'update_norm': 12.0}
  verdict = only(watching({}, huge, larger, {}), 'large updates')
  assert 'by 1.2e+01 of its norm (at step 2)' in verdict.evidence
  assert kinds(watching({}, {'update_norm': 9.0})) == []


@pytest.mark.parametrize(
  ('size', 'kind'), [(1e-7, 'small updates'), (0.5, 'large updates')]
)
def test_the_median_of_the_last_twenty_steps_decides(size, kind):
  bad, good = {'update_norm': size}, {}
  assert kinds(watching(*[bad] * 40, *[good] * 11)) == []
  verdict = only(watching(*[good] * 40, *[bad] * 11), kind)
  assert verdict.since == 40 and verdict.layers == ('w',)
  assert f'changes w by {size:.1e} of its norm' in verdict.evidence
  assert 'median of 20 recorded steps' in verdict.evidence
  assert kinds(watching(*[good] * 40, *[bad] * 9)) == []


@pytest.mark.parametrize(
  ('sizes', 'kind', 'told'),
  [
    ((1e-7, 1e-6, 1e-3), 'small updates', '1.0e-07'),
    ((0.2, 0.4, 1e-3), 'large updates', '4.0e-01'),
  ],
)
def test_the_most_extreme_ratio_is_told(sizes, kind, told):
  step = {'opt_state': watched(*[{'update_norm': u} for u in sizes])}
  verdict = only(record_of(*[step] * 10, params=KERNELS), kind)
  assert verdict.layers == ('a', 'b')
  extent = 'little' if kind == 'small updates' else 'much'
  assert f'changes a, b by as {extent} as {told}' in verdict.evidence


def test_half_of_the_units_dead_is_a_verdict():
  assert kinds(watching({'dead_units': 4})) == []
  verdict = only(watching({}, {'dead_units': 5}), 'dead units')
  assert verdict.layers == ('w',) and verdict.since == 1
  assert '5 of 10 by w' in verdict.evidence
  assert kinds(watching({'dead_units': 5}, {'dead_units': 4})) == []
  unwatched = {'opt_state': watched({'dead_units': 9})}, {'loss': 1.0}
  assert kinds(record_of(*unwatched, params=KERNEL)) == ['dead units']
  # Without any gradient, that is what is wrong.
  dead = {'dead_units': 10, 'gradient_norm': 0.0}
  assert 'dead units' not in kinds(watching(dead))


def test_dead_units_are_told_by_the_layer():
  params = {
    'one': {'bias': kernel(2), 'scale': kernel(2)},
    'two': {'bias': kernel(2)},
    'three': {'kernel': kernel()},
  }
  rows = [{'dead_units': n} for n in (6, 7, 9, 4)]  # one, one, three, two
  record = record_of({'opt_state': watched(*rows)}, params=params)
  verdict = only(record, 'dead units')
  assert verdict.layers == ('one', 'three')
  assert '9 of 10 by three/kernel' in verdict.evidence


def norms_of_gradient(*norms):
  return watching(*[{'gradient_norm': n} for n in norms])


CALM = [1.0, 1.1, 0.9, 1.0, 1.05] * 4


@pytest.mark.parametrize(
  ('norms', 'expected'),
  [
    ([*CALM, 11.0], ['spikes']),
    ([*CALM, 9.9], []),
    ([*[1.0] * 9, 100.0, 1.0], []),  # too few steps before it
    ([*[1.0] * 10, 100.0], ['spikes']),
    ([*[1.0, 3.0, 10.0, 30.0] * 6, 300.0], []),  # they always jump
    ([1.0, 30.0] * 12, []),  # as of two losses in turn
    ([*[1.0] * 12, np.inf, np.nan, 1.0], ['not finite']),
    ([*[0.0] * 12, 1.0], []),
  ],
)
def test_a_spike_is_many_times_the_usual_norm(norms, expected):
  assert kinds(norms_of_gradient(*norms)) == expected


def test_the_first_and_the_last_of_several_spikes_are_told():
  calm = [1.0] * 12
  record = norms_of_gradient(*calm, 50.0, *calm, 20.0, *calm)
  verdict = only(record, 'spikes')
  assert verdict.since == 12 and verdict.layers == ()
  assert 'at 2 of 38 recorded steps' in verdict.evidence
  assert 'up to 50 times, the last time at step 25' in verdict.evidence


def test_all_parameters_together_have_the_norm():
  params = {'a': kernel(), 'b': kernel()}

  def step(a, b):
    return {'opt_state': watched({'gradient_norm': a}, {'gradient_norm': b})}

  # b is five times its calm norm, and hardly shows in the norm of both.
  calm = [step(3.0, 0.4)] * 12
  assert kinds(record_of(*calm, step(3.0, 20.0), params=params)) == []
  record = record_of(*calm, step(40.0, 30.0), params=params)
  assert 'up to 17 times' in only(record, 'spikes').evidence  # 50 / 3.03


def test_with_taps_alone_the_last_layer_shows_spikes():
  calm = [tapped(1.0, 1.0)] * 12
  record = record_of(*calm, tapped(1.0, 70.0))
  assert 'at the last layer' in only(record, 'spikes').evidence
  assert kinds(record_of(*calm, tapped(70.0, 1.0))) == []


@pytest.mark.parametrize('power', [1, 2])
@pytest.mark.parametrize('every', [1, 100])
def test_a_warm_up_from_zero_is_not_small(power, every):
  rows = [{'update_norm': 1e-9 * t**power} for t in range(51)]
  for count in (12, 51):
    steps = [{'opt_state': watched(row)} for row in rows[:count]]
    record = record_of(params=KERNEL)
    for i, step in enumerate(steps):
      add(record, every * i, **step)
    assert kinds(record) == []
  # It ends where the updates are still small.
  last = watching(*rows, *[rows[-1]] * 500)
  assert kinds(last) == ['small updates']


def test_a_kernel_that_starts_at_zero_consists_of_updates():
  def growing(t, first):
    return watched({}, {'update_norm': 0.1, 'parameter_norm': first + 0.1 * t})

  params = {'a': kernel(), 'b': kernel()}
  for first, expected in ((0.0, []), (0.3, []), (0.4, ['large updates'])):
    steps = [{'opt_state': growing(t, first)} for t in range(12)]
    assert kinds(record_of(*steps, params=params)) == expected
  started = [{'opt_state': growing(t, 0.0)} for t in range(40)]
  large = {'opt_state': watched({}, {'update_norm': 1, 'parameter_norm': 4})}
  record = record_of(*started, *[large] * 10, params=params)
  assert only(record, 'large updates').layers == ('b',)


def test_a_parameter_that_the_optimizer_leaves_out_is_named():
  """One that gets zeros while others move; not so if it has no gradient."""
  still = {'update_norm': 0.0}

  def kinds_of(*rows, steps=10):
    step = {'opt_state': watched(*rows)}
    return kinds(record_of(*[step] * steps, params=KERNELS))

  assert kinds_of({}, still, {}) == ['conflict']
  assert kinds_of({}, still, {}, steps=9) == []
  assert kinds_of({}, {**still, 'gradient_norm': 0.0}, {}) == []
  assert kinds_of(still, still, still) == []
  # As with optax.MultiSteps, where nothing moves at most of the steps.
  moving, waiting = (
    {'opt_state': watched(row, row, row)} for row in ({}, still)
  )
  steps = [moving, waiting] * 20
  assert kinds(record_of(*steps, params=KERNELS)) == []


def test_weight_decay_alone_is_no_small_update():
  decayed = {'update_norm': 1e-7, 'gradient_norm': 0.0}
  assert kinds(watching(*[decayed] * 20)) == []
