"""Batch normalization folded into the layer before it."""

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays


def fold_batch_norm(
  kernel: jax.Array,
  bias: jax.Array | None,
  mean: jax.Array,
  var: jax.Array,
  scale: jax.Array | None = None,
  offset: jax.Array | None = None,
  *,
  epsilon: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
  r"""The dense or convolutional layer that does the batch norm after it, too.

  .. math::
    W' = W\, \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad
    b' = (b - \mu)\, \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} + \beta

  Args:
    kernel: W, of a Flax ``Dense`` or ``Conv``: output features last.
    bias: b, or None.
    mean: μ, the running average.
    var: σ², the same.
    scale: γ, or None.
    offset: β, the bias of the batch norm, or None.
    epsilon: of the batch norm.

  Returns:
    W' and b', in the dtype of ``kernel``: their layer has, in evaluation, the
    output that both layers had.

  Raises:
    ValueError: if the last axis of the kernel is not that of the statistics.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> optax_ghm.fold_batch_norm(
    ...   jnp.eye(1), None, jnp.array([1.0]), jnp.array([4.0]), epsilon=0.0
    ... )
    (Array([[0.5]], dtype=float32), Array([-0.5], dtype=float32))
  """
  kernel, mean = jnp.asarray(kernel), jnp.asarray(mean)
  if kernel.shape[-1:] != mean.shape:
    raise ValueError(
      f'kernel, of shape {kernel.shape}, must have the {mean.shape} features'
      ' of the statistics last.'
    )
  dtype = arrays.at_least_float32(kernel.dtype)
  mean, var, scale, offset, bias = (
    jnp.full(mean.shape, default, dtype)
    if u is None
    else jnp.asarray(u).astype(dtype)
    for u, default in (
      (mean, 0),
      (var, 1),
      (scale, 1),
      (offset, 0),
      (bias, 0),
    )
  )
  gain = jax.lax.rsqrt(var + epsilon) * scale
  shift = (bias - mean) * gain + offset
  over_inputs = tuple(range(kernel.ndim - 1))
  folded = kernel.astype(dtype) * jnp.expand_dims(gain, over_inputs)
  return folded.astype(kernel.dtype), shift.astype(kernel.dtype)
