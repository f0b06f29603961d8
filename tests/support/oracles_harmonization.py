"""Densities, harmony weights and plain losses by definition, in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from optax_ghm import harmonization

MU = 0.5  # of the smooth L1 loss


def published(density=None, **kwargs):
  """GHM as published, with a density; that of mmdetection as it is there."""
  raw = isinstance(density, harmonization.MMDetectionDensity)
  kwargs = {'density': density, 'normalize': not raw} | kwargs
  return dataclasses.replace(harmonization.GHM, **kwargs)


# Densities, from the counts of the cells of a histogram.


def length_of(density):
  low, high = density.low, density.high
  return np.log10(high / low) if density.log else high - low


def binned(density, cells):
  """What part of every cell a region covers, and the length of the region."""
  return np.eye(cells), np.full(cells, length_of(density) / cells)


def windowed(density, cells):
  """What part of every cell the window of a cell covers, and its length."""
  cell = length_of(density) / cells
  half = max(density.width / cell, 1) / 2
  center, edge = np.arange(cells)[:, None] + 0.5, np.arange(cells)
  over = np.minimum(center + half, edge + 1) - np.maximum(center - half, edge)
  over = np.clip(over, 0, 1)
  return over, over.sum(1) * cell


def exact(g, mass, width, low=0.0):
  """The definition of the paper, O(N²), with norms in [low, 1]."""
  inside = g >= g[:, None] - width / 2
  inside &= (g < g[:, None] + width / 2) | (g == g[:, None])
  length = np.minimum(width / 2, 1 - g) + np.minimum(width / 2, g - low)
  return np.where(mass > 0, inside @ mass / length, 0)


def harmony(gd, mass, normalize=True):
  """N / GD, divided by its mean; 0 where the density is 0."""
  beta = np.where(gd > 0, mass.sum() / np.where(gd > 0, gd, 1), 0)
  if not normalize:
    return beta
  return beta * mass.sum() / max((mass * beta).sum(), 1e-30)


@dataclasses.dataclass(frozen=True)
class Smooth(harmonization.ExactDensity):
  """A density without edges: rounding of a norm moves no weight by much."""

  def update(self, norms, state, amounts=None, axis_name=None, train=True):
    regions, state = super().update(norms, state, amounts, axis_name, train)
    density = jnp.where(regions.count > 0, crowd_of(norms.ravel()), 0)
    return regions._replace(density=density), state


def crowd_of(norms):
  return 1 + 3 * norms


def harmony_of(g, weights):
  """The harmony weights of :class:`Smooth` times the weights."""
  valid = (weights > 0) & np.isfinite(g)
  mass = np.where(valid, weights, 0)
  crowd = np.where(valid, crowd_of(np.where(valid, g, 0)), 0)
  return mass * harmony(crowd, mass)


# Losses: each with its gradient, and the norm of that.


@np.errstate(all='ignore')
def sigmoid(x, y, largest=np.inf):
  """Of binary cross-entropy; infinities count as the largest number."""
  x = np.clip(x, -largest, largest)
  loss = np.where(x >= 0, x * (1 - y), -x * y) + np.log1p(np.exp(-np.abs(x)))
  error = np.exp(-np.logaddexp(0, -x)) - y
  return loss, error, np.abs(error)


def smooth_l1(x, y, largest=np.inf, mu=MU):
  d = np.clip(x - y, -largest, largest)
  root = np.hypot(d, mu)
  return d * (d / (root + mu)), d / root, np.abs(d) / root


@np.errstate(all='ignore')
def softmax(x, labels):
  """Of cross-entropy; the norm is half of the sum of magnitudes."""
  known = (labels >= 0) & (labels < x.shape[-1])
  at = np.where(known, labels, 0)[..., None].astype(int)
  log_p = x - x.max(-1, keepdims=True)
  log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
  loss = -np.take_along_axis(log_p, at, -1)[..., 0]
  error = np.exp(log_p) - (np.arange(x.shape[-1]) == at)
  loss = np.where(known, loss, np.nan)
  return loss, error, -np.expm1(-loss)
