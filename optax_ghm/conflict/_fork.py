"""Shared features, whose several cotangents are reconciled."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays, counters, per_example
from optax_ghm._core.identity import identity
from optax_ghm.conflict import _gramian
from optax_ghm.conflict._upgrad import upgrad_weights


def fork(
  x: Any,
  branches: int = 2,
  *,
  weights: _gramian.Weights = upgrad_weights,
  axis_name: arrays.AxisName = None,
  enabled: bool = True,
) -> tuple[Any, ...]:
  r"""Forks shared features into branches whose gradients are reconciled.

  .. math::
    (y_1, \dots, y_m) = (x, \dots, x), \qquad
    \bar x = \sum_i w_i \bar y_i

  where w are the weights of the Gramian of the cotangents :math:`\bar y_i`. All
  that lies before the fork learns from the reconciled gradient, for the price
  of one backward pass; what lies behind it, from the loss of its own branch.
  The gradients are compared at x, and not at the parameters before it, as in
  MGDA-UB.

  Most methods give a mean of the gradients where nothing conflicts, so that
  the trunk's gradient is 1 / m of what it was without the fork; PCGrad and GH
  give the sum. Under ``jax.vmap`` every example has weights of its own;
  otherwise the examples of a batch share them.

  Args:
    x: features, an array or a pytree of arrays. Leaves that are not floating or
      complex arrays pass unchanged.
    branches: m, how many losses there are.
    weights: one of the methods of this package, or any function from a Gramian,
      (m, m), to weights, (m,).
    axis_name: mapped axis, or axes, over which the batch is split. Its parts
      share their weights, after an all-reduce of m² numbers.
    enabled: False returns the branches without reconciling. Forward mode needs
      it, since the rule is not linear in the cotangents.

  Returns:
    ``x``, m times. A cotangent with NaN or inf is left out. A branch that the
    loss does not use has a gradient of 0.

  Raises:
    TypeError: if ``branches`` is no integer.
    ValueError: if there is no branch; in the backward pass, if ``weights`` does
      not return (m,).

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm import conflict
    >>> def loss(x, fork):
    ...   first, second = fork(x)
    ...   return first @ jnp.array([1.0, 0.0]) + second @ jnp.array([-1.0, 1.0])
    >>> x = jnp.zeros(2)
    >>> print(jax.grad(loss)(x, lambda x: (x, x)))
    [0. 1.]
    >>> print(np.float64(jax.grad(loss)(x, conflict.fork)).round(4))
    [0.25 0.75]

  References:
    Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
    <https://arxiv.org/abs/1810.04650>`_, 2018, for the gradients at the
    features; the methods' own papers for the weights
  """
  counters.check_type('branches', branches, int)
  counters.check_range('branches', branches, 1, float('inf'))
  copies = (x,) * branches
  return _fork((weights, axis_name), copies) if enabled else copies


@identity
def _fork(how, cotangents):
  weights, axis_name = how

  def stack(*leaves):
    used = next((leaf for leaf in leaves if leaf is not None), None)
    if used is None:
      return None
    zeros = jnp.zeros_like(used)
    return jnp.stack([zeros if leaf is None else leaf for leaf in leaves])

  rows = jax.tree.map(stack, *cotangents, is_leaf=lambda leaf: leaf is None)
  reconciled = None
  if jax.tree.leaves(rows):
    gramian = _gramian.gramian(rows, axis_name=axis_name)
    found = _gramian.weigh(weights, gramian)
    reconciled = per_example.weighted_sum(rows, found)
  # The sum is the cotangent of the first branch, so that it is rounded once.
  return ((reconciled,) + (None,) * (len(cotangents) - 1),)
