"""Two losses that pull apart, harmonised at the features they share."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from optax_ghm._core import arrays
from optax_ghm._core.identity import identity
from optax_ghm._core.norms import global_norm

Rule = Literal['gh', 'gh++']
"""Gradient harmonisation, and its milder form."""


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

  and 1 elsewhere. GH makes :math:`\tau_1 g_1 + \tau_2 g_2` the sum of the two
  gradients after each has lost what points against the other, so that a small
  step along it raises neither loss. GH++ deviates less from the gradients.

  Args:
    first: :math:`g_1`, a pytree of gradients; the domain loss's, for GH++.
    second: :math:`g_2`, the same structure; the task's, for GH++.
    rule: ``'gh'`` or ``'gh++'``, whose formula here is that of the authors'
      published code.
    harmonic_range: η of GH++, from 0 to 1, how the excess of the angle over a
      right angle is split between the two.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    :math:`(\tau_1, \tau_2)`, float32 scalars (float64 where a leaf is of 64
    bits), no larger than that holds. Both are 1 where a gradient is 0 or not
    finite.

  Raises:
    ValueError: if the rule is unknown or the structures differ.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> g1, g2 = jnp.array([1.0, 0.0]), jnp.array([-1.0, 1.0])
    >>> one, two = optax_ghm.conflict_weights(g1, g2)
    >>> float(one), float(two)
    (2.0, 1.5)
    >>> combined = one * g1 + two * g2
    >>> float(combined @ g1) >= 0, float(combined @ g2) >= 0
    (True, True)

  References:
    Huang et al., `Gradient Harmonization in Unsupervised Domain Adaptation
    <https://arxiv.org/abs/2408.00288>`_, 2024
  """
  if rule not in ('gh', 'gh++'):
    raise ValueError(f"rule must be 'gh' or 'gh++', got {rule!r}.")
  kinds = [jax.tree.map(jnp.shape, tree) for tree in (first, second)]
  if kinds[0] != kinds[1]:
    raise ValueError(
      'first and second must have the same structure and shapes, got'
      f' {kinds[0]} and {kinds[1]}.'
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


def harmonized_fork(
  x: Any,
  *,
  rule: Rule = 'gh',
  harmonic_range: float = 0.5,
  axis_name: arrays.AxisName = None,
  enabled: bool = True,
) -> tuple[Any, Any]:
  r"""Two branches of shared features, whose gradients are harmonised.

  .. math::
    (y_1, y_2) = (x, x), \qquad
    \bar x = \tau_1 \bar y_1 + \tau_2 \bar y_2

  with the weights τ of :func:`conflict_weights` for the two cotangents. One
  backward pass does what the paper does with one per loss. Under ``jax.vmap``
  every example gets weights of its own, elsewhere the batch shares them.

  Args:
    x: features, an array or a pytree of them; leaves that are neither floating
      nor complex pass unchanged.
    rule: see :func:`conflict_weights`, as are the following.
    harmonic_range: η of GH++.
    axis_name: mapped axis, or axes, over which the batch is split.
    enabled: False is ``(x, x)``, which forward mode needs: the rule is not
      linear in the cotangents.

  Returns:
    ``x`` twice: first for the domain's branch, then for the task's.

  Raises:
    ValueError: if the rule is unknown.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> def loss(x, fork):
    ...   first, second = fork(x)
    ...   return first @ jnp.array([1.0, 0.0]) + second @ jnp.array([-1.0, 1.0])
    >>> x = jnp.zeros(2)
    >>> jax.grad(loss)(x, lambda x: (x, x))
    Array([0., 1.], dtype=float32)
    >>> jax.grad(loss)(x, optax_ghm.harmonized_fork)
    Array([0.5, 1.5], dtype=float32)

  References:
    Huang et al., `Gradient Harmonization in Unsupervised Domain Adaptation
    <https://arxiv.org/abs/2408.00288>`_, 2024
  """
  if rule not in ('gh', 'gh++'):
    raise ValueError(f"rule must be 'gh' or 'gh++', got {rule!r}.")
  if not enabled:
    return x, x
  leaves, structure = jax.tree.flatten(x)
  floats = [leaf for leaf in leaves if arrays.is_inexact(leaf)]
  branches = _branches((rule, harmonic_range, axis_name), (floats, floats))

  def branch(floats):
    passed = iter(floats)
    return structure.unflatten(
      next(passed) if arrays.is_inexact(leaf) else leaf for leaf in leaves
    )

  first, second = map(branch, branches)
  return first, second


@identity
def _branches(static, cotangents):
  rule, harmonic_range, axis_name = static
  first, second = cotangents
  one, two = conflict_weights(
    first,
    second,
    rule=rule,
    harmonic_range=harmonic_range,
    axis_name=axis_name,
  )

  def combine(g1, g2):
    dtype = arrays.at_least_float32(g1.dtype)
    real = jnp.finfo(dtype).dtype
    combined = arrays.multiply(g1.astype(dtype), one.astype(real))
    combined += arrays.multiply(g2.astype(dtype), two.astype(real))
    return combined.astype(g1.dtype)

  # All of it as the first branch's, so that it is rounded once.
  return ((jax.tree.map(combine, first, second), None),)


def _cosine(first, second, axis_name):
  """The cosine of the angle between two trees, from -1 to 1, and their norms.

  0, and norms of 1, where a tree is 0 or not finite.
  """
  norms = [global_norm(tree, axis_name) for tree in (first, second)]
  dtype = np.promote_types(*(n.dtype for n in norms))
  sound = (norms[0] > 0) & (norms[1] > 0)
  sound &= jnp.isfinite(norms[0]) & jnp.isfinite(norms[1])
  one, two = (jnp.where(sound, n.astype(dtype), 1) for n in norms)
  by = [jnp.clip(n, max=arrays.LARGEST_DIVISOR) for n in (one, two)]
  dot = jnp.zeros([], dtype)
  for g1, g2 in zip(*map(jax.tree.leaves, (first, second)), strict=True):
    if not arrays.is_inexact(g1):
      continue
    # Divided each, not multiplied by 1 / by: XLA would pull those factors out
    # of the product, which then overflows.
    for u, v in zip(_parts(g1), _parts(g2), strict=True):
      dot += jnp.sum((u.astype(dtype) / by[0]) * (v.astype(dtype) / by[1]))
  dot = arrays.psum(dot, axis_name)
  # Kept apart from it: XLA would make it dot * by / norm, which overflows.
  rest = jax.lax.optimization_barrier((one / by[0]) * (two / by[1]))
  cosine = jnp.clip(dot / rest, -1, 1)
  return jnp.where(sound, cosine, 0), one, two


def _parts(x):
  """The real parts that a number has."""
  return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
