"""How the benchmarks measure: side by side, in turn, warmed, until ready.

All programs of a case are compiled and warmed first, then run in turn, round
after round, in one process. What counts is the ratio to the first of them, of
times, of CPU times and of memory; the spread is the interquartile range of the
ratios within rounds, whose order turns from round to round. Beside it stands
the ratio to what can be attained at best: the plain operation alone or, where
none is named, a copy of as many bytes as the first one's arguments and results
have.
"""

import collections
import gc
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

COPY = 'limit: as many bytes, copied'
MOST_ROUNDS, FEWEST_ROUNDS = 41, 7
# An accelerator is given several calls at once, or the host's time is measured.
LEAST_SECONDS = collections.defaultdict(lambda: 5e-3, cpu=0.0)


class Case(NamedTuple):
  """Programs to compare on the same data.

  Attributes:
    programs: functions of the data by name, or :class:`Eager`; the first is
      what one would use instead.
    data: makes the arguments.
    elements: of the data, to give memory per element.
    limit: the name of the program that does the least, if it is one of them.
    init: for training steps, or to have results written where the last ones
      were: what a program of a name carries from one call to the next, made of
      the data. A program then takes that first, donated, and returns it.
    quick: whether it is part of the short run.
  """

  programs: Mapping[str, Any]
  data: Callable[[], tuple]
  elements: int
  limit: str | None = None
  init: Callable[[str, tuple], Any] | None = None
  quick: bool = False


class Growth(NamedTuple):
  """One case at several sizes, whose figures are fitted by a power of size.

  Attributes:
    variable: what grows.
    cases: by size.
  """

  variable: str
  cases: Mapping[float, Case]


class Eager(NamedTuple):
  """A program that is called as it is: PyTorch's, or work of the host.

  Attributes:
    prepare: makes of the data what is called, without an argument, and returns
      when it is done.
  """

  prepare: Callable[..., Callable[[], Any]]


def measure(case: Case, seconds: float) -> dict[str, dict[str, Any]]:
  """One row of figures per program, of as many rounds as fit into seconds."""
  rows = _measure(case, seconds)
  jax.clear_caches()  # a process can only hold so many programs
  gc.collect()
  return rows


def _measure(case, seconds):
  data = jax.block_until_ready(case.data())
  calls, compiled, rows = {}, {}, {}
  for name, program in case.programs.items():
    start = time.perf_counter()
    if isinstance(program, Eager):
      calls[name], compiled[name] = program.prepare(*data), None
    else:
      calls[name], compiled[name] = _compile(case, name, program, data)
    rows[name] = {'compile_s': time.perf_counter() - start}
  first, limit = next(iter(calls)), case.limit
  if limit is None and compiled[first] is not None:
    limit, start = COPY, time.perf_counter()
    calls[COPY], compiled[COPY] = _copy(compiled[first])
    rows[COPY] = {'compile_s': time.perf_counter() - start}

  for call in calls.values():
    _timed(call, 3)
  one_call = max(_timed(call, 1)[0] for call in calls.values())
  repeats = int(np.clip(LEAST_SECONDS[jax.default_backend()] / one_call, 1, 99))
  one_round = sum(_timed(call, repeats)[0] * repeats for call in calls.values())
  rounds = int(np.clip(seconds / one_round, FEWEST_ROUNDS, MOST_ROUNDS))
  times = {name: np.empty((rounds, 2)) for name in calls}
  names = list(calls)
  for i in range(rounds):
    for name in names[i % len(names) :] + names[: i % len(names)]:
      times[name][i] = _timed(calls[name], repeats)

  for name, row in rows.items():
    ratios = times[name] / times[first]
    row.update(
      rounds=rounds,
      ms=1e3 * np.median(times[name][:, 0]),
      ratio=np.median(ratios[:, 0]),
      spread=np.quantile(ratios[:, 0], [0.25, 0.75]).tolist(),
      cpu_ratio=np.median(ratios[:, 1]),
    )
    if limit is not None:
      to_limit = times[name][:, 0] / times[limit][:, 0]
      row['limit_ratio'] = np.median(to_limit)
    if compiled[name] is not None:
      row.update(_of_program(compiled[name], compiled[first], case.elements))
  return rows


def exponents(
  sizes: list[float], rows: list[dict[str, dict[str, Any]]]
) -> dict[str, dict[str, float]]:
  """The powers of size with which time, memory and compilation grow."""

  def fitted(name, figure):
    y = [row[name][figure] for row in rows]
    return float(np.polyfit(np.log(sizes), np.log(y), 1)[0])

  return {
    name: {
      figure: fitted(name, figure)
      for figure in ('ms', 'peak_bytes', 'compile_s', 'instructions')
      if all(row[name].get(figure, 0) > 0 for row in rows)
    }
    for name in rows[0]
  }


def instructions(program: Any) -> int:
  """Of the compiled program, loops and branches counted as one."""
  entry = program.as_text().split('\nENTRY ')[1].split('\n}')[0]
  names = re.findall(r'^\s.*? = .*? ([a-z][a-z0-9-]*)\(', entry, re.MULTILINE)
  free = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast'}
  return sum(name not in free for name in names)


def bandwidth(megabytes: int = 256) -> float:
  """Bytes per second, read and written, of a copy of large arrays."""
  x = jnp.ones(megabytes * 2**18)
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jax.block_until_ready(step(x))
  times = []
  for _ in range(9):
    start = time.perf_counter()
    x = jax.block_until_ready(step(x))
    times.append(time.perf_counter() - start)
  return 2 * x.nbytes / float(np.median(times))


def _compile(case, name, program, data):
  """What calls the program, and the program compiled."""
  if case.init is None:
    compiled = jax.jit(program).lower(*data).compile()
    return lambda: compiled(*data), compiled
  carried = case.init(name, data)
  # What is donated is there to be written to, whether it is read or not.
  step = jax.jit(program, donate_argnums=0, keep_unused=True)
  compiled = step.lower(carried, *data).compile()

  def call():
    nonlocal carried
    carried = compiled(carried, *data)
    return carried

  return call, compiled


def _copy(program):
  """Reads and writes half of the bytes of the program's arguments, results."""
  memory = program.memory_analysis()
  moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
  x = jnp.ones(max(moved // 8, 1))
  compiled = jax.jit(lambda x: x + 1).lower(x).compile()
  return lambda: compiled(x), compiled


def _timed(call, repeats):
  """Seconds of a call, and seconds of all processors."""
  result = None
  start, cpu_start = time.perf_counter(), time.process_time()
  for _ in range(repeats):
    result = call()
  jax.block_until_ready(result)
  wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
  return wall / repeats, cpu / repeats


def _of_program(program, first, elements):
  """What the compiled program tells of itself."""
  found = {'instructions': instructions(program)}
  memory = program.memory_analysis()
  if memory:
    found |= {
      'temporary_bytes_per_element': memory.temp_size_in_bytes / elements,
      'peak_bytes': _peak(program),
    }
    if first is not None:
      found['memory_ratio'] = _peak(program) / _peak(first)
  return found


def _peak(program):
  """Bytes of arguments, results and temporaries that are there together."""
  memory = program.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )
