"""The pictures of a record, drawn by matplotlib."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_ghm._core import optional
from optax_ghm.flow import _record, _rules_depth, _tap, _verdict

if TYPE_CHECKING:
  from matplotlib.figure import Figure

TYPICAL_RATIO = 1e-3
MOST_NAMES = 20
"""Layers with a name beside the heat map, and lines with one in the legend."""


def figure(record: _record.Record) -> 'Figure':
  """Draws the gradients of a record in one figure.

  The figure shows the norms of the gradient over layers and steps, their
  profile over depth, update ratios over time, and the magnitudes at the first
  layer with a kernel. Non-finite numbers are red. Pictures of what the record
  does not hold are empty.

  Args:
    record: of the training.

  Returns:
    A matplotlib figure, which pyplot does not know: a notebook shows it after
    ``%matplotlib inline``, and ``savefig`` writes it.

  Raises:
    ImportError: if ``matplotlib`` is not installed.
    ValueError: if nothing is recorded.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> def loss(x, taps):
    ...   return jnp.sum(jnp.square(flow.tap(x, taps['hidden'])))
    >>> empty = flow.Taps.empty(['hidden'])
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), empty)
    >>> record = flow.Record()
    >>> record.add(0, taps=taps)
    >>> len(flow.figure(record).axes)
    5
  """
  if not len(record):
    raise ValueError('nothing is recorded.')
  module = optional.load('matplotlib.figure', optional.PLOT_EXTRA)
  figure = module.Figure(figsize=(12, 8), layout='constrained')
  found = pictures(record)
  first_layer = next((t for t in found if t.startswith('magnitudes')), '')
  titles = ('gradient norm at the layers', 'over depth')
  titles += ('update norm over parameter norm', first_layer)
  for ax, title in zip(figure.subplots(2, 2).flat, titles, strict=True):
    ax.set_title(text(title))
    if title in found:
      found[title](ax)
  return figure


def pictures(record: _record.Record) -> dict[str, Callable[[Any], None]]:
  """Functions that draw on matplotlib axes, by the title of the picture.

  Args:
    record: of the training.

  Returns:
    The pictures of what the record holds.
  """
  found: dict[str, Callable[[Any], None]] = {}
  if record.has_scalar('loss').sum() > 1:
    found['loss'] = lambda ax: _draw_loss(ax, record)
  tapped, watched = record.having('tapped'), record.having('watched')
  if len(tapped):
    found['gradient norm at the layers'] = lambda ax: _draw_norms(ax, tapped)
    profile = _rules_depth.depth_profile(tapped)
    depth = profile.layers
    if len(depth) > 1:
      found['over depth'] = lambda ax: _draw_profile(ax, tapped, profile)
    with_histogram = tapped.having('histogram')
    if len(with_histogram):
      depth = depth if len(depth) else np.arange(len(record.layers))
      for i in depth[[0, len(depth) // 2, -1]].tolist():
        found[f'magnitudes at {_name(record, i)}'] = lambda ax, i=i: (
          _draw_magnitudes(ax, with_histogram, i)
        )
  if len(watched) > 1 and any(leaf.rank >= 2 for leaf in record.leaves):
    found['update norm over parameter norm'] = lambda ax: _draw_ratios(
      ax, watched
    )
  return found


def text(name: str) -> str:
  """The text, escaped so that matplotlib sees no formulas and no controls."""
  return _verdict.printable(name).replace('$', r'\$')


def _name(record, i):
  return record.layers[i].name or '(the model)'


def _draw_loss(ax, record):
  given = record.has_scalar('loss')
  _line(ax, record.steps[given], record.scalars['loss'][given])
  ax.set_xlabel('step')


def _draw_norms(ax, record):
  from matplotlib.colors import LogNorm  # noqa: PLC0415

  norms = record.layer_stats['norm'].T
  shown = np.isfinite(norms) & (norms > 0)
  low = norms[shown].min() if shown.any() else 1.0
  high = norms[shown].max() if shown.any() else 1.0
  mesh = ax.pcolormesh(
    np.arange(norms.shape[1] + 1) - 0.5,
    np.arange(len(norms) + 1) - 0.5,
    np.ma.masked_where(~shown, norms),
    norm=LogNorm(low, max(high, low * 10)),
    rasterized=True,
  )
  bar = ax.figure.colorbar(mesh, ax=ax)
  bar.solids.set_rasterized(True)
  ax.set_facecolor('gray')
  rows, columns = np.nonzero(~np.isfinite(norms))
  ax.plot(columns, rows, 's', color='red', markersize=3, rasterized=True)
  ax.invert_yaxis()
  some = range(0, len(norms), -(-len(norms) // MOST_NAMES))
  ax.set_yticks(some, [text(_name(record, i)[-40:]) for i in some])
  ax.set_ylabel('from the input to the loss')
  _label_steps(ax, record, 'gray: no gradient, red: not finite')


def _draw_profile(ax, record, profile):
  depth = np.arange(len(profile.layers))
  for t in sorted({0, len(record) // 2, len(record) - 1}):
    label = f'step {record.steps[t]}'
    _line(ax, depth, profile.log_norms[t], 'o-', label=label)
  ax.set_xlabel('layers with a kernel, from the input')
  ax.set_ylabel('log10 of the gradient norm')
  ax.legend()


def _draw_ratios(ax, record):
  ratios = record.leaf_stats['update_ratio']
  kernels = [i for i, leaf in enumerate(record.leaves) if leaf.rank >= 2]
  for i in kernels:
    name = text(record.leaves[i].name)
    # A label that begins with an underscore would not be in the legend.
    label = f' {name}' if name.startswith('_') else name
    values = np.where(ratios[:, i] == 0, np.nan, ratios[:, i])
    many = len(kernels) > MOST_NAMES
    _line(ax, record.steps, values, label=label, rasterized=many)
  ax.axhline(TYPICAL_RATIO, color='gray', linestyle='--')
  ax.set_yscale('log')
  ax.set_xlabel(f'step; the dashed line is at {TYPICAL_RATIO:g}')
  if len(kernels) <= MOST_NAMES:
    ax.legend(fontsize='small')


def _draw_magnitudes(ax, record, layer):
  counts = np.nan_to_num(record.histograms[:, layer].T).clip(0)
  octaves = _tap.OCTAVES_PER_CELL * np.arange(len(counts) + 1)
  edges = (_tap.LOWEST_EXPONENT + octaves) * np.log10(2)
  ax.pcolormesh(
    np.arange(counts.shape[1] + 1) - 0.5,
    edges,
    np.log1p(counts),
    rasterized=True,
  )
  used = np.flatnonzero(counts.any(1))
  if len(used):
    ax.set_ylim(*edges[[used[0], used[-1] + 1]])
  ax.set_ylabel('log10 of the magnitude')
  _label_steps(ax, record, 'the brighter, the more')


def _line(ax, x, y, *style, **options):
  """A line, with a red mark at the top for every value that is not finite."""
  bad = ~np.isfinite(y)
  # Matplotlib overflows where the range of an axis does.
  shown = np.where(bad, np.nan, np.clip(y, -1e300, 1e300))
  ax.plot(x, shown, *style, **options)
  if bad.any():
    top = np.ones(bad.sum())
    at_top = ax.get_xaxis_transform()
    ax.plot(x[bad], top, 'x', color='red', transform=at_top, clip_on=False)


def _label_steps(ax, record, legend):
  steps = record.steps
  some = range(0, len(steps), max(len(steps) // 6, 1))
  ax.set_xticks(some, [str(steps[i]) for i in some])
  ax.set_xlabel(f'step ({legend})')
