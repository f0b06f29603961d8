"""What the writers hand on, and to whom."""

import json
import pathlib
import subprocess
import sys
import tempfile
import types

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from optax_ghm import flow
from tests.support.hand_made import KERNEL, add, kernel, stats, tapped, watched


def record_with(writer):
  record = flow.Record(KERNEL, writers=[writer])
  for i, loss in enumerate([0.5, np.nan, np.inf, -np.inf]):
    step = tapped(stats(3.0, non_finite=i), names=['größe[0] "x"\n'])
    state = watched({'parameter_norm': float(i), 'update_norm': 1.0})
    add(record, 10 * i, **step, opt_state=state, loss=loss)
  assert len(record) == 4  # all have arrived
  return record


def expected(i, loss):
  return {
    'loss': loss,
    'flow/norm/größe[0] "x"\n': 3.0,
    'flow/non_finite/größe[0] "x"\n': float(i),
    'parameters/gradient_norm/w': 1.0,
    'parameters/update_ratio/w': 1.0 / i if i else np.inf,
    'parameters/non_finite/w': 0.0,
  }


def assert_logged(logged):
  """Pairs of a step and its numbers."""
  assert [step for step, _ in logged] == [0, 10, 20, 30]
  for i, (_, numbers) in enumerate(logged):
    wanted = expected(i, [0.5, np.nan, np.inf, -np.inf][i])
    assert list(numbers) == list(wanted)
    np.testing.assert_allclose(
      list(numbers.values()), list(wanted.values()), rtol=1e-6
    )


def test_writers_get_every_step_in_order_before_it_is_dropped():
  written, other = [], []
  record = flow.Record(
    {'dense': {'kernel': kernel()}},
    capacity=4,
    writers=[
      lambda step, numbers: written.append((step, numbers)),
      lambda step, numbers: other.append(step),
    ],
  )
  for i in range(20):
    step = tapped(i + 1.0, stats(2.0, non_finite=3), names=['dense', ''])
    row = {'gradient_norm': i, 'update_norm': 4, 'parameter_norm': 8}
    add(record, 2 * i, **step, opt_state=watched(row), loss=i)
  add(record, 100)
  assert len(record) <= 4
  assert written.pop() == (100, {})
  assert [step for step, _ in written] == other[:-1] == list(range(0, 40, 2))
  for i, (_, numbers) in enumerate(written):
    assert numbers == {
      'loss': i,
      'flow/norm/dense': i + 1.0,
      'flow/non_finite/dense': 0,
      'flow/norm/output': 2,
      'flow/non_finite/output': 3,
      'parameters/gradient_norm/dense/kernel': i,
      'parameters/update_ratio/dense/kernel': 0.5,
      'parameters/non_finite/dense/kernel': 0,
    }
    assert all(type(x) is float for x in numbers.values())


SIZES = [0.0, 1e-45, 1.5, 3e38, np.nan, np.inf, -np.inf]


@given(
  values=st.lists(
    st.dictionaries(
      st.text(min_size=1, max_size=5),
      st.sampled_from(SIZES) | st.floats(),
      max_size=3,
    ),
    max_size=4,
  )
)
@example(values=[{'a': -np.inf, 'b': np.inf, 'c': np.nan}])
def test_json_lines_are_strict_json_of_every_step(values):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'lines'
    path.write_text('{"step": -1}\n')  # which stays
    record = flow.Record(writers=[flow.json_lines_writer(path)])
    for i, each in enumerate(values):
      add(record, i, **{f'_{name}': x for name, x in each.items()})
    assert len(record) == len(values)
    first, *lines, end = path.read_text(encoding='utf-8').split('\n')
  assert first == '{"step": -1}' and end == '' and len(lines) == len(values)
  for i, (line, each) in enumerate(zip(lines, values, strict=True)):
    found = json.loads(line, parse_constant=pytest.fail)
    assert found.pop('step') == i
    for name, x in each.items():
      said = found.pop(f'_{name}')
      assert isinstance(said, float if np.isfinite(x) else str)
      np.testing.assert_equal(float(said), x)
    assert not found


