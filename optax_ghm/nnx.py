"""Flax NNX faces: modules that keep their state themselves."""

import jax
from flax import nnx

from optax_ghm import (
  backward as _backward,
  density as _density,
  harmonizing as _harmonizing,
)


class OverwriteWithGradient(nnx.Variable):
  """A variable that its gradient replaces: state of the backward pass."""


class Harmonize(nnx.Module):
  """:func:`optax_ghm.harmonize` as a module that keeps its own state.

  Differentiate with respect to :data:`trained`, and let
  :func:`apply_gradients` optimise the parameters and overwrite the state.
  Evaluation changes nothing.

  Args:
    density: see :func:`optax_ghm.harmonize`, as are all the following.
    axis: axes that make up one example.
    scale: what the cotangent is multiplied by before its norm is taken.
    axis_name: mapped axis over which the batch is split.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> import optax_ghm.nnx as ghm_nnx
    >>> model = nnx.Sequential(
    ...   nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
    ...   ghm_nnx.Harmonize(density=optax_ghm.WindowedDensity(high=2**0.5)),
    ... )
    >>> optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
    >>> x, labels = jnp.ones((4, 2)), jnp.zeros(4, int)
    >>> def loss(model):
    ...   return optax.softmax_cross_entropy_with_integer_labels(
    ...     model(x), labels
    ...   ).mean()
    >>> grads = nnx.grad(loss, argnums=ghm_nnx.trained)(model)
    >>> ghm_nnx.apply_gradients(optimizer, model, grads)
    >>> float(model.layers[1].state.get_value().histogram.sum())
    4.0
  """

  def __init__(
    self,
    density: _density.DensityEstimator = _density.DEFAULT_DENSITY,
    axis: int | tuple[int, ...] | None = None,
    scale: float | None = None,
    axis_name: _density.AxisName = None,
  ):
    self.density = density
    self.axis = axis
    self.scale = scale
    self.axis_name = axis_name
    self.state = OverwriteWithGradient(density.init())

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
    return _harmonizing.harmonize(
      x,
      self.state.get_value(),
      density=self.density,
      axis=self.axis,
      scale=self.scale,
      mask=mask,
      axis_name=self.axis_name,
      enabled=enabled,
    )


trained = nnx.DiffState(0, nnx.Any(nnx.Param, OverwriteWithGradient))
"""For ``nnx.grad(..., argnums=trained)``: parameters and backward states."""


def apply_gradients(
  optimizer: nnx.Optimizer,
  model: nnx.Module,
  gradients: nnx.State,
  **extra_args,
) -> None:
  """Optimises the parameters and overwrites the states, in place.

  Args:
    optimizer: an ``nnx.Optimizer`` of ``model`` with ``wrt=nnx.Param``.
    model: the model.
    gradients: with respect to :data:`trained`.
    **extra_args: passed to the optimizer's ``update``.

  Raises:
    ValueError: if the gradients of the states are missing.

  Examples:
    See :class:`Harmonize`.
  """
  states, params = nnx.split_state(gradients, OverwriteWithGradient, ...)
  old = nnx.state(model, OverwriteWithGradient)
  if jax.tree.structure(old) != jax.tree.structure(states):
    raise ValueError(
      'gradients must be those of the parameters and of the states of the'
      ' backward pass: take them with nnx.grad(..., argnums=trained).'
    )
  optimizer.update(model, params, **extra_args)
  nnx.update(
    model,
    _backward.overwrite_with_gradient(nnx.as_pure(old), nnx.as_pure(states)),
  )
