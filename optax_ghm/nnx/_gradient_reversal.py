"""Gradient reversal as an NNX module."""

from typing import Any

from flax import nnx
from jax.typing import ArrayLike

from optax_ghm.reversal import _reverse_gradient


class GradientReversal(nnx.Module):
  """:func:`optax_ghm.reverse_gradient` as a module.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from optax_ghm.nnx import GradientReversal
    >>> class DomainClassifier(nnx.Module):
    ...   def __init__(self, rngs):
    ...     self.reverse = GradientReversal()
    ...     self.dense = nnx.Linear(2, 1, rngs=rngs)
    ...
    ...   def __call__(self, features, scale):
    ...     return self.dense(self.reverse(features, scale))
    >>> model = DomainClassifier(nnx.Rngs(0))
    >>> grad = nnx.grad(lambda f, s: model(f, s).sum())
    >>> features = jnp.ones((4, 2))
    >>> bool(jnp.all(grad(features, 0.5) == -0.5 * grad(features, -1.0)))
    True
  """

  def __call__(self, x: Any, scale: ArrayLike = 1.0) -> Any:
    """Returns ``x``; its cotangent is multiplied by minus ``scale``.

    Args:
      x: array or pytree of arrays.
      scale: λ, a number such as the value of a schedule at this step, or an
        array over the leading axes of ``x``.

    Returns:
      ``x``.
    """
    return _reverse_gradient.reverse_gradient(x, scale)
