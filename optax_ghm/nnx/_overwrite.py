"""State of the backward pass in NNX models."""

from typing import Any

import jax
from flax import nnx

from optax_ghm.backward import _overwrite


class OverwriteWithGradient(nnx.Variable[Any]):
  """A variable that its gradient replaces: state of the backward pass.

  Examples:
    >>> from flax import nnx
    >>> import optax_ghm.nnx as ghm_nnx
    >>> model = nnx.Sequential(ghm_nnx.Harmonize())
    >>> states = nnx.state(model, ghm_nnx.OverwriteWithGradient)
    >>> len(nnx.to_flat_state(states))
    1
  """


def differentiable(path: Any, variable: Any) -> bool:
  """Whether a variable learns: parameters and states of the backward pass do.

  It is a filter of NNX, and what :func:`value_and_grad` differentiates by.

  Args:
    path: where in the model the variable is.
    variable: the variable.

  Returns:
    Whether it is a ``nnx.Param`` or an :class:`OverwriteWithGradient`.

  Examples:
    >>> from flax import nnx
    >>> import optax_ghm.nnx as ghm_nnx
    >>> model = nnx.Sequential(
    ...   nnx.BatchNorm(2, rngs=nnx.Rngs(0)), ghm_nnx.Harmonize()
    ... )
    >>> graph, learning, others = nnx.split(model, ghm_nnx.differentiable, ...)
    >>> [path for path, _ in nnx.to_flat_state(learning)]
    [('layers', 0, 'bias'), ('layers', 0, 'scale'), ('layers', 1, 'state')]
  """
  return nnx.Any(nnx.Param, OverwriteWithGradient)(path, variable)


def apply_gradients(
  optimizer: nnx.Optimizer[Any],
  model: nnx.Module,
  gradients: Any,
  **extra_args: Any,
) -> None:
  """Updates the parameters and the backward states of a model, in place.

  ``optimizer.update(model, gradients)`` would update the parameters alone: Flax
  drops the gradients of the states, and no error says so.

  Args:
    optimizer: an ``nnx.Optimizer`` of ``model`` with ``wrt=nnx.Param``.
    model: the model.
    gradients: those by the variables of :func:`differentiable`, from
      :func:`value_and_grad`.
    **extra_args: passed to the optimizer's ``update``.

  Raises:
    ValueError: if the gradients of the states are missing.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm.nnx as ghm_nnx
    >>> model = ghm_nnx.InBackward(optax.trace(0.5), jnp.ones(2))
    >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    >>> def loss(model):
    ...   return model(jnp.ones(2)).sum()
    >>> _, grads = ghm_nnx.value_and_grad(loss)(model)
    >>> ghm_nnx.apply_gradients(optimizer, model, grads)
    >>> momentum = model.state.get_value().floats.trace
    >>> momentum.tolist()
    [1.0, 1.0]
  """
  states, params = nnx.state(gradients, OverwriteWithGradient, ...)
  old = nnx.state(model, OverwriteWithGradient)
  if jax.tree.structure(old) != jax.tree.structure(states):
    raise ValueError(
      'gradients must include those of the states of the backward pass: take'
      ' them with optax_ghm.nnx.value_and_grad.'
    )
  optimizer.update(model, params, **extra_args)
  nnx.update(
    model,
    _overwrite.overwrite_with_gradient(nnx.as_pure(old), nnx.as_pure(states)),
  )
