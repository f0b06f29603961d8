"""Rules about updates, dead units and spikes."""

import numpy as np

from optax_ghm.flow import _record, _verdict

MIN_RATIO, TYPICAL, MAX_RATIO = 1e-5, 1e-3, 1e-1
"""The least, the typical and the largest healthy ratio of a kernel's update to
the kernel, in norm."""


MAX_RATIO_OF_ONE_STEP = 10.0
"""A single update of this many times the kernel is too large."""


MAX_DEAD_SHARE = 0.5
"""The share of dead units in a layer from which on it is reported."""


NEAR_ZERO, MOSTLY_UPDATES = 0.1, 40
"""A kernel that starts with less than NEAR_ZERO of the root mean square of the
others, or of what is usual for its size, consists of updates at first: it is
judged after MOSTLY_UPDATES steps."""


WARM_UP_POWER = 0.5
"""In a warm-up from 0, the ratio grows as the steps do, to this power or more.
It is not small yet, but on its way."""


SPIKE_RATIO, SPIKE_SIGMAS, SPIKE_HISTORY = 10.0, 8.0, 10
"""A spike is more than SPIKE_RATIO times the median of the steps before it, of
which there must be SPIKE_HISTORY, and its logarithm is more than SPIKE_SIGMAS
standard deviations above theirs."""


def update_sizes(record: _record.Record) -> list[_verdict.Verdict]:
  """Finds kernels whose updates are much too small or too large."""
  stats = record.leaf_stats
  ratio = stats['update_ratio']
  usable = judged(record)
  found: dict[str, dict[int, tuple[float, str]]] = {'small': {}, 'large': {}}
  for i in map(int, np.flatnonzero(usable.any(0))):
    values = ratio[usable[:, i], i]
    recent = values[-_verdict.RECENT_STEPS :]
    median = float(np.median(recent))
    how = f'median of {len(recent)} recorded steps'
    if len(recent) < _verdict.MIN_STEPS:
      if values.max() > MAX_RATIO_OF_ONE_STEP:
        at = record.steps[usable[:, i]][values.argmax()]
        found['large'][i] = float(values.max()), f'at step {at}'
    elif median < MIN_RATIO and not _warms_up(
      record.steps, usable[:, i], values
    ):
      found['small'][i] = median, how
    elif median > MAX_RATIO:
      found['large'][i] = median, how
  verdicts = []
  for size, worst_of, limit, bad, suggestion in (
    (
      'small',
      min,
      MIN_RATIO,
      ratio < MIN_RATIO,
      'raise the learning rate, of these parameters at least; if their'
      ' gradients are tiny, look at their initialization and at that of the'
      ' layers after them.',
    ),
    (
      'large',
      max,
      MAX_RATIO,
      ratio > MAX_RATIO,
      'lower the learning rate or warm it up, or bound the updates'
      ' (optax_ghm.clip_by_parameter_norm).',
    ),
  ):
    if not found[size]:
      continue
    at = list(found[size])
    names = tuple(record.leaves[i].name for i in at)
    worst, how = worst_of(found[size].values(), key=lambda u: u[0])
    extent = f'as {"little" if size == "small" else "much"} as ' * (len(at) > 1)
    holds = (usable & bad)[:, at].any(1) | ~usable[:, at].any(1)
    verdicts.append(
      _verdict.Verdict(
        f'{size} updates',
        _verdict.severity(np.log10(worst / TYPICAL), np.log10(limit / TYPICAL)),
        names,
        _verdict.since(record, holds),
        f'a step changes {_verdict.listed(names)} by {extent}{worst:.1e} of its'
        f' norm ({how}); 1e-3 is typical',
        suggestion,
        'Karpathy, CS231n notes, "Ratio of weights:updates"',
      )
    )
  return verdicts


def frozen_by_optimizer(record: _record.Record) -> list[_verdict.Verdict]:
  """Finds parameters with a gradient that never move, while others do."""
  stats = {
    name: record.leaf_stats[name][-_verdict.RECENT_STEPS :]
    for name in ('gradient_norm', 'update_norm')
  }
  moves = stats['update_norm'] > 0
  stepped = moves.any(1)  # not so between those of MultiSteps
  if stepped.sum() < _verdict.MIN_STEPS:
    return []
  has_gradient = (stats['gradient_norm'][stepped] > 0).all(0)
  frozen = np.flatnonzero(has_gradient & (stats['update_norm'] == 0).all(0))
  if not len(frozen):
    return []
  names = tuple(record.leaves[i].name for i in frozen)
  return [
    _verdict.Verdict(
      'conflict',
      0.5,
      names,
      _verdict.since(
        record, ~(record.leaf_stats['update_norm'][:, frozen] > 0).any(1)
      ),
      f'{_verdict.listed(names)} has a gradient, but no update changes it,'
      ' while others move',
      'the optimizer leaves it out (optax.masked, set_to_zero, a learning rate'
      ' of 0): if it is not meant to be frozen, look at labels and masks.',
      'optax.partition, optax.masked',
    )
  ]


