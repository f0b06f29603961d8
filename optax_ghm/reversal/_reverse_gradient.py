"""Gradient reversal: identity forward, minus lambda times the gradient back."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_ghm._core import arrays


def reverse_gradient(x: Any, scale: ArrayLike = 1.0) -> Any:
  r"""Returns ``x``; its cotangent is multiplied by minus ``scale``.

  .. math::
    R_\lambda(x) = x, \qquad \frac{\partial R_\lambda}{\partial x} = -\lambda I

  Between the features and a domain classifier, the reversal trains the
  classifier to tell the domains apart and the features to prevent it. Its law,

  .. math::
    \nabla (f \circ R_\lambda) = -\lambda\, (\nabla f) \circ R_\lambda,

  holds in every mode of differentiation and of any order: the Hessian of
  :math:`f \circ R_\lambda` is :math:`\lambda^2` times the Hessian of f. (Only
  ``jax.linear_transpose``, which does not differentiate, sees the identity.)

  In an optimizer chain, ``optax.scale(-scale)`` or
  ``optax.scale_by_schedule`` reverses the updates of parameters.

  Args:
    x: array or pytree of arrays. Leaves that are not floating or complex arrays
      (integers, PRNG keys, Python numbers) pass unchanged.
    scale: λ, real, cast to the dtype of each leaf: a number, such as the value
      of :func:`dann_reversal_schedule` at this step, or an array over the
      leading axes of ``x``, with 0 for an example that must not be seen. The
      gradient with respect to ``scale`` is zero.

  Returns:
    ``x``, bit for bit. NaN and infinite cotangents are multiplied like any
    other, so that an infinite one becomes NaN where ``scale`` is 0.

  Raises:
    TypeError: if ``scale`` is complex.
    ValueError: if the shape of ``scale`` does not broadcast to the leading axes
      of a leaf.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> def loss(x):
    ...   return jnp.sum(optax_ghm.reverse_gradient(x, 0.5) ** 2)
    >>> loss(jnp.array([1.0, 2.0])), jax.grad(loss)(jnp.array([1.0, 2.0]))
    (Array(5., dtype=float32), Array([-1., -2.], dtype=float32))

  References:
    Ganin and Lempitsky, `Unsupervised Domain Adaptation by Backpropagation
    <https://arxiv.org/abs/1409.7495>`_, 2015
  """
  scale = jnp.asarray(scale)
  if jnp.iscomplexobj(scale):
    raise TypeError(f'scale must be real, got dtype {scale.dtype}.')

  def reverse_leaf(leaf):
    if not arrays.is_inexact(leaf):
      return leaf
    leaf = jnp.asarray(leaf)
    factor = -scale.astype(jnp.finfo(leaf.dtype).dtype)
    if factor.ndim > leaf.ndim or any(
      n not in (1, m) for n, m in zip(factor.shape, leaf.shape, strict=False)
    ):
      raise ValueError(
        'scale must be a number, or an array over the leading axes of every'
        f' leaf of x, got shape {scale.shape} for a leaf of shape {leaf.shape}.'
      )
    factor = jnp.expand_dims(factor, range(factor.ndim, leaf.ndim))
    return _reverse(leaf, factor)

  return jax.tree.map(reverse_leaf, x)


@jax.custom_jvp
def _reverse(x, factor):
  del factor
  return x


@_reverse.defjvp
def _reverse_jvp(primals, tangents):
  x, factor = primals
  # Linear in the tangent, so that its transpose is the backward rule.
  return _reverse(x, factor), arrays.multiply(tangents[0], factor)
