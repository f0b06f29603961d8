"""Gradient harmonization as an NNX module."""

import dataclasses

import jax
from flax import nnx
from jax.typing import ArrayLike

from optax_ghm._core import arrays
from optax_ghm.harmonization import _harmonize, _weighting
from optax_ghm.nnx import _overwrite


@dataclasses.dataclass(eq=False, repr=False)
class Harmonize(nnx.Module):
  """:func:`optax_ghm.harmonize` as a module that keeps its own state.

  Differentiate with :func:`value_and_grad`, and let :func:`apply_gradients`
  update the parameters and overwrite the state. Evaluation changes nothing.

  Nothing else overwrites the state. ``optimizer.update(model, grads)`` trains
  the parameters and leaves the state as it was, without an error: a density
  with a momentum then never learns.

  Args:
    weighting: which weight a norm has. Without a density of its own it is for
      the logits of a cross-entropy, sigmoid or softmax.
    axis: axes of the input that make up one example; None is all but the first.
    reduction: how the loss is reduced, 'mean', 'sum' or what its sum is divided
      by.
    axis_name: mapped axis, or axes, over which the batch is split.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm.nnx as ghm_nnx
    >>> model = nnx.Sequential(
    ...   nnx.Linear(2, 3, rngs=nnx.Rngs(0)), ghm_nnx.Harmonize()
    ... )
    >>> optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
    >>> x, labels = jnp.ones((4, 2)), jnp.zeros(4, int)
    >>> def loss(model):
    ...   return optax.softmax_cross_entropy_with_integer_labels(
    ...     model(x), labels
    ...   ).mean()
    >>> _, grads = ghm_nnx.value_and_grad(loss)(model)
    >>> ghm_nnx.apply_gradients(optimizer, model, grads)
    >>> float(model.layers[1].state.get_value().histogram.sum())
    4.0
  """

  weighting: _weighting.HarmonyWeighting = _weighting.DEFAULT
  axis: int | tuple[int, ...] | None = None
  reduction: _harmonize.Reduction = 'mean'
  axis_name: arrays.AxisName = None

  def __post_init__(self) -> None:
    state = self.weighting.init()
    self.state: _overwrite.OverwriteWithGradient = (
      _overwrite.OverwriteWithGradient(state)
    )

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
    return _harmonize.harmonize(
      x,
      self.state.get_value(),
      weighting=self.weighting,
      axis=self.axis,
      reduction=self.reduction,
      mask=mask,
      weights=weights,
      axis_name=self.axis_name,
      enabled=enabled,
    )