def judged(record: _record.Record) -> np.ndarray:
  """Where the size of an update says something, (steps, leaves)."""
  stats = record.leaf_stats
  kernels = np.array([_is_kernel(leaf) for leaf in record.leaves], bool)
  usable = np.isfinite(stats['update_ratio']) & kernels
  # Without a gradient, an update is weight decay alone.
  usable &= (stats['update_norm'] > 0) & (stats['gradient_norm'] > 0)
  usable[:MOSTLY_UPDATES] &= ~_start_near_zero(stats, kernels)
  return usable


def _start_near_zero(stats, kernels):
  """The kernels that start small beside the others or their size, (leaves,)."""
  if not kernels.any():
    return kernels
  elements = stats['elements'][0]
  first = stats['parameter_norm'][0] / np.sqrt(elements)
  # A square kernel of so many elements has that root mean square by LeCun.
  usual = np.maximum(np.median(first[kernels]), elements**-0.25)
  return kernels & (first <= NEAR_ZERO * usual)


def _warms_up(steps, usable, ratios):
  """Whether the ratios grow with the number of steps since the start."""
  elapsed = (steps - steps[0] + 1)[usable]
  latest = elapsed > elapsed[-1] / 10
  power = np.polyfit(np.log(elapsed[latest]), np.log(ratios[latest]), 1)[0]
  return power >= WARM_UP_POWER


def _is_kernel(leaf):
  # Biases of stacked layers and of attention have two axes, and start at 0.
  own = leaf.name.rpartition('/')[2]
  return leaf.rank >= 2 and own not in ('bias', 'scale')


def dead_units(record: _record.Record) -> list[_verdict.Verdict]:
  """Finds layers many of whose units have had no gradient for long."""
  stats = record.leaf_stats
  with np.errstate(invalid='ignore', divide='ignore'):
    share = stats['dead_units'] / stats['units']
  # Without any gradient at the leaf, the verdict is "no gradient".
  is_dead = (share >= MAX_DEAD_SHARE) & (stats['gradient_norm'] > 0)
  found = np.flatnonzero(is_dead[-1])
  if not len(found):
    return []
  worst = max(found, key=lambda i: share[-1, i])
  leaves = [record.leaves[i].name for i in found]
  names = tuple(dict.fromkeys(u.rpartition('/')[0] or u for u in leaves))
  return [
    _verdict.Verdict(
      'dead units',
      float(share[-1, worst]),
      names,
      _verdict.since(record, is_dead[:, found].any(1)),
      f'half or more of the units of {_verdict.listed(names)} have had no'
      f' gradient for 10 measured steps: {stats["dead_units"][-1, worst]:.0f}'
      f' of {stats["units"][-1, worst]:.0f} by {record.leaves[worst].name}',
      'their activation was off for all examples of these steps, which are few'
      ' with small batches: lower the learning rate,'
      ' start biases at 0, try a leaky activation or normalization.',
      'Maas et al. 2013; Lu et al., Dying ReLU and Initialization, 2019',
    )
  ]


def spikes(record: _record.Record) -> list[_verdict.Verdict]:
  """Finds steps whose gradient is many times that of the steps before."""
  norms, what = record.leaf_stats['gradient_norm'], 'of all parameters together'
  if not norms.shape[1] or np.isnan(norms).all():
    norms, what = record.layer_stats['norm'][:, -1:], 'at the last layer'
  with np.errstate(over='ignore', invalid='ignore'):
    total = np.sqrt((norms**2).sum(1))
  found = {}
  for t in range(SPIKE_HISTORY, len(total)):
    before = total[max(t - _verdict.RECENT_STEPS, 0) : t]
    before = before[np.isfinite(before)]
    if len(before) < SPIKE_HISTORY or not np.isfinite(total[t]):
      continue
    median = float(np.median(before))
    if median == 0:
      continue
    logs = np.log(np.maximum(before, _verdict.SMALLEST_FLOAT32))
    low, high = np.quantile(logs, [0.25, 0.75])
    sigma = (high - low) / 1.349  # of a normal distribution with such quartiles
    times = float(total[t] / median)
    if times > SPIKE_RATIO and np.log(times) > SPIKE_SIGMAS * sigma:
      found[t] = times
  if not found:
    return []
  at = record.steps[list(found)]
  return [
    _verdict.Verdict(
      'spikes',
      _verdict.severity(np.log10(max(found.values())), np.log10(SPIKE_RATIO)),
      (),
      int(at[0]),
      f'at {len(found)} of {len(record)} recorded steps the norm {what} was'
      f' more than {SPIKE_RATIO:.0f} times the median of the'
      f' {_verdict.RECENT_STEPS} before, far beyond their variation, up to'
      f' {max(found.values()):.0f} times, the last time at step {at[-1]}',
      'look at the batches of these steps, and lower the learning rate if the'
      ' loss rises with them; clip by what the steps before were'
      ' (optax_ghm.calibrated, clip_by_zscore) or leave them out'
      ' (optax_ghm.skip_spikes).',
      'Pascanu et al. 2013; Chowdhery et al., PaLM, 2022',
    )
  ]
