"""Verdicts about trained networks: the ill by name, no word of the healthy."""

import re

import numpy as np
import pytest

from optax_ghm import flow
from tests.support import trainings

SEEDS = range(2)
pytestmark = pytest.mark.usefixtures('as_users_run_jax')


def kinds(record):
  return [verdict.kind for verdict in flow.diagnose(record)]


@pytest.mark.parametrize('name', trainings.HEALTHY)
def test_nothing_is_said_about_a_healthy_network(name):
  for seed in SEEDS:
    records = trainings.train(trainings.HEALTHY[name], seed)
    for record, steps in zip(records, trainings.STEPS, strict=True):
      assert len(record) == steps
      assert flow.diagnose(record) == [], (seed, steps)
    assert records[-1].layer_stats['calls'].all()


@pytest.mark.parametrize('name', trainings.HEALTHY_STARTS)
def test_nothing_is_said_at_any_step_of_a_healthy_start(name):
  for seed in range(5):
    case = trainings.HEALTHY_STARTS[name]
    (record,) = trainings.train(case, seed, steps=(50,))
    for step in (1, 2, 3, 4, 6, 9, 12, 20, 35, 50):
      assert flow.diagnose(record.until(step)) == [], (seed, step)


@pytest.mark.parametrize('name', trainings.ILL)
def test_what_is_wrong_is_said(name):
  case = trainings.ILL[name]
  for seed in SEEDS:
    first, *_, record = trainings.train(case, seed)
    assert tuple(kinds(first)) == case.kinds, seed  # and nothing else at first
    at_end = case.kinds if case.at_end is None else case.at_end
    assert set(at_end) <= set(kinds(record)), seed
    verdicts = [v for v in flow.diagnose(record) if v.kind in at_end]
    for verdict in verdicts:
      assert verdict.evidence and verdict.suggestion and verdict.source
      assert verdict.since == SINCE.get(name, 0), seed
    if name in SLOPES:
      assert_slope(first, *SLOPES[name])
    assert [v.layers for v in verdicts] == LAYERS.get(
      name, [v.layers for v in verdicts]
    )
    if name == 'dead units':  # ReLU lives at every fifth unit of the first
      at = [leaf.name for leaf in record.leaves].index('Dense_0/bias')
      assert record.leaf_stats['dead_units'][-1, at] == 51


SINCE = {
  'gain 0.7 later': trainings.CHANGE_AT,
  'dead units': 9,
  'one bad batch': trainings.SPIKE_AT,
}
SLOPES = {  # in decades per layer of ReLU: gain / sqrt(2)
  'gain 1.0': (-np.log10(0.5**0.5), 0.04),
  'gain 0.5': (-np.log10(0.125**0.5), 0.06),
  'gain 2.0': (np.log10(2**0.5), 0.04),
  'sigmoid': (0.63, 0.06),  # its slope is a quarter at most
}
LAYERS = {
  # In a layer without parameters, whose output has a finite gradient.
  'root of zero': [('distances', 'second')],
  'dead units': [('Dense_0',)],
  'one bad batch': [()],
  'wired wrongly': [('encoder',), ('unused',), ('frozen/kernel',)],
  # What is penalized has a gradient of its own.
  'wired wrongly, with a penalty': [
    ('encoder',),
    ('unused',),
    ('encoder/kernel', 'unused/kernel'),
  ],
}


def assert_slope(record, decades, tolerance):
  (verdict,) = flow.diagnose(record)
  (found,) = re.findall(r'by ([\d.]+) decades per layer', verdict.evidence)
  assert float(found) == pytest.approx(decades, abs=tolerance)
  assert 'Dense_0' in verdict.layers
