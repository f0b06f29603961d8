"""Gradient harmonization as a Linen module."""

import jax
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from jax.typing import ArrayLike

from optax_ghm._core import arrays
from optax_ghm.harmonization import _harmonize, _weighting


class Harmonize(nn.Module):
  """:func:`optax_ghm.harmonize` as a module that keeps its own state.

  The state is a variable in Flax's overwrite-with-gradient collection.
  ``flax.training.train_state.TrainState`` knows that collection: create it with
  ``params=variables``, not ``variables['params']``, and differentiate with
  respect to these. Without a ``TrainState``, :func:`optax_ghm.apply_gradients`
  makes the step. Evaluation changes nothing. A step whose gradient does not
  reach the module, as with ``enabled=False``, clears the state under
  ``TrainState``, and keeps it under ``apply_gradients``.

  Give no optimizer the state. ``optax.adam(1e-3).init(variables)`` of all
  variables takes it for parameters and makes its counts negative, without an
  error.

  Attributes:
    weighting: which weight a norm has. Without a density of its own it is for
      the logits of a cross-entropy, sigmoid or softmax.
    axis: axes of the input that make up one example; None is all but the first.
    reduction: how the loss is reduced, 'mean', 'sum' or what its sum is divided
      by.
    axis_name: mapped axis, or axes, over which the batch is split.

  Examples:
    >>> from flax import linen as nn
    >>> from flax.training.train_state import TrainState
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax_ghm.linen import Harmonize
    >>> model = nn.Sequential([nn.Dense(3), Harmonize()])
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

  weighting: _weighting.HarmonyWeighting = _weighting.DEFAULT
  axis: int | tuple[int, ...] | None = None
  reduction: _harmonize.Reduction = 'mean'
  axis_name: arrays.AxisName = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    enabled: bool = True,
  ) -> jax.Array:
    """Returns ``x``; its cotangent is harmonized.

    Args:
      x: activations, examples along the leading axes.
      mask: bool, broadcastable to the examples: which of them count.
      weights: real numbers, broadcastable to the examples: as how many examples
        each counts.
      enabled: False is the plain identity.

    Returns:
      ``x``.
    """
    # As in the batch norm of Flax, init may be outside of the mapped axis.
    axis_name = None if self.is_initializing() else self.axis_name
    state = self.variable(
      OVERWRITE_WITH_GRADIENT,
      'harmony',
      self.weighting.init,
    )
    return _harmonize.harmonize(
      x,
      state.value,
      weighting=self.weighting,
      axis=self.axis,
      reduction=self.reduction,
      mask=mask,
      weights=weights,
      axis_name=axis_name,
      enabled=enabled,
    )
