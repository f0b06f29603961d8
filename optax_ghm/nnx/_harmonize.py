"""NNX modules that reshape the cotangent where they stand."""

import jax
from flax import nnx

from optax_ghm._core import arrays
from optax_ghm.harmonization import _density, _harmonize, _weights
from optax_ghm.nnx import _overwrite


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
    density: _density.DensityEstimator = _weights.DEFAULT_DENSITY,
    axis: int | tuple[int, ...] | None = None,
    scale: float | None = None,
    axis_name: arrays.AxisName = None,
  ):
    self.density = density
    self.axis = axis
    self.scale = scale
    self.axis_name = axis_name
    self.state = _overwrite.OverwriteWithGradient(density.init())

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
    return _harmonize.harmonize(
      x,
      self.state.get_value(),
      density=self.density,
      axis=self.axis,
      scale=self.scale,
      mask=mask,
      axis_name=self.axis_name,
      enabled=enabled,
    )
