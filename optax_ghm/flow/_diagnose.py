"""The diagnosis: what is wrong with the gradients, and what to try."""

import numpy as np

from optax_ghm._core import counters
from optax_ghm.flow import (
  _record,
  _rules_batch_norm,
  _rules_conflict,
  _rules_depth,
  _rules_finite,
  _rules_loss,
  _rules_updates,
  _verdict,
)


def diagnose(record: _record.Record) -> list[_verdict.Verdict]:
  """Says what is wrong with the gradients of a training, if anything.

  Verdicts are about the last 20 recorded steps; spikes, numbers that are not
  finite and a loss that diverges are found at any step. Some verdicts need
  evidence: 5 layers with kernels for a trend over depth; 10 recorded steps for
  updates, dead units, losses in conflict and batch norms; 10 earlier steps for
  a spike. A record with only taps, or only a watched optimizer, gets the
  verdicts that its statistics allow.

  Args:
    record: of the training, with one step or more.

  Returns:
    The verdicts, causes before their consequences, or an empty list if nothing
    is wrong.

  Raises:
    TypeError: if ``record`` is not one record.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> names = [f'layer {i}' for i in range(8)]
    >>> def loss(x, taps):
    ...   for name in names:
    ...     x = flow.tap(x / 2, taps[name])
    ...   return jnp.sum(x)
    >>> taps = jax.grad(loss, argnums=1)(jnp.ones(4), flow.Taps.empty(names))
    >>> record = flow.Record()
    >>> record.add(0, taps=taps)
    >>> for verdict in flow.diagnose(record):
    ...   print(f'{verdict.kind}: {verdict.evidence}')
    vanishing: the norm falls by 0.30 decades per layer towards the input,
    2.1 over 8 layers (R² 1.00): 2 at layer 7, 0.016 at layer 0
  """
  counters.check_type('record', record, _record.Record)
  tapped, watched = record.having('tapped'), record.having('watched')
  losses = record.having('losses')
  verdicts = []
  for rule, measured in (
    (_rules_loss.diverging, watched),
    (_rules_finite.not_finite, record),
    (_rules_conflict.left_out, losses),
    (_rules_finite.disconnected, tapped),
    (_rules_finite.no_gradient, tapped),
    (_rules_depth.trend_over_depth, tapped),
    (_rules_updates.dead_units, watched),
    (_rules_updates.update_sizes, watched),
    (_rules_updates.spikes, watched if len(watched) else tapped),
    (_rules_updates.frozen_by_optimizer, watched),
    (_rules_conflict.losses_in_conflict, losses),
    (_rules_batch_norm.batch_norms, record),
  ):
    if len(measured):
      verdicts += rule(measured)
  kinds = {verdict.kind for verdict in verdicts}
  if 'no gradient' in kinds:  # the reason for small updates
    verdicts = [v for v in verdicts if v.kind != 'small updates']
  both = watched.having('tapped')
  if len(both) and not kinds & {'not finite', 'no gradient'}:
    verdicts += _rules_finite.contradiction(both)
  return verdicts


def without_verdict(record: _record.Record) -> str:
  """What an empty list of verdicts means for this record."""
  of_norms = [~np.isnan(u) for u in record.batch_norm_stats.values()]
  counts = {
    'taps': len(record.having('tapped')),
    'a watched optimizer': len(record.having('watched')),
    'several losses': len(record.having('losses')),
    'batch norms': np.any(of_norms, axis=(0, 2)).sum(),
  }
  found = [f'{n} with {what}' for what, n in counts.items() if n]
  steps = f'{len(record)} recorded step{"s" if len(record) > 1 else ""}'
  if not found:
    return f'nothing was measured in {steps}, so that nothing is known'
  return f'nothing was found in {steps} ({", ".join(found)})'
