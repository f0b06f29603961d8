"""The report in the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from optax_ghm._core import optional
from optax_ghm.flow import _diagnose, _record
from optax_ghm.flow._verdict import printable

if TYPE_CHECKING:
  from rich.console import Console

_RATIOS = ('gradient_norm', 'update_norm', 'parameter_norm', 'update_ratio')
_OF_LOSSES = ('weight', 'norm', 'lowest_cosine', 'non_finite')


def print_report(
  records: _record.Record | Mapping[str, _record.Record],
  console: 'Console | None' = None,
) -> None:
  """Prints the layers, parameters, losses and verdicts as tables.

  Every row shows the last measured step.

  Args:
    records: one record, or several by name.
    console: the console of rich to print to.

  Raises:
    ImportError: if ``rich`` is not installed.

  Examples:
    >>> import io
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import rich.console
    >>> from optax_ghm import flow
    >>> names = [f'layer {i}' for i in range(8)]
    >>> def loss(x, taps):
    ...   for name in names:
    ...     x = flow.tap(x / 2, taps[name])
    ...   return jnp.sum(x)
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), flow.Taps.empty(names))
    >>> record = flow.Record()
    >>> record.add(0, taps=taps)
    >>> console = rich.console.Console(file=io.StringIO())
    >>> flow.print_report(record, console)
    >>> 'vanishing (0.53) since step 0' in console.file.getvalue()
    True
  """
  console = (
    console or optional.load('rich.console', optional.PLOT_EXTRA).Console()
  )
  if isinstance(records, _record.Record):
    records = {'': records}
  for name, record in records.items():
    _print_record(name, record, console)


def _print_record(name, record, console):
  rich_text = optional.load('rich.text', optional.PLOT_EXTRA).Text
  rich_table = optional.load('rich.table', optional.PLOT_EXTRA).Table
  title = f'{name}: ' if name else ''

  def show(*parts):
    """Prints pairs of text and style; markup in the text is not read."""
    parts = [(printable(text), style) for text, style in parts]
    console.print(rich_text.assemble(*parts), highlight=False)

  if not len(record):
    show((f'{title}nothing is recorded', ''))
    return
  for caption, columns, rows in tables(record):
    table = rich_table(title=rich_text(printable(title + caption)))
    for i, column in enumerate(columns):
      table.add_column(
        column, justify='right' if i else 'left', overflow='fold'
      )
    for row in rows:
      table.add_row(*(rich_text(printable(cell)) for cell in row))
    console.print(table)
  verdicts = _diagnose.diagnose(record)
  if not verdicts:
    show((title, ''), (_diagnose.without_verdict(record), 'green'))
  for verdict in verdicts:
    evidence = (
      f' ({verdict.severity:.2f}) since step {verdict.since}:'
      f' {verdict.evidence}'
    )
    show((title, ''), (verdict.kind, 'bold red'), (evidence, ''))
    show((f'  try: {verdict.suggestion} ', ''), (f'({verdict.source})', 'dim'))


def by_name(
  records: _record.Record | Mapping[str, _record.Record],
) -> Mapping[str, _record.Record]:
  """The records by name, of which a single one has none.

  Raises:
    ValueError: if there is no record, or nothing is recorded in one.
  """
  if isinstance(records, _record.Record):
    records = {'': records}
  if not records:
    raise ValueError('there is no record to show.')
  for name, record in records.items():
    if not len(record):
      raise ValueError(f'nothing is recorded{f" in {name}" if name else ""}.')
  return records


def tables(
  record: _record.Record,
) -> Iterator[tuple[str, Sequence[str], list[list[str]]]]:
  """The title, the columns and the rows of every table."""
  tapped, watched = record.having('tapped'), record.having('watched')
  if len(tapped) and record.layers:
    last = {k: v[-1] for k, v in tapped.layer_stats.items()}
    zeros = last['zeros'] / np.maximum(last['elements'], 1)
    rows = []
    for i, layer in enumerate(record.layers):
      cells = ['no gradient arrives']
      if last['calls'][i]:
        cells = [f'{last[k][i]:.2e}' for k in ('norm', 'rms', 'largest')]
        cells += [f'{zeros[i]:.0%}', f'{last["non_finite"][i]:.0f}']
      rows.append([layer.name or '(the model)', *cells])
    columns = ('layer', 'norm', 'rms', 'largest', 'zeros', 'not finite')
    yield 'gradients at the layers', columns, rows
  if len(watched) and record.leaves:
    last = {k: v[-1] for k, v in watched.leaf_stats.items()}
    rows = []
    for i, leaf in enumerate(record.leaves):
      units = last['units'][i]
      dead = f'{last["dead_units"][i]:.0f} of {units:.0f}' if units else ''
      rows.append([leaf.name, *(f'{last[k][i]:.2e}' for k in _RATIOS), dead])
    columns = ('parameter', 'gradient', 'update', 'parameter', 'ratio')
    yield 'parameters', (*columns, 'dead units'), rows
  losses = record.having('losses')
  if len(losses):
    last = {k: v[-1] for k, v in losses.loss_stats.items()}
    rows = [
      [str(i), *(f'{last[k][i]:.2g}' for k in _OF_LOSSES)]
      for i in range(len(last['weight']))
    ]
    columns = ('loss', 'weight', 'norm', 'lowest cosine', 'left out')
    yield 'losses', columns, rows
  if record.batch_norms:
    rows = []
    for i, norm in enumerate(record.batch_norms):
      values = [column[:, i] for column in record.batch_norm_stats.values()]
      last = [u[~np.isnan(u)][-1:] for u in values]
      cells = [f'{u[0]:.2g}' if len(u) else '' for u in last]
      rows.append([norm or '(the model)', *cells])
    columns = ('layer', 'mean / std', 'mean drift', 'std drift')
    yield 'batch normalization', (*columns, 'clipped', 'constant'), rows
