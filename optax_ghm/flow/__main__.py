"""The command line: ``python -m optax_ghm.flow report RECORD``."""

import argparse
import io
import pathlib
import sys

from optax_ghm.flow._markdown import write_markdown
from optax_ghm.flow._page import write_page
from optax_ghm.flow._record import Record
from optax_ghm.flow._report import print_report
from optax_ghm.flow._verdict import printable


def main(arguments: list[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m optax_ghm.flow', description='Reports how gradients flow.'
  )
  commands = parser.add_subparsers(dest='command', required=True)
  report = commands.add_parser(
    'report', help='write the page of saved records, print the tables'
  )
  report.add_argument('records', nargs='+', metavar='RECORD', type=pathlib.Path)
  report.add_argument(
    '-o',
    '--output',
    type=pathlib.Path,
    help='page, or Markdown if it ends in .md; default: RECORD with .html',
  )
  report.add_argument('--title', default='Gradient flow')
  args = parser.parse_args(arguments)
  try:
    stems = [path.stem for path in args.records]
    records = {
      path.stem if stems.count(path.stem) == 1 else str(path): Record.load(path)
      for path in args.records
    }
    output = args.output or args.records[0].with_suffix('.html')
    if output.exists() and any(map(output.samefile, args.records)):
      raise ValueError(f'{output} is a record: give another --output.')
    write = write_markdown if output.suffix == '.md' else write_page
    write(output, records, args.title)
  except (ImportError, OSError, ValueError) as error:
    print(printable(str(error)), file=sys.stderr)
    return 1
  try:
    print_report(records)
  except ImportError as error:
    print(f'(no tables: {error})', file=sys.stderr)
  print(printable(f'written: {output}'))
  return 0


if __name__ == '__main__':
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')  # names can be any text
  sys.exit(main())
