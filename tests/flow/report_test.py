"""The tables in the terminal."""

import io
import sys

import numpy as np
import pytest
import rich.console

from optax_ghm import flow
from tests.support.hand_made import (
  KERNEL,
  kernel,
  record_of,
  silent,
  stats,
  tapped,
  watched,
)


def printed(records, **kwargs):
  console = rich.console.Console(
    file=io.StringIO(), width=200, color_system=None
  )
  flow.print_report(records, console, **kwargs)
  return console.file.getvalue()


def rows(text, name):
  """The cells of the rows that begin so."""
  cells = [
    [cell.strip() for cell in line.strip('│┃').split('│')]
    for line in text.splitlines()
    if '│' in line
  ]
  return [row for row in cells if row[0] == name]


def full_record():
  one = stats(5.0, zeros=25, largest=3.0, non_finite=2)
  layers = tapped(one, silent(), 1.0, names=['one', 'two', ''])
  row = {
    'gradient_norm': 2.0,
    'update_norm': 0.5,
    'parameter_norm': 4.0,
    'dead_units': 7,
  }
  step = {
    **layers,
    'opt_state': watched(row),
  }
  return record_of(step, params={'one': {'kernel': kernel()}}, start=4)


def test_layers_and_parameters_are_tables_of_their_figures():
  text = printed(full_record())
  (one,) = rows(text, 'one')
  assert one == ['one', '5.00e+00', '5.00e-01', '3.00e+00', '25%', '2']
  (two,) = rows(text, 'two')
  assert two == ['two', 'no gradient arrives', '', '', '', '']
  (whole,) = rows(text, '(the model)')
  assert whole[1] == '1.00e+00'
  (kernel,) = rows(text, 'one/kernel')
  assert kernel == [
    'one/kernel',
    '2.00e+00',
    '5.00e-01',
    '4.00e+00',
    '1.25e-01',
    '7 of 10',
  ]
  for head in ('layer', 'norm', 'rms', 'largest', 'zeros', 'not finite'):
    assert head in text
  for head in ('gradient', 'update', 'parameter', 'ratio', 'dead units'):
    assert head in text


def test_what_has_no_units_has_no_dead_ones():
  """The bias of its layer tells the same."""
  (row,) = rows(
    printed(record_of({'opt_state': watched({'units': 0})}, params=KERNEL)), 'w'
  )
  assert row[-1] == ''


def test_it_is_the_last_measured_step_that_is_shown():
  """NaN in a table would say that the gradient was so."""
  record = record_of(
    tapped(1.0, names=['one']),
    {**tapped(3.0, names=['one']), 'opt_state': watched({})},
    {'loss': 0.5},
    params=KERNEL,
  )
  text = printed(record)
  (row,) = rows(text, 'one')
  assert row[1] == '3.00e+00'
  assert rows(text, 'w')
  assert 'nan' not in text


def test_all_verdicts_are_printed_with_what_to_try_and_why():
  record = full_record()
  verdicts, text = flow.diagnose(record), ' '.join(printed(record).split())
  assert len(verdicts) >= 3
  for verdict in verdicts:
    assert f' since step 4: {verdict.evidence}' in text
    assert f'{verdict.kind} ({verdict.severity:.2f}) since' in text
    assert f'try: {verdict.suggestion} ({verdict.source})' in text
  assert 'nothing was found' not in text


def test_several_records_go_by_their_names():
  healthy = record_of(tapped(1.0, names=['a']))
  text = printed(
    {'good [1]': healthy, 'ill': full_record(), 'empty [2]': flow.Record()}
  )
  assert 'good [1]: gradients at the layers' in text
  assert 'good [1]: nothing was found in 1 recorded step' in text
  assert 'ill: parameters' in text
  assert 'ill: disconnected' in text
  assert 'empty [2]: nothing is recorded' in text


def test_only_what_was_recorded_has_a_table():
  assert 'parameter' not in printed(record_of(tapped(1.0)))
  watch_only = record_of({'opt_state': watched({})}, params=KERNEL)
  assert 'layer' not in printed(watch_only)
  losses = printed(record_of({'loss': 1.0}, params=KERNEL))
  assert losses.startswith('nothing was measured in 1 recorded step')
  assert printed(flow.Record()) == 'nothing is recorded\n'


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_is_printed(bad):
  row = {'gradient_norm': bad, 'parameter_norm': 0.0}
  step = {**tapped(bad, names=['one']), 'opt_state': watched(row)}
  text = printed(record_of(step, params=KERNEL))
  (one,) = rows(text, 'one')
  assert one[1] == str(bad) and one[-1] == '1'
  (w,) = rows(text, 'w')
  assert w[1] == str(bad) and w[4] == 'inf'


def test_batch_norms_are_a_table():
  numbers = np.array([123, 0.25, 0, 0, 0.5], 'f')
  step = {'batch_norm': {'a': {'stats': flow.BatchNormStats(numbers)}}}
  text = printed(record_of(step, {'loss': 1.0}))
  assert 'batch normalization' in text
  assert rows(text, 'a') == [['a', '1.2e+02', '0.25', '0', '0', '0.5']]


def test_without_a_console_it_prints_to_the_terminal(capsys):
  flow.print_report(full_record())
  assert 'since step 4' in capsys.readouterr().out


def test_without_rich_it_raises(monkeypatch):
  monkeypatch.setitem(sys.modules, 'rich.console', None)
  with pytest.raises(ImportError):
    flow.print_report(full_record())
