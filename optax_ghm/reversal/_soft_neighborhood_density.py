"""Soft neighborhood density: how densely predictions crowd together."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_ghm._core import arrays, masks
from optax_ghm.reversal import _predictions


def soft_neighborhood_density(
  logits: jax.Array,
  mask: ArrayLike | None = None,
  *,
  temperature: float = 0.05,
) -> jax.Array:
  r"""How densely the predictions of a model crowd together.

  .. math::
    \frac{1}{N} \sum_i H(s_i), \qquad s_{ij} = \frac{\exp(u_i \cdot u_j / T)}
      {\sum_{k \ne i} \exp(u_i \cdot u_k / T)}, \qquad
    u_i = \frac{p_i}{\lVert p_i \rVert}

  The entropy of how similar an example is to each other example is large where
  it has many close neighbors. From 0 to log (N − 1); **higher is better**, if N
  is the same. The score is best for a model that gives every example the same
  prediction: look at :func:`mutual_information` beside it.

  Args:
    logits: floating, (N, C), with C at least 2, of all target examples: pairs
      do not add up over batches. The work is of N² C multiplications, done for
      256 examples at a time. An example where a logit is not finite is nobody's
      neighbor and adds 0.
    mask: bool, (N,), which examples count.
    temperature: T, above 0.

  Returns:
    float32, a scalar, in nats; NaN if the mask leaves no example.

  Raises:
    TypeError: if ``logits`` are not floating or ``mask`` is not bool.
    ValueError: if the shapes do not fit, there is no example, or
      ``temperature`` is not positive.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import reversal
    >>> logits = 9 * jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> clusters = reversal.soft_neighborhood_density(jnp.tile(logits, (4, 1)))
    >>> print(f'{clusters:.3f}, {jnp.log(7):.3f}')  # seven close neighbors
    1.946, 1.946

  References:
    Saito et al., `Tune it the Right Way: Unsupervised Validation of Domain
    Adaptation via Soft Neighborhood Density
    <https://arxiv.org/abs/2108.10860>`_, 2021
  """
  if not temperature > 0:
    raise ValueError(f'temperature must be positive, got {temperature}.')
  logits = arrays.replicated(_predictions.check_logits(logits))
  if logits.shape[0] == 0:
    raise ValueError('logits must have an example, got none.')
  mask = masks.broadcast_mask(mask, logits.shape[:1])
  known = jnp.all(jnp.isfinite(logits), 1)
  counted = jnp.ones_like(known) if mask is None else mask
  p = jax.nn.softmax(_predictions.known_logits(logits))
  u = p / jnp.linalg.norm(p, axis=1, keepdims=True)
  index = jnp.arange(u.shape[0])

  def entropy(i):
    similarity = jnp.dot(u, u[i], precision=jax.lax.Precision.HIGHEST)
    others = known & counted & (index != i)
    s = jax.nn.softmax(similarity / temperature, where=others)
    return _predictions.entropy(s)

  entropies = jax.lax.map(entropy, index, batch_size=256)
  total = jnp.sum(entropies, where=known & counted)
  return total / jnp.sum(counted, dtype=jnp.float32)
