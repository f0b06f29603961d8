"""What the optimizer's statistics tell: dead units, odd updates, spikes."""

import numpy as np

from optax_ghm.flow import _record, _verdict

UPDATE_RATIOS = (1e-5, 1e-1)
"""Between them, a step's change of a kernel over its norm is usual."""


THROWN = 10.0
"""One step whose change is this many times the kernel is one too many."""


DEAD_SHARE = 0.5


SPIKE, SPIKE_SIGMAS, SPIKE_HISTORY = 10.0, 8.0, 10


def update_sizes(record: _record.Record) -> list[_verdict.Verdict]:
  """Kernels that hardly move, or are thrown about."""
  stats = record.leaf_stats
  ratio = stats['update_ratio']
  kernels = np.array([leaf.rank >= 2 for leaf in record.leaves], bool)
  usable = np.isfinite(ratio) & (stats['update_norm'] > 0) & kernels
  low, high = UPDATE_RATIOS
  found: dict[str, list[tuple[int, float, str]]] = {'small': [], 'large': []}
  for i in map(int, np.flatnonzero(usable.any(0))):
    recent = np.flatnonzero(usable[:, i])[-_verdict.RECENT :]
    median, largest = np.median(ratio[recent, i]), ratio[usable[:, i], i].max()
    enough = len(recent) >= _verdict.LEAST_STEPS
    how = f'median of {len(recent)} recorded steps'
    if enough and median < low:
      found['small'].append((i, float(median), how))
    elif enough and median > high:
      found['large'].append((i, float(median), how))
    elif not enough and largest > THROWN:  # else the median knows better
      at = record.steps[usable[:, i]][ratio[usable[:, i], i].argmax()]
      found['large'].append((i, float(largest), f'at step {at}'))
  verdicts = []
  for size, found_here, extreme, bad, advice in (
    (
      'small',
      found['small'],
      min,
      ratio < low,
      'raise the learning rate, of these parameters at least.',
    ),
    (
      'large',
      found['large'],
      max,
      ratio > high,
      'lower the learning rate or warm it up, or bound the updates'
      ' (optax_ghm.clip_by_parameter_norm).',
    ),
  ):
    if not found_here:
      continue
    at = [i for i, _, _ in found_here]
    names = tuple(record.leaves[i].name for i in at)
    _, size_, how = extreme(found_here, key=lambda u: u[1])
    holds = (usable & bad)[:, at].any(1) | ~usable[:, at].any(1)
    verdicts.append(
      _verdict.Verdict(
        f'{size} updates',
        names,
        _verdict.since(record, holds),
        f'a step changes {_verdict.listed(names)} by {size_:.1e} of its norm'
        f' ({how}); 1e-3 is usual',
        advice,
        'Karpathy, CS231n notes, "Ratio of weights:updates"',
      )
    )
  return verdicts


def dead_units(record: _record.Record) -> list[_verdict.Verdict]:
  """Units without a gradient for long."""
  stats = record.leaf_stats
  with np.errstate(invalid='ignore', divide='ignore'):
    share = stats['dead_units'] / stats['units']
    # All of a leaf: nothing arrives there, which is another verdict.
    is_dead = (share >= DEAD_SHARE) & (stats['gradient_norm'] > 0)
  watched = np.flatnonzero(~np.isnan(stats['elements']).any(1))
  if not len(watched) or not is_dead[watched[-1]].any():
    return []
  last = watched[-1]
  found = np.flatnonzero(is_dead[last])
  worst = max(found, key=lambda i: share[last, i])
  leaves = [record.leaves[i].name for i in found]
  names = tuple(dict.fromkeys(u.rpartition('/')[0] or u for u in leaves))
  return [
    _verdict.Verdict(
      'dead units',
      names,
      _verdict.since(record, is_dead[: last + 1, found].any(1)),
      f'half or more of the units of {_verdict.listed(names)} have had no'
      f' gradient for 10 measured steps: {stats["dead_units"][last, worst]:.0f}'
      f' of {stats["units"][last, worst]:.0f} by {record.leaves[worst].name}',
      'their activation is off for all examples: lower the learning rate,'
      ' start biases at 0, try a leaky activation or normalization.',
      'Maas et al. 2013; Lu et al., Dying ReLU and Initialization, 2019',
    )
  ]


def spikes(record: _record.Record) -> list[_verdict.Verdict]:
  """Steps whose gradient is many times the usual one."""
  norms = record.leaf_stats['gradient_norm']
  what = 'of all parameters together'
  if not norms.shape[1] or np.isnan(norms).all():
    norms, what = record.layer_stats['norm'][:, -1:], 'at the last layer'
  if not norms.shape[1]:
    return []
  with np.errstate(over='ignore', invalid='ignore'):
    total = np.sqrt((norms**2).sum(1))
  found, largest = [], 0.0
  for t in range(SPIKE_HISTORY, len(total)):
    before = total[max(t - _verdict.RECENT, 0) : t]
    before = before[np.isfinite(before)]
    if len(before) < SPIKE_HISTORY or not np.isfinite(total[t]):
      continue
    usual = float(np.median(before))
    if usual == 0:
      continue
    low, high = np.quantile(
      np.log(np.maximum(before, _verdict.LEAST)), [0.25, 0.75]
    )
    sigma = (high - low) / 1.349  # of a normal distribution with such quartiles
    times = float(total[t] / usual)
    if times > SPIKE and np.log(times) > SPIKE_SIGMAS * sigma:
      found.append(t)
      largest = max(largest, times)
  if not found:
    return []
  steps = record.steps
  return [
    _verdict.Verdict(
      'spikes',
      (),
      int(steps[found[0]]),
      f'at {len(found)} of {len(steps)} recorded steps the norm {what} was more'
      f' than {SPIKE:.0f} times the median of the {_verdict.RECENT} before,'
      ' far beyond their spread, up to'
      f' {largest:.0f} times, the last time at step {steps[found[-1]]}',
      'look at the batches of these steps; clip by what is usual'
      ' (optax_ghm.calibrated, clip_by_zscore) or leave them out'
      ' (optax_ghm.skip_spikes).',
      'Pascanu et al. 2013; Chowdhery et al., PaLM, 2022',
    )
  ]
