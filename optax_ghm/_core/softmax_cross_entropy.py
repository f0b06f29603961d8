"""Softmax cross-entropy to the last digit."""

import jax
import jax.numpy as jnp
from jax import lax


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  r"""Softmax cross-entropy with integer labels.

  .. math::
    \ell = \log \sum_j e^{x_j - m} + (m - x_y), \qquad m = \max_j x_j

  Optax adds m and subtracts it again, and so loses the digits of a small loss
  where m is large.

  Args:
    logits: floats of shape (..., classes).
    labels: integers of shape (...). A label outside of [0, classes) gives NaN.

  Returns:
    The losses, of shape (...).
  """
  largest = lax.stop_gradient(
    jnp.max(logits, -1, keepdims=True, initial=-jnp.inf)
  )
  log_sum = jnp.log(jnp.sum(jnp.exp(logits - largest), -1))
  # A negative index would count from the end; one beyond the end fills in NaN.
  label = jnp.where(labels < 0, logits.shape[-1], labels)[..., None]
  own = jnp.take_along_axis(logits, label, -1)
  return log_sum + jnp.squeeze(largest - own, -1)
