"""What the writers hand on, and to whom."""

import json
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from optax_ghm import flow
from tests.support.hand_made import stats, taps, watched


def strict_json(line):
  def refuse(constant):
    raise ValueError(f'{constant} is no JSON.')

  return json.loads(line, parse_constant=refuse)


def record_with(writer):
  record = flow.Record({'w': jnp.ones((2, 2))}, writers=[writer])
  for i, loss in enumerate([0.5, np.nan, np.inf, -np.inf]):
    record.add(
      10 * i,
      taps=taps([stats(3.0, non_finite=i)], ['größe[0] "x"\n']),
      opt_state=watched({'parameter_norm': float(i), 'update_norm': 1.0}),
      loss=loss,
    )
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


def test_json_lines_are_strict_json_of_every_step(tmp_path):
  path = tmp_path / 'flow.jsonl'
  record_with(flow.json_lines_writer(path))
  lines = path.read_text(encoding='utf-8').split('\n')
  assert lines.pop() == ''
  found = [strict_json(line) for line in lines]
  losses = [0.5, 'NaN', 'Infinity', '-Infinity']
  for i, (line, loss) in enumerate(zip(found, losses, strict=True)):
    line_expected = {'step': 10 * i, **expected(i, loss)}
    if i == 0:
      line_expected['parameters/update_ratio/w'] = 'Infinity'
    assert list(line) == list(line_expected)
    for name, value in line_expected.items():
      if isinstance(value, str):
        assert line[name] == value
      else:
        assert line[name] == pytest.approx(value)


def test_json_lines_are_appended(tmp_path):
  path = tmp_path / 'flow.jsonl'
  path.write_text('{"step": -1}\n')
  for _ in range(2):
    record = flow.Record(writers=[flow.json_lines_writer(str(path))])
    record.add(0, loss=1.0)
    assert len(record) == 1
  lines = [strict_json(line) for line in path.read_text().splitlines()]
  assert lines == [{'step': -1}, *[{'step': 0, 'loss': 1.0}] * 2]


def test_a_step_is_on_disk_as_soon_as_it_has_arrived(tmp_path):
  path = tmp_path / 'flow.jsonl'
  write = flow.json_lines_writer(path)
  write(3, {'loss': 0.25})
  assert strict_json(path.read_text()) == {'step': 3, 'loss': 0.25}


def test_steps_that_are_numbers_of_numpy_are_written_too(tmp_path):
  path = tmp_path / 'flow.jsonl'
  record = flow.Record(writers=[flow.json_lines_writer(path)])
  for step in np.arange(2):
    record.add(step, loss=1.0)
  assert record.steps.tolist() == [0, 1]
  lines = [strict_json(line) for line in path.read_text().splitlines()]
  assert [line['step'] for line in lines] == [0, 1]


class FakeTensorBoard(types.ModuleType):
  """What tensorboard.summary has, as far as it is used."""

  def __init__(self):
    super().__init__('tensorboard.summary')
    self.logdirs, self.scalars, self.unflushed = [], [], 0
    outer = self

    class Writer:
      def __init__(self, logdir=None):
        outer.logdirs.append(logdir)

      def add_scalar(self, tag, data, step=None):
        outer.scalars.append((tag, data, step))
        outer.unflushed += 1

      def flush(self):
        outer.unflushed = 0

    self.Writer = Writer


def test_tensorboard_gets_every_scalar_with_its_step(tmp_path, monkeypatch):
  fake = FakeTensorBoard()
  monkeypatch.setitem(
    sys.modules, 'tensorboard', types.ModuleType('tensorboard')
  )
  monkeypatch.setitem(sys.modules, 'tensorboard.summary', fake)
  record_with(flow.tensorboard_writer(tmp_path))
  assert fake.logdirs == [str(tmp_path)] and fake.unflushed == 0
  wanted = [
    (name, value, 10 * i)
    for i, loss in enumerate([0.5, np.nan, np.inf, -np.inf])
    for name, value in expected(i, loss).items()
  ]
  assert [(tag, step) for tag, _, step in fake.scalars] == [
    (tag, step) for tag, _, step in wanted
  ]
  np.testing.assert_allclose(
    [x for _, x, _ in fake.scalars], [x for _, x, _ in wanted], rtol=1e-6
  )


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


def assert_logged(logged):
  assert [step for step, _ in logged] == [0, 10, 20, 30]
  for i, (_, numbers) in enumerate(logged):
    wanted = expected(i, [0.5, np.nan, np.inf, -np.inf][i])
    assert list(numbers) == list(wanted)
    np.testing.assert_allclose(
      list(numbers.values()), list(wanted.values()), rtol=1e-6
    )


def test_a_run_of_wandb_gets_the_numbers_of_every_step():
  run = FakeRun()
  record_with(flow.wandb_writer(run))
  assert_logged(run.logged)


def test_without_a_run_wandb_logs_to_the_active_one(monkeypatch):
  fake = types.ModuleType('wandb')
  fake.run = FakeRun()
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
  record.add(4, taps=taps([1.0, 2.0, 3.0], ['a[0][1]', 'a[0]', 'b']), loss=0.5)
  assert len(record) == 1
  assert logged == [
    (
      {
        'loss': 0.5,
        'flow/norm/a_0_1': 1,
        'flow/non_finite/a_0_1': 0,
        'flow/norm/a_0': 2,
        'flow/non_finite/a_0': 0,
        'flow/norm/b': 3,
        'flow/non_finite/b': 0,
      },
      4,
      run_id,
    )
  ]


@pytest.mark.parametrize('name', ['tensorboard', 'wandb', 'mlflow'])
def test_without_the_package_it_raises_at_once(monkeypatch, name):
  monkeypatch.setitem(sys.modules, name, None)
  monkeypatch.setitem(sys.modules, 'tensorboard.summary', None)
  arguments = ['logdir'] if name == 'tensorboard' else []
  with pytest.raises(ImportError, match=f'pip install .{name}'):
    getattr(flow, f'{name}_writer')(*arguments)


def test_no_writer_and_no_picture_is_imported_with_the_library():
  code = (
    'import sys, optax_ghm.flow as flow\n'
    'record = flow.Record()\nrecord.add(0, loss=1.0)\nlen(record)\n'
    "for name in ('tensorboard', 'wandb', 'mlflow', 'matplotlib'):\n"
    '  assert name not in sys.modules, name\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True)
