"""The trend of the gradient's norm over depth."""

from typing import NamedTuple

import numpy as np

from optax_ghm.flow import _record, _verdict

MIN_VANISHING, MIN_EXPLODING = 0.06, 0.11
"""Decades per layer. Gradients that grow towards the input are healthier: batch
norm with ReLU has 0.083 at the start, and trains. None of 27 healthy networks
had 0.06 and two decades the other way."""


MIN_DECADES, MIN_R2, MIN_LAYERS = 2.0, 0.7, 5


BRANCH, MIN_TRUNK = 1.0, 0.6
"""Decades below the line, from which on a layer is on a side branch, and the
share of layers that are not: queries and keys have much smaller gradients than
the trunk of a transformer."""


class DepthProfile(NamedTuple):
  """The gradient's norm over depth, at every recorded step.

  Attributes:
    layers: indices of the layers with a kernel that a gradient has reached.
    log_norms: (steps, layers), log10 of the norms at their outputs.
    slope: (steps,), decades per layer from the input to the loss: positive
      where gradients vanish on their way back to the input.
    decades: (steps,), the slope times the number of layers less one.
    r2: (steps,), the share of the variance that the line explains.
  """

  layers: np.ndarray
  log_norms: np.ndarray
  slope: np.ndarray
  decades: np.ndarray
  r2: np.ndarray


def depth_profile(record: _record.Record) -> DepthProfile:
  r"""Fits a line to the norms of activation gradients over depth.

  .. math::
    \log_{10} \lVert \partial L / \partial h_l \rVert \approx a + b\, l

  by least squares, over the layers l that have a kernel, where h is the output
  of the layer. The gradients of the kernels do not show what is lost between
  layers: a kernel's gradient is the gradient of its output times its input, and
  in a ReLU network one shrinks as the other grows.

  Args:
    record: of the training, with taps.

  Returns:
    The profile. A gradient of 0 counts as 2^-149, the smallest float32. A step
    with a non-finite norm has a non-finite line.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> names = [f'layer {i}' for i in range(8)]
    >>> def loss(x, taps):
    ...   for name in names:
    ...     x = flow.tap(x / 2, taps[name])
    ...   return jnp.sum(x)
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), flow.Taps.empty(names))
    >>> record = flow.Record()
    >>> record.add(0, taps=taps)
    >>> print(flow.depth_profile(record).slope.round(3))
    [0.301]

  References:
    Glorot & Bengio, `Understanding the difficulty of training deep feedforward
    neural networks <https://proceedings.mlr.press/v9/glorot10a.html>`_, 2010
  """
  stats = record.layer_stats
  has_kernel = np.array([layer.has_kernel for layer in record.layers], bool)
  reached = (stats['calls'] > 0).any(0)
  layers = np.flatnonzero(has_kernel & reached)
  if not len(layers):
    missing = np.full(len(record), np.nan)
    return DepthProfile(
      layers, np.zeros((len(record), 0)), missing, missing, missing
    )
  norms = np.maximum(stats['norm'][:, layers], _verdict.SMALLEST_FLOAT32)
  return _fitted(layers, np.log10(norms), np.arange(len(layers)))


def _fitted(layers, log_norms, depth):
  """The line over depth, at every step."""
  centered_depth = depth - depth.mean()
  with np.errstate(invalid='ignore', divide='ignore'):
    centered = log_norms - log_norms.mean(1, keepdims=True)
    slope = centered @ centered_depth / max((centered_depth**2).sum(), 1)
    explained = ((slope[:, None] * centered_depth) ** 2).sum(1)
    r2 = explained / (centered**2).sum(1)
  decades = slope * (depth[-1] - depth[0])
  return DepthProfile(layers, log_norms, slope, decades, r2)


def _trunk(profile, recent):
  """The profile without side branches, whose norms are far below the line."""
  depth = np.arange(len(profile.layers))
  norms = np.median(profile.log_norms[recent], axis=0)
  kept, branches = depth >= 0, depth < 0
  while True:
    kept &= ~branches
    if kept.sum() < MIN_TRUNK * len(depth):
      return profile
    slope, start = np.polyfit(depth[kept], norms[kept], 1)
    branches = kept & (norms < start + slope * depth - BRANCH)
    if not branches.any():
      break
  return _fitted(profile.layers[kept], profile.log_norms[:, kept], depth[kept])


def trend_over_depth(record: _record.Record) -> list[_verdict.Verdict]:
  """Tells whether the gradient vanishes or explodes towards the input."""
  profile = depth_profile(record)
  finite = np.isfinite(profile.slope)
  if len(profile.layers) < MIN_LAYERS or not finite.any():
    return []
  recent = np.flatnonzero(finite)[-_verdict.RECENT_STEPS :]
  profile = _trunk(profile, recent)
  if len(profile.layers) < MIN_LAYERS:
    return []
  slope, decades, r2 = (
    float(np.median(values[recent]))
    for values in (profile.slope, profile.decades, profile.r2)
  )
  least = MIN_VANISHING if slope > 0 else MIN_EXPLODING
  if abs(slope) < least or abs(decades) < MIN_DECADES or r2 < MIN_R2:
    return []
  norms = 10 ** np.median(profile.log_norms[recent], axis=0)
  names = [_verdict.layer_name(record, i) for i in profile.layers]
  if slope > 0:
    kind, verb, affected = 'vanishing', 'falls', norms < 1e-3 * max(norms)
    suggestion = (
      'initialize for the activation (He for ReLU, Glorot for tanh), put'
      ' ReLU-like activations in the place of saturating ones, add skip'
      ' connections or normalization layers.'
    )
    source = (
      'Glorot & Bengio 2010; He et al. 2015 (initialization), 2016 (skip'
      ' connections); Ioffe & Szegedy 2015'
    )
  else:
    kind, verb, affected = 'exploding', 'grows', norms > 1e3 * min(norms)
    suggestion = (
      'use a smaller gain in the initialization (He for ReLU), add'
      ' normalization layers or scale the residual branches down; a clip'
      ' (optax_ghm.calibrated) helps against the size, not against the slope.'
    )
    source = 'Pascanu et al. 2013; He et al. 2015; Ioffe & Szegedy 2015'
  # Half the limits are enough for the steps before.
  with np.errstate(invalid='ignore'):
    holds = ~finite | (
      (np.sign(slope) * profile.slope >= least / 2)
      & (np.abs(profile.decades) >= MIN_DECADES / 2)
    )
  return [
    _verdict.Verdict(
      kind,
      _verdict.severity(abs(decades), MIN_DECADES),
      tuple(n for n, u in zip(names, affected, strict=True) if u)
      or (names[0],),
      _verdict.since(record, holds),
      f'the norm {verb} by {abs(slope):.2f} decades per layer towards the'
      f' input, {abs(decades):.1f} over {len(names)} layers (R² {r2:.2f}):'
      f' {norms[-1]:.2g} at {names[-1]}, {norms[0]:.2g} at {names[0]}',
      suggestion,
      source,
    )
  ]
