"""Files from elsewhere are refused in one line, or shown as they are."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from optax_ghm import flow
from optax_ghm.flow import __main__ as command_line
from tests.flow.page_test import page_of
from tests.support.hand_made import taps, watched

PARAMS = {'w': jnp.ones((2, 3)), 'b': jnp.ones(3)}


def full_record(names=('one', 'two'), params=PARAMS):
  record = flow.Record(params, capacity=16)
  for i in range(12):
    record.add(
      i,
      taps=taps([1.0, 2.0], names, histogram=jnp.ones(64)),
      opt_state=watched({}, {}),
      loss=1.0 / (i + 1),
    )
  return record


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp('saved') / 'record'
  full_record().save(path)
  return path.read_bytes()


def rewritten(data, path, described=(), **arrays):
  """The file with other entries; None leaves one out."""
  with np.load(io.BytesIO(data)) as file:
    kept = {name: file[name] for name in file.files}
  about = {**json.loads(str(kept['about'])), **dict(described)}
  kept['about'] = np.array(json.dumps(about))
  kept = {k: v for k, v in {**kept, **arrays}.items() if v is not None}
  with open(path, 'wb') as file:
    np.savez(file, **kept)


def reason(path):
  """Why it is refused."""
  with pytest.raises(ValueError) as error:
    flow.Record.load(path)
  text = str(error.value)
  assert text.startswith(f'{path} is ') and text.isprintable()
  assert len(text) < len(str(path)) + 400
  return text


# Damaged.


def test_truncated_at_any_byte(saved, tmp_path):
  path = tmp_path / 'cut'
  for length in range(len(saved)):
    path.write_bytes(saved[:length])
    reason(path)


def test_no_byte_that_is_wrong_goes_unnoticed(saved, tmp_path):
  """Only bytes without a checksum, such as dates, can change unnoticed."""
  path, noticed = tmp_path / 'flipped', 0
  expected = full_record()
  for at in range(len(saved)):
    data = bytearray(saved)
    data[at] ^= 0xFF
    path.write_bytes(data)
    try:
      record = flow.Record.load(path)
    except ValueError:
      reason(path)
      noticed += 1
    else:
      assert record.layers == expected.layers
      np.testing.assert_array_equal(record.steps, expected.steps)
      np.testing.assert_array_equal(
        record.layer_stats['norm'], expected.layer_stats['norm']
      )
  assert noticed > 0.7 * len(saved)


# Of another version, or made by hand.

N = 12
ABOUT = {
  'capacity of text': {'capacity': 'many'},
  'capacity of a fraction': {'capacity': 16.5},
  'capacity below the least': {'capacity': 3},
  'one layer too many': {'layers': [['a', '', True, None]] * 3},
  'layers that are numbers': {'layers': [1, 2]},
  'layers named by numbers': {'layers': [[1, '', True, None]] * 2},
  'layers of a later version': {'layers': [['a', '', True, None, 5]] * 2},
  'leaves without a rank': {'leaves': [['a'], ['b']]},
  'one leaf too few': {'leaves': [['a', 1]]},
  'scalars that are not there': {'scalars': ['loss', 'accuracy']},
  'scalars named by numbers': {'scalars': [1]},
}
ARRAYS = {
  'steps of floats': {'steps': np.arange(12.0)},
  'steps without a sign': {'steps': np.arange(12, dtype=np.uint64)},
  'steps that fall': {'steps': np.arange(12)[::-1]},
  'steps twice': {'steps': np.arange(12) // 2},
  'steps in a square': {'steps': np.arange(144).reshape(12, 12)},
  'one step': {'steps': np.array(3)},
  'one step more': {'steps': np.arange(13)},
  'no steps': {'steps': None},
  'taps with a column more': {'tapped': np.ones((N, 2, 10), np.float32)},
  'taps without an axis': {'tapped': np.ones((N, 2), np.float32)},
  'taps of integers': {'tapped': np.ones((N, 2, 9), int)},
  'taps of complex numbers': {'tapped': np.ones((N, 2, 9), complex)},
  'taps of text': {'tapped': np.full((N, 2, 9), 'a')},
  'taps of objects': {'tapped': np.full((N, 2, 9), None)},
  'no taps': {'tapped': None},
  'histograms of another size': {'histogram': np.ones((N, 2, 65))},
  'updates of one leaf': {'watched': np.ones((N, 1, 10), np.float32)},
  'no marks of taps': {'has_tapped': None},
  'marks of taps as numbers': {'has_tapped': np.ones(N)},
  'too few marks of taps': {'has_tapped': np.ones(N - 1, bool)},
  'a scalar of one number': {'scalar_0': np.ones(())},
  'a scalar of text': {'scalar_0': np.full(N, '1')},
  'no scalar': {'scalar_0': None},
  'a description of bytes': {'about': np.array(b'{}')},
  'a description of a list': {'about': np.array('[]')},
  'two descriptions': {'about': np.array(['{}', '{}'])},
  'a description without end': {'about': np.array('[' * 100_000)},
}


@pytest.mark.parametrize('name', [*ABOUT, *ARRAYS])
def test_what_does_not_fit_is_refused(name, saved, tmp_path):
  rewritten(saved, tmp_path / 'r', ABOUT.get(name, ()), **ARRAYS.get(name, {}))
  assert 'is not a record of optax_ghm.flow: ' in reason(tmp_path / 'r')


@pytest.mark.parametrize(
  'version', ['optax_ghm.flow 2', None, 2, ['x'] * 999, 'a\n\x1b[2J' * 99]
)
def test_another_version_is_told(version, saved, tmp_path):
  rewritten(saved, tmp_path / 'r', {'format': version})
  assert 'this is' in reason(tmp_path / 'r')


def test_what_else_is_in_the_file_is_not_read(saved, tmp_path):
  """The name of an entry may even lead out of the folder."""
  path = tmp_path / 'inner' / 'r'
  path.parent.mkdir()
  rewritten(saved, path, {'of a later version': 1})
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr('../escaped.npy', b'not an array')
    archive.writestr('/escaped', b'x')
  assert len(flow.Record.load(path)) == N
  assert [p.name for p in tmp_path.rglob('*')] == ['inner', 'r']


class Hostile:
  """Unpickling this makes a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_no_pickle_is_run(saved, tmp_path):
  made, path = tmp_path / 'made', tmp_path / 'r'
  pickled = np.array([Hostile(made)] * N, object)
  with pytest.raises(FileExistsError):  # it would work
    made.mkdir()
    pickle.loads(pickle.dumps(Hostile(made)))
  made.rmdir()
  for name in ('steps', 'tapped', 'has_tapped', 'about', 'scalar_0', 'extra'):
    rewritten(saved, path, **{name: pickled})
    if name != 'extra':
      assert 'not a record' in reason(path)
    else:
      flow.Record.load(path)
  np.save(path.with_suffix('.npy'), pickled, allow_pickle=True)
  path.write_bytes(pickle.dumps(Hostile(made)))
  for each in (path, path.with_suffix('.npy')):
    assert 'not a record' in reason(each)
  assert not made.exists()


