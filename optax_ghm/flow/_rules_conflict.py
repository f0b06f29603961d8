"""Rules about several losses of one model."""

import numpy as np

from optax_ghm.flow import _record, _verdict

MAX_COSINE = -0.2
"""The median cosine from which on a pair of losses is reported. Of 4,000 pairs
of random gradients, none had it over 10 steps with 100 parameters, and 2 % with
10 parameters."""


MIN_SHARE = 0.75
"""The share of steps in which the cosine of such a pair is negative."""


def losses_in_conflict(record: _record.Record) -> list[_verdict.Verdict]:
  """Finds pairs of losses whose gradients point against each other."""
  stats = record.loss_stats
  recent = slice(-_verdict.RECENT_STEPS, None)
  cosines = stats['cosine'][recent]
  if len(cosines) < _verdict.MIN_STEPS:
    return []
  medians, shares = np.median(cosines, axis=0), np.mean(cosines < 0, axis=0)
  bad = np.triu((medians <= MAX_COSINE) & (shares >= MIN_SHARE))
  if not bad.any():
    return []
  i, j = map(int, np.argwhere(bad)[np.argmin(medians[bad])])
  norms, weights = (
    np.median(stats[name][recent], axis=0) for name in ('norm', 'weight')
  )
  suggestion = (
    'they are averaged: reconcile them by one of the methods of'
    ' optax_ghm.conflict, such as upgrad_weights.'
  )
  if not np.allclose(weights, 1 / len(weights)):
    suggestion = (
      'they are reconciled: if one of them does not fall all the same, they may'
      ' not be compatible: give them parameters of their own.'
    )
  several = f', the worst of {bad.sum()} pairs,' if bad.sum() > 1 else ''
  return [
    _verdict.Verdict(
      'losses in conflict',
      _verdict.severity(medians[i, j], MAX_COSINE),
      _names(bad.any(0) | bad.any(1)),
      _verdict.since(record, (stats['cosine'][:, bad] < 0).any(1)),
      f'the gradients of losses {i} and {j}{several} point against each other'
      f' in {shares[i, j]:.0%} of the last {len(cosines)} recorded steps; their'
      f' cosine is {medians[i, j]:.2f}, their norms are {norms[i]:.2g} and'
      f' {norms[j]:.2g}, their weights {weights[i]:.2g} and {weights[j]:.2g}'
      ' (medians)',
      f'{suggestion} Scale them if their norms are far apart. At the end of'
      ' training, it is the trade-off between them that is left.',
      'Yu et al. 2020; Quinton & Rey 2024',
    )
  ]


def left_out(record: _record.Record) -> list[_verdict.Verdict]:
  """Finds losses that were left out, since their gradients were not finite."""
  more = np.diff(record.loss_stats['non_finite'], axis=0).clip(0)
  recent = more[-_verdict.RECENT_STEPS :] > 0
  bad = recent.any(0)
  if not bad.any():
    return []
  names = _names(bad)
  return [
    _verdict.Verdict(
      'not finite',
      _verdict.severity_of_share(np.any(recent, axis=1)),
      names,
      int(record.steps[1:][more[:, bad].any(1)][0]),
      f'at {recent.any(1).sum()} of the last {len(recent)} recorded steps,'
      f' {_verdict.listed(names)} had NaN or inf in the gradient, and was left'
      ' out',
      'look in this loss for a division, root, logarithm or power at 0, for a'
      ' mean over no examples, and for 16-bit overflow. If all were left out,'
      ' one may have made the others so (0 times NaN): look at their values.',
      'JAX FAQ, "Gradients contain NaN where using where"',
    )
  ]


def _names(mask):
  return tuple(f'loss {i}' for i in np.flatnonzero(mask))
