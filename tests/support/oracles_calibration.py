"""The rules of calibration, one step at a time, in float64 NumPy."""

import jax
import numpy as np

import optax_ghm
from tests.support.strategies_trees import is_inexact, wide


def by_rank(tree):
  return jax.tree.map(lambda leaf: f'rank {np.ndim(leaf)}', tree)


SCOPES = {
  'global': 'global',
  'leaf': 'leaf',
  'unit': 'unit',
  'groups': optax_ghm.Groups(by_rank),
  'units': optax_ghm.Units(lambda path, leaf: tuple(range(leaf.ndim))[:1]),
}


def counted_with_path(tree):
  return [
    (path, leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if is_inexact(leaf) and leaf.size
  ]


def fan_ins(scope, tree):
  """The axes of every leaf over which a unit goes."""
  layout = SCOPES[scope] if scope == 'units' else optax_ghm.Units()
  return [layout.axes(*each) for each in counted_with_path(tree)]


def norms(scope, tree):
  """The norms of every leaf, broadcastable to it."""
  squares = [np.abs(x) ** 2 for x in wide(tree)]
  if scope in ('unit', 'units'):
    return [
      np.sqrt(np.sum(x, axes, keepdims=True))
      for x, axes in zip(squares, fan_ins(scope, tree), strict=True)
    ]
  labels = {
    'global': [0] * len(squares),
    'leaf': range(len(squares)),
    'groups': [x.ndim for x in squares],
  }[scope]
  totals = {}
  for label, x in zip(labels, squares, strict=True):
    totals[label] = totals.get(label, 0) + np.sum(x)
  return [np.sqrt(totals[label]) for label in labels]


# Clips of a stream of norms: the clipped norms, and the thresholds.


def constant(norms, max_norm):
  return np.minimum(norms, max_norm), np.full(len(norms), max_norm)


def percentile(norms, q, length):
  thresholds = [
    np.percentile(norms[max(t - length + 1, 0) : t + 1], q)
    for t in range(len(norms))
  ]
  return np.minimum(norms, thresholds), np.array(thresholds)


def quantile(norms, q, learning_rate=0.2):
  estimate, thresholds = next(iter(norms), np.inf), []
  for n in norms:
    thresholds.append(estimate)
    estimate *= np.exp(-learning_rate * ((n <= estimate) - q / 100))
  return np.minimum(norms, thresholds), np.array(thresholds)


def zscore(norms, z_threshold=2.5, decay=0.97, warmup=25):
  clipped, thresholds = [], []
  for n in norms:
    new, threshold = n, np.inf
    if len(clipped) == warmup:
      mean, variance = np.mean(clipped), np.var(clipped)
    if len(clipped) >= warmup:
      reach = z_threshold * max(np.sqrt(variance), 1e-6 * mean)
      threshold = mean + reach
      if n > threshold:
        new = mean + reach**2 / (n - mean)
      mean = decay * mean + (1 - decay) * new
      variance = decay * variance + (1 - decay) * (new - mean) ** 2
    clipped.append(new)
    thresholds.append(threshold)
  return np.array(clipped), np.array(thresholds)


def norm_ema(norms, ratio=1.05, decay=0.98, max_norm=1.0, warmup=100):
  clipped, average, thresholds = [], np.inf, []
  for t, n in enumerate(norms):
    thresholds.append(max_norm if t < warmup else ratio * average)
    clipped.append(min(n, thresholds[-1]))
    if t < warmup:
      average = min(average, clipped[-1])
    else:
      average = decay * average + (1 - decay) * clipped[-1]
  return np.array(clipped), np.array(thresholds)


def adagc(norms, ratio, decay, max_norm, warmup, eps=1e-6):
  """By the authors' program of 2026: the clipped norms, (steps, leaves)."""
  averages, clipped = np.inf, []
  for t, own in enumerate(norms):
    if t < warmup:
      new = own * min(max_norm / (np.linalg.norm(own) + eps), 1)
      averages = np.minimum(averages, new)
    else:
      limit = ratio * averages
      new = np.where(own > limit, own * limit / (own + eps), own)
      averages = decay * averages + (1 - decay) * np.minimum(own, limit)
    clipped.append(new)
  return np.array(clipped)


# Other rules.


def spikes(norms, values, length, row, sigmas=6.0):
  """Which steps are taken, skipped in a row so far, and both limits."""

  def limit(window):
    if len(window) < max(length // 8, 2):
      return np.inf
    last = window[-length:]
    deviation = max(np.std(last, ddof=1), 1e-6 * abs(np.mean(last)))
    return np.mean(last) + sigmas * deviation

  windows, in_a_row, results = ([], []), 0, []
  for t, norm in enumerate(norms):
    x = (norm,) if values is None else (norm, values[t])
    limits = [limit(w) for w in windows]
    finite = np.isfinite(x).all()
    outlier = windows[0] and norm > 1e4 * np.mean(windows[0][-length:])
    spike = outlier or any(
      number > own for number, own in zip(x, limits, strict=False)
    )
    reset = finite and spike and in_a_row >= row
    taken = finite and (not spike or reset)
    if taken:
      in_a_row = 0
      for number, window in zip(x, windows, strict=False):
        if reset:
          window.clear()
        if window is windows[1] or number > 0:
          window.append(number)
    elif finite:
      in_a_row += 1
    results.append((bool(taken), in_a_row, *limits))
  return [np.array(column) for column in zip(*results, strict=True)]


def noise(squares, square_of_mean, batch_size):
  """Signal and variance, from the paper's two batch sizes."""
  small, big = batch_size, batch_size * len(squares)
  of_small = np.mean(squares)
  signal = (big * square_of_mean - small * of_small) / (big - small)
  return signal, (of_small - square_of_mean) / (1 / small - 1 / big)
