"""The rule about a loss that diverges."""

import numpy as np

from optax_ghm.flow import _record, _rules_updates, _verdict

MAX_RISE, FELL_BACK = 10.0, 0.9
"""A loss that rose to MAX_RISE times what it was before has diverged, unless it
fell below FELL_BACK of that: a dead network has the loss of the start."""


MAX_LASTING_RISE = 3.0
"""The median of the last steps, in units of what the loss was."""


def diverging(record: _record.Record) -> list[_verdict.Verdict]:
  """Finds a loss that updates which were too large have driven up.

  A loss may rise for other reasons, as in reinforcement learning, where the
  returns grow, so it is judged only after an update that was too large.
  """
  if 'loss' not in record.scalars:
    return []
  losses = record.scalars['loss']
  ratio = np.where(
    _rules_updates.judged(record), record.leaf_stats['update_ratio'], 0
  )
  large = (ratio > _rules_updates.MAX_RATIO).any(1)
  if not large.any():
    return []
  first = int(np.argmax(large))
  after = np.isfinite(losses)
  after[: first + 1] = False
  before = losses[: first + 1][-_verdict.RECENT_STEPS :]
  before = before[np.isfinite(before)]
  if not after.any() or not len(before):
    return []
  recent = losses[after][-_verdict.RECENT_STEPS :]
  with np.errstate(over='ignore'):
    level, now, peak = np.median(before), np.median(recent), losses[after].max()
    unit = max(abs(level), np.finfo(np.float32).tiny)
    rise, lasting = (1 + u / unit - level / unit for u in (peak, now))
  lost = rise >= MAX_RISE and lasting >= FELL_BACK
  if not lost and lasting < MAX_LASTING_RISE:
    return []
  limit = MAX_RISE if lost else MAX_LASTING_RISE
  high = after & (losses / unit >= level / unit + limit - 1)
  worst = int(np.argmax(ratio[first]))
  at = np.flatnonzero(ratio[first] > _rules_updates.MAX_RATIO)
  names = tuple(record.leaves[i].name for i in at)
  return [
    _verdict.Verdict(
      'diverging',
      _verdict.severity(max(rise / MAX_RISE, lasting / MAX_LASTING_RISE), 1),
      names,
      int(record.steps[np.argmax(high)]),
      f'the loss was {level:.3g} until step {record.steps[first]} changed'
      f' {record.leaves[worst].name} by {ratio[first, worst]:.1e} of its norm;'
      f' it rose to {peak:.3g} and is {now:.3g} now (median of {len(recent)}'
      ' recorded steps)',
      'divide the learning rate by 10, or warm it up, and begin anew:'
      ' optax_ghm.learning_rate_range_test finds where it diverges. If the data'
      ' changed at this step, as in batches sorted by class, shuffle it. What'
      ' else is said of this record may follow from it.',
      'Smith 2017 (range test); Goyal et al. 2017 (warm-up)',
    )
  ]
