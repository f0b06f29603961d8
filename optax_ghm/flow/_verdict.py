"""Verdicts, and what all rules share."""

import dataclasses
from typing import Any

import numpy as np

from optax_ghm.flow import _record

RECENT_STEPS = 20
"""Verdicts are about the last recorded steps, at most this many."""


MIN_STEPS = 10
"""Recorded steps that a verdict on updates, losses or batch norms needs."""


SMALLEST_FLOAT32 = 2.0**-149
"""Stands for 0 in logarithms."""


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Something that is wrong with the gradients.

  Attributes:
    kind: ``'diverging'``, ``'not finite'``, ``'disconnected'``,
      ``'no gradient'``, ``'vanishing'``, ``'exploding'``, ``'dead units'``,
      ``'small updates'``, ``'large updates'``, ``'spikes'``, ``'conflict'``,
      ``'losses in conflict'``, ``'constant features'`` or
      ``'running averages'``.
    severity: from 0.5, where a figure is at the limit of its rule, to 1, where
      nothing gets through: 1 - limit / (2 figure) for most kinds.
    layers: names of the affected layers, parameters or losses.
    since: number of the first recorded step from which on it has been wrong
      without interruption. For spikes, non-finite numbers and a loss that
      diverges, which come and go, it is the first step of all.
    evidence: the figures.
    suggestion: what to try.
    source: where the rule or the suggestion comes from.
  """

  kind: str
  severity: float
  layers: tuple[str, ...]
  since: int
  evidence: str
  suggestion: str
  source: str


def severity(figure: float, limit: float) -> float:
  """From a half, where the figure is at the limit, towards 1."""
  return float(1 - limit / (2 * figure))


def severity_of_share(bad: np.ndarray) -> float:
  """From a half to 1 by the share of steps, and 1 if the last one is bad."""
  return 1.0 if bad[-1] else float(1 + bad.mean()) / 2


def since(record: _record.Record, holds: Any) -> int:
  """The step at which the last unbroken run of True in ``holds`` begins."""
  start = len(holds)
  while start > 0 and holds[start - 1]:
    start -= 1
  return int(record.steps[min(start, len(holds) - 1)])


def neighbors(mask: np.ndarray) -> list[list[int]]:
  """The indices of True, one list for every unbroken run."""
  at = np.flatnonzero(mask)
  runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
  return [run.tolist() for run in runs if len(run)]


def layer_name(record: _record.Record, i: int) -> str:
  """The name of a layer in a sentence."""
  return record.layers[i].name or 'the model'


def listed(names: tuple[str, ...]) -> str:
  """Up to four names, or the first, the last and how many there are."""
  if len(names) > 4:
    return f'{names[0]}, {names[1]}, … {names[-1]} ({len(names)} in all)'
  return ', '.join(names)


def printable(text: str) -> str:
  """The text, with an escape sequence for every unprintable character."""
  return ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode() for c in text
  )
