"""The report as one HTML page that needs nothing else."""

import html
import os
from collections.abc import Mapping

import numpy as np

from optax_ghm.flow import _diagnose, _plot, _record, _rules_depth, _svg, _tap

COLUMNS = 120
"""Most columns of a heat map; more steps share one, the worst is shown."""


_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d1d22;
  --quiet: #66666e; --line: #dcdce2; --bad: #b3003c; --card: #f5f5f8; }
@media (prefers-color-scheme: dark) { :root { --back: #16161a; --text: #e6e6ea;
  --quiet: #a0a0aa; --line: #3a3a42; --bad: #ff7098; --card: #212127; } }
body { background: var(--back); color: var(--text); margin: 0 auto;
  max-width: 60rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; margin: 1.5em 0 .5em; }
h3 { font-size: 1rem; }
.chart { overflow-x: auto; }
svg { display: block; width: 100%; min-width: 30rem; height: auto; }
svg text { fill: var(--quiet); font-size: 11px; }
svg image { image-rendering: pixelated; }
.grid { stroke: var(--line); }
.guide { stroke: var(--quiet); stroke-dasharray: 6 4; }
.line { fill: none; stroke-width: 1.8; }
.keys { color: var(--quiet); font-size: .8rem; margin: .2rem 0 0; }
.keys span { margin-right: 1rem; white-space: nowrap; }
.keys i { display: inline-block; width: .8em; height: .8em;
  margin: 0 .3em 0 0; }
.verdict { background: var(--card); border-left: 4px solid var(--bad);
  padding: .5rem .8rem; margin: .6rem 0; overflow-wrap: anywhere; }
.verdict b { color: var(--bad); }
.verdict small, footer { color: var(--quiet); }
.well { background: var(--card); padding: .5rem .8rem; }
"""


_SCRIPT = """
for (const svg of document.querySelectorAll('svg[data-cells]')) {
  const cells = svg.dataset.cells.split('\\n').map(row => row.split('\\t'));
  const [left, top, width, height] = svg.dataset.box.split(' ').map(Number);
  const out = svg.parentElement.nextElementSibling.querySelector('output');
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = ((event.clientX - box.left) * scale - left) / width;
    const y = ((event.clientY - box.top) * scale - top) / height;
    if (x < 0 || x >= 1 || y < 0 || y >= 1) { out.textContent = ''; return; }
    const row = cells[1 + Math.floor(y * (cells.length - 1))];
    const j = 1 + Math.floor(x * (row.length - 1));
    out.textContent = `${row[0]} at ${cells[0][j]}: ${row[j]}`;
  });
}
"""


def write_page(
  path: str | os.PathLike,
  records: _record.Record | Mapping[str, _record.Record],
  title: str = 'Gradient flow',
) -> None:
  """Writes one self-contained HTML page: verdicts and pictures.

  For every record the verdicts of :func:`optax_ghm.flow.diagnose`, a heat map
  of log10 norms of the gradients over layers and steps, their profile over
  depth, update ratios over time beside the usual 1e-3, magnitudes over time
  where histograms were kept, and the loss, if one was added. It opens from
  disk, asks nothing of the network, and follows the reader's light or dark
  theme. What is not finite has a color of its own.

  Args:
    path: of the file to write.
    records: one, or several by name, to compare.
    title: of the page.

  Raises:
    ValueError: if there is no record, or nothing is recorded in one.

  Examples:
    >>> import pathlib, tempfile
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> def loss(x, taps):
    ...   return jnp.sum(jnp.square(flow.tap(x, taps['hidden'])))
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), flow.Taps.of(['hidden']))
    >>> record = flow.Record()
    >>> record.add(0, taps=taps)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / 'flow.html'
    >>> flow.write_page(path, {'plain': record})
    >>> '<svg' in path.read_text()
    True
  """
  if isinstance(records, _record.Record):
    records = {'': records}
  if not records:
    raise ValueError('there is no record to show.')
  sections = ''.join(_section(name, record) for name, record in records.items())
  policy = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'"
  )
  page = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n'
    f'<body><h1>{html.escape(title)}</h1>\n{sections}'
    '<footer><small>optax_ghm.flow</small></footer>'
    f'<script>{_SCRIPT}</script></body></html>\n'
  )
  # A name from a file may hold half of a surrogate pair.
  with open(path, 'w', encoding='utf-8', errors='backslashreplace') as file:
    file.write(page)


def _section(name, record):
  steps = record.steps
  if not len(steps):
    raise ValueError(f'nothing is recorded{f" in {name}" if name else ""}.')
  parts = [f'<section><h2>{html.escape(name)}</h2>' if name else '<section>']
  parts.append(
    f'<p class="keys">{len(steps)} recorded steps, {steps[0]} to'
    f' {steps[-1]}</p>'
  )
  verdicts = _diagnose.diagnose(record)
  if not verdicts:
    parts.append(
      '<p class="well">Nothing is wrong by'
      f' {html.escape(_diagnose.evidence(record))}.</p>'
    )
  for verdict in verdicts:
    parts.append(
      f'<div class="verdict"><b>{html.escape(verdict.kind)}</b> since step'
      f' {verdict.since}: {html.escape(verdict.evidence)}<br>Try:'
      f' {html.escape(verdict.suggestion)}<br>'
      f'<small>{html.escape(verdict.source)}</small></div>'
    )
  loss = record.scalars.get('loss')
  if loss is not None and len(steps) > 1:
    given = record.has_scalar('loss')
    parts.append('<h3>Loss</h3>')
    parts.append(
      _svg.line_chart(
        {'loss': (steps[given], loss[given])}, x_label='step', y_label='loss'
      )
    )
  if record.layers and not np.isnan(record.layer_stats['calls']).all():
    parts += _of_layers(record, steps)
  if record.leaves and not np.isnan(record.leaf_stats['elements']).all():
    parts += _of_leaves(record, steps)
  return ''.join(parts) + '</section>\n'


def _of_layers(record, steps):
  stats = record.layer_stats
  tapped = ~np.isnan(stats['calls']).all(1)
  norms, at = stats['norm'][tapped], steps[tapped]
  with np.errstate(divide='ignore'):
    logs = np.where(norms == 0, 0.0, np.log10(norms))
  names = [layer.name or '(the model)' for layer in record.layers]
  values, nothing, columns = _binned(logs, norms == 0, at)
  parts = [
    '<h3>Gradient norm at the layers, from the input (top) to the loss</h3>',
    _svg.heat_map(
      values.T,
      rows=names,
      columns=columns,
      label='log10 of the gradient norm',
      nothing=nothing.T,
    ),
  ]
  profile = _rules_depth.depth_profile(record)
  depth = np.arange(len(profile.layers))
  shown = np.flatnonzero(tapped)
  if len(depth) > 1:
    shown = sorted({shown[0], shown[len(shown) // 2], shown[-1]})
    parts += [
      '<h3>Over depth</h3>',
      _svg.line_chart(
        {f'step {steps[t]}': (depth, profile.log_norms[t]) for t in shown},
        x_label='layers with a kernel, from the input',
        y_label='log10 of the gradient norm',
      ),
    ]
  histograms = record.histograms
  if histograms is not None:
    chosen = profile.layers if len(profile.layers) else np.arange(len(names))
    chosen = chosen[[0, len(chosen) // 2, -1]]
    lowest, octaves = _tap.LOWEST, _tap.OCTAVES
    for i in dict.fromkeys(int(i) for i in chosen):
      counts = np.nan_to_num(histograms[tapped][:, i])
      share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
      used = np.flatnonzero(share.any(0))
      if not len(used):
        continue
      cells = np.arange(used[-1], used[0] - 1, -1)
      values, nothing, columns = _binned(
        share[:, cells], share[:, cells] == 0, at
      )
      parts += [
        f'<h3>Magnitudes at {html.escape(names[i])}</h3>',
        _svg.heat_map(
          values.T,
          rows=[f'{2.0 ** (lowest + octaves * c):.0e} and up' for c in cells],
          columns=columns,
          label='share of the numbers',
          nothing=nothing.T,
        ),
      ]
  return parts


def _of_leaves(record, steps):
  with np.errstate(divide='ignore', invalid='ignore'):
    logs = np.log10(record.leaf_stats['update_ratio'])
  watched = ~np.isnan(record.leaf_stats['elements']).all(1)
  kernels = [i for i, leaf in enumerate(record.leaves) if leaf.rank >= 2]
  if not kernels or watched.sum() < 2:
    return []
  logs = logs[watched][:, kernels]
  values, _, at = _binned(logs, np.zeros(logs.shape, bool), steps[watched])
  lines = {
    record.leaves[i].name: (np.array(at, float), values[:, j])
    for j, i in enumerate(kernels)
  }
  return [
    '<h3>Update norm over parameter norm</h3>',
    _svg.line_chart(
      lines,
      x_label='step; the dashed line is the usual 1e-3',
      y_label='log10 of the ratio',
      guide=float(np.log10(_plot.RATIO_GUIDE)),
    ),
  ]


def _binned(values, nothing, steps):
  """At most COLUMNS columns: the last of each bin, or what is not finite."""
  bins = np.array_split(np.arange(len(steps)), min(len(steps), COLUMNS))
  bad = ~np.isfinite(values)
  rows, empty = [], []
  for members in bins:
    last = members[-1]
    first_bad = members[np.argmax(bad[members], axis=0)]
    cell = np.arange(values.shape[1])
    picked = np.where(bad[members].any(0), first_bad, last)
    rows.append(values[picked, cell])
    empty.append(nothing[picked, cell])
  labels = [str(steps[members[-1]]) for members in bins]
  return np.array(rows), np.array(empty), labels
