"""A transformation in the backward pass, as an NNX module."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from optax_ghm.backward import _in_backward
from optax_ghm.nnx import _overwrite


class InBackward(nnx.Module):
  """:func:`optax_ghm.in_backward` as a module.

  The state of ``tx`` is an :class:`OverwriteWithGradient` variable.
  Differentiate with :func:`optax_ghm.nnx.value_and_grad`;
  :func:`optax_ghm.nnx.apply_gradients` then replaces the state by its gradient.
  ``optimizer.update(model, grads)`` leaves the state as it was, without an
  error.

  Args:
    tx: any Optax transformation.
    x: an example of the activations, or ``jax.ShapeDtypeStruct`` of them. None
      if ``tx`` keeps no state in the shape of its updates.

  Examples:
    >>> from flax import nnx
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm.nnx as ghm_nnx
    >>> clip = ghm_nnx.InBackward(optax.clip_by_global_norm(1.0))
    >>> clip(jnp.ones((4, 2))).shape
    (4, 2)
    >>> momentum = ghm_nnx.InBackward(optax.trace(0.9), jnp.ones((4, 2)))
    >>> momentum.state.get_value().floats.trace.shape
    (4, 2)
  """

  def __init__(self, tx: optax.GradientTransformation, x: Any = None):
    self.identity: _in_backward.InBackward = _in_backward.in_backward(tx)
    x = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)
    self.state: _overwrite.OverwriteWithGradient = (
      _overwrite.OverwriteWithGradient(self.identity.init(x))
    )

  def __call__(self, x: Any, enabled: bool = True) -> Any:
    """Returns ``x``; its cotangent becomes what ``tx`` makes of it.

    Args:
      x: array or pytree of arrays.
      enabled: False makes this the plain identity.

    Returns:
      ``x``.

    Raises:
      ValueError: if ``tx`` keeps a state in the shape of its updates, and the
        constructor was given no such ``x``.
    """
    return self.identity(x, self.state.get_value(), enabled=enabled)
