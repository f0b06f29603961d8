"""Several losses and one gradient of them, reconciled."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ghm._core import per_example
from optax_ghm.conflict import _gramian
from optax_ghm.conflict._upgrad import upgrad_weights


class Reconciliation(NamedTuple):
  """How the gradients of several losses were reconciled.

  Attributes:
    weights: of the losses, in their structure and in float32.
    cosines: (m, m), of the angles between their gradients, in the order of
      ``jax.tree.leaves``. A gradient that is 0 or not finite has a cosine of 0
      with all others.
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

  where w are the weights of the Gramian of all :math:`g_i`. Call it under
  ``jax.jit``: the losses are then computed once. Every leaf of the losses is
  pulled back alone, and only through those parts of the model that it depends
  on; the elements of one leaf are pulled back together. Return a dict of
  scalars where every loss has a head of its own, and a vector where the losses
  are many and have all parts in common.

  Args:
    losses_fn: pure function whose first argument is the pytree of parameters,
      and which returns the losses: one vector of them, or a pytree of scalars
      such as a dict. It is traced more than once: of a Flax NNX model, give the
      parameters, and merge a copy of the model inside. With ``shard_map``, the
      losses are means over all devices.
    weights: one of the methods of this package, or any function from a Gramian,
      (m, m), to weights, (m,).
    has_aux: whether ``losses_fn`` returns a pair of the losses and other data.
    batch_size: how many elements of a vector of losses are pulled back at once.
      By default it is all, which takes as many times the memory of one.

  Returns:
    A function with the arguments of ``losses_fn`` that returns

    - the losses (or, with ``has_aux``, the pair that ``losses_fn`` returned),
    - the reconciled gradient, as the parameters,
    - a :class:`Reconciliation`.

    A loss whose gradient holds NaN or inf is left out. In a vector it may take
    the others with it, since 0 times NaN is NaN: the gradient is then 0.

  Raises:
    TypeError: when it is called, if a loss is no real floating number, or if
      with ``has_aux`` there is no pair.
    ValueError: when it is called, if there is no loss, if there are several
      vectors, if no parameter is a floating or complex array, or if ``weights``
      does not return (m,).

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> import optax
    >>> from optax_ghm import conflict
    >>> def losses_fn(w):
    ...   return {'left': (w[0] - 1) ** 2, 'right': 4 * w[0] + w[1] ** 2}
    >>> params = jnp.array([0.5, 1.0])
    >>> tx = optax.sgd(0.1)
    >>> value_and_grad = conflict.reconciled_value_and_grad(losses_fn)
    >>> losses, grads, how = jax.jit(value_and_grad)(params)
    >>> print(losses['left'], losses['right'], np.float64(grads).round(4))
    0.25 3.0 [-0.1  1.2]
    >>> print(np.float64(how.cosines[0]).round(4), how.weights['left'])
    [ 1.     -0.8944] 2.5
    >>> updates, _ = tx.update(grads, tx.init(params))

  References:
    Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024, for the default
  """

  @functools.wraps(losses_fn)
  def value_and_grad(params, *args, **kwargs):
    out = losses_fn(params, *args, **kwargs)
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):  # noqa: PLR2004
      raise TypeError(
        'with has_aux, losses_fn must return a pair of losses and other data,'
        f' got {out!r}.'
      )
    losses, structure = jax.tree.flatten(out[0] if has_aux else out)
    _check(losses)

    def leaf_of(params, index):
      out = losses_fn(params, *args, **kwargs)
      leaf = jax.tree.leaves(out[0] if has_aux else out)[index]
      return jnp.atleast_1d(leaf)

    def rows_of(index):
      leaf, pull = jax.vjp(functools.partial(leaf_of, index=index), params)
      at_once = leaf.size if batch_size is None else batch_size
      basis = jnp.eye(leaf.size, dtype=leaf.dtype)
      return jax.lax.map(pull, basis, batch_size=at_once)[0]

    # A leaf is pulled back alone, through what it depends on. What all of them
    # compute on the way there is the same, and XLA keeps one copy of it.
    rows = [rows_of(index) for index in range(len(losses))]
    rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
    gramian = _gramian.gramian(rows)
    found = _gramian.weigh(weights, gramian)
    grads = per_example.weighted_sum(rows, found)
    of_leaves = list(found) if len(losses) > 1 else [found]
    of_leaves = [
      weight.reshape(jnp.shape(loss))
      for weight, loss in zip(of_leaves, losses, strict=True)
    ]
    cosines = _gramian.directions(gramian).cosines
    how = Reconciliation(jax.tree.unflatten(structure, of_leaves), cosines)
    return out, grads, how

  return value_and_grad


def _check(losses):
  shapes = [jnp.shape(loss) for loss in losses]
  if not losses or (0,) in shapes:
    raise ValueError('losses_fn must return one loss or more, got none.')
  if any(shapes) and (len(shapes) > 1 or len(shapes[0]) > 1):
    raise ValueError(
      'losses_fn must return scalars, or one vector of losses, got shapes'
      f' {shapes}. With other data beside the losses, set has_aux.'
    )
  if not all(jnp.issubdtype(jnp.result_type(u), jnp.floating) for u in losses):
    raise TypeError(
      'losses must be real, floating numbers, got'
      f' {[jnp.result_type(u).name for u in losses]}.'
    )
