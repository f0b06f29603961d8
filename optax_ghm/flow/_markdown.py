"""The report as Markdown: for a log, a pull request or a language model."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import TextIO

from optax_ghm.flow import _diagnose, _record, _report
from optax_ghm.flow._verdict import printable

MEANINGS = 'https://optax-ghm.readthedocs.io/en/stable/verdicts.html'


def write_markdown(
  path: str | os.PathLike[str] | TextIO,
  records: _record.Record | Mapping[str, _record.Record],
  title: str = 'Gradient flow',
) -> None:
  """Writes the verdicts and the tables of the last step as Markdown.

  Takes what :func:`optax_ghm.flow.write_page` takes, needs no other package,
  and has no pictures. All figures are in the text.

  Args:
    path: of the file to write, or an open text file, such as ``sys.stdout``.
    records: one record, or several by name, to compare.
    title: of the report.

  Raises:
    ValueError: if there is no record, or nothing is recorded in one.

  Examples:
    >>> import sys
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> def loss(x, taps):
    ...   return jnp.sum(jnp.square(flow.tap(x, taps['hidden'])))
    >>> empty = flow.Taps.empty(['hidden'])
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), empty)
    >>> record = flow.Record()
    >>> record.add(0, taps=taps)
    >>> flow.write_markdown(sys.stdout, record)
    # Gradient flow
    <BLANKLINE>
    Recorded steps: 1, from 0 to 0.
    <BLANKLINE>
    Nothing was found in 1 recorded step (1 with taps).
    <BLANKLINE>
    ## Gradients at the layers
    <BLANKLINE>
    | layer | norm | rms | largest | zeros | not finite |
    | :-- | --: | --: | --: | --: | --: |
    | hidden | 4.00e+00 | 2.00e+00 | 2.00e+00 | 0% | 0 |
  """
  records = _report.by_name(records)
  blocks = [f'# {_text(title)}']
  for name, record in records.items():
    if name:
      blocks.append(f'## {_text(name)}')
    blocks += _blocks(name, record)
  text = '\n\n'.join(blocks) + '\n'
  if isinstance(path, str | os.PathLike):
    with open(path, 'w', encoding='utf-8') as file:
      file.write(text)
  else:
    path.write(text)


def _blocks(name: str, record: _record.Record) -> Iterator[str]:
  """The paragraphs and tables of one record."""
  steps = record.steps
  yield f'Recorded steps: {len(steps)}, from {steps[0]} to {steps[-1]}.'
  verdicts = _diagnose.diagnose(record)
  if verdicts:
    yield '\n'.join(
      f'- **{verdict.kind}** since step {verdict.since}, severity'
      f' {verdict.severity:.2f}: {_text(verdict.evidence)}.\n'
      f'  Try: {_text(verdict.suggestion)}\n'
      f'  Source: {_text(verdict.source)}.'
      for verdict in verdicts
    )
    yield (
      'A severity is 0.5 at the limit of its rule, and 1 at the worst. What the'
      f' verdicts mean: <{MEANINGS}>'
    )
  else:
    well = _diagnose.without_verdict(record)
    yield f'{_text(well[:1].upper() + well[1:])}.'
  level = '###' if name else '##'
  for caption, columns, rows in _report.tables(record):
    yield f'{level} {caption[:1].upper()}{caption[1:]}'
    cells = [[*map(_text, row)] for row in (columns, *rows)]
    cells.insert(1, [':--', *['--:'] * (len(columns) - 1)])
    yield '\n'.join(
      f'| {" | ".join(row)}{" |" * (len(columns) - len(row) + 1)}'
      for row in cells
    )


def _text(text: str) -> str:
  """The text as it is, whatever Markdown would make of it."""
  return re.sub(r'([\\`*<|\[\]])', r'\\\1', printable(text))
