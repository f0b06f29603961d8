"""Runs cases, prints a table of each, and keeps the figures."""

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Mapping
from typing import Any

import harness
import jax
import jaxlib
import laws
import rich
from rich.console import Console
from rich.table import Table

RESULTS = pathlib.Path(__file__).parent / 'results'
WIDTH = 136
COLUMNS = {
  'ms': ('ms', '{:.3f}'),
  'ratio': ('× first', '{:.2f}'),
  'spread': ('spread', '{0[0]:.2f}-{0[1]:.2f}'),
  'cpu_ratio': ('× CPU', '{:.2f}'),
  'limit_ratio': ('× limit', '{:.2f}'),
  'instructions': ('instr.', '{}'),
  'temporary_bytes_per_element': ('temp', '{:.1f}'),
  'memory_ratio': ('× mem', '{:.2f}'),
  'compile_s': ('compile', '{:.1f}'),
}


def main(
  suites: Mapping[str, Mapping[str, Any]],
  about: str,
  save: str,
  must_hold: Mapping[str, laws.Law] | None = None,
) -> None:
  """Reads the command line and runs what it asks for.

  Args:
    suites: cases, or growths, by title, by the name of the suite.
    about: what ``--help`` says.
    save: the name of the results, unless the command line has another.
    must_hold: laws to check first; if one does not hold, the exit status is 1.
  """
  parser = argparse.ArgumentParser(
    description=about, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true', help='the short run')
  parser.add_argument('--only', default='', help='what has this in its name')
  parser.add_argument('--save', default=save, help='name of the results')
  args = parser.parse_args()
  console, started = Console(width=WIDTH), time.time()
  report: dict[str, Any] = {'machine': machine(), 'cases': {}, 'growth': {}}
  console.print(report['machine'])
  if must_hold and args.only in 'laws':
    report['laws'] = laws.check(must_hold)
    console.print(laws_table(report['laws']))
  for suite, cases in suites.items():
    for title, case in cases.items():
      name = f'{suite}: {title}'
      if args.only in name:
        if isinstance(case, harness.Growth):
          grow(console, report, name, case, args.quick)
        elif case.quick or not args.quick:
          add(console, report, name, case, args.quick)
  if not report['cases'] and 'laws' not in report:
    parser.error(f'no case has {args.only!r} in its name')
  if report['growth']:
    console.print(growth_table(report['growth']))
  report['minutes'] = (time.time() - started) / 60
  RESULTS.mkdir(exist_ok=True)
  path = RESULTS / f'{args.save}.json'
  path.write_text(json.dumps(report, indent=1) + '\n')
  console.print(f'{report["minutes"]:.1f} minutes; written: {path}')
  if report['cases'] and importlib.util.find_spec('matplotlib'):
    importlib.import_module('picture').draw(report, path.with_suffix('.png'))
  if not all(row['holds'] for row in report.get('laws', {}).values()):
    sys.exit('a law does not hold')


def laws_table(rows):
  """By how much each law deviates."""
  table = Table(title='laws', box=rich.box.SIMPLE, title_justify='left')
  for header in ('', 'deviation', 'limit', 'holds'):
    table.add_column(header, justify='right' if header else 'left')
  for name, row in rows.items():
    table.add_row(
      name,
      f'{row["deviation"]:.1e}',
      f'{row["limit"]:.0e}',
      'yes' if row['holds'] else '[bold red]no',
    )
  return table


def machine():
  """What it ran on."""
  processor = platform.processor() or platform.machine()
  about = pathlib.Path('/proc/cpuinfo')
  if about.exists():
    for line in about.read_text().splitlines():
      if line.startswith('model name'):
        processor = line.split(':')[1].strip()
        break
  return {
    'date': datetime.date.today().isoformat(),
    'python': platform.python_version(),
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'device': jax.devices()[0].device_kind,
    'processor': processor,
    'cores': os.cpu_count(),
    'copy_gigabytes_per_second': round(harness.bandwidth() / 1e9, 1),
  }


def add(console, report, name, case, quick):
  """Measures, prints and keeps one case."""
  rows = harness.measure(case, seconds=1.0 if quick else 4.0)
  report['cases'][name] = rows
  rounds = next(iter(rows.values()))['rounds']
  table = Table(
    title=f'{name}, {rounds} rounds', box=rich.box.SIMPLE, title_justify='left'
  )
  table.add_column('', min_width=46)
  for header, _ in COLUMNS.values():
    table.add_column(header, justify='right', no_wrap=True)
  for program, row in rows.items():
    table.add_row(
      program,
      *(
        form.format(row[key]) if key in row else ''
        for key, (_, form) in COLUMNS.items()
      ),
    )
  console.print(table)
  return rows


def grow(console, report, name, growth, quick):
  """Measures a case at its sizes, and how its figures grow with them."""
  sizes = {
    size: case for size, case in growth.cases.items() if case.quick or not quick
  }
  rows = [
    add(console, report, f'{name}, {growth.variable} = {size:,}', case, quick)
    for size, case in sizes.items()
  ]
  if len(sizes) > 1:
    report['growth'][f'{name}, with {growth.variable}'] = {
      'sizes': list(sizes),
      'exponents': harness.exponents(list(sizes), rows),
    }


def growth_table(growths):
  """Exponents of time, memory, compilation and kernels."""
  table = Table(
    title='growth: the exponents of size', box=rich.box.SIMPLE, width=WIDTH
  )
  table.add_column('')
  columns = {
    'ms': 'time',
    'peak_bytes': 'memory',
    'compile_s': 'compile',
    'instructions': 'instr.',
  }
  for header in columns.values():
    table.add_column(header, justify='right', no_wrap=True)
  for name, growth in growths.items():
    low, high = min(growth['sizes']), max(growth['sizes'])
    table.add_row(f'[bold]{name}, {low:,} to {high:,}')
    for program, figures in growth['exponents'].items():
      table.add_row(
        f'  {program}',
        *(f'{figures[key]:.2f}' if key in figures else '' for key in columns),
      )
    table.add_section()
  return table
