"""The pictures, as a matplotlib figure."""

from typing import TYPE_CHECKING

import numpy as np

from optax_ghm.flow import _record, _rules_depth, _tap

if TYPE_CHECKING:
  from matplotlib.figure import Figure

RATIO_GUIDE = 1e-3
"""What a step usually changes of a parameter's norm."""


def figure(record: _record.Record) -> 'Figure':
  """Heat map, depth profile, update ratios and histogram in one figure.

  Args:
    record: of the training; what it does not hold is left empty.

  Returns:
    A matplotlib figure, not registered with pyplot: a notebook shows it,
    ``savefig`` writes it. What is not finite is red.

  Raises:
    ImportError: if ``matplotlib`` is not installed.
    ValueError: if nothing is recorded.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> def loss(x, taps):
    ...   return jnp.sum(jnp.square(flow.tap(x, taps['hidden'])))
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), flow.Taps.of(['hidden']))
    >>> record = flow.Record()
    >>> record.add(0, taps=taps)
    >>> len(flow.figure(record).axes)
    5
  """
  from matplotlib.colors import LogNorm  # noqa: PLC0415
  from matplotlib.figure import Figure  # noqa: PLC0415

  steps = record.steps
  if not len(steps):
    raise ValueError('nothing is recorded.')
  figure = Figure(figsize=(12, 8), layout='constrained')
  axes = figure.subplots(2, 2)

  ax = axes[0, 0]
  ax.set_title('gradient norm at the layers')
  if record.layers:
    norms = record.layer_stats['norm']
    seen = norms[np.isfinite(norms) & (norms > 0)]
    low, high = (seen.min(), seen.max()) if len(seen) else (1, 1)
    mesh = ax.pcolormesh(
      np.arange(len(steps) + 1) - 0.5,
      np.arange(len(record.layers) + 1) - 0.5,
      np.ma.masked_where(~(np.isfinite(norms) & (norms > 0)), norms).T,
      norm=LogNorm(low, max(high, low * 10)),
    )
    figure.colorbar(mesh, ax=ax)
    bad = ~np.isfinite(norms) & ~np.isnan(record.layer_stats['calls'])
    ax.plot(*np.nonzero(bad), 's', color='red', markersize=3)
    ax.invert_yaxis()
    every = max(len(record.layers) // 20, 1)
    shown = range(0, len(record.layers), every)
    ax.set_yticks(
      list(shown),
      [_text(record.layers[i].name or '(the model)') for i in shown],
    )
    _label_steps(ax, steps)

  ax = axes[0, 1]
  ax.set_title('over depth')
  ax.set_xlabel('layers with a kernel, from the input')
  ax.set_ylabel('log10 of the gradient norm')
  profile = _rules_depth.depth_profile(record)
  if len(profile.layers):
    for t in sorted({0, len(steps) // 2, len(steps) - 1}):
      ax.plot(profile.log_norms[t], 'o-', label=f'step {steps[t]}')
    ax.legend()

  ax = axes[1, 0]
  ax.set_title('update norm over parameter norm')
  ratio = record.leaf_stats['update_ratio']
  for i, leaf in enumerate(record.leaves):
    positive = np.where(ratio[:, i] > 0, ratio[:, i], np.nan)
    if leaf.rank >= 2 and np.isfinite(positive).any():
      ax.plot(steps, positive, label=_text(leaf.name))
  ax.axhline(RATIO_GUIDE, color='gray', linestyle='--')
  ax.set_yscale('log')
  ax.set_xlabel('step')
  if 0 < len(ax.get_legend_handles_labels()[0]) <= 12:
    ax.legend(fontsize='small')

  ax = axes[1, 1]
  histograms = record.histograms
  ax.set_title('magnitudes at the first layer')
  if histograms is not None:
    at = int(profile.layers[0]) if len(profile.layers) else 0
    name = _text(record.layers[at].name or '(the model)')
    ax.set_title(f'magnitudes at {name}')
    edges = _tap.LOWEST + _tap.OCTAVES * np.arange(_tap.CELLS + 1)
    ax.pcolormesh(
      np.arange(len(steps) + 1) - 0.5,
      edges * np.log10(2),
      np.log1p(np.nan_to_num(histograms[:, at])).T,
    )
    ax.set_ylabel('log10 of the magnitude')
    _label_steps(ax, steps)
  return figure


def _label_steps(ax, steps):
  every = max(len(steps) // 6, 1)
  shown = range(0, len(steps), every)
  ax.set_xticks(list(shown), [str(steps[i]) for i in shown])
  ax.set_xlabel('step')


def _text(name):
  """A name as it is: no mathematics, and a legend entry in any case."""
  name = name.replace('$', r'\$')
  return f' {name}' if name.startswith('_') else name
