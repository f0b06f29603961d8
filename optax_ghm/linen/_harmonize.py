"""Linen modules that reshape the cotangent where they stand."""

from typing import Any

import jax
import optax
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from jax.typing import ArrayLike

from optax_ghm import (
  backward as _backward,
  density as _density,
  harmonizing as _harmonizing,
  norms as _norms,
  reversal as _reversal,
)


class Harmonize(nn.Module):
  """:func:`optax_ghm.harmonize` as a module that keeps its own state.

  The state is a variable in Flax's overwrite-with-gradient collection, so
  ``flax.training.train_state.TrainState`` trains with it as it is: create it
  with ``params=variables``, not ``variables['params']``, and differentiate with
  respect to them. Without a ``TrainState``, :func:`optax_ghm.apply_gradients`
  makes the step. Evaluation applies the variables and changes nothing. A step
  whose gradient does not reach the module (``enabled=False``, say) clears its
  memory under ``TrainState``, and keeps it under ``apply_gradients``.

  Attributes:
    density: see :func:`optax_ghm.harmonize`, as are all the following.
    axis: axes that make up one example.
    scale: what the cotangent is multiplied by before its norm is taken.
    axis_name: mapped axis over which the batch is split.

  Examples:
    >>> from flax import linen as nn
    >>> from flax.training.train_state import TrainState
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax_ghm import WindowedDensity
    >>> from optax_ghm.linen import Harmonize
    >>> density = WindowedDensity(high=2**0.5)  # norms of p - y
    >>> model = nn.Sequential([nn.Dense(3), Harmonize(density=density)])
    >>> x, labels = jnp.ones((4, 2)), jnp.zeros(4, int)
    >>> state = TrainState.create(
    ...   apply_fn=model.apply,
    ...   tx=optax.sgd(1e-3),
    ...   params=model.init(jax.random.key(0), x),
    ... )
    >>> def loss(variables):
    ...   return optax.softmax_cross_entropy_with_integer_labels(
    ...     state.apply_fn(variables, x), labels
    ...   ).mean()
    >>> state = state.apply_gradients(grads=jax.grad(loss)(state.params))
    >>> int(state.step)
    1
  """

  density: _density.DensityEstimator = _density.DEFAULT_DENSITY
  axis: int | tuple[int, ...] | None = None
  scale: float | None = None
  axis_name: _norms.AxisName = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    enabled: bool = True,
  ) -> jax.Array:
    """Returns ``x``; its cotangent is harmonised.

    Args:
      x: activations, examples along the leading axes.
      mask: broadcastable to the examples: which of them count.
      enabled: False is the plain identity.

    Returns:
      ``x``.
    """
    state = self.variable(OVERWRITE_WITH_GRADIENT, 'harmony', self.density.init)
    return _harmonizing.harmonize(
      x,
      state.value,
      density=self.density,
      axis=self.axis,
      scale=self.scale,
      mask=mask,
      axis_name=self.axis_name,
      enabled=enabled,
    )


class GradientReversal(nn.Module):
  """:func:`optax_ghm.reverse_gradient` as a module, without state.

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
      scale: λ, such as a schedule's value at this step; one number, or one per
        example.

    Returns:
      ``x``.
    """
    return _reversal.reverse_gradient(x, scale)


class InBackward(nn.Module):
  """:func:`optax_ghm.in_backward` as a module that keeps the state.

  The state, if ``tx`` has one, is a variable in Flax's overwrite-with-gradient
  collection; :class:`Harmonize` says how to train with it.

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
    """Returns ``x``; its cotangent is what ``tx`` makes of it.

    Args:
      x: array or pytree of arrays, of the same shapes at every call if ``tx``
        keeps a state shaped as what it updates.
      enabled: False is the plain identity.

    Returns:
      ``x``.
    """
    mounted = _backward.in_backward(self.tx)
    if not mounted.keeps_state(x):
      return mounted(x, enabled=enabled)
    state = self.variable(
      OVERWRITE_WITH_GRADIENT, 'in_backward', mounted.init, x
    )
    return mounted(x, state.value, enabled=enabled)
