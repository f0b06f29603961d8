"""The one shape of all identities whose backward rule is not linear."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from optax_ghm._core import arrays


def identity(rule: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
  r"""An identity whose backward pass is ``rule``.

  .. math::
    y = x, \qquad (\bar x, \bar r_1, \bar r_2, \dots) =
      \text{rule}(\text{static}, \bar y, r_1, r_2, \dots)

  A rule that is linear in the cotangent is a ``jax.custom_jvp`` instead, which
  has every mode of differentiation. This identity has reverse mode only.

  A leaf of :math:`\bar y` is None where the leaf of x is not floating or
  complex, and where the loss does not use the leaf of y. The rule returns None
  there, so that JAX goes on without a gradient: a zero array would become NaN
  upstream, where it meets an infinite derivative.

  Args:
    rule: from the static argument, the cotangent and the residuals to the
      cotangents of ``x`` and of every residual, with None for what has none.
      The name of the rule is the name of the primitive in jaxprs and errors.

  Returns:
    A function of ``(static, x, *residuals)`` that returns ``x``: a hashable
    argument, then pytrees.
  """

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
  @functools.wraps(rule)
  def primitive(static, x, *residuals):
    del static, residuals
    return x

  def forward(static, *primals):
    x, *residuals = custom_vjp_primal_tree_values(primals)
    # Returning x itself would lose the rule in a gradient of this gradient.
    return primitive(static, x, *residuals), residuals

  def backward(static, residuals, cotangent):
    used = jax.tree.map(
      lambda leaf: None if isinstance(leaf, SymbolicZero) else leaf, cotangent
    )
    return rule(static, used, *residuals)

  primitive.defvjp(forward, backward, symbolic_zeros=True)

  def call(static, x, *residuals):
    outputs = primitive(static, inexact_part(x), *residuals)
    return jax.tree.map(
      lambda leaf, output: leaf if output is None else output, x, outputs
    )

  return call


def inexact_part(x: Any) -> Any:
  """``x`` with None in the place of leaves that have no gradient."""
  return jax.tree.map(lambda leaf: leaf if arrays.is_inexact(leaf) else None, x)
