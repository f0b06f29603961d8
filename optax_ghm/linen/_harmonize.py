"""Linen modules that reshape the cotangent where they stand."""

import jax
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from optax_ghm._core import arrays
from optax_ghm.harmonization import _density, _harmonize, _weights


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

  density: _density.DensityEstimator = _weights.DEFAULT_DENSITY
  axis: int | tuple[int, ...] | None = None
  scale: float | None = None
  axis_name: arrays.AxisName = None

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
    return _harmonize.harmonize(
      x,
      state.value,
      density=self.density,
      axis=self.axis,
      scale=self.scale,
      mask=mask,
      axis_name=self.axis_name,
      enabled=enabled,
    )
