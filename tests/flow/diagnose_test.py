"""All verdicts about a record."""

import pathlib
import re

import numpy as np
import pytest

from optax_ghm import flow
from tests.support.hand_made import (
  KERNEL,
  kernel,
  kinds,
  record_of,
  stats,
  tapped,
  watched,
  watching,
)

KINDS = (
  *(
    'diverging',
    'not finite',
    'disconnected',
    'no gradient',
    'vanishing',
    'exploding',
  ),
  *('dead units', 'small updates', 'large updates', 'spikes', 'conflict'),
)


@pytest.mark.parametrize(
  'record',
  [
    record_of(),
    record_of(params=KERNEL),
    record_of({}),
    record_of({'loss': 1.0}, {}, {'accuracy': 0.5}),
    record_of(*[tapped(1.0)] * 3),
    watching(*[{}] * 30),
    record_of(*[tapped(1.0, 1.2, 0.9, 1.0, 1.1, 1.0)] * 30),
    record_of(tapped(stats(0.0, elements=0, zeros=0), 1.0)),  # empty output
    watching({'dead_units': 0, 'units': 0}),
    watching(*[{'parameter_norm': 0.0}] * 20),  # there is no ratio to it
  ],
)
def test_nothing_is_said_of_what_shows_nothing(record):
  assert flow.diagnose(record) == []


@pytest.mark.parametrize(('offset', 'every'), [(0, 50), (5, 50), (3, 10)])
def test_steps_that_are_not_measured_hide_nothing(offset, every):
  """Of 600 steps with a loss alone, some hundred are kept."""
  rows = [{'gradient_norm': 1 + 0.01 * i} for i in range(600 // every)]
  rows[-2] = {'gradient_norm': 1e3}
  measured = [{'opt_state': watched(row), **tapped(None, 1.0)} for row in rows]
  steps = [
    {'loss': 1.0, **(measured[i // every] if i % every == offset else {})}
    for i in range(600)
  ]
  record = record_of(*steps, params=KERNEL, capacity=100)
  assert len(record) <= 100
  cut, *spikes = flow.diagnose(record)
  assert cut.kind == 'disconnected' and cut.layers == ('layer 0',)
  assert cut.since == offset
  if every == 10:
    (spike,) = spikes
    assert spike.kind == 'spikes' and spike.since == 583


def test_causes_come_before_their_consequences():
  params = {f'layer {i}': {'kernel': kernel()} for i in range(8)}
  row = {'update_norm': 1e-8, 'dead_units': 5}
  step = {
    **tapped(None, *(10.0 ** (np.arange(6) - 6)), 0.0),
    'opt_state': watched(*[row] * 8),
  }
  spike = {**step, 'opt_state': watched(*[{**row, 'gradient_norm': 1e3}] * 8)}
  found = kinds(record_of(*[step] * 12, spike, params=params))
  order = [KINDS.index(kind) for kind in found]
  assert order == sorted(order)
  assert set(found) >= {'disconnected', 'no gradient', 'dead units', 'spikes'}
  nan = {'loss': np.nan, **step}
  assert kinds(record_of(*[step] * 12, nan, params=params))[0] == 'not finite'


def test_every_kind_has_a_section_of_the_docs():
  kinds = re.findall("``'([a-z ]+)'``", flow.Verdict.__doc__)
  page = pathlib.Path(__file__).parents[2] / 'docs' / 'verdicts.md'
  sections = re.findall('^## (.*)$', page.read_text(), re.MULTILINE)
  assert sections == kinds and len(set(kinds)) == 14


def test_no_gradient_is_the_reason_for_small_updates():
  small = {'opt_state': watched({'update_norm': 1e-8})}
  for norm, expected in (
    (0.0, ['no gradient']),
    (None, ['disconnected', 'small updates']),
  ):
    step = {**tapped(norm, 1.0), **small}
    assert kinds(record_of(*[step] * 12, params=KERNEL)) == expected


def test_several_records_are_diagnosed_one_by_one():
  with pytest.raises(TypeError, match='record must be a Record, got {'):
    flow.diagnose({'one': record_of()})
