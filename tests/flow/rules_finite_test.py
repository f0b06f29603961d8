"""Verdicts on gradients that are not finite, or do not arrive."""

import numpy as np
import pytest

from optax_ghm import flow
from tests.support.hand_made import (
  kernel,
  kinds,
  only,
  record_of,
  stats,
  tapped,
  taps,
  verdict_of,
  watched,
  watching,
)


def test_where_it_was_made_is_between_the_last_finite_and_the_next():
  bad = tapped(np.nan, np.nan, np.inf, 1.0, 1.0, None)
  record = record_of(tapped(*[1.0] * 6), bad, start=5)
  verdict = only(record, 'not finite')
  assert verdict.layers == ('layer 3', 'layer 2')
  assert verdict.since == 6
  assert verdict.evidence == (
    'at 1 of 2 recorded steps, first at step 6: 1 of 100 numbers of the'
    ' gradient at the output of layer 2; at the output of layer 3, where the'
    ' backward pass came from, all were finite: it was made in the backward'
    ' pass between the two, by layer 3 or what stands before it'
  )
  record = record_of(tapped(np.nan, None, None, 1.0))  # not reached
  assert verdict_of(record, 'not finite').layers == ('layer 3', 'layer 0')


def test_at_the_last_layer_it_came_from_the_loss():
  verdict = only(record_of(tapped(np.nan, np.nan)), 'not finite')
  assert verdict.layers == ('layer 1',)
  assert 'it came from the loss' in verdict.evidence
  whole = record_of(tapped(1.0, np.nan, names=['a', '']))
  assert only(whole, 'not finite').layers == ('the model',)


def test_an_overflow_of_finite_numbers_is_seen_in_the_norm():
  record = record_of(tapped(stats(1.0, large_squares=np.inf), 1.0))
  assert only(record, 'not finite').layers == ('layer 1', 'layer 0')
  record = watching({'gradient_norm': np.inf})
  assert only(record, 'not finite').layers == ('w',)


def test_parameters_are_named_where_the_layers_show_nothing():
  params = {'a': kernel(), 'b': kernel()}
  bad = watched({}, {'gradient_norm': np.nan, 'non_finite': 3})
  alone = only(record_of({'opt_state': bad}, params=params), 'not finite')
  assert alone.layers == ('b',) and 'at the outputs' not in alone.evidence
  both = record_of({'opt_state': bad, **tapped(1.0)}, params=params)
  verdict = verdict_of(both, 'not finite')
  assert verdict.layers == ('b',)
  assert 'finite at the outputs of all layers' in verdict.evidence


@pytest.mark.parametrize(
  ('row', 'loss', 'said', 'try_'),
  [
    ({'update_norm': np.nan}, 1.0, 'the optimizer made it', 'eps'),
    ({'update_norm': np.inf}, np.nan, 'the optimizer made it', 'eps'),
    ({'parameter_norm': np.nan, 'update_norm': np.nan}, 1.0, 'loaded', 'anew'),
  ],
)
def test_what_the_optimizer_makes_of_finite_gradients(row, loss, said, try_):
  bad = {'loss': loss, **tapped(1.0), 'opt_state': watched({}, row)}
  # From the next step on, everything is NaN.
  next_ = {'gradient_norm': np.nan, 'parameter_norm': np.nan, 'non_finite': 1}
  after = {'loss': 1.0, **tapped(np.nan), 'opt_state': watched(next_, next_)}
  params = {'a': kernel(), 'b': kernel()}
  verdict = verdict_of(record_of(bad, after, params=params), 'not finite')
  assert verdict.layers == ('b',) and verdict.since == 0
  assert said in verdict.evidence and try_ in verdict.suggestion


def test_a_loss_of_nan_was_made_in_the_forward_pass():
  bad = {'loss': np.nan, **tapped(1.0, np.nan)}
  verdict = only(record_of(bad), 'not finite')
  assert 'in the forward pass, or it was in the batch' in verdict.evidence
  assert 'inputs and labels' in verdict.suggestion
  finite = only(record_of({**bad, 'loss': 1.0}), 'not finite')
  assert 'forward pass' not in finite.evidence


def test_a_loss_that_is_not_finite_is_named_alone():
  good = {'loss': 1.0, **tapped(1.0)}
  bad = {**good, 'loss': np.nan, 'accuracy': 1.0}
  verdict = only(record_of(good, good, good, bad, good), 'not finite')
  assert verdict.layers == ('loss',) and verdict.since == 3
  assert verdict.evidence == (
    'at 1 of 5 recorded steps, first at step 3: loss; the gradients are finite'
  )


def test_the_first_step_that_is_not_finite_is_told_for_ever():
  good, bad = tapped(1.0, 1.0), tapped(np.inf, 1.0)
  verdict = only(record_of(*[good] * 3, bad, *[good] * 40, bad), 'not finite')
  assert verdict.since == 3
  assert verdict.evidence.startswith('at 2 of 45 recorded steps')


ON, CUT, OFF = tapped(1.0, 1.0), tapped(None, 1.0), tapped(0.0, 1.0)
ALMOST = tapped(stats(1e-30, zeros=99), 1.0)


