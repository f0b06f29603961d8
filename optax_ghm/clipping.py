"""Clipping gradients by what their norms have been doing."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_ghm import norms as _norms, percentiles as _percentiles


@dataclasses.dataclass(frozen=True)
class Groups:
  """Named groups of leaves, to be clipped together: a scope of the clips.

  Attributes:
    labels: a label for every leaf, as for ``optax.partition``: a pytree that is
      a prefix of that of the gradients, or a function that makes it of them.

  Examples:
    >>> import optax_ghm
    >>> by_part = optax_ghm.Groups({'encoder': 'slow', 'head': 'fast'})
    >>> tx = optax_ghm.clip_by_zscore(scope=by_part)
  """

  labels: Any


Scope = Literal['global', 'leaf'] | Groups
"""What is clipped together: the whole tree, every leaf by itself, or groups."""

DEFAULT_PERCENTILE = _percentiles.WindowPercentile()

ABSURD = 1e4
"""So many times the usual norm is no gradient but an error."""


class ClipState(NamedTuple):
  """State of the clips; scalars, or one per group or leaf.

  Groups are in the order of their sorted labels, leaves in that of
  ``jax.tree.leaves``, without those that have no norm: integers, empty ones.

  Attributes:
    norm: of the last good step.
    threshold: that the norm was compared with in it; inf while none is known.
    factor: that the last update was multiplied by, 0 if it was left out.
    clipped: int32, how many good steps were clipped.
    skipped: int32, how many steps were kept out of the statistics: those with
      NaN or inf, whose update is 0; those that are all zero; and those beyond
      :data:`ABSURD` times the usual norm, which are clipped.
    statistics: what the rule remembers.
  """

  norm: jax.Array
  threshold: jax.Array
  factor: jax.Array
  clipped: jax.Array
  skipped: jax.Array
  statistics: Any


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


def _clip(init, judge, scope, axis_name):
  """A clip by the norms of groups.

  Args:
    init: from the shape of the norms to the statistics at the start, arrays
      whose first axes are that shape.
    judge: from (norms, global norm, statistics) to a :class:`Verdict`.
    scope: see :data:`Scope`.
    axis_name: mapped axis, or axes, over which the leaves are split.
  """

  def init_fn(params):
    _, count = _groups(scope, params)
    shape = () if count is None else (count,)
    return ClipState(
      norm=jnp.zeros(shape, jnp.float32),
      threshold=jnp.full(shape, jnp.inf, jnp.float32),
      factor=jnp.ones(shape, jnp.float32),
      clipped=jnp.zeros(shape, jnp.int32),
      skipped=jnp.zeros(shape, jnp.int32),
      statistics=init(shape),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    groups, count = _groups(scope, updates)
    norm = _norms.group_norms(
      _norms.counted(updates), groups, 1 if count is None else count, axis_name
    ).astype(jnp.float32)
    total = _norms.norm(jnp.where(jnp.isfinite(norm), norm, 0))
    if count is None:
      norm = norm[0]
    finite = jnp.isfinite(norm)
    # The statistics never see a bad number, not even one to be thrown away.
    seen = jnp.where(finite & (norm > 0), norm, 1)
    verdict = judge(seen, total, state.statistics)
    absurd = norm > ABSURD * verdict.usual
    above = norm > verdict.threshold
    # What is absurd before any threshold is known comes down to the usual.
    target = jnp.where(above, verdict.target, verdict.usual)
    factor = jnp.where(above | absurd, target / seen, 1)
    factor = jnp.where(finite, factor, 0)
    good = finite & (norm > 0) & ~absurd

    def remember(old, new):
      at = jnp.expand_dims(good, tuple(range(good.ndim, new.ndim)))
      return jnp.where(at, new, old)

    state = ClipState(
      norm=remember(state.norm, norm),
      threshold=remember(state.threshold, verdict.threshold),
      factor=factor,
      clipped=_count(state.clipped, above & good),
      skipped=_count(state.skipped, ~good),
      statistics=jax.tree.map(remember, state.statistics, verdict.statistics),
    )
    return _scale(updates, factor, groups), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _count(count, event=True):
  """One more where it happened, as long as int32 holds it."""
  return jnp.where(event, optax.safe_increment(count), count)


def _scale(updates, factor, groups):
  """The updates times the factor of their group, in one multiplication."""
  leaves, structure = jax.tree.flatten(updates)
  group = iter(groups)

  def scale(leaf):
    if not (_norms.is_inexact(leaf) and leaf.size):
      return leaf
    own = factor[next(group)] if factor.ndim else factor
    dtype = _norms.at_least_float32(leaf.dtype)
    scaled = _norms.multiply(
      leaf.astype(dtype), own.astype(jnp.finfo(dtype).dtype)
    )
    return jnp.where(own > 0, scaled, 0).astype(leaf.dtype)

  return structure.unflatten([scale(leaf) for leaf in leaves])


def _groups(scope, tree):
  """The group of every counted leaf, and how many there are (None: global)."""
  leaves = _norms.counted(tree)
  if isinstance(scope, str) and scope == 'global':
    return np.zeros(len(leaves), int), None
  if isinstance(scope, str) and scope == 'leaf':
    return np.arange(len(leaves)), len(leaves)
  if not isinstance(scope, Groups):
    raise ValueError(
      f"scope must be 'global', 'leaf' or Groups, got {scope!r}."
    )
  labels = scope.labels(tree) if callable(scope.labels) else scope.labels
  each = jax.tree.leaves(jax.tree.broadcast(labels, tree))
  of_all = jax.tree.leaves(tree)
  each = [
    label
    for label, leaf in zip(each, of_all, strict=True)
    if _norms.is_inexact(leaf) and leaf.size
  ]
  names = sorted(set(jax.tree.leaves(labels)), key=str)
  return np.array([names.index(label) for label in each], int), len(names)


def clip_by_norm(
  max_norm: ArrayLike,
  *,
  scope: Scope = 'global',
  axis_name: _norms.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Clips to a constant norm: ``optax.clip_by_global_norm``, and cheaper.

  .. math:: g \leftarrow g \min(1, c / \lVert g \rVert)

  as one scalar factor, which an optimizer behind it takes into its own loop;
  over the whole tree, groups or leaves.

  Args:
    max_norm: c; one number, or one per group or leaf.
    scope: what is clipped together: ``'global'``, the whole tree; ``'leaf'``,
      every leaf by itself; or :class:`Groups`.
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

  def judge(norm, total, statistics):
    del total
    limit = jnp.broadcast_to(jnp.asarray(max_norm, jnp.float32), norm.shape)
    return Verdict(limit, limit, jnp.full_like(norm, jnp.inf), statistics)

  return _clip(lambda shape: (), judge, scope, axis_name)


def clip_by_percentile(
  percentile: ArrayLike = 10.0,
  *,
  estimator: _percentiles.PercentileEstimator = DEFAULT_PERCENTILE,
  scope: Scope = 'global',
  axis_name: _norms.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Clips to a percentile of the norms so far: AutoClip.

  .. math::
    g_t \leftarrow g_t \min\left(1,
      \frac{P_p(\lVert g_1 \rVert, \dots, \lVert g_t \rVert)}
      {\lVert g_t \rVert}\right)

  Args:
    percentile: p, from 0 to 100. The paper's 10 clips nine steps of ten.
    estimator: :class:`WindowPercentile`, exact over a window, or
      :class:`GeometricQuantile`, one number.
    scope: see :func:`clip_by_norm`.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`ClipState`. A step with
    NaN or inf becomes 0; like one that is all zero, or beyond 10,000 times what
    is usual, it leaves the statistics as they were.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.clip_by_percentile(50.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for size in (1.0, 2.0, 30.0):
    ...   update, state = tx.update(jnp.array([size]), state)
    >>> print(update, state.threshold)
    [2.] 2.0

  References:
    Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source
    Separation Networks <https://arxiv.org/abs/2007.14469>`_, 2020
  """

  def judge(norm, total, statistics):
    del total
    threshold, usual, following = estimator.judge(norm, percentile, statistics)
    return Verdict(threshold, threshold, usual, following)

  return _clip(estimator.init, judge, scope, axis_name)


