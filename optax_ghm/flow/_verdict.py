"""What a verdict is, and how all of them are worded."""

import dataclasses
from typing import Any

import numpy as np

from optax_ghm.flow import _record

RECENT = 20
"""Verdicts are about the last so many recorded steps."""


LEAST_STEPS = 10
"""Recorded steps that verdicts need about what only shows over time."""


LEAST = 2.0**-149
"""The least float32: what stands for 0 in a logarithm."""


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Something that is wrong.

  Attributes:
    kind: ``'not finite'``, ``'disconnected'``, ``'no gradient'``,
      ``'vanishing'``, ``'exploding'``, ``'dead units'``, ``'small updates'``,
      ``'large updates'``, ``'spikes'``, ``'conflict'``, ``'constant features'``
      or ``'running averages'``.
    layers: names of the layers or parameters that it is about.
    since: the first recorded step of those at which it has been so without
      interruption; for spikes and what is not finite, that of the first.
    evidence: the figures.
    suggestion: what to try.
    source: where that comes from.
  """

  kind: str
  layers: tuple[str, ...]
  since: int
  evidence: str
  suggestion: str
  source: str


def since(record: _record.Record, holds: Any) -> int:
  """The first step of the last unbroken row of steps at which it holds."""
  start = len(holds)
  while start > 0 and holds[start - 1]:
    start -= 1
  return int(record.steps[min(start, len(holds) - 1)])


def runs(mask: np.ndarray) -> list[list[int]]:
  """Neighbours in depth, as lists of indices."""
  runs, last = [], None
  for i in np.flatnonzero(mask):
    if last is not None and i == last + 1:
      runs[-1].append(int(i))
    else:
      runs.append([int(i)])
    last = i
  return runs


def called(record: _record.Record, i: int) -> str:
  """The name of a layer."""
  return record.layers[i].name or 'the model'


def listed(names: tuple[str, ...]) -> str:
  """A few names, and how many there are."""
  if len(names) > 4:
    return f'{names[0]}, {names[1]}, … {names[-1]} ({len(names)} in all)'
  return ', '.join(names)
