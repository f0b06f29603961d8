"""A transformation in the backward pass, as a Linen module."""

from typing import Any

import optax
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from optax_ghm.backward import _in_backward


class InBackward(nn.Module):
  """:func:`optax_ghm.in_backward` as a module.

  The state of ``tx``, if it keeps one, is a variable in Flax's collection
  ``'_overwrite_with_gradient'``. Differentiate with respect to this collection
  beside ``'params'``; ``TrainState.apply_gradients`` or
  :func:`optax_ghm.apply_gradients` then replaces it by its gradient. An
  optimizer that is given all variables takes the state for parameters, without
  an error.

  Attributes:
    tx: any Optax transformation.

  Examples:
    >>> from flax import linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax_ghm.linen import InBackward
    >>> clip = InBackward(optax.clip_by_global_norm(1.0))
    >>> model, x = nn.Sequential([nn.Dense(3), clip, nn.relu]), jnp.ones((4, 2))
    >>> variables = model.init(jax.random.key(0), x)
    >>> model.apply(variables, x).shape
    (4, 3)
  """

  tx: optax.GradientTransformation

  @nn.compact
  def __call__(self, x: Any, enabled: bool = True) -> Any:
    """Returns ``x``; its cotangent becomes what ``tx`` makes of it.

    Args:
      x: array or pytree of arrays, of the same shapes at every call if ``tx``
        keeps a state in the shape of its updates.
      enabled: False makes this the plain identity.

    Returns:
      ``x``.
    """
    identity = _in_backward.in_backward(self.tx)
    # As in the batch norm of Flax, init may be outside of the mapped axis.
    enabled = enabled and not self.is_initializing()
    if not identity.keeps_state(x):
      return identity(x, enabled=enabled)
    state = self.variable(
      OVERWRITE_WITH_GRADIENT, 'in_backward', identity.init, x
    )
    return identity(x, state.value, enabled=enabled)
