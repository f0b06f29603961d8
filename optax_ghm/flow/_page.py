"""The report as one HTML page that needs nothing else."""

import html
import io
import os
import re
import warnings
from collections.abc import Mapping

from optax_ghm._core import optional
from optax_ghm.flow import _diagnose, _plot, _record, _report

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d1d22;
  --dim: #66666e; --bad: #b3003c; --card: #f5f5f8; }
@media (prefers-color-scheme: dark) { :root { --back: #16161a; --text: #e6e6ea;
  --dim: #a0a0aa; --bad: #ff7098; --card: #212127; } }
body { background: var(--back); color: var(--text); margin: 0 auto;
  max-width: 60rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; margin: 1.5em 0 .5em; }
h3 { font-size: 1rem; }
figure { margin: 0; overflow-x: auto; }
svg { display: block; width: 100%; min-width: 40rem; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
svg image { image-rendering: pixelated; }
.verdict { background: var(--card); border-left: 4px solid var(--bad);
  padding: .5rem .8rem; margin: .6rem 0; overflow-wrap: anywhere; }
.verdict b { color: var(--bad); }
small { color: var(--dim); }
.well { background: var(--card); padding: .5rem .8rem; }
"""

# A color that nothing else has, to be replaced by the color of the page's text.
_TEXT_COLOR = '#010203'
_DRAWING = {
  'svg.fonttype': 'none',
  'svg.hashsalt': 'optax_ghm',
  'text.color': _TEXT_COLOR,
  'axes.edgecolor': _TEXT_COLOR,
  'axes.labelcolor': _TEXT_COLOR,
  'axes.facecolor': 'none',
  'xtick.color': _TEXT_COLOR,
  'ytick.color': _TEXT_COLOR,
  'figure.facecolor': 'none',
  'savefig.facecolor': 'none',
  'legend.facecolor': 'none',
  'legend.framealpha': 0,
}


def write_page(
  path: str | os.PathLike[str],
  records: _record.Record | Mapping[str, _record.Record],
  title: str = 'Gradient flow',
) -> None:
  """Writes one self-contained HTML page: verdicts and pictures.

  For every record, the page has the verdicts of
  :func:`optax_ghm.flow.diagnose` with their severity, the loss, if one was
  added, and the pictures of :func:`optax_ghm.flow.figure`. It opens from disk,
  asks nothing of the network, runs no script, and takes on the reader's light
  or dark theme.

  Args:
    path: of the file to write.
    records: one record, or several by name, to compare.
    title: of the page.

  Raises:
    ImportError: if ``matplotlib`` is not installed.
    ValueError: if there is no record, or nothing is recorded in one.

  Examples:
    >>> import pathlib, tempfile
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> def loss(x, taps):
    ...   return jnp.sum(jnp.square(flow.tap(x, taps['hidden'])))
    >>> empty = flow.Taps.empty(['hidden'])
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), empty)
    >>> record = flow.Record()
    >>> record.add(0, taps=taps)
    >>> path = pathlib.Path(tempfile.mkdtemp()) / 'flow.html'
    >>> flow.write_page(path, {'plain': record})
    >>> '<svg' in path.read_text()
    True
  """
  records = _report.by_name(records)
  sections = ''.join(_section(name, record) for name, record in records.items())
  policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
  page = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n'
    f'<body><h1>{html.escape(title)}</h1>\n{sections}'
    '<footer><small>optax_ghm.flow</small></footer></body></html>\n'
  )
  # A name that was read from a file may hold half of a surrogate pair.
  with open(path, 'w', encoding='utf-8', errors='backslashreplace') as file:
    file.write(page)


def _section(name, record):
  steps = record.steps
  parts = [f'<section><h2>{html.escape(name)}</h2>' if name else '<section>']
  parts.append(
    f'<p><small>{len(steps)} recorded steps, {steps[0]} to {steps[-1]}</small>'
    '</p>'
  )
  verdicts = _diagnose.diagnose(record)
  if not verdicts:
    well = html.escape(_diagnose.without_verdict(record))
    parts.append(f'<p class="well">{well[:1].upper()}{well[1:]}.</p>')
  for verdict in verdicts:
    parts.append(
      f'<div class="verdict"><b>{html.escape(verdict.kind)}</b>'
      f' ({verdict.severity:.2f}) since step {verdict.since}:'
      f' {html.escape(verdict.evidence)}<br>Try:'
      f' {html.escape(verdict.suggestion)}<br>'
      f'<small>{html.escape(verdict.source)}</small></div>'
    )
  for title, draw in _plot.pictures(record).items():
    heading = html.escape(title[:1].upper() + title[1:])
    parts.append(f'<h3>{heading}</h3><figure>{_svg(draw, heading)}</figure>')
  return ''.join(parts) + '</section>\n'


def _svg(draw, label):
  """A picture as an SVG element that can stand in HTML beside others."""
  matplotlib = optional.load('matplotlib', optional.PLOT_EXTRA)
  module = optional.load('matplotlib.figure', optional.PLOT_EXTRA)
  with matplotlib.rc_context(), warnings.catch_warnings():
    # The browser has the glyphs that matplotlib's font lacks.
    warnings.filterwarnings('ignore', 'Glyph .* missing')
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_DRAWING)
    figure = module.Figure(figsize=(9, 4), layout='constrained')
    draw(figure.subplots())
    file = io.StringIO()
    no_metadata = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    figure.savefig(file, format='svg', metadata=no_metadata)
  text = file.getvalue()
  body = text[text.index('<defs') :]
  body = re.sub(r'<style.*?</style>', '', body, flags=re.DOTALL)
  referred = set(re.findall(r'#(\w+)', body))

  def adapt(tag):
    """Drops ids that nothing refers to, since all pictures have the same."""
    tag = tag[0].replace(_TEXT_COLOR, 'currentColor')
    return re.sub(
      r' id="([^"]+)"', lambda m: m[0] if m[1] in referred else '', tag
    )

  width, height = 72 * figure.get_size_inches()
  return (
    f'<svg role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}">'
    + re.sub(r'<[^>]*>', adapt, body)
  )
