"""What is loaded is what was saved, and no other file is taken for a record."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from optax_ghm import flow
from optax_ghm.flow import _losses, _record_file, _tap, _watch
from tests.flow.record_test import (
  NAMES,
  PARAMS,
  assert_same_records,
  full_record,
)
from tests.support import hand_made
from tests.support.hand_made import MEASURED, NUMBERS, taps, watched


def of_three(step, **kwargs):
  return hand_made.record_of(*[step] * 3, **kwargs)


RECORDS = {
  'everything': full_record,
  'nothing': flow.Record,
  'leaves but no steps': lambda: flow.Record(PARAMS),
  'taps': lambda: of_three({'taps': taps([1.0, None], NAMES)}),
  'watched': lambda: of_three({'opt_state': watched({}, {})}, params=PARAMS),
  'losses': lambda: of_three({'losses': hand_made.losses(-0.5)}),
  'scalars': lambda: of_three({'loss': 0.1, 'accuracy': -1}),
  'a scalar at some steps': lambda: hand_made.record_of({}, {'a': 0.5}, {}),
}


@pytest.mark.parametrize('name', RECORDS)
def test_what_is_loaded_is_what_was_saved(name, tmp_path):
  record = RECORDS[name]()
  record.save(tmp_path / 'ä.record')
  loaded = flow.Record.load(tmp_path / 'ä.record')
  assert_same_records(loaded, record)
  assert flow.diagnose(loaded) == flow.diagnose(record)
  assert [p.name for p in tmp_path.iterdir()] == ['ä.record']
  with np.load(tmp_path / 'ä.record', allow_pickle=False) as file:
    assert all(file[name].dtype != object for name in file.files)


def test_steps_can_be_added_to_a_loaded_record(tmp_path):
  record = full_record(capacity=9)
  record.save(str(tmp_path / 'r.npz'))
  loaded = flow.Record.load(str(tmp_path / 'r.npz'))
  with pytest.raises(ValueError, match='comes after step 33'):
    loaded.add(33)
  with pytest.raises(ValueError, match='layers differ'):
    loaded.add(34, taps=taps([1.0]))
  with pytest.raises(ValueError, match='watches 1 leaves'):
    loaded.add(34, opt_state=watched({}))
  step = {
    'taps': taps([1.0, 2.0], NAMES, [True, False]),
    'opt_state': watched({}, {}),
  }
  for i in range(34, 60):
    record.add(i, **step, loss=float(i))
    loaded.add(i, **step, loss=float(i))
    assert_same_records(loaded, record)
  assert len(loaded) <= 9  # the capacity is kept too


def test_the_columns_on_disk_are_those_of_the_format():
  """What is renamed or moved needs another format."""
  assert _record_file.FORMAT == 'optax_ghm.flow 1'
  assert NUMBERS == _tap.COLUMNS
  assert MEASURED == _watch.COLUMNS
  assert _losses.COLUMNS == ('weight', 'norm', 'non_finite')


# Refused.


def reason(path):
  """Why it is refused, in one short line."""
  with pytest.raises(ValueError) as error:
    flow.Record.load(path)
  text = str(error.value)
  assert text.startswith(f'{path} is ') and text.isprintable()
  assert len(text) < len(str(path)) + 400
  return text


N = 12


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp('saved') / 'record'
  step = {
    'taps': taps([1.0, 2.0], ['one', 'two'], histogram=hand_made.ONES),
    'opt_state': watched({}, {}),
    'losses': hand_made.losses(-0.5),
    'loss': 1.0,
  }
  params = {'w': np.ones((2, 3), 'f'), 'b': np.ones(3, 'f')}
  hand_made.record_of(*[step] * N, params=params, capacity=16).save(path)
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


def npz(**arrays):
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


def npy(array):
  file = io.BytesIO()
  np.save(file, array, allow_pickle=True)
  return file.getvalue()


@pytest.mark.filterwarnings('ignore::ResourceWarning')
@pytest.mark.parametrize(
  'data',
  [
    b'',
    b'step,loss\n0,1.0\n',
    bytes(range(256)) * 8,
    pickle.dumps({'steps': [1]}),
    npy(np.array([{}], object)),
    npy(np.ones(3)),
    npz(weights=np.ones(3)),
    npz(about=np.array({}, object)),
    npz(about=np.array('{')),
    npz(about=np.array('[1]')),
    npz(about=np.array(json.dumps({'format': _record_file.FORMAT}))),
    b'PK\x03\x04' + b'x' * 99,
  ],
  ids=lambda data: ascii(data[:8]),
)
def test_a_file_that_is_no_record_raises_a_value_error(data, tmp_path):
  (tmp_path / 'file').write_bytes(data)
  assert 'is not a record of optax_ghm.flow: ' in reason(tmp_path / 'file')
  with pytest.raises(FileNotFoundError):
    flow.Record.load(tmp_path / 'missing')


def test_a_damaged_file_is_refused_or_gives_what_was_saved(saved, tmp_path):
  """Only bytes without a checksum, such as dates, can change unnoticed."""
  path, noticed, places = tmp_path / 'r', 0, range(0, len(saved), 13)
  path.write_bytes(saved)
  expected = flow.Record.load(path)
  for at in places:
    path.write_bytes(saved[:at])
    reason(path)
    data = bytearray(saved)
    data[at] ^= 0xFF
    path.write_bytes(data)
    try:
      record = flow.Record.load(path)
    except ValueError:
      reason(path)
      noticed += 1
    else:
      assert_same_records(record, expected)
  assert noticed > 0.7 * len(places)


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
  'one loss too many': {'losses': 3},
  'losses of text': {'losses': 'two'},
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
  'taps of objects': {'tapped': np.full((N, 2, 9), None)},
  'no taps': {'tapped': None},
  'histograms of another size': {'histogram': np.ones((N, 2, 65))},
  'updates of one leaf': {'watched': np.ones((N, 1, 10), np.float32)},
  'losses without cosines': {'losses': np.ones((N, 2, 3), np.float32)},
  'no losses': {'losses': None},
  'no marks of losses': {'has_losses': None},
  'no marks of taps': {'has_tapped': None},
  'marks of taps as numbers': {'has_tapped': np.ones(N)},
  'too few marks of taps': {'has_tapped': np.ones(N - 1, bool)},
  'a scalar of one number': {'scalar_0': np.ones(())},
  'a scalar of text': {'scalar_0': np.full(N, '1')},
  'no scalar': {'scalar_0': None},
  'a description of bytes': {'about': np.array(b'{}')},
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
  told = reason(tmp_path / 'r')
  assert "this is 'optax_ghm.flow 1'" in told
  assert f'is of the format {version!r}'[:90] in told


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
  """Unpickling this makes a folder."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_no_pickle_is_run(saved, tmp_path):
  made, path = tmp_path / 'made', tmp_path / 'r'
  pickled = np.array([Hostile(made)] * N, object)
  pickle.loads(pickle.dumps(Hostile(made)))  # it would work
  made.rmdir()
  for name in ('steps', 'tapped', 'has_tapped', 'about', 'scalar_0'):
    rewritten(saved, path, **{name: pickled})
    assert 'not a record' in reason(path)
  rewritten(saved, path, extra=pickled)
  assert len(flow.Record.load(path)) == N
  for data in (npy(pickled), pickle.dumps(Hostile(made))):
    path.write_bytes(data)
    assert 'not a record' in reason(path)
  assert not made.exists()


@pytest.mark.parametrize('count', [10**9, 10**18, 10**30])
def test_a_huge_array_that_is_only_declared_is_refused(count, saved, tmp_path):
  header = io.BytesIO()
  described = {'descr': '<i8', 'fortran_order': False, 'shape': (count,)}
  np.lib.format.write_array_header_1_0(header, described)
  rewritten(saved, tmp_path / 'r', steps=None)
  with zipfile.ZipFile(tmp_path / 'r', 'a') as archive:
    archive.writestr('steps.npy', header.getvalue() + bytes(100))
  reason(tmp_path / 'r')


@pytest.mark.parametrize(
  ('local', 'central', 'value'),
  [(6, 8, 1), (8, 10, 97)],
  ids=['encrypted', 'compressed in a way of its own'],
)
def test_an_archive_that_cannot_be_read_is_refused(
  local, central, value, saved, tmp_path
):
  data = bytearray(saved)
  for mark, offset in ((b'PK\3\4', local), (b'PK\1\2', central)):
    data[data.index(mark) + offset] = value
  (tmp_path / 'r').write_bytes(data)
  reason(tmp_path / 'r')
