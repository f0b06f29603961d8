"""Gradient reversal as a Linen module."""

from typing import Any

from flax import linen as nn
from jax.typing import ArrayLike

from optax_ghm.reversal import _reverse_gradient


class GradientReversal(nn.Module):
  """:func:`optax_ghm.reverse_gradient` as a module.

  Examples:
    >>> from flax import linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm.linen import GradientReversal
    >>> class DomainClassifier(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, features, scale):
    ...     return nn.Dense(1)(GradientReversal()(features, scale))
    >>> model, features = DomainClassifier(), jnp.ones((4, 2))
    >>> variables = model.init(jax.random.key(0), features, 1.0)
    >>> grad = jax.grad(lambda f, s: model.apply(variables, f, s).sum())
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
