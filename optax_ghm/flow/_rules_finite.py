"""Rules about gradients that are not finite, or do not arrive."""

import numpy as np

from optax_ghm.flow import _verdict


def not_finite(record):
  """Finds where the first non-finite number was made."""
  steps, layers, leaves = record.steps, record.layer_stats, record.leaf_stats
  measured = ~np.isnan(leaves['elements'])
  # A number that overflows in a statistic is counted as finite.
  bad_layers = (layers['non_finite'] > 0) | np.isinf(layers['norm'])
  bad_leaves, bad_params, bad_updates = (
    measured & ~np.isfinite(leaves[name])
    for name in ('gradient_norm', 'parameter_norm', 'update_norm')
  )
  bad_leaves |= leaves['non_finite'] > 0
  bad_scalars = {
    name: ~np.isfinite(values) & record.has_scalar(name)
    for name, values in record.scalars.items()
  }
  of_leaves = bad_leaves | bad_params | bad_updates
  bad = np.any(
    [bad_layers.any(1), of_leaves.any(1), *bad_scalars.values()], axis=0
  )
  if not bad.any():
    return []
  t = int(np.argmax(bad))
  in_scalars = tuple(name for name, values in bad_scalars.items() if values[t])
  suggestion = (
    'look there for a division, root, logarithm or power at 0, also in the'
    ' branch of a where that is not taken (give that branch a safe argument),'
    ' for 16-bit overflow, and for NaN in the inputs of this step;'
    ' optax_ghm.calibrated leaves out such steps.'
  )
  if bad_params[t].any():
    names = _names(record, bad_params[t])
    where = (
      f'{_verdict.listed(names)} before this step: an update that was not'
      ' recorded, or what the parameters were loaded from, made them so'
    )
    suggestion = 'begin anew from parameters that are finite, and record them.'
  elif bad_layers[t].any():
    names, where = _made_at_layers(record, layers, bad_layers[t], t)
    if len(names) == 1 and in_scalars:
      where += (
        f', and {", ".join(in_scalars)} was not finite either: it was made in'
        ' the forward pass, or it was in the batch'
      )
      suggestion = 'look at the inputs and labels of this step; ' + suggestion
  elif bad_leaves[t].any():
    names = _names(record, bad_leaves[t])
    where = f'the gradients of {len(names)} of {len(record.leaves)} parameters'
    if record.layers and not np.isnan(layers['non_finite'][t]).any():
      where += (
        ', while it was finite at the outputs of all layers: what came into'
        ' these layers was not finite'
      )
      suggestion = 'look at the inputs of this step; ' + suggestion
  elif bad_updates[t].any():
    names = _names(record, bad_updates[t])
    where = (
      f'the updates of {_verdict.listed(names)}, whose gradients and parameters'
      ' were finite: the optimizer made it'
    )
    suggestion = (
      "keep the optimizer's moments in float32; look for an eps that is 0 in"
      ' their dtype (1e-8 is 0 in float16), for a learning rate that is NaN or'
      ' inf, and for a division by 0 in a transformation of your own.'
    )
  else:
    names = in_scalars
    where = f'{", ".join(names)}; the gradients are finite'
  return [
    _verdict.Verdict(
      'not finite',
      _verdict.severity_of_share(bad[-_verdict.RECENT_STEPS :]),
      names,
      int(steps[t]),
      f'at {bad.sum()} of {len(steps)} recorded steps, first at step'
      f' {steps[t]}: {where}',
      suggestion,
      'JAX FAQ, "Gradients contain NaN where using where"',
    )
  ]


def _names(record, mask):
  return tuple(record.leaves[i].name for i in np.flatnonzero(mask))


def _made_at_layers(record, layers, bad, t):
  """Between which layers it was made, and the sentence that says so."""
  # The backward pass meets the layers from the last to the first.
  i = int(np.flatnonzero(bad)[-1])
  name = _verdict.layer_name(record, i)
  where = (
    f'{layers["non_finite"][t, i]:.0f} of {layers["elements"][t, i]:.0f}'
    f' numbers of the gradient at the output of {name}'
  )
  reached = np.flatnonzero(layers['calls'][t] > 0)
  later = reached[reached > i]
  if not len(later):
    return (name,), f'{where}, the last layer: it came from the loss'
  names = (_verdict.layer_name(record, later[0]), name)
  return names, (
    f'{where}; at the output of {names[0]}, where the backward pass came from,'
    ' all were finite: it was made in the backward pass between the two, by'
    f' {names[0]} or what stands before it'
  )