def test_json_lines_have_the_numbers_of_every_step(tmp_path):
  record_with(flow.json_lines_writer(str(tmp_path / 'flow.jsonl')))
  text = (tmp_path / 'flow.jsonl').read_text(encoding='utf-8')
  lines = [json.loads(line) for line in text.split('\n')[:-1]]
  logged = [(line.pop('step'), line) for line in lines]
  assert_logged([(i, {k: float(x) for k, x in u.items()}) for i, u in logged])


def test_tensorboard_gets_every_scalar_with_its_step(tmp_path, monkeypatch):
  module, scalars, dirs = types.ModuleType('tensorboard.summary'), {}, []
  unflushed = []

  class Writer:
    flush = unflushed.clear

    def __init__(self, logdir):
      dirs.append(logdir)

    def add_scalar(self, tag, data, step=None):
      scalars.setdefault(step, {})[tag] = data
      unflushed.append(tag)

  module.Writer = Writer
  parent = types.ModuleType('tensorboard')
  monkeypatch.setitem(sys.modules, 'tensorboard', parent)
  monkeypatch.setitem(sys.modules, 'tensorboard.summary', module)
  record_with(flow.tensorboard_writer(tmp_path))
  assert_logged(list(scalars.items()))
  assert dirs == [str(tmp_path)] and not unflushed


def test_the_real_tensorboard_reads_what_was_written(tmp_path):
  pytest.importorskip('tensorboard')
  from tensorboard.backend.event_processing import event_accumulator

  record_with(flow.tensorboard_writer(tmp_path))
  events = event_accumulator.EventAccumulator(str(tmp_path))
  events.Reload()
  name = 'parameters/gradient_norm/w'
  assert [event.step for event in events.Scalars(name)] == [0, 10, 20, 30]


class FakeRun:
  def __init__(self):
    self.logged = []

  def log(self, numbers, step=None):
    self.logged.append((step, dict(numbers)))


def test_wandb_gets_the_numbers_of_every_step(monkeypatch):
  record_with(flow.wandb_writer(run := FakeRun()))
  assert_logged(run.logged)
  fake = types.ModuleType('wandb')
  fake.run = FakeRun()  # the active one
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  record_with(flow.wandb_writer())
  assert_logged(fake.run.logged)
  fake.run = None
  with pytest.raises(ValueError, match='wandb.init'):
    flow.wandb_writer()


@pytest.mark.parametrize('run_id', [None, 'abc'])
def test_mlflow_gets_names_without_brackets(monkeypatch, run_id):
  logged = []
  fake = types.ModuleType('mlflow')
  fake.log_metrics = lambda metrics, step, run_id: logged.append(
    (dict(metrics), step, run_id)
  )
  monkeypatch.setitem(sys.modules, 'mlflow', fake)
  record = flow.Record(writers=[flow.mlflow_writer(run_id)])
  step = tapped(1.0, 2.0, 3.0, names=['a[0][1]', 'a[0]', 'b'])
  add(record, 4, **step, loss=0.5)
  assert len(record) == 1
  wanted = {'loss': 0.5}
  for name, norm in {'a_0_1': 1, 'a_0': 2, 'b': 3}.items():
    wanted |= {f'flow/norm/{name}': norm, f'flow/non_finite/{name}': 0}
  assert logged == [(wanted, 4, run_id)]


@pytest.mark.parametrize('name', ['tensorboard', 'wandb', 'mlflow'])
def test_without_the_package_it_raises_at_once(monkeypatch, name):
  monkeypatch.setitem(sys.modules, name, None)
  monkeypatch.setitem(sys.modules, 'tensorboard.summary', None)
  arguments = ['logdir'] if name == 'tensorboard' else []
  with pytest.raises(ImportError, match=f'pip install .{name}'):
    getattr(flow, f'{name}_writer')(*arguments)


def test_no_writer_and_no_picture_is_imported_before_it_is_used():
  """And what is drawn is not registered with pyplot."""
  code = (
    'import sys, optax_ghm.flow as flow\n'
    'record = flow.Record()\nrecord.add(0, loss=1.0)\nlen(record)\n'
    "for name in ('tensorboard', 'wandb', 'mlflow', 'matplotlib'):\n"
    '  assert name not in sys.modules, name\n'
    'flow.figure(record)\n'
    "assert 'matplotlib.pyplot' not in sys.modules\n"
  )
  subprocess.run([sys.executable, '-c', code], check=True)
