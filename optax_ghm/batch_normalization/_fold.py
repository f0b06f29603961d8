"""Batch normalization folded into the layer before it."""

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import _running_moments


def fold_batch_norm(
  kernel: jax.Array,
  kernel_bias: jax.Array | None,
  running: _running_moments.RunningMoments,
  scale: jax.Array | None = None,
  bias: jax.Array | None = None,
  *,
  epsilon: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
  r"""Folds a batch norm into the dense or convolutional layer before it.

  .. math::
    W' = W\, \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad
    b' = (b - \mu)\, \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} + \beta

  Args:
    kernel: W, of a Flax ``Dense`` or ``Conv``, with output features last.
    kernel_bias: b, of the same layer; None is 0.
    running: μ and σ², of the batch norm.
    scale: γ, of the batch norm; None is 1.
    bias: β, of the batch norm; None is 0.
    epsilon: ε, of the batch norm.

  Returns:
    W' and b', in the dtype of ``kernel``. The layer with this kernel and bias
    computes what both layers did in evaluation.

  Raises:
    ValueError: if the last axis of the kernel is not that of the statistics.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> running = optax_ghm.RunningMoments(
    ...   mean=jnp.array([1.0]), var=jnp.array([4.0]), weight=jnp.ones(1)
    ... )
    >>> optax_ghm.fold_batch_norm(jnp.eye(1), None, running, epsilon=0.0)
    (Array([[0.5]], dtype=float32), Array([-0.5], dtype=float32))
  """
  kernel, shape = jnp.asarray(kernel), jnp.shape(running.mean)
  if kernel.shape[-1:] != shape:
    raise ValueError(
      f'kernel, of shape {kernel.shape}, must have the {shape} features of the'
      ' statistics last.'
    )
  dtype = arrays.at_least_float32(kernel.dtype)

  def fit(u, default):
    return jnp.full(shape, default if u is None else u, dtype)

  gain = jax.lax.rsqrt(fit(running.var, 1) + epsilon) * fit(scale, 1)
  shift = (fit(kernel_bias, 0) - fit(running.mean, 0)) * gain + fit(bias, 0)
  folded = kernel.astype(dtype) * jnp.expand_dims(gain, range(kernel.ndim - 1))
  return folded.astype(kernel.dtype), shift.astype(kernel.dtype)
