"""Every view of any record: a file, verdicts, tables, a figure and a page."""

import io
import pathlib
import re
import tempfile

import numpy as np
import pytest
import rich.console
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from optax_ghm import flow
from optax_ghm.flow import _report
from tests.flow.page_test import page_of
from tests.flow.record_test import assert_same_records
from tests.support.hand_made import (
  KERNEL,
  ONES,
  add,
  kernel,
  record_of,
  tapped,
  watched,
)

PARAMS = {'one': {'bias': kernel(2), 'kernel': kernel()}}


def printed(records):
  """What is printed, of which every line is text."""
  console = rich.console.Console(
    file=io.StringIO(), width=400, force_terminal=True, color_system=None
  )
  flow.print_report(records, console)
  text = console.file.getvalue()
  assert all(line.isprintable() for line in text.split('\n'))
  return text


def check_file_and_verdicts(record):
  """Verdicts have figures, and are the same about the record from a file."""
  with tempfile.TemporaryDirectory() as folder:
    record.save(path := pathlib.Path(folder) / 'record.npz')
    loaded = flow.Record.load(path)
  assert_same_records(loaded, record)
  verdicts = flow.diagnose(record)
  assert flow.diagnose(loaded) == verdicts
  for verdict in verdicts:
    assert verdict.since in record.steps
    assert verdict.layers or verdict.kind == 'spikes'
  assert 'nothing' in printed(record) or verdicts


def check_markdown(record):
  """Every verdict is there, and every row has a cell for every column."""
  flow.write_markdown(file := io.StringIO(), record)
  text = file.getvalue()
  for verdict in flow.diagnose(record):
    assert f'- **{verdict.kind}** since step {verdict.since}, severity' in text
  tables = text.split('\n\n## ')[1:]
  for table, (caption, columns, rows) in zip(
    tables, _report.tables(record), strict=True
  ):
    heading, _, *lines = table.rstrip('\n').split('\n')
    assert heading.lower() == caption and len(lines) == 2 + len(rows)
    for line in lines:
      assert line.isprintable()
      assert len(re.split(r'(?<!\\)\|', line)) == len(columns) + 2


def check_pictures(record):
  """The figure has a place for everything, and no number of the page is bad."""
  figure = flow.figure(record)
  figure.savefig(io.BytesIO(), dpi=20)
  assert len(figure.axes) >= 4
  with tempfile.TemporaryDirectory() as folder:
    page = page_of(record, pathlib.Path(folder))
  for attrs in page.all('svg'):
    assert attrs['aria-label'] and attrs['viewbox']
  for _, attrs in page.elements:
    for name in ('d', 'x', 'y', 'x1', 'x2', 'y1', 'y2', 'cx', 'cy'):
      value = attrs.get(name, '')
      assert 'nan' not in value and 'inf' not in value
  has_taps = len(record.having('tapped')) > 0
  assert ('Gradient norm at the layers' in page.headings()) == has_taps


def of(*steps, params=PARAMS):
  return record_of(*steps, params=params)


