"""Clips with a given limit: a constant, or the norm of the parameters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, scopes, stateful, trees
from optax_ghm.calibration import _clip


def clip_by_norm(
  max_norm: ArrayLike | Callable[[jax.Array], ArrayLike],
  *,
  scope: scopes.Scope = 'global',
  axis_name: arrays.AxisName = None,
) -> stateful.StatefulTransformation[_clip.ClipState]:
  r"""Clips gradients to a constant norm.

  .. math:: g \leftarrow g \min(1, c / \lVert g \rVert)

  It has the numbers of ``optax.clip_by_global_norm`` at a lower cost: the clip
  is one scalar factor, which an optimizer behind it fuses into its own loop.

  Args:
    max_norm: c, the largest norm that is not clipped: one number, or one per
      norm of the scope, or a schedule of it: a function of the number of
      updates so far, which the state then counts.
    scope: what is clipped together: ``'global'``, the whole tree; ``'leaf'``,
      every leaf by itself; ``'unit'`` or :class:`Units`, every unit of a leaf;
      or :class:`Groups` of leaves.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`~optax_ghm.calibration.ClipState`. A step with NaN or inf becomes 0.

  Raises:
    ValueError: if ``max_norm`` is negative.

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
  if callable(max_norm):
    clip = functools.partial(clip_by_norm, scope=scope, axis_name=axis_name)
    return _clip_by_schedule(clip, max_norm)
  counters.check_range('max_norm', max_norm, 0, np.inf)

  def rule(step, statistics):
    del step
    return _clip.Limit(max_norm, statistics)

  return _clip.clip_by_rule(rule, scope=scope, axis_name=axis_name)


def _clip_by_schedule(clip_at, schedule):
  """The clip whose statistics are the number of updates, bad ones included."""

  def init_fn(params):
    state: Any = clip_at(np.inf).init(params)
    return state._replace(statistics=jnp.zeros([], jnp.int32))

  def update_fn(updates, state, params=None, **extra_args):
    count = state.statistics
    clip, state = clip_at(schedule(count)), state._replace(statistics=())
    clipping: Any = clip.update(updates, state, params, **extra_args)
    updates, state = clipping
    return updates, state._replace(statistics=optax.safe_increment(count))

  return stateful.StatefulTransformation(init_fn, update_fn)


def clip_by_parameter_norm(
  ratio: ArrayLike = 0.01,
  *,
  eps: ArrayLike = 1e-3,
  scope: scopes.Scope = 'unit',
  axis_name: arrays.AxisName = None,
) -> stateful.StatefulTransformation[_clip.ClipState]:
  r"""Clips every unit to a fraction of the norm of its parameters: AGC.

  .. math::
    g_i \leftarrow g_i \min\left(1,
      \lambda \frac{\max(\lVert w_i \rVert, \epsilon)}{\lVert g_i \rVert}\right)

  ``optax.adaptive_grad_clip`` clips units of up to four axes. Here the units
  are those of Flax's layouts
  (:func:`~optax_ghm.calibration.flax_unit_axes`), with any number of axes. The
  paper leaves out the last layer: use ``optax.masked``.

  Args:
    ratio: λ, the largest ratio of a gradient's norm to its parameters' norm.
    eps: ε, the least norm of parameters, so that parameters at 0 can move.
    scope: what is clipped together; see :func:`clip_by_norm`. The paper clips
      every ``'unit'``.
    axis_name: mapped axis, or axes, over which gradients and parameters are
      split. With units, the axes over which the *fan-in* of every leaf is
      split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`~optax_ghm.calibration.ClipState`, whose ``update`` needs
    ``params``. A unit with NaN or inf becomes 0.

  Raises:
    ValueError: if a number is negative; on update, if ``params`` is not given.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.clip_by_parameter_norm(0.5)
    >>> params = {'kernel': jnp.array([[1.0, 6.0], [0.0, 8.0]])}
    >>> grads = {'kernel': jnp.array([[3.0, 0.3], [4.0, 0.4]])}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> print(updates['kernel'])  # the first column is clipped to 0.5
    [[0.3 0.3]
     [0.4 0.4]]

  References:
    Brock et al., `High-Performance Large-Scale Image Recognition Without
    Normalization <https://arxiv.org/abs/2102.06171>`_, 2021
  """
  counters.check_range('ratio', ratio, 0, np.inf)
  counters.check_range('eps', eps, 0, np.inf)

  def rule(step, statistics):
    if step.params is None and step.updates is not None:
      raise ValueError('params must be given to update(), and were None.')
    params = trees.like(step.updates, step.params)
    norm = step.scoped.norms(params, axis_name)
    norm = jnp.maximum(norm, jnp.asarray(eps, jnp.float32))
    return _clip.Limit(jnp.asarray(ratio, jnp.float32) * norm, statistics)

  return _clip.clip_by_rule(rule, scope=scope, axis_name=axis_name)


