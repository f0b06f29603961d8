"""Several losses and one gradient of them, reconciled."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from optax_ghm._core import per_example
from optax_ghm.conflict import _gramian
from optax_ghm.conflict._upgrad import upgrad_weights


class Reconciliation(NamedTuple):
  """How the gradients of several losses were reconciled.

  Attributes:
    weights: of the losses, in their structure.
    cosines: (m, m), of the angles between their gradients, in the order of
      ``jax.tree.leaves``. It is 0 for a gradient that is 0 or not finite.
  """

  weights: Any
  cosines: jax.Array


def reconciled_value_and_grad(
  losses_fn: Callable[..., Any],
  weights: _gramian.Weights = upgrad_weights,
  *,
  has_aux: bool = False,
  batch_size: int | None = None,
) -> Callable[..., tuple[Any, Any, Reconciliation]]:
  r"""The values of several losses, and one gradient that reconciles them.

  .. math::
    \ell = f(\theta), \qquad g_i = \nabla_\theta \ell_i, \qquad
    \bar g = \sum_i w_i g_i

  where w are the weights of the Gramian of all :math:`g_i`. The losses are
  computed once, and pulled back m times.

  Args:
    losses_fn: function whose first argument is the pytree of parameters, and
      which returns the losses: a vector of them, or a pytree of scalars such as
      a dict. With ``shard_map``, they are means over all devices.
    weights: one of the methods of this package, or any function from a Gramian,
      (m, m), to weights, (m,).
    has_aux: whether ``losses_fn`` returns a pair of the losses and other data.
    batch_size: how many losses are pulled back at once. By default it is all of
      them, which is fast, and takes m times the memory of one backward pass.

  Returns:
    A function with the arguments of ``losses_fn`` that returns

    - the losses (or, with ``has_aux``, the pair that ``losses_fn`` returned),
    - the reconciled gradient, as the parameters,
    - a :class:`Reconciliation`.

    A loss whose gradient holds NaN or inf is left out. Since 0 times NaN is NaN
    in JAX, a loss whose derivative at shared outputs is NaN takes the others
    with it: the gradient is then 0. With :func:`fork`, it does not.

  Raises:
    ValueError: when it is called, if there is no loss, or no parameter that is
      a floating or complex array.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax
    >>> from optax_ghm import conflict
    >>> def losses_fn(w):
    ...   return {'left': (w[0] - 1) ** 2, 'right': 4 * w[0] + w[1] ** 2}
    >>> params = jnp.array([0.5, 1.0])
    >>> tx = optax.sgd(0.1)
    >>> losses, grads, how = conflict.reconciled_value_and_grad(losses_fn)(
    ...   params
    ... )
    >>> print(losses['left'], losses['right'], np.float64(grads).round(4))
    0.25 3.0 [-0.1  1.2]
    >>> print(
    ...   np.float64(how.weights['left']).round(4),
    ...   np.float64(how.cosines[0, 1]).round(4),
    ... )
    2.5 -0.8944
    >>> updates, _ = tx.update(grads, tx.init(params))

  References:
    Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024, for the default
  """

  @functools.wraps(losses_fn)
  def value_and_grad(params, *args, **kwargs):
    def flat_losses(params):
      out = losses_fn(params, *args, **kwargs)
      losses = out[0] if has_aux else out
      vector, unravel = ravel_pytree(losses)
      return vector, (out, unravel)

    vector, pull, (out, unravel) = jax.vjp(flat_losses, params, has_aux=True)
    if not vector.size:
      raise ValueError('losses_fn must return one loss or more, got none.')
    basis = jnp.eye(vector.size, dtype=vector.dtype)
    if batch_size is None:
      (rows,) = jax.vmap(pull)(basis)
    else:
      (rows,) = jax.lax.map(pull, basis, batch_size=batch_size)
    gramian = _gramian.gramian(rows)
    found = weights(gramian)
    cosines = _gramian.directions(gramian).cosines
    grads = per_example.weighted_sum(rows, found)
    return out, grads, Reconciliation(unravel(found), cosines)

  return value_and_grad
