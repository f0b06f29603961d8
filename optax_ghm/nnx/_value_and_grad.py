"""Gradients of NNX models, in graph mode and in tree mode."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from optax_ghm.nnx import _overwrite


def value_and_grad(
  loss_fn: Callable[..., Any],
  *,
  argnums: int | Sequence[int] = 0,
  wrt: Any = _overwrite.differentiable,
  has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
  """The value of a loss, and its gradients by the variables that learn.

  ``nnx.value_and_grad`` differentiates a model by its parameters in the graph
  mode of Flax, and by everything in it in tree mode, which is an error for
  models with integers such as random states. This function differentiates it by
  the variables of ``wrt`` in both modes: it splits the model, and the loss gets
  a model that is merged from the parts. Running averages, random states and
  other variables change in the model itself. New attributes, such as what
  ``Module.sow`` leaves without ``nnx.capture``, do not reach it.

  Args:
    loss_fn: the loss, of models and other arguments.
    argnums: the position, or positions, of what to differentiate by.
    wrt: filter of the variables by which models are differentiated; by default
      those of :func:`differentiable`. Other arguments are differentiated whole.
    has_aux: whether the loss returns a pair (loss, auxiliary data).

  Returns:
    A function of the arguments of ``loss_fn`` that returns (value, gradients).
    The gradients of a model are a ``nnx.State``, those of several arguments a
    tuple. With ``has_aux`` the value is (loss, auxiliary data).

  Raises:
    TypeError: if ``argnums`` are not integers of 0 or more.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import optax_ghm.nnx as ghm_nnx
    >>> model = nnx.Sequential(
    ...   nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)),
    ...   ghm_nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0)),
    ... )
    >>> def loss_fn(model, x):
    ...   return jnp.mean(jnp.square(model(x) - 1))
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> value, grads = ghm_nnx.value_and_grad(loss_fn)(model, x)
    >>> [path for path, _ in nnx.to_flat_state(grads)]
    [('layers', 0, 'kernel'), ('layers', 1, 'bias'), ('layers', 1, 'scale')]
    >>> bool(jnp.any(model.layers[1].mean.get_value() != 0))
    True
  """
  several = isinstance(argnums, Sequence)
  numbers = tuple(argnums) if several else (argnums,)
  if not all(isinstance(number, int) and number >= 0 for number in numbers):
    raise TypeError(
      f'argnums must be positions, counted from 0, got {argnums}. A filter of'
      ' variables, as in nnx.DiffState, is given as wrt.'
    )

  def value_and_grad(*args, **kwargs):
    wanted, rests, graphs = {}, dict(enumerate(args)), {}
    for i in numbers:
      if isinstance(args[i], nnx.Pytree):
        graphs[i], wanted[i], rests[i] = nnx.split(args[i], wrt, ...)
      else:
        wanted[i] = rests.pop(i)

    def loss_of_wanted(wanted, rests, kwargs):
      merged = {i: nnx.merge(g, wanted[i], rests[i]) for i, g in graphs.items()}
      by_number = {**rests, **wanted, **merged}
      return loss_fn(*(by_number[i] for i in range(len(args))), **kwargs)

    value, grads = nnx.value_and_grad(loss_of_wanted, has_aux=has_aux)(
      wanted, rests, kwargs
    )
    grads = tuple(grads[i] for i in numbers)
    return value, grads if several else grads[0]

  return value_and_grad