def clip_by_rms(
  max_rms: ArrayLike | Callable[[jax.Array], ArrayLike] = 1.0,
  *,
  scope: scopes.Scope = 'leaf',
  axis_name: arrays.AxisName = None,
) -> stateful.StatefulTransformation[_clip.ClipState]:
  r"""Clips the root mean square of updates, behind the moments: Adafactor.

  .. math::
    u \leftarrow u / \max(1, \operatorname{RMS}(u) / d), \qquad
    \operatorname{RMS}(u) = \lVert u \rVert / \sqrt n

  The formula is that of ``optax.clip_by_block_rms``; this clip also reports
  what it did. Behind ``optax.scale_by_rms``, where :math:`u = g / \sqrt v`, it
  is the rule of Adafactor. Behind ``optax.scale_by_adam`` it is close to
  StableAdamW, which divides :math:`m / \sqrt v` by the root mean square of
  :math:`g / \sqrt v`: a spike moves the root mean square of
  :math:`m / \sqrt v` less.

  The clip turns NaN and inf into 0, and so hides moments that are broken for
  good. Put a guard around both, as the example does.

  Args:
    max_rms: d, the largest root mean square that is not clipped, or a schedule
      of it, as for :func:`clip_by_norm`.
    scope: what is clipped together; see :func:`clip_by_norm`. The papers clip
      every ``'leaf'``.
    axis_name: mapped axis, or axes, over which the updates are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`~optax_ghm.calibration.ClipState` of norms: the threshold is
    :math:`d \sqrt n`.

  Raises:
    ValueError: if ``max_rms`` is negative.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> rms_prop = optax_ghm.calibrated(
    ...   optax.chain(
    ...     optax.scale_by_rms(),
    ...     optax_ghm.clip_by_rms(),
    ...     optax.scale(-1e-3),
    ...   )
    ... )
    >>> tx = optax_ghm.clip_by_rms()
    >>> updates, _ = tx.update(jnp.array([1.0, -7.0]), tx.init(jnp.zeros(2)))
    >>> print(updates)  # the root mean square was 5
    [ 0.2 -1.4]

  References:
    Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory
    Cost <https://arxiv.org/abs/1804.04235>`_, 2018

    Wortsman et al., `Stable and low-precision training for large-scale
    vision-language models <https://arxiv.org/abs/2304.13013>`_, 2023
  """
  if callable(max_rms):
    clip = functools.partial(clip_by_rms, scope=scope, axis_name=axis_name)
    return _clip_by_schedule(clip, max_rms)
  counters.check_range('max_rms', max_rms, 0, np.inf)

  def rule(step, statistics):
    root = jnp.sqrt(step.scoped.sizes(step.updates, axis_name))
    return _clip.Limit(jnp.asarray(max_rms, jnp.float32) * root, statistics)

  return _clip.clip_by_rule(rule, scope=scope, axis_name=axis_name)
