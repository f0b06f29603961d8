"""Rules about batch norms."""

import numpy as np

from optax_ghm.flow import _verdict

CONSTANT_SHARE = 0.5
"""Of the features of a batch norm: more that do not vary are too many."""


DRIFT = 0.5
"""Of batch statistics from the running ones: what 4 examples have by chance."""


def odd_batches(record):
  """Features that do not vary, and running averages that are far off."""
  verdicts, stats = [], record.norm_stats
  for kind, columns, limit, evidence, suggestion, source in (
    (
      'constant features',
      ('constant',),
      CONSTANT_SHARE,
      'half or more of the features at {names} have a variance below epsilon,'
      ' {worst:.0%} at the worst: they are no longer normalized',
      'their input is off or saturated for all examples (dead units before'
      ' it, a mask, an embedding that is not used): look at the layer before.',
      'Ioffe & Szegedy 2015',
    ),
    (
      'running averages',
      ('mean_drift', 'std_drift'),
      DRIFT,
      'at {names} the batches are off the running averages by {worst:.2g}'
      ' standard deviations, or a factor exp({worst:.2g}) of it: evaluation'
      ' will see another network than training does',
      'let the averages settle (train on, or a smaller decay), recalibrate them'
      ' before evaluating (recalibrate in optax_ghm.linen and .nnx), use larger'
      ' batches, or BatchRenorm.',
      'Ioffe 2017; Wu & Johnson 2021',
    ),
  ):
    worst = np.max([stats[column] for column in columns], axis=0)
    found, values = [], []
    for i in range(len(record.norms)):
      measured = np.flatnonzero(~np.isnan(worst[:, i]))[-_verdict.RECENT :]
      if len(measured) < _verdict.LEAST_STEPS:
        continue
      median = float(np.median(worst[measured, i]))
      if median > limit:
        found.append(i)
        values.append(median)
    if found:
      names = tuple(record.norms[i] for i in found)
      with np.errstate(invalid='ignore'):
        holds = ~(worst[:, found] <= limit).all(1)
      verdicts.append(
        _verdict.Verdict(
          kind,
          names,
          _verdict.since(record, holds),
          evidence.format(names=_verdict.listed(names), worst=max(values)),
          suggestion,
          source,
        )
      )
  return verdicts
