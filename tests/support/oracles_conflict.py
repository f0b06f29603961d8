"""Conflict weights by their formulas, in float64."""

import numpy as np

from tests.support.strategies_trees import wide

RULES = ('gh', 'gh++')


def flat(tree):
  """The real numbers of a tree in a row, float64."""

  def reals(x):
    width = np.complex128 if np.iscomplexobj(x) else np.float64
    return x.astype(width).ravel().view(np.float64)

  return np.concatenate([np.zeros(0), *map(reals, wide(tree))])


def weights(first, second, rule='gh', harmonic_range=0.5):
  """The weights of two gradients, pytrees or arrays."""
  g1, g2 = flat(first), flat(second)
  lengths = np.linalg.norm(g1), np.linalg.norm(g2)
  if not (np.isfinite(lengths).all() and min(lengths) > 0):
    return 1.0, 1.0
  cosine = np.clip((g1 / lengths[0]) @ (g2 / lengths[1]), -1, 1)
  if cosine >= 0:
    return 1.0, 1.0
  if rule == 'gh':
    ratio = lengths[1] / lengths[0]
    return 1 - cosine * ratio, 1 - cosine / ratio
  excess = np.arccos(cosine) - np.pi / 2
  beta = harmonic_range * excess
  return 1 + 2 * np.sin(beta / 2), 1 - 2 * np.sin((excess - beta) / 2)


def combined(first, second, **kwargs):
  """The sum of the weighted gradients, in a row."""
  one, two = weights(first, second, **kwargs)
  return one * flat(first) + two * flat(second)
