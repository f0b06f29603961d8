"""State that the backward pass replaces: overwrite-with-gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ghm._core import arrays, counters, trees

OVERWRITE_WITH_GRADIENT = '_overwrite_with_gradient'
"""The name of Flax's collection of variables that their gradient replaces."""


def overwrite_with_gradient(states: Any, gradients: Any) -> Any:
  """Replaces states of the backward pass by their gradients.

  The gradient with respect to a state of this library is the next state. Its
  field ``calls`` counts the backward passes that were added up in it. Where
  ``calls`` is 0, no gradient reached the state in this step, and the state
  stays as it is. A variable without such a field, such as the scales of Flax's
  8-bit layers, becomes its gradient.

  Args:
    states: pytree of states of the backward pass.
    gradients: the gradients with respect to ``states``, of the same structure.

  Returns:
    The states for the next step.

  Raises:
    ValueError: if ``gradients`` have another structure than ``states``.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> momentum = optax_ghm.in_backward(optax.trace(0.9))
    >>> x = jnp.ones(2)
    >>> state = momentum.init(x)
    >>> state_grad = jax.grad(lambda s: jnp.sum(momentum(x, s)))(state)
    >>> state = optax_ghm.overwrite_with_gradient(state, state_grad)
    >>> momentum.unpack(state, x).trace
    Array([1., 1.], dtype=float32)
  """

  def overwrite(state, gradient):
    if not hasattr(state, 'calls'):
      return gradient
    if jax.tree.structure(state) != jax.tree.structure(gradient):
      raise ValueError(
        'gradients must have the structure of the states: got'
        f' {jax.tree.structure(gradient)} for {jax.tree.structure(state)}.'
      )
    # One number of calls per state, where states are stacked.
    return trees.select(gradient.calls > 0, gradient, state)

  return jax.tree.map(
    overwrite, states, gradients, is_leaf=lambda x: hasattr(x, 'calls')
  )


def apply_gradients(
  tx: optax.GradientTransformation,
  gradients: dict[str, Any],
  opt_state: optax.OptState,
  variables: dict[str, Any],
  **extra_args: Any,
) -> tuple[dict[str, Any], optax.OptState]:
  """Updates the parameters and the backward states of a Linen model.

  This is ``flax.training.train_state.TrainState.apply_gradients`` for a loop
  without a ``TrainState``: ``tx`` updates the collection ``'params'``, and
  :func:`overwrite_with_gradient` replaces the collection
  ``'_overwrite_with_gradient'``.

  Args:
    tx: the optimizer.
    gradients: with respect to ``variables``, of the same structure.
    opt_state: from ``tx.init(variables['params'])``.
    variables: the collection ``'params'`` and, if a module keeps state in the
      backward pass, the collection ``'_overwrite_with_gradient'``.
    **extra_args: passed to ``tx.update``.

  Returns:
    The next variables and the next state of ``tx``.

  Raises:
    TypeError: if ``tx`` is no transformation.
    ValueError: if ``variables`` and ``gradients`` hold other collections.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> tx = optax.sgd(0.5)
    >>> variables = {'params': jnp.array(1.0)}
    >>> gradients = {'params': jnp.array(2.0)}
    >>> opt_state = tx.init(variables['params'])
    >>> variables, opt_state = optax_ghm.apply_gradients(
    ...   tx, gradients, opt_state, variables
    ... )
    >>> float(variables['params'])
    0.0
  """
  counters.check_type('tx', tx, counters.GradientTransformation)
  names = set(variables)
  known = {'params', OVERWRITE_WITH_GRADIENT}
  if not {'params'} <= names <= known or names != set(gradients):
    raise ValueError(
      "variables and gradients must both hold 'params', may both hold"
      f' {OVERWRITE_WITH_GRADIENT!r}, and nothing else, got {sorted(names)} and'
      f' {sorted(gradients)}: differentiate no other collection.'
    )
  updates, opt_state = optax.with_extra_args_support(tx).update(
    gradients['params'], opt_state, variables['params'], **extra_args
  )
  params = optax.apply_updates(variables['params'], updates)
  states = overwrite_with_gradient(variables, gradients)
  return {**states, 'params': params}, opt_state


def tie_to_cotangent(next_state: Any, cotangent: Any) -> Any:
  """Makes every leaf of a next state depend on the cotangent.

  Where ``jax.vmap`` shares one state among examples, JAX sums the parts of its
  gradient that depend on the example, and takes the others, such as a count,
  once. With this dependence all leaves are summed, and ``calls`` says over how
  many examples. It compiles to nothing.
  """
  numbers = [leaf for leaf in jax.tree.leaves(cotangent) if leaf.size]
  if not numbers:
    return next_state
  total = jnp.sum(numbers[0].real)
  zero = jnp.where(jnp.isnan(total), 0, 0)

  def tie(leaf):
    # Shards that have agreed on a state must not be made to differ again.
    if not arrays.varying_axes(zero) <= arrays.varying_axes(leaf):
      return leaf
    return leaf + zero.astype(leaf.dtype)

  return jax.tree.map(tie, next_state)
