"""Harmonizing the cotangents of any activation."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, masks
from optax_ghm._core.identity import identity
from optax_ghm._core.norms import norm
from optax_ghm.backward import _overwrite
from optax_ghm.harmonization import (
  _density,
  _weighting,
  _weights,
  _windowed,
)

Reduction = Literal['mean', 'sum'] | float | jax.Array
"""How a loss was reduced: by mean, by sum, or by its sum over a number."""

# The norms of p - y, and windows of the same share of the range: two softmax
# classes have the weights of one sigmoid.
_OF_VECTORS = _windowed.WindowedDensity(high=2**0.5, width=0.1 * 2**0.5)


def harmonize(
  x: jax.Array,
  state: _density.DensityState | None = None,
  *,
  weighting: _weighting.HarmonyWeighting = _weighting.DEFAULT,
  axis: int | tuple[int, ...] | None = None,
  reduction: Reduction = 'mean',
  mask: ArrayLike | None = None,
  weights: ArrayLike | None = None,
  axis_name: arrays.AxisName = None,
  enabled: bool = True,
) -> jax.Array:
  r"""Identity forward; backward, every example's cotangent times its harmony.

  .. math::
    \bar x_i \leftarrow w_i\, \beta(g_i)\, \bar x_i, \qquad
    g_i = n\, \lVert \bar x_i \rVert_2

  where :math:`\bar x_i` is the cotangent of example i, β the harmony weight
  (:func:`harmony_weights`) and n the number that the loss's sum was divided by.
  Put at the logits of any loss, or at a hidden layer, it makes that loss a
  gradient-harmonized one. Its law: the gradient equals that of the GHM loss
  whose g is this norm.

  The next state of the density is the gradient with respect to ``state``: take
  it with ``jax.grad(..., argnums=(0, 1))`` and hand it to
  :func:`overwrite_with_gradient`. Evaluation runs no backward pass and leaves
  the state alone. Where one state serves several calls in a step, or
  micro-batches whose gradients are summed, their statistics are averaged.

  The rule is not linear in the cotangent. Forward mode (``jax.jvp``,
  ``jax.hessian``) raises: give ``enabled=False`` there.

  Args:
    x: activations, floating or complex, examples along the leading axes.
    state: of the density, from ``weighting.init()`` or the last step. None is
      for densities without momentum.
    weighting: which weight a norm has. Without a density of its own it is for
      the logits of a cross-entropy: ``WindowedDensity()`` with norms in [0, 1]
      if an example is a single number, else the same windows, as a share of the
      range, over [0, √2], the norms of p - y for softmax. For norms without a
      bound, as at a hidden layer, give it the density
      :data:`optax_ghm.harmonization.PARAMETER_DENSITY`.
    axis: axes of ``x`` that make up one example, over which the norm is taken.
      None is all but the first, ``()`` makes every element its own example.
    reduction: how the loss was reduced. 'mean' is a mean over all examples that
      ``mask`` leaves, over all of ``axis_name``; 'sum' is a sum. A number, that
      may be traced, is what the sum was divided by: the size of the shard if
      every shard means its own examples and the gradients are averaged later,
      or the number of examples over the loss scale of mixed precision. A loss
      that is reduced in another way than this says has norms beyond the range,
      which the next state counts in ``above_range``, or far too small ones.
    mask: bool, broadcastable to the examples: which of them count. The
      cotangents of the others become 0.
    weights: real numbers w, broadcastable to the examples: as how many examples
      each counts, in the density and in the cotangent.
    axis_name: mapped axis, or axes, over which the batch is split, under
      ``shard_map`` or ``vmap``; None under ``jit`` of sharded arrays.
    enabled: False is the plain identity.

  Returns:
    ``x``.

  Raises:
    TypeError: if ``x`` is neither floating nor complex, or ``mask`` not bool.
    ValueError: if ``axis``, ``reduction``, ``mask``, ``weights`` or ``state``
      do not fit, or if the density has a momentum and there is no ``state``.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> labels = jnp.array([0.0, 0.0, 0.0, 1.0])
    >>> def loss(logits):
    ...   logits = optax_ghm.harmonize(logits)
    ...   return optax.sigmoid_binary_cross_entropy(logits, labels).mean()
    >>> grads = jax.grad(loss)(jnp.array([-3.0, -3.0, -3.0, -1.0]))
    >>> [round(float(g), 3) for g in grads]  # 0.012 and -0.183 without
    [0.012, 0.012, 0.012, -0.178]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, 2019
  """
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    raise TypeError(f'x must be floating or complex, got dtype {x.dtype}.')
  if not enabled:
    return x
  axes = tuple(range(1, x.ndim)) if axis is None else axis
  axes = np.lib.array_utils.normalize_axis_tuple(axes, x.ndim, 'axis')
  counters.check_type('weighting', weighting, _weighting.HarmonyWeighting)
  vectors = math.prod(x.shape[i] for i in axes) != 1
  weighting = weighting.with_density(
    _OF_VECTORS if vectors else _windowed.DEFAULT
  )
  if state is None:
    state = _weights.init_without_momentum(weighting)
  examples = tuple(n for i, n in enumerate(x.shape) if i not in axes)
  amounts = masks.amounts(mask, weights, examples)
  divisor = reduction
  if isinstance(reduction, str):
    if reduction not in ('mean', 'sum'):
      raise ValueError(
        f"reduction must be 'mean', 'sum' or a number, got {reduction!r}."
      )
    counts = masks.broadcast_mask(mask, examples)
    count = math.prod(examples) if counts is None else jnp.sum(counts)
    divisor = arrays.psum(count, axis_name) if reduction == 'mean' else 1
  elif not isinstance(reduction, jax.Array) and not reduction > 0:
    raise ValueError(f'reduction must be above 0, got {reduction!r}.')
  static = weighting, axes, axis_name
  return _harmonize(static, x, state, divisor, amounts)


@identity
def _harmonize(static, cotangent, state, divisor, amounts):
  weighting, axes, axis_name = static
  norms = norm(cotangent, axes)
  weights, next_state = _weights.weigh(
    norms * jnp.asarray(divisor).astype(norms.dtype),
    amounts,
    state,
    weighting,
    axis_name,
    True,
  )
  weights = jnp.expand_dims(weights, axes)
  dtype = arrays.at_least_float32(cotangent.dtype)
  weighed = weights.astype(dtype) * cotangent.astype(dtype)
  if amounts is not None:
    counts = jnp.expand_dims(amounts.astype(bool), axes)
    weighed = jnp.where(counts, weighed, jnp.zeros_like(weighed))
  next_state = _overwrite.tie_to_cotangent(next_state, cotangent)
  return weighed.astype(cotangent.dtype), next_state, None, None
