"""Where a record's numbers can also go, step by step, as they arrive."""

import importlib
import json
import math
import os
from collections.abc import Callable
from typing import Any

Writer = Callable[[int, dict[str, float]], None]
"""Takes the step and its numbers by name."""


def json_lines(path: str | os.PathLike) -> Writer:
  """Appends one JSON object per step to a file.

  Args:
    path: of the file. What is not finite is the string ``'NaN'``,
      ``'Infinity'`` or ``'-Infinity'``, since JSON has no such numbers.

  Returns:
    A writer for :class:`optax_ghm.flow.Record`.

  Examples:
    >>> import pathlib, tempfile
    >>> from optax_ghm import flow
    >>> path = pathlib.Path(tempfile.mkdtemp()) / 'flow.jsonl'
    >>> record = flow.Record(writers=[flow.json_lines(path)])
    >>> record.add(0, loss=0.5)
    >>> len(record)
    1
    >>> print(path.read_text().strip())
    {"step": 0, "loss": 0.5}
  """

  def write(step, numbers):
    line = {name: _json_number(x) for name, x in numbers.items()}
    with open(path, 'a', encoding='utf-8') as file:
      file.write(json.dumps({'step': step, **line}) + '\n')

  return write


def _json_number(x):
  if math.isfinite(x):
    return x
  return 'NaN' if math.isnan(x) else 'Infinity' if x > 0 else '-Infinity'


def tensorboard(logdir: str | os.PathLike) -> Writer:
  """Writes scalars for TensorBoard, with its own package.

  Args:
    logdir: the folder that TensorBoard is pointed at.

  Returns:
    A writer for :class:`optax_ghm.flow.Record`.

  Raises:
    ImportError: if ``tensorboard`` is not installed.

  Examples:
    >>> from optax_ghm import flow
    >>> def train(logdir):
    ...   record = flow.Record(writers=[flow.tensorboard(logdir)])
  """
  summary = importlib.import_module('tensorboard.summary')
  writer = summary.Writer(os.fspath(logdir))

  def write(step, numbers):
    for name, x in numbers.items():
      writer.add_scalar(name, x, step)
    writer.flush()

  return write


def wandb(run: Any = None) -> Writer:
  """Logs to Weights & Biases.

  Args:
    run: what ``wandb.init`` returned; None is the current run.

  Returns:
    A writer for :class:`optax_ghm.flow.Record`.

  Raises:
    ImportError: if no run is given and ``wandb`` is not installed.
    ValueError: if no run is given and none is active.

  Examples:
    >>> from optax_ghm import flow
    >>> def train(run):
    ...   record = flow.Record(writers=[flow.wandb(run)])
  """
  if run is None:
    run = importlib.import_module('wandb').run
    if run is None:
      raise ValueError('there is no active run: call wandb.init first.')

  def write(step, numbers):
    run.log(numbers, step=step)

  return write


def mlflow(run_id: str | None = None) -> Writer:
  """Logs metrics to MLflow.

  Args:
    run_id: of the run; None is the active one.

  Returns:
    A writer for :class:`optax_ghm.flow.Record`.

  Raises:
    ImportError: if ``mlflow`` is not installed.

  Examples:
    >>> from optax_ghm import flow
    >>> def train():
    ...   record = flow.Record(writers=[flow.mlflow()])
  """
  package = importlib.import_module('mlflow')

  def write(step, numbers):
    # MLflow takes no brackets in names.
    clean = {
      name.replace('[', '_').replace(']', ''): x for name, x in numbers.items()
    }
    package.log_metrics(clean, step=step, run_id=run_id)

  return write
