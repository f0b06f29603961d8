"""What is wrong with the gradients, with the evidence, and what to try."""

import dataclasses
from typing import NamedTuple

import numpy as np

from optax_ghm.flow import record as _record

RECENT = 20
"""Verdicts are about the last so many recorded steps."""

DECADES_PER_LAYER, DECADES, LEAST_R2, LEAST_LAYERS = 0.11, 2.0, 0.7, 5
"""Where a slope is called a trend: BatchNorm and ReLU alone make 0.083 decades
per layer at the start, and train well."""

UPDATE_RATIOS = (1e-5, 1e-1)
DEAD_SHARE = 0.5
SPIKE, SPIKE_SIGMAS, SPIKE_HISTORY = 10.0, 8.0, 10
LEAST_STEPS = 10
"""Recorded steps that verdicts about updates and dead units need."""

_LEAST = 2.0**-149


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Something that is wrong.

  Attributes:
    kind: ``'not finite'``, ``'disconnected'``, ``'no gradient'``,
      ``'vanishing'``, ``'exploding'``, ``'dead units'``, ``'small updates'``,
      ``'large updates'``, ``'spikes'`` or ``'conflict'``.
    layers: names of the layers or parameters that it is about.
    since: the first recorded step of those at which it has been so without
      interruption; for spikes and what is not finite, that of the first.
    evidence: the figures.
    suggestion: what to try.
    source: where that comes from.
  """

  kind: str
  layers: tuple[str, ...]
  since: int
  evidence: str
  suggestion: str
  source: str


class DepthProfile(NamedTuple):
  """How the gradient's norm goes with depth, for every recorded step.

  Attributes:
    layers: indices of the layers with a kernel that some gradient reached.
    log_norms: (steps, layers), log10 of the norms at their outputs.
    slope: (steps,), decades per layer, from the input on: positive where
      gradients vanish on their way back to the input.
    decades: (steps,), the slope times the number of layers between.
    r2: (steps,), what share of the variance the line explains.
  """

  layers: np.ndarray
  log_norms: np.ndarray
  slope: np.ndarray
  decades: np.ndarray
  r2: np.ndarray


def depth_profile(record: _record.Record) -> DepthProfile:
  r"""Fits a line to the norms of activation gradients over depth.

  .. math::
    \log_{10} \lVert \partial L / \partial h_l \rVert \approx a + b\, l

  by least squares, over the layers l that have a kernel of their own, at whose
  outputs h the gradient is taken: the gradients of the kernels themselves do
  not show what is lost between layers, since a kernel's gradient is that of its
  output times its input, and in a ReLU network one shrinks as the other grows.

  Args:
    record: with taps.

  Returns:
    The profile; of a gradient that is 0 the logarithm is that of the least
    float32, 2^-149. Where a norm is not finite, so is the line.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> names = [f'layer {i}' for i in range(8)]
    >>> def loss(x, taps):
    ...   for name in names:
    ...     x = flow.tap(x / 2, taps[name])
    ...   return jnp.sum(x)
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), flow.Taps.of(names))
    >>> record = flow.Record()
    >>> record.add(0, taps=taps)
    >>> print(flow.depth_profile(record).slope.round(3))
    [0.301]

  References:
    Glorot & Bengio, `Understanding the difficulty of training deep feedforward
    neural networks <https://proceedings.mlr.press/v9/glorot10a.html>`_, 2010
  """
  stats = record.layer_stats
  reached = np.nan_to_num(stats['calls']).sum(0) > 0
  layers = np.array(
    [i for i, layer in enumerate(record.layers) if layer.has_kernel], int
  )
  layers = layers[reached[layers]]
  if not len(layers):
    nothing = np.full(len(record), np.nan)
    return DepthProfile(
      layers, np.zeros((len(record), 0)), nothing, nothing, nothing
    )
  log_norms = np.log10(np.maximum(stats['norm'][:, layers], _LEAST))
  depth = np.arange(len(layers)) - (len(layers) - 1) / 2
  with np.errstate(invalid='ignore', divide='ignore'):
    centered = log_norms - log_norms.mean(1, keepdims=True)
    slope = centered @ depth / max((depth**2).sum(), 1)
    r2 = (slope[:, None] * depth) ** 2
    r2 = r2.sum(1) / (centered**2).sum(1)
  return DepthProfile(
    layers, log_norms, slope, slope * max(len(layers) - 1, 0), r2
  )


def diagnose(record: _record.Record) -> list[Verdict]:
  """Says what is wrong with the gradients of a training, if anything.

  Verdicts are about the last 20 recorded steps and need evidence: a slope over
  depth, 5 layers with kernels; updates and dead units, 10 recorded steps; a
  spike, 10 steps before it. With taps alone, or a watched optimizer alone, the
  verdicts are those that can be told from it.

  Args:
    record: of the training; one step of it is enough to begin with.

  Returns:
    The verdicts, the gravest first; an empty list if nothing is wrong.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> names = [f'layer {i}' for i in range(8)]
    >>> def loss(x, taps):
    ...   for name in names:
    ...     x = flow.tap(x / 2, taps[name])
    ...   return jnp.sum(x)
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), flow.Taps.of(names))
    >>> record = flow.Record()
    >>> record.add(0, taps=taps)
    >>> for verdict in flow.diagnose(record):
    ...   print(f'{verdict.kind}: {verdict.evidence}')
    vanishing: the norm falls by 0.30 decades per layer towards the input,
    2.1 over 8 layers (R² 1.00): 2 at layer 7, 0.016 at layer 0
  """
  if not len(record):
    return []
  tapped, watched = record.having('tapped'), record.having('watched')
  verdicts = []
  for rule, measured in (
    (_not_finite, record),
    (_disconnected, tapped),
    (_trend_over_depth, tapped),
    (_dead_units, watched),
    (_updates, watched),
    (_spikes, watched if len(watched) else tapped),
  ):
    if len(measured):
      verdicts += rule(measured)
  kinds = {verdict.kind for verdict in verdicts}
  if 'no gradient' in kinds:  # which explains them
    verdicts = [v for v in verdicts if v.kind != 'small updates']
  both = watched.having('tapped')
  if len(both) and not kinds & {'not finite', 'no gradient'}:
    verdicts += _conflict(both)
  return verdicts


def _not_finite(record):
  steps, at_layers = record.steps, record.layer_stats['non_finite']
  at_leaves = record.leaf_stats['non_finite']
  bad_layers, bad_leaves = at_layers > 0, at_leaves > 0
  # Counts may say 0 of what overflowed in float32, the norms not.
  bad_layers |= np.isinf(record.layer_stats['norm'])
  bad_leaves |= ~np.isfinite(record.leaf_stats['gradient_norm']) & ~np.isnan(
    record.leaf_stats['elements']
  )
  bad_values = {
    name: ~np.isfinite(values) & record.has_scalar(name)
    for name, values in record.scalars.items()
  }
  bad = bad_layers.any(1) | bad_leaves.any(1)
  for values in bad_values.values():
    bad = bad | values
  if not bad.any():
    return []
  t = int(np.argmax(bad))
  if bad_layers[t].any():
    # The backward pass meets the layers from the last to the first.
    i = int(np.flatnonzero(bad_layers[t])[-1])
    name = _called(record, i)
    reached = np.nan_to_num(record.layer_stats['calls'][t]) > 0
    behind = [j for j in range(i + 1, len(record.layers)) if reached[j]]
    where = (
      f'{at_layers[t, i]:.0f} of {record.layer_stats["elements"][t, i]:.0f}'
      f' numbers of the gradient at the output of {name}'
    )
    if behind:
      layers = (_called(record, behind[0]), name)
      where += (
        f'; at the output of {layers[0]}, where the backward pass came from,'
        ' all were finite: it was made in the backward pass between the two,'
        f' by {layers[0]} or what stands before it'
      )
    else:
      layers = (name,)
      where += ', the last layer: it came from the loss'
  elif bad_leaves[t].any():
    layers = tuple(record.leaves[i].name for i in np.flatnonzero(bad_leaves[t]))
    where = f'the gradients of {len(layers)} of {len(record.leaves)} parameters'
    if len(record.layers) and not np.isnan(at_layers[t]).any():
      where += ', while it was finite at the outputs of all layers'
  else:
    layers = tuple(name for name, values in bad_values.items() if values[t])
    where = f'{", ".join(layers)}; the gradients are finite'
  count = int(bad.sum())
  return [
    Verdict(
      'not finite',
      layers,
      int(steps[t]),
      f'at {count} of {len(steps)} recorded steps, first at step {steps[t]}:'
      f' {where}',
      'look there for a division, root, logarithm or power at 0, also in the'
      ' branch of a where that is not taken (give that branch a safe argument),'
      ' and for 16-bit overflow; optax_ghm.calibrated leaves out such steps.',
      'JAX FAQ, "Gradients contain NaN where using where"',
    )
  ]


def _disconnected(record):
  """What no gradient, or only an exact zero, reaches."""
  calls = record.layer_stats['calls'][-RECENT:]
  known = ~np.isnan(calls)
  verdicts = []
  never = known.any(0) & (np.where(known, calls, 0).sum(0) == 0)
  for run in _runs(never):
    names = tuple(_called(record, i) for i in run)
    verdicts.append(
      Verdict(
        'disconnected',
        names,
        _since(record, (record.layer_stats['calls'] == 0)[:, run].all(1)),
        f'no backward pass arrives at the output of {_listed(names)}',
        'look between its output and the loss for stop_gradient, a detour'
        ' through NumPy or integers, an output that is not used, or a function'
        ' that was compiled before the taps were there.',
        'optax_ghm.flow.tap: calls is 0 where nothing is differentiated',
      )
    )
  stats = record.layer_stats
  only_zeros = (
    (stats['calls'] > 0)
    & (stats['zeros'] == stats['elements'])
    & (stats['elements'] > 0)
  )
  recent = only_zeros[-RECENT:]
  silent = recent.any(0) & (recent | ~known).all(0)
  for run in _runs(silent):
    names = tuple(_called(record, i) for i in run)
    later = [i for i in range(run[-1] + 1, len(record.layers)) if not never[i]]
    where = (
      f'; at {_called(record, later[0])}, after it, there is one'
      if later
      else ''
    )
    verdicts.append(
      Verdict(
        'no gradient',
        names,
        _since(record, only_zeros[:, run].all(1)),
        f'the gradient at the output of {_listed(names)} is exactly 0{where}',
        'what follows is off for every example (ReLUs that are dead, a gate or'
        ' a mask that is 0, a saturated float), or a kernel there is 0: look'
        ' at its biases and learning rate, try a leaky activation.',
        'Lu et al., Dying ReLU and Initialization, 2019',
      )
    )
  return verdicts


def _trend_over_depth(record):
  profile = depth_profile(record)
  if len(profile.layers) < LEAST_LAYERS:
    return []
  finite = np.isfinite(profile.slope)
  if not finite.any():
    return []
  recent = np.flatnonzero(finite)[-RECENT:]
  slope, decades, r2 = (
    float(np.median(values[recent]))
    for values in (profile.slope, profile.decades, profile.r2)
  )
  if abs(slope) < DECADES_PER_LAYER or abs(decades) < DECADES or r2 < LEAST_R2:
    return []
  vanishing = slope > 0
  norms = 10 ** np.median(profile.log_norms[recent], axis=0)
  names = [_called(record, i) for i in profile.layers]
  verb = 'falls' if vanishing else 'grows'
  evidence = (
    f'the norm {verb} by {abs(slope):.2f} decades per layer towards the input,'
    f' {abs(decades):.1f} over {len(names)} layers (R² {r2:.2f}):'
    f' {norms[-1]:.2g} at {names[-1]}, {norms[0]:.2g} at {names[0]}'
  )
  # Half of it is enough to say that it was so before.
  with np.errstate(invalid='ignore'):
    same = ~finite | (
      (np.sign(slope) * profile.slope >= DECADES_PER_LAYER / 2)
      & (np.abs(profile.decades) >= DECADES / 2)
    )
  if vanishing:
    starved = tuple(
      name
      for name, norm in zip(names, norms, strict=True)
      if norm < 1e-3 * norms.max()
    ) or tuple(names[:1])
    return [
      Verdict(
        'vanishing',
        starved,
        _since(record, same),
        evidence,
        'initialize for the activation (He for ReLU, Glorot for tanh), put'
        ' ReLU-like activations in the place of saturating ones, add skip'
        ' connections or normalization layers.',
        'Glorot & Bengio 2010; He et al. 2015 (initialization), 2016 (skip'
        ' connections); Ioffe & Szegedy 2015',
      )
    ]
  swollen = tuple(
    name
    for name, norm in zip(names, norms, strict=True)
    if norm > 1e3 * norms.min()
  ) or tuple(names[:1])
  return [
    Verdict(
      'exploding',
      swollen,
      _since(record, same),
      evidence,
      'use a smaller gain in the initialization (He for ReLU), add'
      ' normalization layers or scale the residual branches down; a clip'
      ' (optax_ghm.calibrated) helps against the size, not against the slope.',
      'Pascanu et al. 2013; He et al. 2015; Ioffe & Szegedy 2015',
    )
  ]


def _dead_units(record):
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
    Verdict(
      'dead units',
      names,
      _since(record, is_dead[: last + 1, found].any(1)),
      f'half or more of the units of {_listed(names)} have had no gradient for'
      f' 10 measured steps: {stats["dead_units"][last, worst]:.0f} of'
      f' {stats["units"][last, worst]:.0f} by {record.leaves[worst].name}',
      'their activation is off for all examples: lower the learning rate,'
      ' start biases at 0, try a leaky activation or normalization.',
      'Maas et al. 2013; Lu et al., Dying ReLU and Initialization, 2019',
    )
  ]


def _updates(record):
  """Kernels that hardly move, or are thrown about."""
  stats = record.leaf_stats
  ratio = stats['update_ratio']
  verdicts = []
  with np.errstate(invalid='ignore'):
    usable = np.isfinite(ratio) & (stats['update_norm'] > 0)
  for kind, bad in (
    ('small updates', usable & (np.nan_to_num(ratio) < UPDATE_RATIOS[0])),
    ('large updates', usable & (np.nan_to_num(ratio) > UPDATE_RATIOS[1])),
  ):
    found, sizes, counts = [], [], []
    for i, leaf in enumerate(record.leaves):
      recent = np.flatnonzero(usable[:, i])[-RECENT:]
      if leaf.rank < 2 or len(recent) < LEAST_STEPS:
        continue
      median = float(np.median(ratio[recent, i]))
      too_small = kind == 'small updates' and median < UPDATE_RATIOS[0]
      too_large = kind == 'large updates' and median > UPDATE_RATIOS[1]
      if too_small or too_large:
        found.append(i)
        sizes.append(median)
        counts.append(len(recent))
    if not found:
      continue
    names = tuple(record.leaves[i].name for i in found)
    extreme = min(sizes) if kind == 'small updates' else max(sizes)
    verdicts.append(
      Verdict(
        kind,
        names,
        _since(record, bad[:, found].any(1) | ~usable[:, found].any(1)),
        f'a step changes {_listed(names)} by {extreme:.1e} of its norm (median'
        f' of {min(counts)} recorded steps); 1e-3 is usual',
        'raise the learning rate, of these parameters at least.'
        if kind == 'small updates'
        else 'lower the learning rate or warm it up, or bound the updates'
        ' (optax_ghm.clip_by_parameter_norm).',
        'Karpathy, CS231n notes, "Ratio of weights:updates"',
      )
    )
  return verdicts


def _spikes(record):
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
    before = total[max(t - RECENT, 0) : t]
    before = before[np.isfinite(before)]
    if len(before) < SPIKE_HISTORY or not np.isfinite(total[t]):
      continue
    usual = float(np.median(before))
    if usual == 0:
      continue
    low, high = np.quantile(np.log(np.maximum(before, _LEAST)), [0.25, 0.75])
    sigma = (high - low) / 1.349  # of a normal distribution with such quartiles
    times = float(total[t] / usual)
    if times > SPIKE and np.log(times) > SPIKE_SIGMAS * sigma:
      found.append(t)
      largest = max(largest, times)
  if not found:
    return []
  steps = record.steps
  return [
    Verdict(
      'spikes',
      (),
      int(steps[found[0]]),
      f'at {len(found)} of {len(steps)} recorded steps the norm {what} was more'
      f' than {SPIKE:.0f} times the median of the {RECENT} before, far beyond'
      ' their spread, up to'
      f' {largest:.0f} times, the last time at step {steps[found[-1]]}',
      'look at the batches of these steps; clip by what is usual'
      ' (optax_ghm.calibrated, clip_by_zscore) or leave them out'
      ' (optax_ghm.skip_spikes).',
      'Pascanu et al. 2013; Chowdhery et al., PaLM, 2022',
    )
  ]


def _conflict(record):
  """Where what passes a layer and what its parameters get do not agree."""
  layers, leaves = record.layer_stats, record.leaf_stats
  both = ~np.isnan(layers['calls']).any(1) & ~np.isnan(leaves['elements']).any(
    1
  )
  if not both.any() or not record.layers or not record.leaves:
    return []
  both = np.flatnonzero(both)[-RECENT:]
  arrives = (layers['norm'][both] > 0) | ~np.isfinite(layers['norm'][both])
  gets = (leaves['gradient_norm'][both] > 0) | ~np.isfinite(
    leaves['gradient_norm'][both]
  )
  frozen, elsewhere = [], []
  for i, layer in enumerate(record.layers):
    own = _own_leaves(record, layer)
    if not own:
      continue
    if arrives[:, i].all():
      frozen += [j for j in own if not gets[:, j].any()]
    if '[' not in layer.name and not arrives[:, i].any():
      elsewhere += [j for j in own if gets[:, j].all()]
  verdicts = []
  if frozen:
    names = tuple(record.leaves[j].name for j in sorted(set(frozen)))
    verdicts.append(
      Verdict(
        'conflict',
        names,
        int(record.steps[both[0]]),
        f'a gradient arrives at the layer of {_listed(names)}, but its own is'
        ' exactly 0',
        'the parameter is frozen by stop_gradient, is not used, or is only'
        ' multiplied by zeros: look at the input of the layer.',
        'chain rule: a kernel gradient is input times output gradient',
      )
    )
  if elsewhere:
    names = tuple(record.leaves[j].name for j in sorted(set(elsewhere)))
    verdicts.append(
      Verdict(
        'conflict',
        names,
        int(record.steps[both[0]]),
        f'{_listed(names)} has a gradient although none arrives at the output'
        ' of its layer',
        'it comes by another way: a penalty on the weights, weights that are'
        ' shared, or a call of the layer that is not tapped.',
        'chain rule: a kernel gradient is input times output gradient',
      )
    )
  return verdicts


def _own_leaves(record, layer):
  """Indices of the parameters that a layer holds itself."""
  module = layer.name.partition('[')[0]
  return [
    i
    for i, leaf in enumerate(record.leaves)
    if leaf.name.rpartition('/')[0].removeprefix('params/') == module
  ]


def _since(record, holds):
  """The first step of the last unbroken row of steps at which it holds."""
  start = len(holds)
  while start > 0 and holds[start - 1]:
    start -= 1
  return int(record.steps[min(start, len(holds) - 1)])


def _runs(mask):
  """Neighbours in depth, as lists of indices."""
  runs, last = [], None
  for i in np.flatnonzero(mask):
    if last is not None and i == last + 1:
      runs[-1].append(int(i))
    else:
      runs.append([int(i)])
    last = i
  return runs


def _called(record, i):
  return record.layers[i].name or 'the model'


def _listed(names):
  if len(names) > 4:
    return f'{names[0]}, {names[1]}, … {names[-1]} ({len(names)} in all)'
  return ', '.join(names)
