"""Rules about batch norms."""

from collections.abc import Mapping

import numpy as np

from optax_ghm.flow import _record, _verdict

MAX_CONSTANT_SHARE = 0.5
"""The largest healthy share of features that do not vary."""


MAX_DRIFT = 0.5
"""The drift that is too large. Batches of 4 examples have as much by chance."""


def batch_norms(record: _record.Record) -> list[_verdict.Verdict]:
  """Finds features that do not vary and running averages that are far off."""
  return [
    *_above(
      record,
      'constant features',
      MAX_CONSTANT_SHARE,
      {
        'constant': lambda share: (
          'more than half of the features have a variance below epsilon,'
          f' {share:.0%} at the worst: they are no longer normalized'
        )
      },
      'their input is off or saturated for all examples (dead units before'
      ' it, a mask, an embedding that is not used): look at the layer before.',
      'Ioffe & Szegedy 2015',
    ),
    *_above(
      record,
      'running averages',
      MAX_DRIFT,
      {
        'mean_drift': lambda drift: (
          f'the means of the batches are {drift:.2g} running standard'
          ' deviations off the running mean'
        ),
        'std_drift': lambda drift: (
          'the standard deviations of the batches are off the running ones by'
          f' a factor of e^{drift:.2g}'
        ),
      },
      'evaluation sees another network than training does: let the averages'
      ' settle (train on, or a smaller momentum), recalibrate them before'
      ' evaluating (recalibrate in optax_ghm.linen and .nnx), use larger'
      ' batches, or BatchRenorm.',
      'Ioffe 2017; Wu & Johnson 2021',
    ),
  ]


def _above(record, kind, limit, sentences: Mapping, suggestion, source):
  """A verdict on the batch norms of which a statistic is above the limit."""
  stats = record.batch_norm_stats
  medians = {name: _recent_medians(stats[name]) for name in sentences}
  bad = np.any([median > limit for median in medians.values()], axis=0)
  if not bad.any():
    return []
  figure = max(median.max() for median in medians.values())
  names = tuple(np.array(record.batch_norms)[bad].tolist())
  worst = {name: median[bad].max() for name, median in medians.items()}
  told = [sentences[name](x) for name, x in worst.items() if x > limit]
  healthy = np.all([stats[name][:, bad] <= limit for name in sentences], axis=0)
  return [
    _verdict.Verdict(
      kind,
      _verdict.severity(figure, limit),
      names,
      _verdict.since(record, ~healthy.all(1)),
      f'at {_verdict.listed(names)}, {" and ".join(told)}',
      suggestion,
      source,
    )
  ]


def _recent_medians(column):
  """The median of the last steps of every batch norm; 0 of too few."""
  medians = np.zeros(column.shape[1])
  for i, values in enumerate(column.T):
    recent = values[~np.isnan(values)][-_verdict.RECENT_STEPS :]
    if len(recent) >= _verdict.MIN_STEPS:
      medians[i] = np.median(recent)
  return medians
