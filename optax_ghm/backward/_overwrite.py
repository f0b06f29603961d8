"""State that the backward pass replaces: overwrite-with-gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ghm._core import arrays

OVERWRITE_WITH_GRADIENT = '_overwrite_with_gradient'
"""The name of Flax's collection for variables that their gradient replaces."""


def overwrite_with_gradient(states: Any, gradients: Any) -> Any:
  """The next states, from the gradients with respect to the states.

  A state is any node with a field ``calls``, the number of backward passes
  whose next states were added up in its gradient. Where that is 0, because no
  gradient reached the state in this step, the state stays as it was, where
  taking the gradient itself would clear it. What has no such field, like Flax's
  own states of that kind, is its gradient.

  Args:
    states: pytree of states that rode the backward pass.
    gradients: their gradients, the same structure.

  Returns:
    The states to use in the next step.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> def loss(params, harmony):
    ...   logits = optax_ghm.harmonize(params * jnp.arange(3.0), harmony)
    ...   return jnp.mean(jnp.square(logits - 1))
    >>> harmony = optax_ghm.DEFAULT_DENSITY.init()
    >>> grads, harmony_grad = jax.grad(loss, argnums=(0, 1))(2.0, harmony)
    >>> harmony = optax_ghm.overwrite_with_gradient(harmony, harmony_grad)
    >>> float(harmony.histogram.sum())
    3.0
  """

  def overwrite(state, gradient):
    if not hasattr(state, 'calls'):
      return gradient
    reached = gradient.calls > 0  # one per state, where states are stacked

    def choose(old, new):
      each = jnp.expand_dims(reached, tuple(range(reached.ndim, new.ndim)))
      return jnp.where(each, new, old)

    return jax.tree.map(choose, state, gradient)

  return jax.tree.map(
    overwrite, states, gradients, is_leaf=lambda x: hasattr(x, 'calls')
  )


def apply_gradients(
  tx: optax.GradientTransformation,
  variables: dict[str, Any],
  gradients: dict[str, Any],
  opt_state: optax.OptState,
  **extra_args: Any,
) -> tuple[dict[str, Any], optax.OptState]:
  """One step of a plain Optax loop over Linen variables.

  What ``TrainState.apply_gradients`` does, for loops without one: the
  collection ``'params'`` is updated by ``tx``, the collection
  :data:`OVERWRITE_WITH_GRADIENT` is replaced by its gradient.

  Args:
    tx: optimizer, its state initialised on ``variables['params']``.
    variables: with a collection ``'params'`` and, if any state rides the
      backward pass, :data:`OVERWRITE_WITH_GRADIENT`.
    gradients: with respect to ``variables``, the same structure.
    opt_state: state of ``tx``.
    **extra_args: passed to ``tx.update``.

  Returns:
    The next variables and the next state of ``tx``.

  Raises:
    ValueError: if ``variables`` and ``gradients`` hold other collections.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> tx = optax.sgd(0.5)
    >>> variables = {'params': jnp.array(1.0)}
    >>> variables, _ = optax_ghm.apply_gradients(
    ...   tx,
    ...   variables,
    ...   {'params': jnp.array(2.0)},
    ...   tx.init(variables['params']),
    ... )
    >>> float(variables['params'])
    0.0
  """
  known = {'params', OVERWRITE_WITH_GRADIENT}
  for name, tree in (('variables', variables), ('gradients', gradients)):
    if not {'params'} <= set(tree) <= known:
      raise ValueError(
        f"{name} must hold 'params' and at most {OVERWRITE_WITH_GRADIENT!r}"
        f' beside it, got {sorted(tree)}: keep other collections out of what'
        ' is differentiated.'
      )
  if set(variables) != set(gradients):
    raise ValueError(
      'variables and gradients must hold the same collections, got'
      f' {sorted(variables)} and {sorted(gradients)}.'
    )
  updates, opt_state = optax.with_extra_args_support(tx).update(
    gradients['params'], opt_state, variables['params'], **extra_args
  )
  following = dict(variables)
  following['params'] = optax.apply_updates(variables['params'], updates)
  if OVERWRITE_WITH_GRADIENT in variables:
    following[OVERWRITE_WITH_GRADIENT] = overwrite_with_gradient(
      variables[OVERWRITE_WITH_GRADIENT], gradients[OVERWRITE_WITH_GRADIENT]
    )
  return following, opt_state


def ride(next_state: Any, cotangent: Any) -> Any:
  """Ties every leaf of a next state to the cotangent it came with.

  Where ``jax.vmap`` shares one state among examples, JAX sums over these what
  of the state's gradient depends on the example, and takes the rest, such as a
  count, once. Tied, all of it is summed, and ``calls`` says how many there are.
  Compiles to nothing.
  """
  numbers = [u for u in jax.tree.leaves(cotangent) if u.size]
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
