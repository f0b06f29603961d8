"""The tables in the terminal."""

import io
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from optax_ghm import flow
from tests.support.hand_made import silent, stats, taps, watched

HOSTILE = '[red]x[/red] <b>"\'\\ [0]'


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
  record = flow.Record({'one': {'kernel': jnp.ones((2, 2))}})
  record.add(
    4,
    taps=taps(
      [stats(5.0, zeros=25, largest=3.0, non_finite=2), silent(), 1.0],
      ['one', 'two', ''],
    ),
    opt_state=watched(
      {
        'gradient_norm': 2.0,
        'update_norm': 0.5,
        'parameter_norm': 4.0,
        'dead_units': 7,
      }
    ),
  )
  return record


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


def test_it_is_the_last_step_that_is_shown():
  record = flow.Record()
  for i in range(3):
    record.add(i, taps=taps([10.0**i], ['one']))
  (row,) = rows(printed(record), 'one')
  assert row[1] == '1.00e+02'


def test_all_verdicts_are_printed_with_what_to_try_and_why():
  record = full_record()
  verdicts, text = flow.diagnose(record), ' '.join(printed(record).split())
  assert len(verdicts) >= 3
  for verdict in verdicts:
    assert f'{verdict.kind} since step 4: {verdict.evidence}' in text
    assert f'try: {verdict.suggestion} ({verdict.source})' in text
  assert 'nothing is wrong' not in text


def test_where_nothing_is_wrong_it_says_so():
  record = flow.Record()
  record.add(0, taps=taps([1.0]))
  assert 'nothing is wrong' in printed(record)


def test_several_records_go_by_their_names():
  healthy = flow.Record()
  healthy.add(0, taps=taps([1.0], ['a']))
  text = printed(
    {'good [1]': healthy, 'ill': full_record(), 'empty [2]': flow.Record()}
  )
  assert 'good [1]: gradients at the layers' in text
  assert 'good [1]: nothing is wrong' in text
  assert 'ill: parameters' in text
  assert 'ill: disconnected' in text
  assert 'empty [2]: nothing is recorded' in text


def test_only_what_was_recorded_has_a_table():
  taps_only, watch_only = flow.Record(), flow.Record({'w': jnp.ones(2)})
  taps_only.add(0, taps=taps([1.0]))
  watch_only.add(0, opt_state=watched({}))
  losses = flow.Record({'w': jnp.ones(2)})
  losses.add(0, loss=1.0)
  assert 'parameter' not in printed(taps_only)
  assert 'layer' not in printed(watch_only)
  assert '│' not in printed(losses) and 'nothing is wrong' in printed(losses)


def test_names_are_printed_as_they_are():
  record = flow.Record({HOSTILE: jnp.ones(2), ':smile:': jnp.ones(2)})
  record.add(
    0,
    taps=taps([None, 1.0], [HOSTILE, 'x']),
    opt_state=watched({}, {'dead_units': 9}),
  )
  text = printed({HOSTILE: record})
  assert text.count(HOSTILE) >= 5  # titles, layer, parameter, verdict
  assert rows(text, ':smile:') and rows(text, HOSTILE)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_is_printed(bad):
  record = flow.Record({'w': jnp.ones(2)})
  record.add(
    0,
    taps=taps([bad], ['one']),
    opt_state=watched({'gradient_norm': bad, 'parameter_norm': 0.0}),
  )
  text = printed(record)
  (one,) = rows(text, 'one')
  assert one[1] == str(bad) and one[-1] == '1'
  (w,) = rows(text, 'w')
  assert w[1] == str(bad) and w[4] == 'inf'


def test_a_last_step_without_taps_or_state_hides_nothing():
  """NaN in a table says that the gradient was so."""
  record = flow.Record({'w': jnp.ones(2)})
  record.add(0, taps=taps([3.0], ['one']), opt_state=watched({}))
  record.add(1, loss=0.5)
  text = printed(record)
  (one,) = rows(text, 'one')
  assert one[1] == '3.00e+00'
  assert rows(text, 'w')
  assert 'nan' not in text


def test_without_a_console_it_prints_to_the_terminal(capsys):
  flow.print_report(full_record())
  assert 'since step 4' in capsys.readouterr().out


def test_without_rich_it_raises(monkeypatch):
  monkeypatch.setitem(sys.modules, 'rich.console', None)
  with pytest.raises(ImportError):
    flow.print_report(full_record())
