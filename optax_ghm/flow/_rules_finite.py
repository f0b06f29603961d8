"""Rules about gradients that are not finite, or do not arrive."""

import numpy as np

from optax_ghm.flow import _verdict


def not_finite(record):
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
    name = _verdict.called(record, i)
    reached = np.nan_to_num(record.layer_stats['calls'][t]) > 0
    behind = [j for j in range(i + 1, len(record.layers)) if reached[j]]
    where = (
      f'{at_layers[t, i]:.0f} of {record.layer_stats["elements"][t, i]:.0f}'
      f' numbers of the gradient at the output of {name}'
    )
    if behind:
      layers = (_verdict.called(record, behind[0]), name)
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
    _verdict.Verdict(
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


def disconnected(record):
  """What no gradient, or only an exact zero, reaches."""
  calls = record.layer_stats['calls'][-_verdict.RECENT :]
  verdicts = []
  never = calls.sum(0) == 0
  for run in _verdict.runs(never):
    names = tuple(_verdict.called(record, i) for i in run)
    verdicts.append(
      _verdict.Verdict(
        'disconnected',
        names,
        _verdict.since(
          record, (record.layer_stats['calls'] == 0)[:, run].all(1)
        ),
        f'no backward pass arrives at the output of {_verdict.listed(names)}',
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
  recent = only_zeros[-_verdict.RECENT :]
  silent = recent.all(0)
  for run in _verdict.runs(silent):
    names = tuple(_verdict.called(record, i) for i in run)
    later = [i for i in range(run[-1] + 1, len(record.layers)) if not never[i]]
    where = (
      f'; at {_verdict.called(record, later[0])}, after it, there is one'
      if later
      else ''
    )
    verdicts.append(
      _verdict.Verdict(
        'no gradient',
        names,
        _verdict.since(record, only_zeros[:, run].all(1)),
        f'the gradient at the output of {_verdict.listed(names)} is exactly'
        f' 0{where}',
        'what follows is off for every example (ReLUs that are dead, a gate or'
        ' a mask that is 0, a saturated float), or a kernel there is 0: look'
        ' at its biases and learning rate, try a leaky activation.',
        'Lu et al., Dying ReLU and Initialization, 2019',
      )
    )
  return verdicts


def conflict(record):
  """Where what passes a layer and what its parameters get do not agree."""
  layers, leaves = record.layer_stats, record.leaf_stats
  if not record.layers or not record.leaves:
    return []
  both = np.arange(len(record))[-_verdict.RECENT :]
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
      _verdict.Verdict(
        'conflict',
        names,
        int(record.steps[both[0]]),
        f'a gradient arrives at the layer of {_verdict.listed(names)}, but its'
        ' own is exactly 0',
        'the parameter is frozen by stop_gradient, is not used, or is only'
        ' multiplied by zeros: look at the input of the layer.',
        'chain rule: a kernel gradient is input times output gradient',
      )
    )
  if elsewhere:
    names = tuple(record.leaves[j].name for j in sorted(set(elsewhere)))
    verdicts.append(
      _verdict.Verdict(
        'conflict',
        names,
        int(record.steps[both[0]]),
        f'{_verdict.listed(names)} has a gradient although none arrives at the'
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
