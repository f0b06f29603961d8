"""The report in the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from optax_ghm.flow import _diagnose, _record

if TYPE_CHECKING:
  from rich.console import Console


def print_report(
  records: _record.Record | Mapping[str, _record.Record],
  console: 'Console | None' = None,
) -> None:
  """Prints the layers, the parameters and what is wrong, as tables.

  Args:
    records: one, or several by name.
    console: rich's, to print to; needs ``rich``.

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
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), flow.Taps.of(names))
    >>> record = flow.Record()
    >>> record.add(0, taps=taps)
    >>> console = rich.console.Console(file=io.StringIO())
    >>> flow.print_report(record, console)
    >>> 'vanishing since step 0' in console.file.getvalue()
    True
  """
  from rich.console import Console  # noqa: PLC0415
  from rich.markup import escape  # noqa: PLC0415
  from rich.table import Table  # noqa: PLC0415
  from rich.text import Text  # noqa: PLC0415

  def markup(text):
    return escape(printable(text))

  console = console or Console()
  if isinstance(records, _record.Record):
    records = {'': records}
  for name, record in records.items():
    steps = record.steps
    if not len(steps):
      console.print(f'{markup(name)}: nothing is recorded', emoji=False)
      continue
    title = f'{name}: ' if name else ''
    if record.layers and not np.isnan(record.layer_stats['calls']).all():
      table = Table(title=Text(printable(f'{title}gradients at the layers')))
      table.add_column('layer')
      for column in ('norm', 'rms', 'largest', 'zeros', 'not finite'):
        table.add_column(column, justify='right')
      last = _last(record.layer_stats, 'calls')
      for i, layer in enumerate(record.layers):
        row = {k: v[i] for k, v in last.items()}
        figures = ['no gradient arrives', '', '', '', '']
        if row['calls'] != 0:
          figures = [f'{row[k]:.2e}' for k in ('norm', 'rms', 'largest')]
          figures.append(f'{row["zeros"] / max(row["elements"], 1):.0%}')
          figures.append(f'{row["non_finite"]:.0f}')
        table.add_row(Text(printable(layer.name or '(the model)')), *figures)
      console.print(table)
    if record.leaves and not np.isnan(record.leaf_stats['elements']).all():
      table = Table(title=Text(printable(f'{title}parameters')))
      table.add_column('parameter')
      for column in ('gradient', 'update', 'parameter', 'ratio', 'dead units'):
        table.add_column(column, justify='right')
      last = _last(record.leaf_stats, 'elements')
      for i, leaf in enumerate(record.leaves):
        row = {k: v[i] for k, v in last.items()}
        table.add_row(
          Text(printable(leaf.name)),
          *(
            f'{row[k]:.2e}'
            for k in (
              'gradient_norm',
              'update_norm',
              'parameter_norm',
              'update_ratio',
            )
          ),
          f'{row["dead_units"]:.0f} of {row["units"]:.0f}',
        )
      console.print(table)
    if record.norms:
      table = Table(title=Text(printable(f'{title}batch normalization')))
      table.add_column('layer')
      titles = ('mean / std', 'mean drift', 'std drift', 'clipped', 'constant')
      for column in titles:
        table.add_column(column, justify='right')
      for i, name_ in enumerate(record.norms):
        values = [column[:, i] for column in record.norm_stats.values()]
        last = [u[~np.isnan(u)][-1:] for u in values]
        figures = [f'{u[0]:.2g}' if len(u) else '' for u in last]
        table.add_row(Text(printable(name_ or '(the model)')), *figures)
      console.print(table)
    verdicts = _diagnose.diagnose(record)
    if not verdicts:
      console.print(
        f'{markup(title)}[green]nothing is wrong[/green] by'
        f' {_diagnose.evidence(record)}',
        highlight=False,
        emoji=False,
      )
    for verdict in verdicts:
      console.print(
        f'{markup(title)}[bold red]{verdict.kind}[/bold red] since step'
        f' {verdict.since}: {markup(verdict.evidence)}\n'
        f'  try: {markup(verdict.suggestion)} [dim]({markup(verdict.source)})'
        '[/dim]',
        highlight=False,
        emoji=False,
      )


def printable(text: str) -> str:
  """The text with what is no letter or sign, such as escapes, spelled out."""
  return ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode() for c in text
  )


def _last(stats, always):
  """The last step at which these were measured."""
  at = np.flatnonzero(~np.isnan(stats[always]).all(1))[-1]
  return {name: values[at] for name, values in stats.items()}
