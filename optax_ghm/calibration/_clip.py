"""Clipping gradients by their norms: one engine, and limits that are given."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ghm._core import arrays, counters, norms, scopes

ABSURD = 1e4
"""So many times the usual norm is no gradient but an error."""


PATIENCE = 20
"""After so many of them in a row, it is what is usual that was wrong."""


_LEAST = float(np.finfo(np.float32).tiny)


class ClipState(NamedTuple):
  """State of the clips; scalars, or one per group, leaf or unit.

  Groups are in the order of their sorted labels; leaves in that of
  ``jax.tree.leaves``, without those that have no norm: integers, empty ones;
  units in the order of the leaves, raveled.

  Attributes:
    norm: of the last good step.
    threshold: that the norm was compared with in it; inf while none is known.
    factor: that the last update was multiplied by, 0 if it was left out.
    clipped: int32, how many good steps were clipped.
    skipped: int32, how many steps were kept out of the statistics: those with
      NaN or inf, a norm that float32 does not hold, or one of more than 1e37
      times the limit, whose update is 0; those that are all zero; and those
      beyond 10,000 times the usual norm, which are clipped.
    absurd_in_a_row: int32, how many steps were beyond it just now; after 20 of
      them the statistics start anew.
    statistics: what the rule remembers.
  """

  norm: jax.Array
  threshold: jax.Array
  factor: jax.Array
  clipped: jax.Array
  skipped: jax.Array
  absurd_in_a_row: jax.Array
  statistics: Any


class Step(NamedTuple):
  """What a rule sees of one step; all float32, of the shape of the scope.

  Attributes:
    norm: of the gradients; 1 in place of what is 0 or not finite.
    total: the norm of all that is finite, a scalar.
    sizes: makes them: how many numbers each norm is of.
    of_params: makes the norms of the parameters.
  """

  norm: jax.Array
  total: jax.Array
  sizes: Callable[[], jax.Array]
  of_params: Callable[[], jax.Array]


class Verdict(NamedTuple):
  """What a rule makes of the norms of one step.

  Attributes:
    threshold: above which a norm is clipped.
    target: the norm it is clipped to.
    usual: what is usual so far, to tell an absurd norm by; inf if not known.
    statistics: with this step in them.
  """

  threshold: jax.Array
  target: jax.Array
  usual: jax.Array
  statistics: Any


def clip_by_rule(
  judge: Callable[[Step, Any], Verdict],
  init: Callable[[tuple[int, ...]], Any] = lambda shape: (),
  *,
  scope: scopes.Scope,
  axis_name: arrays.AxisName,
) -> optax.GradientTransformationExtraArgs:
  """What all clips have in common: norms, bad steps, the factor, the state.

  Args:
    judge: from a :class:`Step` and the statistics to a :class:`Verdict`.
    init: from the shape of the norms to the statistics at the start, arrays
      whose first axes are that shape.
    scope: what is clipped together.
    axis_name: mapped axis, or axes, over which the leaves are split.
  """

  def init_fn(params):
    shape = scopes.scoped(scope, params).shape
    return ClipState(
      norm=jnp.zeros(shape, jnp.float32),
      threshold=jnp.full(shape, jnp.inf, jnp.float32),
      factor=jnp.ones(shape, jnp.float32),
      clipped=jnp.zeros(shape, jnp.int32),
      skipped=jnp.zeros(shape, jnp.int32),
      absurd_in_a_row=jnp.zeros(shape, jnp.int32),
      statistics=init(shape),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    scoped = scopes.scoped(scope, updates)
    norm = scoped.norms(updates, axis_name)
    finite = jnp.isfinite(norm)
    verdict = judge(
      Step(
        # The statistics never see a bad number, not even to throw it away.
        norm=(seen := jnp.where(finite & (norm > 0), norm, 1)),
        total=norms.norm(jnp.where(finite, norm, 0)),
        sizes=lambda: scoped.sizes(updates, axis_name),
        of_params=lambda: scoped.norms(_given(params, updates), axis_name),
      ),
      state.statistics,
    )
    absurd = norm > ABSURD * verdict.usual
    above = norm > verdict.threshold
    # What is absurd before any threshold is known comes down to the usual.
    target = jnp.where(above, verdict.target, verdict.usual)
    factor = jnp.where(above | absurd, target / seen, 1)
    # Below the least float32 there is no factor: that is left out as inf is.
    factor = jnp.where(finite & (factor > _LEAST), factor, 0)
    good = (factor > 0) & (norm > 0) & ~absurd

    in_a_row = jnp.where(
      finite & absurd, counters.count_if(True, state.absurd_in_a_row), 0
    )
    anew = in_a_row >= PATIENCE

    def select(where, new, old):
      where = jnp.expand_dims(where, tuple(range(where.ndim, new.ndim)))
      return jnp.where(where, new, old)

    remember = functools.partial(select, good)
    statistics = jax.tree.map(remember, verdict.statistics, state.statistics)
    start = init(scoped.shape)

    state = ClipState(
      norm=remember(norm, state.norm),
      threshold=remember(verdict.threshold, state.threshold),
      factor=factor,
      clipped=counters.count_if(above & good, state.clipped),
      skipped=counters.count_if(~good, state.skipped),
      absurd_in_a_row=jnp.where(anew, 0, in_a_row),
      statistics=jax.tree.map(
        functools.partial(select, anew), start, statistics
      ),
    )
    return scoped.scale(updates, factor), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _given(params, updates):
  if params is None and updates is not None:
    raise ValueError('params must be given to update(), and were None.')
  return params
