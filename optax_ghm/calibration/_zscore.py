"""Clips whose limits follow what the norms have been doing."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_ghm import (
  clipping as _clipping,
  norms as _norms,
  percentiles as _percentiles,
  scopes as _scopes,
)

DEFAULT_PERCENTILE = _percentiles.WindowPercentile()


def clip_by_percentile(
  percentile: ArrayLike = 10.0,
  *,
  estimator: _percentiles.PercentileEstimator = DEFAULT_PERCENTILE,
  scope: _scopes.Scope = 'global',
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
  _clipping.check_range('percentile', percentile, 0, 100)

  def judge(step, statistics):
    threshold, usual, following = estimator.judge(
      step.norm, percentile, statistics
    )
    return _clipping.Verdict(threshold, threshold, usual, following)

  return _clipping.clip_by_rule(
    judge, estimator.init, scope=scope, axis_name=axis_name
  )


class NormMoments(NamedTuple):
  """Statistics of :func:`clip_by_zscore`.

  Attributes:
    mean: of the norms, 0 before the first good step.
    deviation: of the norms, σ and not its square, which float32 could not hold.
    recorded: int32, how many good steps there were.
  """

  mean: jax.Array
  deviation: jax.Array
  recorded: jax.Array


def clip_by_zscore(
  z_threshold: ArrayLike = 2.5,
  *,
  decay: ArrayLike = 0.97,
  warmup_steps: ArrayLike = 25,
  scope: _scopes.Scope = 'global',
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

  What is clipped enters the averages as clipped, so that a lasting rise of the
  norms, of three times or more, is clipped for as long as it lasts: this is the
  paper's rule. Where that may happen, take :func:`clip_by_percentile` with a
  percentile of 50.

  Args:
    z_threshold: :math:`z_\theta`.
    decay: α.
    warmup_steps: how many steps the averages are started with, one at least;
      with two or more there is a deviation to begin with.
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
  _clipping.check_range('decay', decay, 0, 1)

  def init(shape):
    zero = jnp.zeros(shape, jnp.float32)
    return NormMoments(zero, jnp.copy(zero), jnp.zeros(shape, jnp.int32))

  def judge(step, statistics):
    norm = step.norm
    mean, deviation, recorded = statistics
    count = recorded.astype(jnp.float32)
    warm = count < jnp.maximum(jnp.asarray(warmup_steps, jnp.float32), 1)
    # Equal norms differ by rounding: that is no deviation.
    spread = jnp.maximum(deviation, 1e-6 * mean)
    reach = jnp.asarray(z_threshold, jnp.float32) * spread
    threshold = mean + reach
    above = jnp.where(norm > threshold, norm - mean, 1)
    target = mean + reach * (reach / above)
    threshold = jnp.where(warm, jnp.inf, threshold)
    seen = jnp.where(norm > threshold, target, norm)

    alpha = jnp.asarray(decay, jnp.float32)
    share = jnp.where(warm, 1 / (count + 1), 1 - alpha)
    next_mean = mean + share * (seen - mean)
    # The first steps by Welford's rule, whose product of the distances to the
    # old mean and to the new one keeps the plain variance.
    to_new = jnp.abs(seen - next_mean)
    distance = jnp.where(warm, jnp.abs(seen - mean), to_new)
    moved = jnp.sqrt(distance) * jnp.sqrt(to_new)
    # Not 0: the hypotenuse of two zeros is NaN on the way, in some of JAX.
    moved = jnp.maximum(jnp.sqrt(share) * moved, jnp.finfo(jnp.float32).tiny)
    following = NormMoments(
      next_mean,
      jnp.hypot(jnp.sqrt(1 - share) * deviation, moved),
      _clipping.count_if(True, recorded),
    )
    usual = jnp.where(recorded > 0, mean, jnp.inf)
    return _clipping.Verdict(threshold, target, usual, following)

  return _clipping.clip_by_rule(judge, init, scope=scope, axis_name=axis_name)


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
  scope: _scopes.Scope = 'leaf',
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
  _clipping.check_range('decay', decay, 0, 1)

  def init(shape):
    return NormAverage(
      jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
    )

  def judge(step, statistics):
    norm, total = step.norm, step.total
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
    # The least of a few norms is not what is usual.
    usual = jnp.where(
      warm,
      jnp.maximum(average, jnp.asarray(max_norm, jnp.float32)),
      average,
    )
    recorded = _clipping.count_if(True, recorded)
    return _clipping.Verdict(
      threshold, threshold, usual, NormAverage(following, recorded)
    )

  return _clipping.clip_by_rule(judge, init, scope=scope, axis_name=axis_name)


class SecondMomentState(NamedTuple):
  """State of :func:`clip_by_second_moment`.

  Attributes:
    second_moment: v, float32, in the tree of the parameters; masked where these
      have no gradient.
    elements_clipped: float32, the share of the numbers of the last step.
    bad_steps: int32, how many had NaN or inf, in any leaf.
    absurd_in_a_row: int32, how many steps just now had a leaf whose norm was
      beyond 10,000 times that of the square roots of its v.
  """

  second_moment: Any
  elements_clipped: jax.Array
  bad_steps: jax.Array
  absurd_in_a_row: jax.Array


def clip_by_second_moment(
  ratio: ArrayLike = 5000.0,
  *,
  decay: ArrayLike = 0.999,
  axis_name: _norms.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Clips single numbers that stand out from their own past: SPAM.

  .. math::
    g \leftarrow \operatorname{sign}(g) \sqrt{\theta v}
    \quad \text{where } v \ne 0 \text{ and } g^2 > \theta v, \qquad
    v \leftarrow \beta v + (1 - \beta) g^2

  with Adam's second moment v, not corrected for its start at 0, so that the
  first steps are clipped sooner; only this rule of the paper's, not its resets
  of the momentum. It costs a moment of memory.

  Args:
    ratio: θ.
    decay: β.
    axis_name: mapped axis, or axes, over which the leaves are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`SecondMomentState`. A
    leaf with NaN or inf becomes 0; that and one that is all zero leave its v as
    it was. So does one whose norm is beyond 10,000 times that of
    :math:`\sqrt v`, which is clipped, unless there were 20 in a row.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.clip_by_second_moment(4.0, decay=0.0)
    >>> state = tx.init(jnp.zeros(2))
    >>> for grads in (jnp.array([1.0, 1.0]), jnp.array([-1.5, -50.0])):
    ...   updates, state = tx.update(grads, state)
    >>> print(updates, state.elements_clipped)
    [-1.5 -2. ] 0.5

  References:
    Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM
    Training <https://arxiv.org/abs/2501.06842>`_, 2025
  """

  def has_gradient(leaf):
    return _norms.is_inexact(leaf) and leaf.size

  def init_fn(params):
    return SecondMomentState(
      second_moment=jax.tree.map(
        lambda p: (
          jnp.zeros_like(p, jnp.float32)
          if has_gradient(p)
          else optax.MaskedNode()
        ),
        params,
      ),
      elements_clipped=jnp.zeros([], jnp.float32),
      bad_steps=jnp.zeros([], jnp.int32),
      absurd_in_a_row=jnp.zeros([], jnp.int32),
    )

  def clip_leaf(g, v, norm, patient):
    """The clipped leaf, its next moment, how many were clipped, if absurd."""
    dtype = _norms.at_least_float32(g.dtype)
    theta = jnp.asarray(ratio, jnp.float32)

    def clipped():
      limit = jnp.sqrt(theta) * jnp.sqrt(v)
      size = jnp.abs(g.astype(dtype)).astype(jnp.float32)
      above = (limit > 0) & (size > limit)
      if not jnp.iscomplexobj(g):
        x = g.astype(dtype)
        bound = jnp.sign(x) * limit.astype(dtype)
        return jnp.where(above, bound, x).astype(g.dtype)
      factor = jnp.where(above, limit / jnp.where(above, size, 1), 1)
      factor = factor.astype(jnp.finfo(dtype).dtype)
      return _norms.multiply(g.astype(dtype), factor).astype(g.dtype)

    # A conditional, for it is written out: what reads the old moment is then
    # done before XLA writes the new one in its place.
    update = jax.lax.cond(
      jnp.isfinite(norm), clipped, lambda: jnp.zeros_like(g)
    )
    size = jnp.abs(g.astype(dtype)).astype(jnp.float32)
    entering = jnp.abs(update.astype(dtype)).astype(jnp.float32)
    beta = jnp.asarray(decay, jnp.float32)
    moved = beta * v + (1 - beta) * jnp.square(entering)
    moved = jnp.minimum(moved, jnp.finfo(jnp.float32).max)
    usual = jnp.sum(v)
    if axis_name is not None:
      usual = jax.lax.psum(usual, axis_name)
    absurd = jnp.isfinite(norm) & (usual > 0)
    absurd &= norm > _clipping.ABSURD * jnp.sqrt(usual)
    known = jnp.isfinite(norm) & (norm > 0) & ~(absurd & patient)
    count = jnp.sum(jnp.where(entering < size, 1, 0), dtype=jnp.float32)
    count = jnp.where(jnp.isfinite(norm), count, 0)
    return update, jnp.where(known, moved, v), count, absurd

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    scoped = _scopes.scoped('leaf', updates)
    norms = scoped.norms(updates, axis_name)
    leaves, structure = jax.tree.flatten(updates)
    moments, of_moments = jax.tree.flatten(state.second_moment)
    at = [i for i, leaf in enumerate(leaves) if has_gradient(leaf)]
    count, any_absurd = jnp.zeros([], jnp.float32), jnp.zeros([], bool)
    patient = state.absurd_in_a_row < _clipping.PATIENCE
    for k, i in enumerate(at):
      leaves[i], moments[k], clipped, absurd = clip_leaf(
        leaves[i], moments[k], norms[k], patient
      )
      count += clipped
      any_absurd |= absurd
    if axis_name is not None:
      count = jax.lax.psum(count, axis_name)
    size = jnp.maximum(jnp.sum(scoped.sizes(updates, axis_name)), 1)
    return structure.unflatten(leaves), SecondMomentState(
      of_moments.unflatten(moments),
      count / size,
      _clipping.count_if(~jnp.all(jnp.isfinite(norms)), state.bad_steps),
      jnp.where(any_absurd, _clipping.count_if(True, state.absurd_in_a_row), 0),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
