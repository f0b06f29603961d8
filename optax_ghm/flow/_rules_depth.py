"""How the gradient's norm goes with depth."""

from typing import NamedTuple

import numpy as np

from optax_ghm.flow import _record, _verdict

DECADES_PER_LAYER, DECADES, LEAST_R2, LEAST_LAYERS = 0.11, 2.0, 0.7, 5
"""Where a slope is called a trend: BatchNorm and ReLU alone make 0.083 decades
per layer at the start, and train well."""


class DepthProfile(NamedTuple):
  """How the gradient's norm goes with depth, for every recorded step.

  Attributes:
    layers: indices of the layers with a kernel that some gradient reached.
    log_norms: (steps, layers), log10 of the norms at their outputs.
    slope: (steps,), decades per layer, from the input on: positive where
      gradients vanish on their way back to the input.
    decades: (steps,), the slope times the number of layers between.
    r2: (steps,), what share of the variance the line explains.
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

  by least squares, over the layers l that have a kernel of their own, at whose
  outputs h the gradient is taken: the gradients of the kernels themselves do
  not show what is lost between layers, since a kernel's gradient is that of its
  output times its input, and in a ReLU network one shrinks as the other grows.

  Args:
    record: with taps.

  Returns:
    The profile; of a gradient that is 0 the logarithm is that of the least
    float32, 2^-149. Where a norm is not finite, so is the line.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> names = [f'layer {i}' for i in range(8)]
    >>> def loss(x, taps):
    ...   for name in names:
    ...     x = flow.tap(x / 2, taps[name])
    ...   return jnp.sum(x)
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), flow.Taps.of(names))
    >>> record = flow.Record()
    >>> record.add(0, taps=taps)
    >>> print(flow.depth_profile(record).slope.round(3))
    [0.301]

  References:
    Glorot & Bengio, `Understanding the difficulty of training deep feedforward
    neural networks <https://proceedings.mlr.press/v9/glorot10a.html>`_, 2010
  """
  stats = record.layer_stats
  reached = np.nan_to_num(stats['calls']).sum(0) > 0
  layers = np.array(
    [i for i, layer in enumerate(record.layers) if layer.has_kernel], int
  )
  layers = layers[reached[layers]]
  if not len(layers):
    nothing = np.full(len(record), np.nan)
    return DepthProfile(
      layers, np.zeros((len(record), 0)), nothing, nothing, nothing
    )
  log_norms = np.log10(np.maximum(stats['norm'][:, layers], _verdict.LEAST))
  depth = np.arange(len(layers)) - (len(layers) - 1) / 2
  with np.errstate(invalid='ignore', divide='ignore'):
    centered = log_norms - log_norms.mean(1, keepdims=True)
    slope = centered @ depth / max((depth**2).sum(), 1)
    r2 = (slope[:, None] * depth) ** 2
    r2 = r2.sum(1) / (centered**2).sum(1)
  return DepthProfile(
    layers, log_norms, slope, slope * max(len(layers) - 1, 0), r2
  )


def trend_over_depth(record: _record.Record) -> list[_verdict.Verdict]:
  """Whether the gradient vanishes or explodes on its way to the input."""
  profile = depth_profile(record)
  if len(profile.layers) < LEAST_LAYERS:
    return []
  finite = np.isfinite(profile.slope)
  if not finite.any():
    return []
  recent = np.flatnonzero(finite)[-_verdict.RECENT :]
  slope, decades, r2 = (
    float(np.median(values[recent]))
    for values in (profile.slope, profile.decades, profile.r2)
  )
  if abs(slope) < DECADES_PER_LAYER or abs(decades) < DECADES or r2 < LEAST_R2:
    return []
  vanishing = slope > 0
  norms = 10 ** np.median(profile.log_norms[recent], axis=0)
  names = [_verdict.called(record, i) for i in profile.layers]
  verb = 'falls' if vanishing else 'grows'
  evidence = (
    f'the norm {verb} by {abs(slope):.2f} decades per layer towards the input,'
    f' {abs(decades):.1f} over {len(names)} layers (R² {r2:.2f}):'
    f' {norms[-1]:.2g} at {names[-1]}, {norms[0]:.2g} at {names[0]}'
  )
  # Half of it is enough to say that it was so before.
  with np.errstate(invalid='ignore'):
    same = ~finite | (
      (np.sign(slope) * profile.slope >= DECADES_PER_LAYER / 2)
      & (np.abs(profile.decades) >= DECADES / 2)
    )
  if vanishing:
    small = tuple(
      n for n, u in zip(names, norms, strict=True) if u < 1e-3 * max(norms)
    )
    return [
      _verdict.Verdict(
        'vanishing',
        small or tuple(names[:1]),
        _verdict.since(record, same),
        evidence,
        'initialize for the activation (He for ReLU, Glorot for tanh), put'
        ' ReLU-like activations in the place of saturating ones, add skip'
        ' connections or normalization layers.',
        'Glorot & Bengio 2010; He et al. 2015 (initialization), 2016 (skip'
        ' connections); Ioffe & Szegedy 2015',
      )
    ]
  large = tuple(
    n for n, u in zip(names, norms, strict=True) if u > 1e3 * min(norms)
  )
  return [
    _verdict.Verdict(
      'exploding',
      large or tuple(names[:1]),
      _verdict.since(record, same),
      evidence,
      'use a smaller gain in the initialization (He for ReLU), add'
      ' normalization layers or scale the residual branches down; a clip'
      ' (optax_ghm.calibrated) helps against the size, not against the slope.',
      'Pascanu et al. 2013; He et al. 2015; Ioffe & Szegedy 2015',
    )
  ]