NO_KERNELS = {
  **tapped(1.0, 2.0, kernels=[False] * 2, histogram=ONES),
  'opt_state': watched({}),
}
NOTHING_FINITE = {
  **tapped(np.nan, np.inf),
  'opt_state': watched({}, {'update_norm': np.nan}),
  'loss': np.nan,
}
RATIOS = [{'update_norm': 0.0, 'parameter_norm': i} for i in range(3)]
FOR_MATPLOTLIB = tapped(
  1.0, 2.0, names=['$\\frac{$', '_x\n<b>|`'], histogram=ONES
)
RECORDS = {
  'one step': of(tapped(1.0, 2.0)),
  'one layer': of(*[tapped(1.0)] * 3),
  'taps only': of(*[tapped(*[1.0] * 6)] * 3),
  'watch only': of(*[{'opt_state': watched({}, {})}] * 3),
  'a loss only': of({'loss': 1.0}, {'loss': 2.0}),
  'a loss at one step': of({'loss': 1.0}, {}, {}),
  'nothing at all': of({}),
  'huge losses': of({'loss': 1.7e308}, {'loss': -1.7e308}),
  'no finite loss': of({'loss': -np.inf}, {}),
  'no kernels': of(NO_KERNELS, NO_KERNELS, params={'bias': kernel(2)}),
  'no gradient': of(*[tapped(None, 0.0, histogram=0 * ONES)] * 2),
  'nothing finite': of(NOTHING_FINITE, NOTHING_FINITE),
  'tiny and huge': of(*[tapped(1e-38, 1e38) | {'loss': 3e38}] * 2),
  'ratios of 0 and inf': of(*[{'opt_state': watched({}, u)} for u in RATIOS]),
  'histograms at some steps': of(tapped(1.0), tapped(1.0, histogram=ONES)),
  'taps at some steps': of(
    {'loss': 1.0}, tapped(1.0, 2.0), {'opt_state': watched({}, {})}
  ),
  'many layers': of(*[tapped(*[1.0] * 60)] * 30),
  'names that matplotlib reads': of(
    *[FOR_MATPLOTLIB | {'opt_state': watched({}, {})}] * 2,
    params={'$\\bad{$': kernel(), '_hidden': kernel()},
  ),
  'one statistic of a batch norm': of(
    *[{'batch_norm/mean_to_std/a': float(i)} for i in range(12)]
  ),
}


@pytest.mark.parametrize('name', RECORDS)
def test_any_record_can_be_viewed(name):
  check_file_and_verdicts(RECORDS[name])
  for verdict in flow.diagnose(RECORDS[name]):
    assert 0.5 <= verdict.severity <= 1
  check_markdown(RECORDS[name])
  check_pictures(RECORDS[name])


# Any numbers.

SIZES = st.sampled_from(
  [0.0, 1e-45, 1e-38, 1e-20, 1e-3, 1.0, 1.5, 30.0, 1e20, 3e38]
  + [np.nan, np.inf]
)
VALUES = SIZES | SIZES.map(lambda u: -u) | st.floats()
ROWS = st.fixed_dictionaries(
  {
    'gradient_norm': SIZES,
    'update_norm': SIZES,
    'parameter_norm': SIZES,
    'non_finite': st.integers(0, 3),
    'zeros': st.integers(0, 100),
    'dead_units': st.integers(0, 10),
    'units': st.sampled_from([0, 10]),
    'signal_to_noise': SIZES,
    'cosine': SIZES,
  }
)


@st.composite
def steps(draw):
  """What is added at a step: any part of it, any numbers."""
  step = {}
  if draw(st.booleans()):
    norms = draw(st.lists(SIZES | st.none(), min_size=6, max_size=6))
    step = tapped(*norms, histogram=ONES if draw(st.booleans()) else None)
  if draw(st.booleans()):
    step['opt_state'] = watched(draw(ROWS), draw(ROWS))
  if draw(st.booleans()):
    numbers = draw(hnp.arrays(np.float32, 5, elements=SIZES))
    step['batch_norm'] = {'a': flow.BatchNormStats(numbers)}
  if draw(st.booleans()):
    step['loss'] = draw(VALUES)
  return step


@st.composite
def records(draw):
  """A few steps, some of them many times."""
  record, number = flow.Record(PARAMS, capacity=40), draw(st.integers(0, 2**62))
  for _ in range(draw(st.integers(1, 4))):
    step = draw(steps())
    for _ in range(draw(st.sampled_from([1, 12]))):
      add(record, number, **step)
      number += draw(st.sampled_from([1, 1, 1000]))
  return record


@given(record=records())
def test_bad_numbers_break_no_file_no_verdict_and_no_table(record):
  check_file_and_verdicts(record)


