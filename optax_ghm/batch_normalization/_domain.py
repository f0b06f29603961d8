"""Batch normalization of every domain by itself."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import _moments, _normalize, _pool


def domain_batch_norm(
  x: jax.Array,
  domain: jax.Array,
  scale: jax.Array | None = None,
  bias: jax.Array | None = None,
  *,
  num_domains: int,
  axis: int | tuple[int, ...] = -1,
  epsilon: float = 1e-5,
  mask: jax.Array | None = None,
  axis_name: arrays.AxisName = None,
  dtype: Any = None,
) -> tuple[jax.Array, _moments.Moments]:
  """Normalizes the examples of every domain by their own mean and variance.

  Args:
    x: real floating array, examples along axis 0.
    domain: integers from 0 to ``num_domains`` - 1, or bool, one for each
      example, or one for all. Examples of any other number become 0 and do not
      count.
    scale: shaped like the features, or one row of this shape for each domain;
      None is 1.
    bias: shaped like the features, or one row of this shape for each domain;
      None is 0.
    num_domains: how many domains there are. Up to 16 are told apart by
      comparisons, which cost a little for each domain; with more, the
      statistics are gathered for every example.
    axis: the feature axes, not axis 0.
    epsilon: added to the variance.
    mask: bool, broadcastable to ``x``: which elements count.
    axis_name: mapped axes over which the batch is split.
    dtype: of the result; None is that of ``x``.

  Returns:
    y, shaped like ``x``, and the moments of every domain, stacked along axis 0,
    through which no gradient flows.

  Raises:
    TypeError: if ``x`` is not real and floating, ``mask`` not bool, or
      ``domain`` neither integer nor bool.
    ValueError: if an argument does not fit ``x``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> x = jnp.array([[1.0], [50.0], [3.0], [70.0]])
    >>> y, moments = optax_ghm.domain_batch_norm(
    ...   x, jnp.array([0, 1, 0, 1]), num_domains=2, epsilon=0.0
    ... )
    >>> y[:, 0]
    Array([-1., -1.,  1.,  1.], dtype=float32)
    >>> moments.mean[:, 0]
    Array([ 2., 60.], dtype=float32)

  References:
    Chang et al., `Domain-Specific Batch Normalization for Unsupervised Domain
    Adaptation <https://arxiv.org/abs/1906.03950>`_, 2019
  """
  x = jnp.asarray(x)
  pool = _pool.Pool.of(x, axis, axis_name, mask, domain, num_domains)
  return _normalize.by_batch(pool, x, scale, bias, epsilon=epsilon, dtype=dtype)
