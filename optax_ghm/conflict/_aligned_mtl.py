"""Gradients turned and stretched until they are orthogonal and alike."""

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.conflict import _gramian


def aligned_mtl_weights(gramian: jax.Array) -> jax.Array:
  r"""Weights of Aligned-MTL: the mean of gradients made orthogonal and alike.

  With the eigenvalues λ and eigenvectors V of the Gramian,

  .. math::
    w = \frac{1}{m} \sqrt{\lambda_{\min}}\,
      V \operatorname{diag}(\lambda)^{-1/2}\, V^T \mathbf{1}

  over the eigenvalues that are not 0. It is the mean of the nearest orthogonal
  rows, each as long as the shortest principal axis of the gradients. Where they
  almost depend on one another, the step is therefore short.

  Args:
    gramian: (m, m), inner products of the losses' gradients. The method is not
      defined where their norms span many decades: rounding decides then which
      eigenvalues are 0. It is not differentiable where two are equal.

  Returns:
    (m,), the weights; float32, or float64 for such a Gramian. A loss whose
    gradient is not finite has weight 0, and does not count in m.

  Raises:
    ValueError: if ``gramian`` is not a square matrix.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import conflict
    >>> rows = jnp.array([[1.0, 0.0], [0.0, 4.0]])
    >>> weights = conflict.aligned_mtl_weights(rows @ rows.T)
    >>> print(weights, weights @ rows)
    [0.5   0.125] [0.5 0.5]

  References:
    Senushkin et al., `Independent Component Alignment for Multi-Task Learning
    <https://arxiv.org/abs/2305.19000>`_, 2023
  """
  of = _gramian.directions(gramian)
  unit = jnp.max(of.divisors)
  lengths = of.norms / unit
  values, vectors = jnp.linalg.eigh(of.cosines * jnp.outer(lengths, lengths))
  known = values > len(values) * jnp.finfo(values.dtype).eps * values[-1]
  smallest = jnp.min(jnp.where(known, values, jnp.inf))
  ratios = jnp.where(known, smallest / jnp.where(known, values, 1), 0)
  along = arrays.contract(vectors.T, of.shares)
  weights = arrays.contract(vectors, jnp.sqrt(ratios) * along)
  return jnp.where(of.points, weights, 0)
