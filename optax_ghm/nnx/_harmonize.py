"""NNX modules that reshape the cotangent where they stand."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike

from optax_ghm import (
  backward as _backward,
  density as _density,
  harmonizing as _harmonizing,
  norms as _norms,
  reversal as _reversal,
)


class OverwriteWithGradient(nnx.Variable):
  """A variable that its gradient replaces: state of the backward pass.

  Examples:
    >>> from flax import nnx
    >>> import optax_ghm.nnx as ghm_nnx
    >>> model = nnx.Sequential(ghm_nnx.Harmonize())
    >>> states = nnx.state(model, ghm_nnx.OverwriteWithGradient)
    >>> len(nnx.to_flat_state(states))
    1
  """


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
    axis_name: _norms.AxisName = None,
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


class GradientReversal(nnx.Module):
  """:func:`optax_ghm.reverse_gradient` as a module, without state.

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
      scale: λ, such as a schedule's value at this step; one number, or one per
        example.

    Returns:
      ``x``.
    """
    return _reversal.reverse_gradient(x, scale)


class InBackward(nnx.Module):
  """:func:`optax_ghm.in_backward` as a module that keeps the state.

  :class:`Harmonize` says how to train with it.

  Args:
    tx: any Optax transformation.
    x: an example of what will pass, or a ``jax.ShapeDtypeStruct`` of it; only
      a transformation that keeps a state needs it.

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
    >>> momentum.state.get_value().carried.trace.shape
    (4, 2)
  """

  def __init__(self, tx: optax.GradientTransformation, x: Any = None):
    self.mounted = _backward.in_backward(tx)
    self.knows_x = x is not None
    x = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)
    self.state = OverwriteWithGradient(self.mounted.init(x))

  def __call__(self, x: Any, enabled: bool = True) -> Any:
    """Returns ``x``; its cotangent is what ``tx`` makes of it.

    Args:
      x: array or pytree of arrays.
      enabled: False is the plain identity.

    Returns:
      ``x``.

    Raises:
      ValueError: if ``tx`` keeps a state and the constructor was given no x.
    """
    if enabled and not self.knows_x and self.mounted.keeps_state(x):
      raise ValueError(
        'tx keeps a state: give InBackward(tx, x) an example of what passes.'
      )
    return self.mounted(x, self.state.get_value(), enabled=enabled)


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
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm.nnx as ghm_nnx
    >>> model = ghm_nnx.InBackward(optax.trace(0.5), jnp.ones(2))
    >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    >>> def loss(model):
    ...   return model(jnp.ones(2)).sum()
    >>> grads = nnx.grad(loss, argnums=ghm_nnx.trained)(model)
    >>> ghm_nnx.apply_gradients(optimizer, model, grads)
    >>> momentum = model.state.get_value().carried.trace
    >>> momentum.tolist()
    [1.0, 1.0]
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
