"""How the benchmarks measure: side by side, in turn, warmed, until ready.

All programs of a case are compiled and warmed first, then run in turn, round
after round, in one process. What counts is the ratio to the first of them, of
times, of CPU times and of memory; the spread is the interquartile range of the
ratios within rounds.
"""

import argparse
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

RESULTS = pathlib.Path(__file__).parent / 'results'


class Case(NamedTuple):
  """Programs to compare on the same data.

  Attributes:
    programs: functions of the data by name; the first is what one would use
      instead.
    data: makes the arguments.
    elements: of the data, to give memory per element.
    floor: the name of the program that nothing can be faster than, if any.
    init: for training steps, or to have results written where the last ones
      were: what a program of a name carries from one call to the next, made of
      the data. A program then takes that first, donated, and returns it.
  """

  programs: Mapping[str, Callable[..., Any]]
  data: Callable[[], tuple]
  elements: int
  floor: str | None = None
  init: Callable[[str, tuple], Any] | None = None


def main(name: str, description: str, cases: Mapping[str, Case]) -> None:
  """Measures the cases, prints a table of each and writes ``name``.json."""
  parser = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--quick', action='store_true', help='fewer rounds')
  parser.add_argument('--only', default='', help='cases whose name has this')
  args = parser.parse_args()
  console, report = Console(), {}
  for title, case in cases.items():
    if args.only not in title:
      continue
    rounds = 15 if args.quick else 41
    if case.elements >= 10**7:
      rounds = max(rounds // 3, 5)
    report[title] = rows = measure(case, rounds)
    table = Table(title=f'{title}, median of {rounds} rounds')
    for column in (
      '',
      'ms',
      '× first',
      'spread',
      '× CPU',
      '× floor',
      'temp B/elem',
      '× memory',
    ):
      table.add_column(column, justify='right' if column else 'left')
    for program, row in rows.items():
      table.add_row(
        program,
        f'{row["ms"]:.2f}',
        f'{row["ratio"]:.2f}',
        '{:.2f}-{:.2f}'.format(*row['spread']),
        f'{row["cpu_ratio"]:.3f}',
        f'{row["ratio_to_floor"]:.2f}' if case.floor else '',
        f'{row["temporary_bytes_per_element"]:.1f}',
        f'{row["memory_ratio"]:.3f}',
      )
    console.print(table)
  RESULTS.mkdir(exist_ok=True)
  context = {
    'jax': jax.__version__,
    'backend': jax.default_backend(),
    'processor': platform.processor() or platform.machine(),
    'cores': os.cpu_count(),
  }
  path = RESULTS / f'{name}.json'
  path.write_text(
    json.dumps({'context': context, 'cases': report}, indent=1) + '\n'
  )
  console.print(f'written: {path}')


def measure(case: Case, rounds: int) -> dict[str, dict[str, Any]]:
  """One row of figures per program."""
  data = jax.block_until_ready(case.data())
  carried, programs = {}, {}
  for name, f in case.programs.items():
    donated: tuple[int, ...] = ()
    carried[name] = ()
    if case.init is not None:
      donated, carried[name] = (0,), (case.init(name, data),)
    # What is donated is there to be written to, whether it is read or not.
    step = jax.jit(f, donate_argnums=donated, keep_unused=bool(donated))
    programs[name] = step.lower(*carried[name], *data).compile()

  def call(name):
    start, cpu_start = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(programs[name](*carried[name], *data))
    if case.init is not None:
      carried[name] = (result,)
    return time.perf_counter() - start, time.process_time() - cpu_start

  for name in programs:
    for _ in range(3):
      call(name)
  seconds = {name: np.empty(rounds) for name in programs}
  cpu_seconds = {name: np.empty(rounds) for name in programs}
  for i in range(rounds):
    for name in programs:
      seconds[name][i], cpu_seconds[name][i] = call(name)
  first, cpu_first = (next(iter(s.values())) for s in (seconds, cpu_seconds))
  rows = {}
  peak_of_first = _peak(next(iter(programs.values())))
  for name, program in programs.items():
    memory = program.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else float('nan')
    ratio = seconds[name] / first
    rows[name] = {
      'ms': 1e3 * np.median(seconds[name]),
      'ratio': np.median(ratio),
      'spread': np.quantile(ratio, [0.25, 0.75]).tolist(),
      'cpu_ratio': np.median(cpu_seconds[name] / cpu_first),
      'memory_ratio': _peak(program) / peak_of_first,
      'temporary_bytes_per_element': temporary / case.elements,
    }
    if case.floor is not None:
      rows[name]['ratio_to_floor'] = np.median(
        seconds[name] / seconds[case.floor]
      )
  return rows


def _peak(program):
  """Bytes of arguments, results and temporaries that are there together."""
  memory = program.memory_analysis()
  if not memory:
    return float('nan')
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )
