"""Reconciled directions by their definitions, in float64."""

import numpy as np
from scipy.optimize import nnls


def projected(g, rows):
  """The nearest vector to g that points against no row."""
  lengths = np.linalg.norm(rows, axis=1)
  units = rows / np.where(lengths > 0, lengths, 1)[:, None]
  size = np.linalg.norm(g) or 1
  gains, _ = nnls(units.T, -g / size, maxiter=999)
  return g + size * gains @ units


def upgrad(rows):
  return np.mean([projected(g, rows) for g in rows], axis=0)


def dualproj(rows):
  return projected(rows.mean(0), rows)


def mgda(rows):
  """The shortest mean, of rows that are not 0."""
  lengths = np.linalg.norm(rows, axis=1)
  shortest = lengths.min()
  # Half the squared length plus half of (1 - the sum of the weights)².
  scaled = np.vstack([(rows / lengths[:, None]).T, shortest / lengths])
  x, _ = nnls(scaled, np.eye(len(scaled))[-1], maxiter=999)
  weights = x / lengths
  return weights @ rows / weights.sum()


def gh(rows):
  """The sum of two gradients that each lose what points against the other."""
  one, two = rows
  return projected(one, rows[1:]) + projected(two, rows[:1])


def gh_plus_plus_weights(rows, harmonic_range=0.5):
  """Weights by the angle between two gradients, neither of them 0."""
  units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  excess = max(np.arccos(np.clip(units[0] @ units[1], -1, 1)) - np.pi / 2, 0)
  beta = harmonic_range * excess
  return 1 + 2 * np.sin(beta / 2), 1 - 2 * np.sin((excess - beta) / 2)