@settings(max_examples=max(settings.default.max_examples // 5, 5))
@given(record=records())
def test_bad_numbers_break_no_picture(record):
  check_pictures(record)


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@pytest.mark.parametrize('seed', range(2))
def test_numbers_that_no_training_has_break_nothing(seed):
  """Such as negative counts, in a file from elsewhere."""
  rng = np.random.default_rng(seed)
  odd = [0, -0.0, 1, -1, 1e-45, 1e38, -3e38, np.nan, np.inf, -np.inf]

  def drawn(*shape):
    return rng.choice(np.array(odd, np.float32), shape)

  record, names = flow.Record(PARAMS), ('a', 'b')
  for step in np.sort(rng.integers(-(2**62), 2**62, 12)).tolist():
    stats = {n: flow.TapStats(drawn(9), drawn(64)) for n in names}
    every = {
      'taps': flow.Taps(stats, tuple(map(flow.Layer, names))),
      'opt_state': flow.WatchState(drawn(2, 10), drawn(1), ()),
      'loss': rng.choice([*odd, 1.7e308, -1.7e308]),
    }
    some = {name: u for name, u in every.items() if rng.integers(3)}
    add(record, step, **some)
  check_file_and_verdicts(record)
  check_pictures(record)


# Any names.

NAMES = [
  '[red]',
  '[/]',
  '[/red] [link=https://example.org]x[/link]',
  'a[',
  'a\\',
  '\\[bold]',
  ':warning:',
  '\x1b[2J\x1b]0;title\x07',
  '\x9b31m',
  'one\r\ntwo\x00',
  '\u202etxt.exe',
  'half of a pair \ud800',
  '</title><script>alert(1)</script>',
  '"><img src=x onerror=alert(1)>',
  "' onload='alert(1)",
  '--></svg><script>',
  '<script>alert(1)</script>"\'&\t</svg>\n-->',
  '&lt;b&gt;&#60;',
  '{}%s%n{0.__class__}',
]


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
  """By every name a record with a layer, parameter and scalar of that name.

  And a record with all of them. All of them are from files.
  """

  def loaded(names, **step):
    step = {
      **tapped(*[None] * len(names), 1.0, names=[*names, 'x']),
      'opt_state': watched(*[{'dead_units': 9}] * len(names)),
      **{f'batch_norm/constant/{name}': 1.0 for name in names},
      **dict.fromkeys(names, np.nan),
      **step,
    }
    params = {name: kernel() for name in names}
    record = record_of(*[step] * 12, params=dict(sorted(params.items())))
    record.save(path := tmp_path_factory.mktemp('hostile') / 'r')
    return flow.Record.load(path)

  together = tapped(*[1.0] * len(NAMES), names=NAMES, histogram=ONES)
  return {
    **{name: loaded([name]) for name in NAMES},
    'all': loaded(NAMES, **together),
  }


def test_the_terminal_gets_no_markup_and_no_escapes(hostile):
  for name in NAMES:
    text = printed({name: hostile[name], f'{name} 2': flow.Record()})
    escaped = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    # Titles, layer, parameter, batch norm, verdicts on each, and the other.
    assert text.count(escaped) >= 9


def test_the_page_gets_no_elements_and_no_attributes(hostile, tmp_path):
  plain = record_of(
    {**tapped(1.0, 2.0, np.nan, histogram=ONES), 'loss': 1.0},
    {'opt_state': watched({}), 'loss': 2.0},
    {'opt_state': watched({}), 'loss': np.nan},
    params=KERNEL,
  )
  plain = page_of({'x': plain, 'y': record_of({})}, tmp_path)
  of_names = {name: record_of({name: np.nan}) for name in NAMES}
  title = ''.join(NAMES)
  page = page_of({**of_names, 'all': hostile['all']}, tmp_path, title=title)
  assert {tag for tag, _ in page.elements} <= {t for t, _ in plain.elements}
  shown = [name.replace('\ud800', r'\ud800') for name in NAMES]
  assert page.title().split() == page.text('h1').split()
  assert page.text('h2').split() == ''.join([*shown, 'all']).split()
  verdicts = page.text('section')
  for name, text in zip(NAMES, shown, strict=True):
    if name.isprintable() or '\ud800' in name:
      assert text in verdicts
      assert text[-40:] in page.drawn()
