"""Clips whose limits are given: constants, or the norms of the parameters."""

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, scopes
from optax_ghm.calibration import _clip


def clip_by_norm(
  max_norm: ArrayLike,
  *,
  scope: scopes.Scope = 'global',
  axis_name: arrays.AxisName = None,
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
  counters.check_range('max_norm', max_norm, 0, np.inf)

  def judge(step, statistics):
    limit = jnp.asarray(max_norm, jnp.float32)
    return _known(jnp.broadcast_to(limit, step.norm.shape), statistics)

  return _clip.clip_by_rule(judge, scope=scope, axis_name=axis_name)


def _known(limit, statistics):
  """A limit that is given knows nothing of what is usual."""
  return _clip.Verdict(limit, limit, jnp.full_like(limit, jnp.inf), statistics)


def clip_by_parameter_norm(
  ratio: ArrayLike = 0.01,
  *,
  eps: ArrayLike = 1e-3,
  scope: scopes.Scope = 'unit',
  axis_name: arrays.AxisName = None,
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

  return _clip.clip_by_rule(judge, scope=scope, axis_name=axis_name)


def clip_update_rms(
  max_rms: ArrayLike = 1.0,
  *,
  scope: scopes.Scope = 'leaf',
  axis_name: arrays.AxisName = None,
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

  return _clip.clip_by_rule(judge, scope=scope, axis_name=axis_name)