@pytest.mark.parametrize('count', [10**9, 10**13, 10**18, 10**30])
def test_a_huge_array_that_is_only_declared_is_refused(count, saved, tmp_path):
  header = io.BytesIO()
  described = {'descr': '<i8', 'fortran_order': False, 'shape': (count,)}
  np.lib.format.write_array_header_1_0(header, described)
  path = tmp_path / 'r'
  rewritten(saved, path, steps=None)
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr('steps.npy', header.getvalue() + bytes(100))
  reason(path)


@pytest.mark.parametrize('at', ['flag_bits', 'compress_type'])
def test_an_archive_that_cannot_be_read_is_refused(at, saved, tmp_path):
  """Encrypted, or compressed in a way of its own."""
  data = bytearray(saved)
  local, central = {'flag_bits': (6, 8), 'compress_type': (8, 10)}[at]
  for mark, offset in ((b'PK\3\4', local), (b'PK\1\2', central)):
    data[data.index(mark) + offset] = {'flag_bits': 1, 'compress_type': 97}[at]
  (tmp_path / 'r').write_bytes(data)
  reason(tmp_path / 'r')


# The command line.


def test_the_command_line_says_what_is_wrong_in_a_line(saved, tmp_path, capsys):
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'nothing').write_bytes(b'')
  (tmp_path / 'two\nlines\x1b[2J').write_bytes(saved[:-9])
  rewritten(saved, tmp_path / 'shapes', steps=np.arange(3))
  for name, told in {
    'folder': 'directory',
    'nothing': 'not a zip file',
    'two\nlines\x1b[2J': 'not a zip file',
    'shapes': 'has_tapped is bool[12]',
    'missing': 'No such file',
  }.items():
    path = tmp_path / name
    assert command_line.main(['report', str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == '' and err.endswith('\n') and err[:-1].isprintable()
    assert told in err and name.split('\n')[0] in err
    assert not path.with_suffix('.html').exists()


def test_a_record_is_not_written_over_by_its_page(saved, tmp_path, capsys):
  one, two = tmp_path / 'one.html', tmp_path / 'two.npz'
  for path in (one, two):
    path.write_bytes(saved)
  for arguments in ([one], [one, two], [two, '-o', two]):
    assert command_line.main(['report', *map(str, arguments)]) == 1
    assert 'is a record' in capsys.readouterr().err
  assert one.read_bytes() == two.read_bytes() == saved


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8'])
def test_names_that_no_terminal_can_show(encoding, tmp_path):
  full_record(['größe \ud800', 'x']).save(tmp_path / 'r.npz')
  done = subprocess.run(
    [sys.executable, '-m', 'optax_ghm.flow', 'report', str(tmp_path / 'r.npz')],
    check=False,
    capture_output=True,
    env={**os.environ, 'PYTHONIOENCODING': encoding, 'COLUMNS': '200'},
  )
  assert done.returncode == 0, done.stderr
  assert rb'\ud800' in done.stdout and done.stderr == b''


# What is shown of hostile names and numbers.

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
  '&lt;b&gt;&#60;',
  '{}%s%n{0.__class__}',
]


@pytest.fixture(scope='module', params=NAMES, ids=ascii)
def hostile(request, tmp_path_factory):
  """A name, and a record full of it, from a file."""
  name = request.param
  record = flow.Record({name: jnp.ones((2, 2)), 'w': jnp.ones((2, 2))})
  for i in range(12):
    record.add(
      i,
      taps=taps([None, 1.0], [name, 'x'], histogram=jnp.ones(64)),
      opt_state=watched({}, {'dead_units': 9}),
      **{f'batch_norm/constant/{name}': 1.0, name: np.nan},
    )
  path = tmp_path_factory.mktemp('hostile') / 'r'
  record.save(path)
  return name, flow.Record.load(path)


def test_the_terminal_gets_no_markup_and_no_escapes(hostile):
  name, record = hostile
  console = rich.console.Console(
    file=io.StringIO(), width=400, force_terminal=True, color_system=None
  )
  flow.print_report({name: record, f'{name} 2': flow.Record()}, console)
  text = console.file.getvalue()
  assert all(line.isprintable() for line in text.split('\n'))
  escaped = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
  # Titles, layer, parameter, batch norm, verdicts about each, and the other.
  assert text.count(escaped) >= 9
  assert len(flow.diagnose(record)) >= 3


def test_the_page_gets_no_elements_and_no_attributes(hostile, tmp_path):
  name, record = hostile
  shown = name.replace('\ud800', r'\ud800')
  page = page_of({name: record}, tmp_path, title=name)
  plain = page_of({'x': full_record()}, tmp_path)
  assert {tag for tag, _ in page.elements} <= {
    *(tag for tag, _ in plain.elements),
    'br',
    'div',
    'small',
    'b',
  }
  if name.isprintable() or '\ud800' in name:
    assert page.text('h2') == page.title() == shown
    assert shown[-40:] in page.drawn()


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@pytest.mark.parametrize('seed', range(8))
def test_any_numbers_have_verdicts_a_page_and_a_report(seed, saved, tmp_path):
  rng = np.random.default_rng(seed)
  odd = [0, -0.0, 1, -1, 1e-45, 1e38, -3e38, np.nan, np.inf, -np.inf]

  def draw(*shape):
    return rng.choice(np.array(odd, np.float32), shape)

  rewritten(
    saved,
    tmp_path / 'r',
    tapped=draw(N, 2, 9),
    watched=draw(N, 2, 10),
    histogram=draw(N, 2, 64),
    scalar_0=rng.choice([*odd, 1.7e308, -1.7e308], N),
    has_tapped=rng.integers(2, size=N).astype(bool),
    has_watched=rng.integers(2, size=N).astype(bool),
    has_histogram=rng.integers(2, size=N).astype(bool),
    steps=np.sort(rng.integers(-(2**62), 2**62, N)),
  )
  assert command_line.main(['report', str(tmp_path / 'r')]) == 0


def test_a_batch_norm_with_one_statistic_is_shown(tmp_path):
  record = flow.Record()
  for i in range(12):
    record.add(i, **{'batch_norm/mean_to_std/a': float(i)})
  assert np.isnan(record.batch_norm_stats['constant']).all()
  assert flow.diagnose(record) == []
  page_of(record, tmp_path)
  flow.print_report(record, rich.console.Console(file=io.StringIO()))


# Checkpoints, which Orbax reads.


REFUSED = """
import pathlib, sys
import jax.numpy as jnp, optax, orbax.checkpoint as ocp
import optax_ghm

path, params = pathlib.Path(sys.argv[1]), {'w': jnp.ones(3)}
window = optax_ghm.WindowPercentile(length=8)
written = optax_ghm.clip_by_percentile(estimator=window).init(params)
with ocp.StandardCheckpointer() as checkpointer:
  checkpointer.save(path, written)
  checkpointer.wait_until_finished()
  restored = checkpointer.restore(path, written)
  print(type(restored) is type(written))
  for other in (
    optax_ghm.clip_by_zscore(),
    optax_ghm.clip_by_percentile(estimator=window, scope='leaf'),
    optax_ghm.clip_by_percentile(),
    optax.chain(optax_ghm.clip_by_percentile(estimator=window)),
  ):
    try:
      checkpointer.restore(path, other.init(params))
      print('read')
    except (ValueError, KeyError):
      print('refused')
  largest = max(path.rglob('*'), key=lambda p: p.is_file() and p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-20])
  try:
    checkpointer.restore(path, written)
    print('read')
  except Exception:
    print('refused')
"""


def test_a_checkpoint_of_another_structure_or_truncated_is_refused(tmp_path):
  """It runs in a process of its own, because Orbax leaves work behind."""
  done = subprocess.run(
    [sys.executable, '-c', REFUSED, tmp_path / 'state'],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.split() == ['True'] + 5 * ['refused']
