"""The engine of all clips: norms, bad steps, the factor and the state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, norms, scopes, stateful, trees

OUTLIER_RATIO = 1e4
"""A norm of more than so many times the reference norm is an error."""

RESET_AFTER = 20
"""After so many outliers in a row, the statistics are what was wrong."""


class ClipState(NamedTuple):
  """State of the clips.

  Every field is a scalar, or a vector with one entry per group, leaf or unit.
  Groups are in the order of their sorted labels. Leaves are in the order of
  ``jax.tree.leaves``, without integers and empty leaves, which have no norm.
  Units are in the order of their leaves, raveled.

  Attributes:
    norm: norm of the last good step.
    threshold: threshold that this norm was compared with; inf while none is
      known.
    factor: factor of the last update; 0 if the update was left out.
    clipped: int32, number of good steps that were clipped.
    skipped: int32, number of steps that did not enter the statistics. A step
      with NaN or inf, or with a norm beyond float32 or 1e37 times the
      threshold, becomes 0. A step that is all zero stays 0. An outlier, whose
      norm is more than 10,000 times the reference norm, is clipped.
    nan_steps: int32, number of these steps that held NaN.
    inf_steps: int32, number of these steps that held inf and no NaN, or had a
      norm beyond float32.
    outliers: int32, number of these steps that were outliers.
    outliers_in_a_row: int32, number of outliers since the last other step;
      after 20 the statistics are reset.
    statistics: what the clip remembers of the norms.
  """

  norm: jax.Array
  threshold: jax.Array
  factor: jax.Array
  clipped: jax.Array
  skipped: jax.Array
  nan_steps: jax.Array
  inf_steps: jax.Array
  outliers: jax.Array
  outliers_in_a_row: jax.Array
  statistics: Any


class Step(NamedTuple):
  """What a rule sees of one step.

  Attributes:
    norm: float32, the norms, with 1 for a norm that is 0 or not finite.
    total: float32, a scalar: the norm of all finite gradients together.
    scoped: the scope on the tree of the gradients.
    updates: the gradients.
    params: the parameters, if they are given.
  """

  norm: jax.Array
  total: jax.Array
  scoped: scopes.Scoped
  updates: Any
  params: Any


class Limit(NamedTuple):
  """What a rule makes of the norms of one step.

  Attributes:
    threshold: a larger norm is clipped.
    statistics: the next statistics, if the step is good.
    target: norm that a larger norm is clipped to; the threshold by default.
    reference_norm: norm to recognize outliers by; inf while none is known.
  """

  threshold: ArrayLike
  statistics: Any
  target: jax.Array | None = None
  reference_norm: ArrayLike = np.inf


def clip_by_rule(
  rule: Callable[[Step, Any], Limit],
  init: Callable[[tuple[int, ...]], Any] = lambda shape: (),
  *,
  scope: scopes.Scope,
  axis_name: arrays.AxisName,
) -> stateful.StatefulTransformation[ClipState]:
  """A clip whose limit is a rule.

  Args:
    rule: function from a :class:`Step` and the statistics to a :class:`Limit`.
    init: function from the shape of the norms to the first statistics, arrays
      whose first axes have this shape.
    scope: what is clipped together.
    axis_name: mapped axis, or axes, over which the leaves are split.
  """

  def init_fn(params):
    shape = scopes.scoped(scope, params).shape

    def none():
      return jnp.zeros(shape, jnp.int32)

    return ClipState(
      norm=jnp.zeros(shape, jnp.float32),
      threshold=jnp.full(shape, jnp.inf, jnp.float32),
      factor=jnp.ones(shape, jnp.float32),
      clipped=none(),
      skipped=none(),
      nan_steps=none(),
      inf_steps=none(),
      outliers=none(),
      outliers_in_a_row=none(),
      statistics=init(shape),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    scoped = scopes.scoped(scope, updates)
    scopes.check_same_tree(state.norm, scoped.shape)
    norm = scoped.norms(updates, axis_name)
    finite = jnp.isfinite(norm)
    # The rule does not compute with a bad number, lest debug_nans report it.
    seen = jnp.where(finite & (norm > 0), norm, 1)
    total = norms.norm(jnp.where(finite, norm, 0))
    limit = rule(Step(seen, total, scoped, updates, params), state.statistics)
    threshold = jnp.broadcast_to(
      jnp.asarray(limit.threshold, jnp.float32), norm.shape
    )
    target = threshold if limit.target is None else limit.target
    above = norm > threshold
    outlier = norm > OUTLIER_RATIO * limit.reference_norm
    # An outlier before any threshold is known comes down to the reference.
    target = jnp.where(above, target, limit.reference_norm)
    # Exactly 1 where nothing is clipped, and differentiable there.
    factor = jnp.where(above | outlier, target, seen) / seen
    factor = jnp.where(finite & (factor > 0), factor, 0)

    outlier &= finite
    good = (factor > 0) & (norm > 0) & ~outlier
    outliers_in_a_row = jnp.where(
      outlier, optax.safe_increment(state.outliers_in_a_row), 0
    )
    reset = outliers_in_a_row >= RESET_AFTER
    good_norm, threshold, statistics = trees.select(
      good,
      (norm, threshold, limit.statistics),
      (state.norm, state.threshold, state.statistics),
    )
    return scoped.scale(updates, factor), ClipState(
      norm=good_norm,
      threshold=threshold,
      factor=factor,
      clipped=counters.count_if(above & good, state.clipped),
      skipped=counters.count_if(~good, state.skipped),
      nan_steps=counters.count_if(jnp.isnan(norm), state.nan_steps),
      inf_steps=counters.count_if(jnp.isinf(norm), state.inf_steps),
      outliers=counters.count_if(outlier, state.outliers),
      outliers_in_a_row=jnp.where(reset, 0, outliers_in_a_row),
      statistics=trees.select(reset, init(scoped.shape), statistics),
    )

  return stateful.StatefulTransformation(init_fn, update_fn)
