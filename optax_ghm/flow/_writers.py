"""Writers: where else the numbers of a record go, step by step."""

import json
import math
import os
from collections.abc import Callable
from typing import Any

from optax_ghm._core import optional

Writer = Callable[[int, dict[str, float]], None]
"""A function of the step and its numbers by name."""


def json_lines_writer(path: str | os.PathLike[str]) -> Writer:
  """Appends one JSON object per step to a file.

  JSON has no non-finite numbers, so they become the strings ``'NaN'``,
  ``'Infinity'`` and ``'-Infinity'``.

  Args:
    path: of the file.

  Returns:
    A writer for :class:`optax_ghm.flow.Record`.

  Examples:
    >>> import pathlib, tempfile
    >>> from optax_ghm import flow
    >>> path = pathlib.Path(tempfile.mkdtemp()) / 'flow.jsonl'
    >>> record = flow.Record(writers=[flow.json_lines_writer(path)])
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


def tensorboard_writer(logdir: str | os.PathLike[str]) -> Writer:
  """Writes scalars for TensorBoard, with the package ``tensorboard``.

  Args:
    logdir: folder of the event files.

  Returns:
    A writer for :class:`optax_ghm.flow.Record`.

  Raises:
    ImportError: if ``tensorboard`` is not installed.

  Examples:
    >>> from optax_ghm import flow
    >>> def train(logdir):
    ...   record = flow.Record(writers=[flow.tensorboard_writer(logdir)])
  """
  summary = optional.load('tensorboard.summary', 'tensorboard')
  writer = summary.Writer(os.fspath(logdir))

  def write(step, numbers):
    for name, x in numbers.items():
      writer.add_scalar(name, x, step)
    writer.flush()

  return write


def wandb_writer(run: Any = None) -> Writer:
  """Logs to Weights & Biases.

  Args:
    run: the run that ``wandb.init`` returned, or None for the current run.

  Returns:
    A writer for :class:`optax_ghm.flow.Record`.

  Raises:
    ImportError: if no run is given and ``wandb`` is not installed.
    ValueError: if no run is given and none is active.

  Examples:
    >>> from optax_ghm import flow
    >>> def train(run):
    ...   record = flow.Record(writers=[flow.wandb_writer(run)])
  """
  if run is None:
    run = optional.load('wandb', 'wandb').run
    if run is None:
      raise ValueError('there is no active run: call wandb.init first.')

  def write(step, numbers):
    run.log(numbers, step=step)

  return write


def mlflow_writer(run_id: str | None = None) -> Writer:
  """Logs metrics to MLflow.

  MLflow allows no brackets in names: ``blocks[0]`` becomes ``blocks_0``.

  Args:
    run_id: identifier of the run, or None for the active run.

  Returns:
    A writer for :class:`optax_ghm.flow.Record`.

  Raises:
    ImportError: if ``mlflow`` is not installed.

  Examples:
    >>> from optax_ghm import flow
    >>> def train():
    ...   record = flow.Record(writers=[flow.mlflow_writer()])
  """
  package = optional.load('mlflow', 'mlflow')

  def write(step, numbers):
    clean = {
      name.replace('[', '_').replace(']', ''): x for name, x in numbers.items()
    }
    package.log_metrics(clean, step=step, run_id=run_id)

  return write
