"""What is wrong with the gradients, with the evidence, and what to try."""

import numpy as np

from optax_ghm.flow import (
  depth as _depth,
  record as _record,
  updates as _updates,
  verdicts as _verdicts,
)

CONSTANT_SHARE = 0.5
"""Of the features of a batch norm: more that do not vary are too many."""

DRIFT = 0.5
"""Of batch statistics from the running ones: what 4 examples have by chance."""


def diagnose(record: _record.Record) -> list[_verdicts.Verdict]:
  """Says what is wrong with the gradients of a training, if anything.

  Verdicts are about the last 20 recorded steps and need evidence: a slope over
  depth, 5 layers with kernels; updates, dead units and running averages, 10
  recorded steps; a spike, 10 steps before it. With taps alone, or a watched
  optimizer alone, the verdicts are those that can be told from it.

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
    (_depth.trend_over_depth, tapped),
    (_updates.dead_units, watched),
    (_updates.update_sizes, watched),
    (_updates.spikes, watched if len(watched) else tapped),
    (_odd_batches, record),
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


def evidence(record: _record.Record) -> str:
  """How much a verdict, or that there is none, rests on."""
  counts = {
    'steps with taps': len(record.having('tapped')),
    'with a watched optimizer': len(record.having('watched')),
  }
  found = [f'{n} {what}' for what, n in counts.items() if n]
  if not found:
    return f'{len(record)} recorded steps without measurements'
  return f'{len(record)} recorded steps ({", ".join(found)})'


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
    name = _verdicts.called(record, i)
    reached = np.nan_to_num(record.layer_stats['calls'][t]) > 0
    behind = [j for j in range(i + 1, len(record.layers)) if reached[j]]
    where = (
      f'{at_layers[t, i]:.0f} of {record.layer_stats["elements"][t, i]:.0f}'
      f' numbers of the gradient at the output of {name}'
    )
    if behind:
      layers = (_verdicts.called(record, behind[0]), name)
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
    _verdicts.Verdict(
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
  calls = record.layer_stats['calls'][-_verdicts.RECENT :]
  verdicts = []
  never = calls.sum(0) == 0
  for run in _verdicts.runs(never):
    names = tuple(_verdicts.called(record, i) for i in run)
    verdicts.append(
      _verdicts.Verdict(
        'disconnected',
        names,
        _verdicts.since(
          record, (record.layer_stats['calls'] == 0)[:, run].all(1)
        ),
        f'no backward pass arrives at the output of {_verdicts.listed(names)}',
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
  recent = only_zeros[-_verdicts.RECENT :]
  silent = recent.all(0)
  for run in _verdicts.runs(silent):
    names = tuple(_verdicts.called(record, i) for i in run)
    later = [i for i in range(run[-1] + 1, len(record.layers)) if not never[i]]
    where = (
      f'; at {_verdicts.called(record, later[0])}, after it, there is one'
      if later
      else ''
    )
    verdicts.append(
      _verdicts.Verdict(
        'no gradient',
        names,
        _verdicts.since(record, only_zeros[:, run].all(1)),
        f'the gradient at the output of {_verdicts.listed(names)} is exactly'
        f' 0{where}',
        'what follows is off for every example (ReLUs that are dead, a gate or'
        ' a mask that is 0, a saturated float), or a kernel there is 0: look'
        ' at its biases and learning rate, try a leaky activation.',
        'Lu et al., Dying ReLU and Initialization, 2019',
      )
    )
  return verdicts


def _odd_batches(record):
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
      measured = np.flatnonzero(~np.isnan(worst[:, i]))[-_verdicts.RECENT :]
      if len(measured) < _verdicts.LEAST_STEPS:
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
        _verdicts.Verdict(
          kind,
          names,
          _verdicts.since(record, holds),
          evidence.format(names=_verdicts.listed(names), worst=max(values)),
          suggestion,
          source,
        )
      )
  return verdicts


def _conflict(record):
  """Where what passes a layer and what its parameters get do not agree."""
  layers, leaves = record.layer_stats, record.leaf_stats
  if not record.layers or not record.leaves:
    return []
  both = np.arange(len(record))[-_verdicts.RECENT :]
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
      _verdicts.Verdict(
        'conflict',
        names,
        int(record.steps[both[0]]),
        f'a gradient arrives at the layer of {_verdicts.listed(names)}, but its'
        ' own is exactly 0',
        'the parameter is frozen by stop_gradient, is not used, or is only'
        ' multiplied by zeros: look at the input of the layer.',
        'chain rule: a kernel gradient is input times output gradient',
      )
    )
  if elsewhere:
    names = tuple(record.leaves[j].name for j in sorted(set(elsewhere)))
    verdicts.append(
      _verdicts.Verdict(
        'conflict',
        names,
        int(record.steps[both[0]]),
        f'{_verdicts.listed(names)} has a gradient although none arrives at the'
        ' output of its layer',
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