def disconnected(record):
  """Finds layers that no backward pass reaches."""
  missed = record.layer_stats['calls'] == 0
  verdicts = []
  for run in _verdict.neighbors(missed[-_verdict.RECENT_STEPS :].all(0)):
    names = tuple(_verdict.layer_name(record, i) for i in run)
    verdicts.append(
      _verdict.Verdict(
        'disconnected',
        1.0,
        names,
        _verdict.since(record, missed[:, run].all(1)),
        f'no backward pass arrives at the output of {_verdict.listed(names)}',
        'look between its output and the loss for stop_gradient, a detour'
        ' through NumPy or integers, an output that is not used, or a function'
        ' that was compiled before the taps were there.',
        'optax_ghm.flow.tap: calls is 0 where nothing is differentiated',
      )
    )
  return verdicts


ENOUGH_ZEROS = 5
"""Recorded steps after which a gradient of 0 is none of the start: a kernel or
a scale that starts at 0 lets nothing through, until it has changed."""


def may_start_at_zero(record):
  """Whether a parameter that is still 0 may be why others have no gradient."""
  if len(record) >= ENOUGH_ZEROS:
    return False
  watched = record.having('watched')
  if not len(watched):
    return True
  stats = watched.leaf_stats
  moves = (stats['parameter_norm'][-1] == 0) & (stats['gradient_norm'][-1] > 0)
  names = [leaf.name.rpartition('/')[2] for leaf in record.leaves]
  return any(m and n != 'bias' for m, n in zip(moves, names, strict=True))


def no_gradient(record):
  """Finds layers whose gradient arrives, but is exactly 0."""
  stats = record.layer_stats
  # NaN is off in every ReLU, so that it is 0 before it.
  if may_start_at_zero(record) or (stats['non_finite'][-1] > 0).any():
    return []
  recent = slice(-_verdict.RECENT_STEPS, None)
  reached = ~(stats['calls'][recent] == 0).all(0)
  only_zeros = (
    (stats['calls'] > 0)
    & (stats['zeros'] == stats['elements'])
    & (stats['elements'] > 0)
  )
  verdicts = []
  for run in _verdict.neighbors(only_zeros[recent].all(0)):
    names = tuple(_verdict.layer_name(record, i) for i in run)
    later = np.flatnonzero(reached[run[-1] + 1 :])
    where = ''
    if len(later):
      name = _verdict.layer_name(record, run[-1] + 1 + later[0])
      where = f'; at {name}, after it, there is one'
    verdicts.append(
      _verdict.Verdict(
        'no gradient',
        1.0,
        names,
        _verdict.since(record, only_zeros[:, run].all(1)),
        f'the gradient at the output of {_verdict.listed(names)} is exactly'
        f' 0{where}',
        'the layers after it are off for every example (dead ReLUs, a gate or'
        ' a mask that is 0, a saturated float), or a kernel there is 0 or so'
        ' small that the gradient underflows: look at its initialization, its'
        ' biases and the learning rate, try a leaky activation.',
        'Lu et al., Dying ReLU and Initialization, 2019',
      )
    )
  return verdicts


def contradiction(record):
  """Finds layers and parameters of which only one has a gradient."""
  recent = slice(-_verdict.RECENT_STEPS, None)
  # NaN is not 0 either.
  at_layers = record.layer_stats['norm'][recent] != 0
  at_leaves = record.leaf_stats['gradient_norm'][recent] != 0
  frozen, unexplained = set(), set()
  starts = may_start_at_zero(record)
  for i, layer in enumerate(record.layers):
    own = _own_leaves(record, layer)
    if at_layers[:, i].all() and not starts:
      frozen |= {j for j in own if not at_leaves[:, j].any()}
    if '[' not in layer.name and not at_layers[:, i].any():
      unexplained |= {j for j in own if at_leaves[:, j].all()}
  verdicts = []
  for found, evidence, suggestion in (
    (
      frozen,
      'a gradient arrives at the layer of {names}, but its own is exactly 0',
      'the parameter is frozen by stop_gradient, is not used, or is only'
      ' multiplied by zeros: look at the input of the layer.',
    ),
    (
      unexplained,
      '{names} has a gradient although none arrives at the output of its layer',
      'it comes by another way: a penalty on the weights, weights that are'
      ' shared, or a call of the layer that is not tapped.',
    ),
  ):
    if found:
      names = tuple(record.leaves[j].name for j in sorted(found))
      verdicts.append(
        _verdict.Verdict(
          'conflict',
          0.5,
          names,
          int(record.steps[recent][0]),
          evidence.format(names=_verdict.listed(names)),
          suggestion,
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
