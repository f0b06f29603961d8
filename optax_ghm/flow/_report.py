"""The report in the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from optax_ghm.flow import _diagnose, _optional, _plot, _record
from optax_ghm.flow._verdict import printable

if TYPE_CHECKING:
  from rich.console import Console

_RATIOS = ('gradient_norm', 'update_norm', 'parameter_norm', 'update_ratio')


def print_report(
  records: _record.Record | Mapping[str, _record.Record],
  console: 'Console | None' = None,
) -> None:
  """Prints the layers, the parameters and the verdicts as tables.

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
    >>> 'vanishing since step 0' in console.file.getvalue()
    True
  """
  console = (
    console or _optional.load('rich.console', _plot.PLOT_EXTRA).Console()
  )
  if isinstance(records, _record.Record):
    records = {'': records}
  for name, record in records.items():
    _print_record(name, record, console)


def _print_record(name, record, console):
  text = _optional.load('rich.text', _plot.PLOT_EXTRA).Text
  title = f'{name}: ' if name else ''

  def show(*parts):
    """Prints parts in the styles after them; text is no markup here."""
    console.print(
      text.assemble(*((printable(part), style) for part, style in parts)),
      highlight=False,
    )

  if not len(record):
    show((f'{name}: nothing is recorded', ''))
    return
  tapped, watched = record.having('tapped'), record.having('watched')
  if len(tapped) and record.layers:
    last = {k: v[-1] for k, v in tapped.layer_stats.items()}
    zeros = last['zeros'] / np.maximum(last['elements'], 1)
    console.print(
      _table(
        f'{title}gradients at the layers',
        ('layer', 'norm', 'rms', 'largest', 'zeros', 'not finite'),
        [
          [
            layer.name or '(the model)',
            *(f'{last[k][i]:.2e}' for k in ('norm', 'rms', 'largest')),
            f'{zeros[i]:.0%}',
            f'{last["non_finite"][i]:.0f}',
          ]
          if last['calls'][i]
          else [layer.name or '(the model)', 'no gradient arrives']
          for i, layer in enumerate(record.layers)
        ],
      )
    )
  if len(watched) and record.leaves:
    last = {k: v[-1] for k, v in watched.leaf_stats.items()}
    console.print(
      _table(
        f'{title}parameters',
        ('parameter', 'gradient', 'update', 'parameter', 'ratio', 'dead units'),
        [
          [
            leaf.name,
            *(f'{last[k][i]:.2e}' for k in _RATIOS),
            f'{last["dead_units"][i]:.0f} of {last["units"][i]:.0f}',
          ]
          for i, leaf in enumerate(record.leaves)
        ],
      )
    )
  if record.batch_norms:
    columns = record.batch_norm_stats.values()
    console.print(
      _table(
        f'{title}batch normalization',
        (
          *('layer', 'mean / std', 'mean drift'),
          *('std drift', 'clipped', 'constant'),
        ),
        [
          [
            norm or '(the model)',
            *(
              ''.join(f'{u:.2g}' for u in column[~np.isnan(column)][-1:])
              for column in (values[:, i] for values in columns)
            ),
          ]
          for i, norm in enumerate(record.batch_norms)
        ],
      )
    )
  verdicts = _diagnose.diagnose(record)
  if not verdicts:
    show(
      (title, ''),
      ('nothing is wrong', 'green'),
      (f' by {_diagnose.evidence(record)}', ''),
    )
  for verdict in verdicts:
    show(
      (title, ''),
      (verdict.kind, 'bold red'),
      (f' since step {verdict.since}: {verdict.evidence}', ''),
    )
    show((f'  try: {verdict.suggestion} ', ''), (f'({verdict.source})', 'dim'))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]):
  module = _optional.load('rich.table', _plot.PLOT_EXTRA)
  text = _optional.load('rich.text', _plot.PLOT_EXTRA).Text
  table = module.Table(title=text(printable(title)))
  for i, column in enumerate(columns):
    table.add_column(column, justify='right' if i else 'left')
  for row in rows:
    table.add_row(*(text(printable(cell)) for cell in row))
  return table
