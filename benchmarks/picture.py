"""The picture of a run: every program's ratio to what one would use instead."""

import math

import matplotlib

matplotlib.use('agg')

import matplotlib.pyplot as plt

PEERS = ('optax.', 'flax.', 'torch', 'jax.', 'plain', 'by hand')
OURS, PEER, LIMIT = '#1f6fb2', '#777777', '#d1495b'
ROWS_PER_COLUMN, INCHES_PER_ROW = 110, 0.165


def draw(report, path):
  """One row per program: dot, quartiles, and a tick where the limit is."""
  columns = _columns(report['cases'])
  rows = max(len(column) for column in columns)
  height = 0.9 + INCHES_PER_ROW * rows
  figure, axes = plt.subplots(
    1, len(columns), figsize=(6.2 * len(columns), height), squeeze=False
  )
  for axis, column in zip(axes[0], columns, strict=True):
    _draw_column(axis, column, rows)
  machine = report['machine']
  figure.suptitle(
    'time, × what one would use instead (1); a red tick is the limit\n'
    f'{machine["processor"]}, {machine["cores"]} cores, jax {machine["jax"]}',
    fontsize=9,
  )
  figure.tight_layout(rect=(0, 0, 1, 1 - 0.2 / height))
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _columns(cases):
  """Titles and rows, cut between cases into columns of about one length."""
  blocks = [
    [(title, None)]
    + [
      (name, row) for name, row in rows.items() if not name.startswith('limit')
    ]
    for title, rows in cases.items()
  ]
  total = sum(len(block) for block in blocks)
  length = total / math.ceil(total / ROWS_PER_COLUMN)
  columns, done = [[]], 0
  for block in blocks:
    if done >= length * len(columns):
      columns.append([])
    columns[-1] += block
    done += len(block)
  return columns


def _draw_column(axis, column, rows):
  for y, (name, row) in enumerate(column):
    if row is None:
      axis.text(
        -0.02,
        y,
        name,
        fontsize=6,
        weight='bold',
        ha='right',
        va='center',
        transform=axis.get_yaxis_transform(),
      )
      continue
    color = PEER if name.startswith(PEERS) else OURS
    axis.plot(row['spread'], [y, y], color=color, lw=1.5)
    axis.plot(row['ratio'], y, 'o', color=color, ms=3.5)
    if 'limit_ratio' in row:
      limit = row['ratio'] / row['limit_ratio']
      axis.plot(limit, y, '|', color=LIMIT, ms=6)
    axis.text(
      -0.02,
      y,
      name,
      fontsize=6,
      color=color,
      ha='right',
      va='center',
      transform=axis.get_yaxis_transform(),
    )
  axis.axvline(1, color='black', lw=0.6)
  axis.set_xscale('log')
  ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
  axis.set_xticks(ticks, [f'{tick:g}' for tick in ticks], fontsize=6)
  axis.set_xticks([], minor=True)
  ratios = [row['ratio'] for _, row in column if row is not None]
  axis.set_xlim(min(0.2, 0.8 * min(ratios)), max(5, 1.25 * max(ratios)))
  axis.set_ylim(rows - 0.5, -0.7)
  axis.set_yticks([])
  axis.grid(axis='x', lw=0.3)
  for side in ('top', 'right', 'left'):
    axis.spines[side].set_visible(False)
