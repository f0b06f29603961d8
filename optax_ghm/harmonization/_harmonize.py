"""Harmonising any gradients: those of activations, and those per example."""

import jax
import jax.numpy as jnp
import numpy as np

from optax_ghm._core import arrays, masks
from optax_ghm._core.identity import identity
from optax_ghm._core.norms import norm
from optax_ghm.backward import _overwrite
from optax_ghm.harmonization import _density, _weights


def harmonize(
  x: jax.Array,
  state: _density.DensityState | None = None,
  *,
  density: _density.DensityEstimator = _weights.DEFAULT_DENSITY,
  axis: int | tuple[int, ...] | None = None,
  scale: float | jax.Array | None = None,
  mask: jax.Array | None = None,
  axis_name: arrays.AxisName = None,
  enabled: bool = True,
) -> jax.Array:
  r"""Identity forward; backward, every example's cotangent times its harmony.

  .. math::
    \bar x_i \leftarrow \beta(g_i)\, \bar x_i, \qquad
    g_i = s\, \lVert \bar x_i \rVert_2

  where :math:`\bar x_i` is the cotangent of example i, β the harmony weight
  (:func:`harmony_weights`) and s the scale that undoes the loss's own
  averaging. Put at the logits of any loss, or at a hidden layer, it makes that
  loss a gradient-harmonised one: its law is that the gradient equals that of
  the GHM loss whose g is this norm.

  The next state of ``density`` is the gradient with respect to ``state``: take
  it with ``jax.grad(..., argnums=(0, 1))`` and pass it on through
  :func:`overwrite_with_gradient`. Evaluation runs no backward pass and so never
  touches it. Where one state serves several calls in a step, or micro-batches
  whose gradients are summed, their statistics are averaged.

  The rule is not linear in the cotangent, so forward mode (``jax.jvp``,
  ``jax.hessian``) raises: switch it off there with ``enabled``.

  Args:
    x: activations, examples along the leading axes.
    state: of ``density``; None starts afresh (of no consequence with momentum
      0, where a batch is weighed by itself alone).
    density: estimator of the density of g. The default expects g in [0, 1], as
      cross-entropy at the logits has it; for norms without a bound take one
      with ``log=True``, such as :data:`PARAMETER_DENSITY`.
    axis: axes of ``x`` that make up one example, over which the norm is taken.
      None is all but the first, ``()`` makes every element its own example.
    scale: what the cotangent is multiplied by before its norm is taken. None,
      for a loss that is the mean over all examples, is the number of examples
      that the mask leaves, over all of ``axis_name``. If every shard means its
      own examples and the gradients are averaged later, it is the number in the
      shard; for a sum, 1. Divide by the loss scale of mixed precision, if any.
      Softmax cross-entropy has norms up to :math:`\sqrt 2`: give it a density
      with ``high=2**0.5``.
    mask: broadcastable to the examples' shape: which count; the cotangents of
      others become 0.
    axis_name: mapped axis, or axes, over which the batch is split; under
      ``shard_map`` or ``vmap``, not needed under ``jit`` of sharded arrays.
    enabled: False is the plain identity.

  Returns:
    ``x``.

  Raises:
    TypeError: if ``x`` is neither floating nor complex.
    ValueError: if ``axis``, ``mask`` or ``state`` do not fit.

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
    >>> [round(float(g), 3) for g in grads]  # the rare one counts as much
    [0.008, 0.008, 0.008, -0.37]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, 2019
  """
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    raise TypeError(f'x must be floating or complex, got dtype {x.dtype}.')
  if not enabled:
    return x
  axes = _example_axes(x, axis)
  if state is None:
    state = density.init()
  if mask is not None:
    examples = tuple(n for i, n in enumerate(x.shape) if i not in axes)
    mask = masks.broadcast_mask(mask, examples)
  return _harmonize((density, axes, axis_name), x, state, scale, mask)


@identity
def _harmonize(static, cotangent, state, scale, mask):
  density, axes, axis_name = static
  norms = norm(cotangent, axes)
  if scale is None:
    scale = norms.size
    if mask is not None:
      scale = jnp.sum(masks.counts(mask), dtype=jnp.float32)
    scale = arrays.psum(scale, axis_name)
  weights, next_state = _weights.harmony_weights(
    norms * jnp.asarray(scale, norms.dtype),
    state,
    density=density,
    mask=mask,
    axis_name=axis_name,
  )
  weights = jnp.expand_dims(weights, axes)
  dtype = arrays.at_least_float32(cotangent.dtype)
  weighed = weights.astype(dtype) * cotangent.astype(dtype)
  if mask is not None:
    counts = jnp.expand_dims(masks.counts(mask), axes)
    weighed = jnp.where(counts, weighed, jnp.zeros_like(weighed))
  next_state = _overwrite.ride(next_state, cotangent)
  return weighed.astype(cotangent.dtype), next_state, None, None


def _example_axes(x, axis):
  """The axes of one example, non-negative."""
  if axis is None:
    return tuple(range(1, x.ndim))
  return np.lib.array_utils.normalize_axis_tuple(axis, x.ndim, 'axis')
