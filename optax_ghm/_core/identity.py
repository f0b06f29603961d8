"""The one shape of all identities here that are not linear going backward."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def identity(rule: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
  r"""An identity whose backward pass is ``rule``.

  .. math::
    y = x, \qquad (\bar x, \bar r_1, \bar r_2, \dots) =
      \text{rule}(\text{static}, \bar y, r_1, r_2, \dots)

  A rule that is linear in the cotangent, with factors that do not depend on it,
  is a ``jax.custom_jvp`` instead, which has every mode of differentiation; this
  one has reverse mode only.

  Args:
    rule: from the static argument, the cotangent, and the residuals to the
      cotangents of ``x`` and of every residual, None for a residual that has
      none. Its name is the primitive's in jaxprs and error messages.

  Returns:
    A function of ``(static, x, *residuals)`` that returns ``x``: a hashable
    argument, then pytrees of arrays.
  """

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
  @functools.wraps(rule)
  def primitive(static, x, *residuals):
    del static, residuals
    return x

  def forward(static, x, *residuals):
    # The primitive and not x itself: a gradient of this gradient would
    # otherwise go through a plain identity, and lose the rule.
    return primitive(static, x, *residuals), residuals

  def backward(static, residuals, cotangent):
    return rule(static, cotangent, *residuals)

  primitive.defvjp(forward, backward)
  return primitive
