"""Clipping gradients by their norms: one engine, and limits that are given."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_ghm import norms as _norms, scopes as _scopes

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
  scope: _scopes.Scope,
  axis_name: _norms.AxisName,
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
    shape = _scopes.scoped(scope, params).shape
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
    scoped = _scopes.scoped(scope, updates)
    norm = scoped.norms(updates, axis_name)
    finite = jnp.isfinite(norm)
    verdict = judge(
      Step(
        # The statistics never see a bad number, not even to throw it away.
        norm=(seen := jnp.where(finite & (norm > 0), norm, 1)),
        total=_norms.norm(jnp.where(finite, norm, 0)),
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
      finite & absurd, count_if(True, state.absurd_in_a_row), 0
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
      clipped=count_if(above & good, state.clipped),
      skipped=count_if(~good, state.skipped),
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


def check_range(name: str, value: Any, low: float, high: float) -> None:
  """What is known while tracing, Python's own numbers, must be in the range."""
  if isinstance(value, int | float) and not low <= value <= high:
    raise ValueError(f'{name} must be from {low} to {high}, got {value}.')


def count_if(event: ArrayLike, count: jax.Array) -> jax.Array:
  """One more where it happened, as long as int32 holds it."""
  return jnp.where(event, optax.safe_increment(count), count)


def clip_by_norm(
  max_norm: ArrayLike,
  *,
  scope: _scopes.Scope = 'global',
  axis_name: _norms.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Clips to a constant norm: ``optax.clip_by_global_norm``, and cheaper.

  .. math:: g \leftarrow g \min(1, c / \lVert g \rVert)

  as one scalar factor, which an optimizer behind it takes into its own loop;
  over the whole tree, groups, leaves or units.

  Args:
    max_norm: c; one number, or one per norm of the scope.
    scope: what is clipped together: ``'global'``, the whole tree; ``'leaf'``,
      every leaf by itself; ``'unit'`` or :class:`Units`, every unit of a leaf;
      or :class:`Groups` of leaves.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`ClipState`. A step with
    NaN or inf becomes 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.clip_by_norm(1.0)
    >>> grads = {'w': jnp.array([3.0, 4.0])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates['w'], state.norm)
    [0.6 0.8] 5.0

  References:
    Pascanu et al., `On the difficulty of training Recurrent Neural Networks
    <https://arxiv.org/abs/1211.5063>`_, 2012
  """
  check_range('max_norm', max_norm, 0, np.inf)

  def judge(step, statistics):
    limit = jnp.asarray(max_norm, jnp.float32)
    return _known(jnp.broadcast_to(limit, step.norm.shape), statistics)

  return clip_by_rule(judge, scope=scope, axis_name=axis_name)


def _known(limit, statistics):
  """A limit that is given knows nothing of what is usual."""
  return Verdict(limit, limit, jnp.full_like(limit, jnp.inf), statistics)


def clip_by_parameter_norm(
  ratio: ArrayLike = 0.01,
  *,
  eps: ArrayLike = 1e-3,
  scope: _scopes.Scope = 'unit',
  axis_name: _norms.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Clips every unit to a share of its parameters' norm: AGC.

  .. math::
    g_i \leftarrow g_i \min\left(1,
      \lambda \frac{\max(\lVert w_i \rVert, \epsilon)}{\lVert g_i \rVert}\right)

  ``optax.adaptive_grad_clip`` does so for units of up to four axes; here they
  are those of Flax's layouts (:func:`flax_unit_axes`) with any number of axes,
  and there are the other scopes and the measurements. The paper leaves out the
  last layer: use ``optax.masked``.

  Args:
    ratio: λ.
    eps: ε, so that parameters that start at 0 can move.
    scope: see :func:`clip_by_norm`; the paper's is ``'unit'``.
    axis_name: mapped axis, or axes, over which gradients and parameters are
      split. With units, over which the *fan-in* of every leaf is split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`ClipState`, whose
    ``update`` needs ``params``. A unit with NaN or inf becomes 0.

  Raises:
    ValueError: if ``update`` gets no ``params``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.clip_by_parameter_norm(0.5)
    >>> params = {'kernel': jnp.array([[1.0, 6.0], [0.0, 8.0]])}
    >>> grads = {'kernel': jnp.array([[3.0, 0.3], [4.0, 0.4]])}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> print(updates['kernel'])  # the first column is held to 0.5
    [[0.3 0.3]
     [0.4 0.4]]

  References:
    Brock et al., `High-Performance Large-Scale Image Recognition Without
    Normalization <https://arxiv.org/abs/2102.06171>`_, 2021
  """

  def judge(step, statistics):
    norm = jnp.maximum(step.of_params(), jnp.asarray(eps, jnp.float32))
    return _known(jnp.asarray(ratio, jnp.float32) * norm, statistics)

  return clip_by_rule(judge, scope=scope, axis_name=axis_name)


def clip_update_rms(
  max_rms: ArrayLike = 1.0,
  *,
  scope: _scopes.Scope = 'leaf',
  axis_name: _norms.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Clips the root mean square of an update: for behind the moments.

  .. math::
    u \leftarrow u / \max(1, \operatorname{RMS}(u) / d), \qquad
    \operatorname{RMS}(u) = \lVert u \rVert / \sqrt n

  Behind ``optax.scale_by_rms`` it is the rule of Adafactor, for
  :math:`u = g / \sqrt v`. StableAdamW divides :math:`m / \sqrt v` by the root
  mean square of :math:`g / \sqrt v`; behind ``optax.scale_by_adam`` this takes
  that of :math:`m / \sqrt v` itself, which a spike moves less. The formula is
  that of ``optax.clip_by_block_rms``; here it says what it did.

  NaN and inf become 0, which hides moments that are broken for good: have a
  guard around them, as in the example.

  Args:
    max_rms: d.
    scope: see :func:`clip_by_norm`; the papers' is ``'leaf'``.
    axis_name: mapped axis, or axes, over which the updates are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`ClipState`, of norms:
    the threshold is :math:`d \sqrt n`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> rms_prop = optax_ghm.calibrated(
    ...   optax.chain(
    ...     optax.scale_by_rms(),
    ...     optax_ghm.clip_update_rms(),
    ...     optax.scale(-1e-3),
    ...   )
    ... )
    >>> tx = optax_ghm.clip_update_rms()
    >>> updates, _ = tx.update(jnp.array([1.0, -7.0]), tx.init(jnp.zeros(2)))
    >>> print(updates)  # the root mean square was 5
    [ 0.2 -1.4]

  References:
    Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory
    Cost <https://arxiv.org/abs/1804.04235>`_, 2018

    Wortsman et al., `Stable and low-precision training for large-scale
    vision-language models <https://arxiv.org/abs/2304.13013>`_, 2023
  """

  def judge(step, statistics):
    limit = jnp.asarray(max_rms, jnp.float32) * jnp.sqrt(step.sizes())
    return _known(limit, statistics)

  return clip_by_rule(judge, scope=scope, axis_name=axis_name)
