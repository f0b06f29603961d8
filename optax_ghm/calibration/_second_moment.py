"""Clipping single numbers by their second moment: SPAM."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, scopes
from optax_ghm.calibration import _clip


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
  axis_name: arrays.AxisName = None,
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
    return arrays.is_inexact(leaf) and leaf.size

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
    dtype = arrays.at_least_float32(g.dtype)
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
      return arrays.multiply(g.astype(dtype), factor).astype(g.dtype)

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
    absurd &= norm > _clip.ABSURD * jnp.sqrt(usual)
    known = jnp.isfinite(norm) & (norm > 0) & ~(absurd & patient)
    count = jnp.sum(jnp.where(entering < size, 1, 0), dtype=jnp.float32)
    count = jnp.where(jnp.isfinite(norm), count, 0)
    return update, jnp.where(known, moved, v), count, absurd

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    scoped = scopes.scoped('leaf', updates)
    norms = scoped.norms(updates, axis_name)
    leaves, structure = jax.tree.flatten(updates)
    moments, of_moments = jax.tree.flatten(state.second_moment)
    at = [i for i, leaf in enumerate(leaves) if has_gradient(leaf)]
    count, any_absurd = jnp.zeros([], jnp.float32), jnp.zeros([], bool)
    patient = state.absurd_in_a_row < _clip.PATIENCE
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
      counters.count_if(~jnp.all(jnp.isfinite(norms)), state.bad_steps),
      jnp.where(any_absurd, counters.count_if(True, state.absurd_in_a_row), 0),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
