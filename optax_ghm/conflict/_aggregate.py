"""Updates with the losses along a leading axis, reconciled in a chain."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays, counters, per_example, stateful
from optax_ghm.conflict import _gramian
from optax_ghm.conflict._upgrad import upgrad_weights


class ReconciledAggregateState(NamedTuple):
  """State of :func:`reconciled_aggregate`, in float32.

  Attributes:
    gramian: (m, m), the moving average of the Gramian.
    weights: (m,), of the losses in the last step.
    cosines: (m, m), of the angles in the moving average.
    steps: int32, how many steps there were.
    conflicts: int32, in how many of them two gradients of the step itself
      pointed against each other.
    non_finite: (m,), int32, how often every loss was left out because its
      gradient held NaN or inf.
  """

  gramian: jax.Array
  weights: jax.Array
  cosines: jax.Array
  steps: jax.Array
  conflicts: jax.Array
  non_finite: jax.Array


def reconciled_aggregate(
  losses: int,
  weights: _gramian.Weights = upgrad_weights,
  *,
  decay: float = 0.0,
  axis_name: arrays.AxisName = None,
) -> stateful.StatefulTransformation[ReconciledAggregateState]:
  r"""Adds the gradients of several losses, weighted so that they agree.

  .. math::
    G_t = \delta\, G_{t-1} + (1 - \delta)\, J_t J_t^T, \qquad
    \bar g_t = \sum_i w_i(G_t)\, g_{t, i}

  The transformation is the first link of a chain, before any moments. It takes
  updates with the m losses along the leading axis of every leaf, as
  ``jax.jacrev`` makes them, and gives updates shaped as the parameters. With
  ``mean_weights``, it only measures.

  Frozen parameters are None among the rows, or masked behind this: around it,
  ``optax.masked`` would let rows pass as they are.

  With a decay δ, small batches do not decide alone which losses conflict. The
  step then hurts no loss on the average, which does not hold for each batch.

  Args:
    losses: m, how many there are.
    weights: one of the methods of this package, or any function from a Gramian,
      (m, m), to weights, (m,).
    decay: δ, from 0 to 1. 0 looks at the current step alone.
    axis_name: mapped axis, or axes, over which the gradients are split, as the
      parameters are in FSDP: an all-reduce of m² numbers. Average gradients of
      parts of a batch before they come here.

  Returns:
    A ``GradientTransformationExtraArgs``; for ``optax.inject_hyperparams``,
    ``losses`` and ``weights`` are static arguments. A loss whose gradient holds
    NaN or inf is left out and counted. Leaves that are not floating or complex
    pass unchanged.

  Raises:
    TypeError: if ``losses`` is no integer.
    ValueError: if an argument is out of range; on update, if leaves do not have
      the m losses along their first axis, or do not have the shape of
      ``params`` behind it, or if ``weights`` does not return (m,).

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax
    >>> from optax_ghm import conflict
    >>> tx = optax.chain(conflict.reconciled_aggregate(2), optax.sgd(0.1))
    >>> params = {'w': jnp.array([0.5, 1.0])}
    >>> def losses_fn(params):
    ...   w = params['w']
    ...   return jnp.stack([(w[0] - 1) ** 2, 4 * w[0] + w[1] ** 2])
    >>> rows = jax.jacrev(losses_fn)(params)
    >>> updates, state = tx.update(rows, tx.init(params), params)
    >>> print(np.float64(updates['w']).round(4), state[0].weights)
    [ 0.01 -0.12] [2.5 0.6]

  References:
    Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024, for the default
  """
  counters.check_type('losses', losses, int)
  counters.check_range('losses', losses, 1, float('inf'))
  counters.check_range('decay', decay, 0, 1)

  def init_fn(params):
    del params
    return ReconciledAggregateState(
      gramian=jnp.zeros([losses, losses], jnp.float32),
      weights=jnp.zeros([losses], jnp.float32),
      cosines=jnp.zeros([losses, losses], jnp.float32),
      steps=jnp.zeros([], jnp.int32),
      conflicts=jnp.zeros([], jnp.int32),
      non_finite=jnp.zeros([losses], jnp.int32),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    rows = per_example.leading(updates, params, 'loss')
    if not rows:
      return updates, state
    if len(rows[0]) != losses:
      raise ValueError(
        f'updates must have {losses} losses along their first axis, got'
        f' {len(rows[0])}.'
      )
    gramian = _gramian.gramian(updates, axis_name=axis_name)
    now = _gramian.directions(gramian)
    before = state.gramian.astype(gramian.dtype)
    average = _averaged(gramian, now.finite, before, decay)
    left_out = ~jnp.outer(now.finite, now.finite)
    used = jnp.where(left_out, jnp.nan, average)
    found = _gramian.weigh(weights, used)
    return per_example.weighted_sum(updates, found), ReconciledAggregateState(
      gramian=average.astype(jnp.float32),
      weights=found.astype(jnp.float32),
      cosines=_gramian.directions(average).cosines.astype(jnp.float32),
      steps=counters.count_if(True, state.steps),
      conflicts=counters.count_if(jnp.any(now.cosines < 0), state.conflicts),
      non_finite=counters.count_if(~now.finite, state.non_finite),
    )

  return stateful.StatefulTransformation(init_fn, update_fn)


def _averaged(gramian, finite, average, decay):
  """The moving average; it begins with the first gradient that is not 0."""
  begun = jnp.diagonal(average) > 0
  moved = average + (1 - decay) * (gramian - average)
  moved = jnp.where(jnp.outer(begun, begun), moved, gramian)
  return jnp.where(jnp.outer(finite, finite), moved, average)