class NormMoments(NamedTuple):
  """Statistics of :func:`clip_by_zscore`.

  Attributes:
    mean: of the norms, 0 before the first good step.
    variance: of the norms.
    recorded: int32, how many good steps there were.
  """

  mean: jax.Array
  variance: jax.Array
  recorded: jax.Array


def clip_by_zscore(
  z_threshold: ArrayLike = 2.5,
  *,
  decay: ArrayLike = 0.97,
  warmup_steps: ArrayLike = 25,
  scope: Scope = 'global',
  axis_name: _norms.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Clips norms that stand out from their running mean: ZClip.

  .. math::
    z = \frac{\lVert g \rVert - \mu}{\sigma}, \qquad
    \lVert g \rVert \leftarrow \mu + \frac{z_\theta^2}{z} \sigma
    \quad \text{where } z > z_\theta

  and the norm so clipped goes into the moving averages
  :math:`\mu \leftarrow \alpha \mu + (1 - \alpha) \lVert g \rVert`,
  :math:`\sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha)
  (\lVert g \rVert - \mu)^2`. The further out a norm is, the closer to the mean
  it is brought. In the first steps nothing is clipped; their mean and variance
  start the averages.

  Args:
    z_threshold: :math:`z_\theta`.
    decay: α.
    warmup_steps: how many steps the averages are started with.
    scope: see :func:`clip_by_norm`.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`ClipState`; bad steps
    are as for :func:`clip_by_percentile`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.clip_by_zscore(warmup_steps=2)
    >>> state = tx.init(jnp.zeros(1))
    >>> for size in (1.0, 3.0, 100.0):
    ...   update, state = tx.update(jnp.array([size]), state)
    >>> print(update, state.threshold)  # 2 + 2.5² / 98
    [2.0637755] 4.5

  References:
    Kumar et al., `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
    <https://arxiv.org/abs/2504.02507>`_, 2025
  """

  def init(shape):
    zero = jnp.zeros(shape, jnp.float32)
    return NormMoments(zero, jnp.copy(zero), jnp.zeros(shape, jnp.int32))

  def judge(norm, total, statistics):
    del total
    mean, variance, recorded = statistics
    count = recorded.astype(jnp.float32)
    warm = count < jnp.asarray(warmup_steps, jnp.float32)
    # Equal norms differ by rounding: that is no deviation.
    deviation = jnp.maximum(jnp.sqrt(variance), 1e-6 * mean)
    theta = jnp.asarray(z_threshold, jnp.float32)
    threshold = mean + theta * deviation
    above = jnp.where(norm > threshold, norm - mean, 1)
    target = mean + jnp.square(theta * deviation) / above
    threshold = jnp.where(warm, jnp.inf, threshold)
    seen = jnp.where(norm > threshold, target, norm)

    alpha = jnp.asarray(decay, jnp.float32)
    share = jnp.where(warm, 1 / (count + 1), 1 - alpha)
    next_mean = mean + share * (seen - mean)
    # The first steps by Welford's rule, whose product of the distances to the
    # old mean and to the new one keeps the plain variance.
    distance = jnp.where(warm, seen - mean, seen - next_mean)
    moved = distance * (seen - next_mean)
    following = NormMoments(
      next_mean,
      variance + share * (moved - variance),
      _count(recorded),
    )
    usual = jnp.where(recorded > 0, mean, jnp.inf)
    return Verdict(threshold, target, usual, following)

  return _clip(init, judge, scope, axis_name)


class NormAverage(NamedTuple):
  """Statistics of :func:`clip_by_norm_ema`.

  Attributes:
    average: γ, of the clipped norms; inf before the first good step.
    recorded: int32, how many good steps there were.
  """

  average: jax.Array
  recorded: jax.Array


def clip_by_norm_ema(
  ratio: ArrayLike = 1.05,
  *,
  decay: ArrayLike = 0.98,
  max_norm: ArrayLike = 1.0,
  warmup_steps: ArrayLike = 100,
  scope: Scope = 'leaf',
  axis_name: _norms.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Clips every leaf to a multiple of its average clipped norm: AdaGC.

  .. math::
    \hat g_t = g_t \min\left(1,
      \frac{\lambda \gamma_{t - 1}}{\lVert g_t \rVert}\right), \qquad
    \gamma_t = \beta \gamma_{t - 1} + (1 - \beta) \lVert \hat g_t \rVert

  In the first steps the whole tree is clipped to one norm,
  :math:`\hat g_t = g_t \min(1, c / \lVert g_t \rVert_{\text{global}})`, and γ
  is the smallest clipped norm so far.

  Args:
    ratio: λ.
    decay: β.
    max_norm: c, in the first steps.
    warmup_steps: how many steps those are.
    scope: see :func:`clip_by_norm`; the paper's is ``'leaf'``.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`ClipState`; bad steps
    are as for :func:`clip_by_percentile`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.clip_by_norm_ema(warmup_steps=1, max_norm=10.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> for size in (1.0, 1.04, 100.0):
    ...   update, state = tx.update(jnp.array([size]), state)
    >>> print(update)  # 1.05 (0.98 + 0.02 * 1.04)
    [1.05084]

  References:
    Wang et al., `AdaGC: Improving Training Stability for Large Language Model
    Pretraining <https://arxiv.org/abs/2502.11034>`_, 2025
  """

  def init(shape):
    return NormAverage(
      jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
    )

  def judge(norm, total, statistics):
    average, recorded = statistics
    warm = recorded.astype(jnp.float32) < jnp.asarray(warmup_steps, jnp.float32)
    limit = jnp.asarray(max_norm, jnp.float32) / jnp.where(total > 0, total, 1)
    threshold = jnp.where(
      warm,
      norm * jnp.minimum(limit, 1),
      jnp.asarray(ratio, jnp.float32) * average,
    )
    seen = jnp.minimum(norm, threshold)
    beta = jnp.asarray(decay, jnp.float32)
    following = jnp.where(
      warm, jnp.minimum(average, seen), beta * average + (1 - beta) * seen
    )
    recorded = _count(recorded)
    return Verdict(
      threshold, threshold, average, NormAverage(following, recorded)
    )

  return _clip(init, judge, scope, axis_name)