@pytest.mark.parametrize(
  ('steps', 'kind', 'since'),
  [
    ([*[CUT] * 5, ON], None, None),
    ([ON, *[CUT] * 19], None, None),
    ([ON, *[CUT] * 20], 'disconnected', 1),
    ([CUT, {}], 'disconnected', 0),
    ([OFF] * 4, None, None),  # a scale may start at 0
    ([OFF] * 5, 'no gradient', 0),
    ([ON, *[OFF] * 19], None, None),
    ([ON, *[OFF] * 20], 'no gradient', 1),
    ([*[OFF] * 20, ON], None, None),
    (
      [OFF, {'loss': 1.0}, *[OFF] * 4],
      'no gradient',
      0,
    ),  # nothing known between
    ([ALMOST] * 3, None, None),
  ],
)
def test_a_layer_is_off_at_all_of_the_last_steps(steps, kind, since):
  found = [
    (v.kind, v.layers, v.since) for v in flow.diagnose(record_of(*steps))
  ]
  assert found == ([(kind, ('layer 0',), since)] if kind else [])


@pytest.mark.parametrize(
  ('name', 'row', 'expected'),
  [
    ('kernel', {}, ['no gradient']),
    ('kernel', {'parameter_norm': 0}, []),
    ('scale', {'parameter_norm': 0}, []),
    ('bias', {'parameter_norm': 0}, ['no gradient']),  # they do start at 0
    ('scale', {'parameter_norm': 0, 'gradient_norm': 0}, ['no gradient']),
  ],
)
def test_a_parameter_that_starts_at_zero_explains_a_gradient_of_zero(
  name, row, expected
):
  step = {'opt_state': watched(row), **OFF}
  params = {'layer 1': {name: kernel()}}
  assert kinds(record_of(step, params=params)) == expected
  # After 5 steps it would have moved.
  assert kinds(record_of(*[step] * 5, params=params)) == ['no gradient']


def test_neighbors_without_gradient_are_one_verdict():
  verdicts = flow.diagnose(record_of(tapped(None, None, 1.0, None, 1.0)))
  assert [(v.kind, v.layers) for v in verdicts] == [
    ('disconnected', ('layer 0', 'layer 1')),
    ('disconnected', ('layer 3',)),
  ]
  assert only(record_of(*[OFF] * 5), 'no gradient').evidence == (
    'the gradient at the output of layer 0 is exactly 0; at layer 1, after'
    ' it, there is one'
  )


def test_many_names_are_told_shortly():
  verdict = only(record_of(tapped(*[None] * 5, 1.0)), 'disconnected')
  assert len(verdict.layers) == 5
  assert 'layer 0, layer 1, … layer 4 (5 in all)' in verdict.evidence
  verdict = only(record_of(tapped(*[None] * 4, 1.0)), 'disconnected')
  assert 'of layer 0, layer 1, layer 2, layer 3' in verdict.evidence


LAYERS = {
  'one': {'kernel': kernel(), 'bias': kernel(2)},
  'two': {'kernel': kernel()},
}  # rows: one/bias, one/kernel, two/kernel


def step_of(one, two, *gradients):
  return {
    'taps': taps([one, two], ['one', 'two']),
    'opt_state': watched(*[{'gradient_norm': g} for g in gradients]),
  }


FROZEN = step_of(1.0, 1.0, 1.0, 0.0, 1.0)
APART = [{name: value} for name, value in FROZEN.items()]


@pytest.mark.parametrize('outside', [LAYERS, {'params': LAYERS}])
def test_a_parameter_that_gets_nothing_of_what_arrives_is_a_conflict(outside):
  verdict = only(record_of({}, *[FROZEN] * 3, params=outside), 'conflict')
  (name,) = verdict.layers
  assert name.endswith('one/kernel') and verdict.since == 1
  assert 'arrives at the layer of' in verdict.evidence


def test_a_parameter_that_gets_what_does_not_arrive_is_a_conflict():
  step = step_of(1.0, None, 1.0, 1.0, 0.5)
  verdicts = flow.diagnose(record_of(*[step] * 3, params=LAYERS))
  assert [v.kind for v in verdicts] == ['disconnected', 'conflict']
  assert verdicts[1].layers == ('two/kernel',)
  assert 'although none arrives' in verdicts[1].evidence


@pytest.mark.parametrize(
  ('steps', 'expected'),
  [
    ([FROZEN, step_of(1.0, 1.0, 1, 1, 1)], []),  # once it had one
    ([step_of(1.0, None, 1, 1, 0)] * 3, ['disconnected']),
    ([step_of(0.0, 1.0, 0, 0, 0)], ['no gradient']),
    ([step_of(1.0, np.nan, 0, 0, 0)], ['not finite']),
    ([step_of(0.0, np.nan, 0, 0, 0)] * 20, ['not finite']),  # off in a ReLU
    # It needs taps and a watched optimizer at one step.
    (APART * 2, []),
    ([*APART, FROZEN], ['conflict']),
    # The parameters of a stack are one array, with the gradients of others.
    (
      [
        {
          'taps': taps([None, 1.0], ['one[0]', 'one[1]']),
          'opt_state': watched({}, {}, {}),
        }
      ],
      ['disconnected'],
    ),
  ],
)
def test_a_conflict_is_not_told_where_it_is_explained(steps, expected):
  assert kinds(record_of(*steps, params=LAYERS)) == expected
