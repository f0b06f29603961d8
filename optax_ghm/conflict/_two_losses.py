"""Gradient harmonization of two losses at the features that they share."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays, trees
from optax_ghm._core.identity import identity
from optax_ghm._core.norms import global_norm

Rule = Literal['gh', 'gh++']
"""The names of gradient harmonization and of its milder variant."""


def conflict_weights(
  first: Any,
  second: Any,
  *,
  rule: Rule = 'gh',
  harmonic_range: float = 0.5,
  axis_name: arrays.AxisName = None,
) -> tuple[jax.Array, jax.Array]:
  r"""Weights for two losses whose gradients point against each other.

  Where :math:`g_1 \cdot g_2 < 0`, with θ the angle between them,

  .. math::
    \text{GH:} \quad & \tau_1 = 1 - \frac{g_1 \cdot g_2}{|g_1|^2}, \qquad
      \tau_2 = 1 - \frac{g_1 \cdot g_2}{|g_2|^2} \\
    \text{GH++:} \quad & \tau_1 = 1 + 2 \sin \frac{\beta}{2}, \qquad
      \tau_2 = 1 - 2 \sin \frac{\theta - \pi/2 - \beta}{2}, \qquad
      \beta = \eta\, (\theta - \pi / 2)

  and both weights are 1 otherwise. GH makes :math:`\tau_1 g_1 + \tau_2 g_2` the
  sum of the two gradients after each has lost the component that points against
  the other, so that a small step along it raises neither loss. GH++ changes the
  gradients less, and does not promise this.

  Args:
    first: :math:`g_1`, a pytree of gradients; of the domain loss, for GH++.
    second: :math:`g_2`, of the same structure; of the task's loss, for GH++.
    rule: ``'gh'`` or ``'gh++'``. The formula of GH++ is the one in the authors'
      published code.
    harmonic_range: η of GH++, from 0 to 1: the share of the excess over a right
      angle that the first weight answers for.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    :math:`(\tau_1, \tau_2)`, finite scalars in float32, or in float64 where a
    leaf has 64 bits. Both are 1 where a gradient is 0 or not finite.

  Raises:
    ValueError: if the rule is unknown or the structures differ.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm.conflict import conflict_weights
    >>> g1, g2 = jnp.array([1.0, 0.0]), jnp.array([-1.0, 1.0])
    >>> one, two = conflict_weights(g1, g2)
    >>> float(one), float(two)
    (2.0, 1.5)
    >>> combined = one * g1 + two * g2
    >>> float(combined @ g1) >= 0, float(combined @ g2) >= 0
    (True, True)

  References:
    Huang et al., `Gradient Harmonization in Unsupervised Domain Adaptation
    <https://arxiv.org/abs/2408.00288>`_, 2024
  """
  _check_rule(rule)
  shapes = [jax.tree.map(jnp.shape, tree) for tree in (first, second)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      'first and second must have the same structure and shapes, got'
      f' {shapes[0]} and {shapes[1]}.'
    )
  cosine, one, two = _cosine(first, second, axis_name)
  against = cosine < 0
  if rule == 'gh':
    weights = 1 - cosine * two / one, 1 - cosine * one / two
  else:
    # The derivative of the arc sine is infinite at -1, of opposite gradients.
    inside = against & (cosine > -1)
    excess = jnp.arcsin(jnp.where(inside, -cosine, 0))
    excess = jnp.where(inside, excess, math.pi / 2)
    beta = harmonic_range * excess
    weights = (
      1 + 2 * jnp.sin(beta / 2),
      1 - 2 * jnp.sin((excess - beta) / 2),
    )
  largest = jnp.finfo(cosine.dtype).max
  tau_1, tau_2 = (
    jnp.where(against, jnp.minimum(w, largest), 1) for w in weights
  )
  return tau_1, tau_2


def fork(
  x: Any,
  *,
  rule: Rule = 'gh',
  harmonic_range: float = 0.5,
  axis_name: arrays.AxisName = None,
  enabled: bool = True,
) -> tuple[Any, Any]:
  r"""Forks shared features into two branches with harmonized gradients.

  .. math::
    (y_1, y_2) = (x, x), \qquad
    \bar x = \tau_1 \bar y_1 + \tau_2 \bar y_2

  where the weights :math:`\tau` are :func:`conflict_weights` of the two
  cotangents. One backward pass does what the paper does with one backward pass
  per loss. Under ``jax.vmap`` every example has weights of its own; otherwise
  the examples of a batch share them.

  Args:
    x: features, an array or a pytree of arrays. Leaves that are not floating or
      complex arrays pass unchanged.
    rule: ``'gh'`` or ``'gh++'``, as in :func:`conflict_weights`.
    harmonic_range: η of GH++, from 0 to 1.
    axis_name: mapped axis, or axes, over which the batch is split.
    enabled: False returns ``(x, x)``. Forward mode needs it, since the rule is
      not linear in the cotangents.

  Returns:
    ``x`` twice: for the domain's branch, then for the task's branch.

  Raises:
    ValueError: if the rule is unknown.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import conflict
    >>> def loss(x, fork):
    ...   first, second = fork(x)
    ...   return first @ jnp.array([1.0, 0.0]) + second @ jnp.array([-1.0, 1.0])
    >>> x = jnp.zeros(2)
    >>> jax.grad(loss)(x, lambda x: (x, x))
    Array([0., 1.], dtype=float32)
    >>> jax.grad(loss)(x, conflict.fork)
    Array([0.5, 1.5], dtype=float32)

  References:
    Huang et al., `Gradient Harmonization in Unsupervised Domain Adaptation
    <https://arxiv.org/abs/2408.00288>`_, 2024
  """
  _check_rule(rule)
  if not enabled:
    return x, x
  weigh = functools.partial(
    conflict_weights,
    rule=rule,
    harmonic_range=harmonic_range,
    axis_name=axis_name,
  )
  return _fork(weigh, (x, x))


@identity
def _fork(weigh, cotangents):
  def fill(leaf, other):  # with zeros, where only the other branch is used
    is_zero = leaf is None and other is not None
    return jnp.zeros_like(other) if is_zero else leaf

  first, second = (
    jax.tree.map(fill, *pair, is_leaf=lambda leaf: leaf is None)
    for pair in (cotangents, cotangents[::-1])
  )
  one, two = weigh(first, second)

  def combine(g1, g2):
    combined = arrays.multiply(arrays.widen(g1), one)
    combined += arrays.multiply(arrays.widen(g2), two)
    return combined.astype(g1.dtype)

  # The sum is the cotangent of the first branch, so that it is rounded once.
  return ((jax.tree.map(combine, first, second), None),)


def _check_rule(rule):
  if rule not in ('gh', 'gh++'):
    raise ValueError(f"rule must be 'gh' or 'gh++', got {rule!r}.")


def _cosine(first, second, axis_name):
  """The cosine of the angle between two trees, and their norms.

  The cosine is 0 and the norms are 1 where a tree is 0 or not finite.
  """
  norms = jnp.stack([global_norm(tree, axis_name) for tree in (first, second)])
  sound = jnp.all((norms > 0) & jnp.isfinite(norms))
  one, two = jnp.where(sound, norms, 1)
  dot = jnp.zeros([], norms.dtype)
  for g1, g2 in zip(*map(trees.counted, (first, second)), strict=True):
    # Divided each, not multiplied by 1 / norm: XLA would pull those factors out
    # of the product, which then overflows.
    for u, v in zip(arrays.parts(g1), arrays.parts(g2), strict=True):
      dot += jnp.sum((u.astype(dot.dtype) / one) * (v.astype(dot.dtype) / two))
  cosine = jnp.clip(arrays.psum(dot, axis_name), -1, 1)
  return jnp.where(sound, cosine, 0), one, two
