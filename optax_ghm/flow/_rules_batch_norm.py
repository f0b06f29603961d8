"""Rules about batch norms."""

import numpy as np

from optax_ghm.flow import _verdict

MAX_CONSTANT_SHARE = 0.5
"""The largest healthy share of features that do not vary."""


MAX_DRIFT = 0.5
"""The drift that is too large. Batches of 4 examples have as much by chance."""


def batch_norms(record):
  """Finds features that do not vary and running averages that are far off."""
  verdicts, stats = [], record.batch_norm_stats
  for kind, columns, limit, evidence, suggestion, source in (
    (
      'constant features',
      ('constant',),
      MAX_CONSTANT_SHARE,
      'half or more of the features at {names} have a variance below epsilon,'
      ' {worst:.0%} at the worst: they are no longer normalized',
      'their input is off or saturated for all examples (dead units before'
      ' it, a mask, an embedding that is not used): look at the layer before.',
      'Ioffe & Szegedy 2015',
    ),
    (
      'running averages',
      ('mean_drift', 'std_drift'),
      MAX_DRIFT,
      'at {names} the batches are off the running averages by {worst:.2g}'
      ' standard deviations, or a factor exp({worst:.2g}) of it: evaluation'
      ' will see another network than training does',
      'let the averages settle (train on, or a smaller momentum), recalibrate'
      ' them before evaluating (recalibrate in optax_ghm.linen and .nnx), use'
      ' larger batches, or BatchRenorm.',
      'Ioffe 2017; Wu & Johnson 2021',
    ),
  ):
    worst = np.max([stats[column] for column in columns], axis=0)
    medians = {}
    for i in range(len(record.batch_norms)):
      recent = worst[~np.isnan(worst[:, i]), i][-_verdict.RECENT_STEPS :]
      if len(recent) >= _verdict.MIN_STEPS and np.median(recent) > limit:
        medians[i] = float(np.median(recent))
    if not medians:
      continue
    names = tuple(record.batch_norms[i] for i in medians)
    largest = max(medians.values())
    verdicts.append(
      _verdict.Verdict(
        kind,
        names,
        _verdict.since(record, ~(worst[:, list(medians)] <= limit).all(1)),
        evidence.format(names=_verdict.listed(names), worst=largest),
        suggestion,
        source,
      )
    )
  return verdicts
