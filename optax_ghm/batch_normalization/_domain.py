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
  """:func:`batch_norm` of every domain by itself, in a batch of several.

  Args:
    x: real floating array, examples along axis 0.
    domain: integers from 0 to ``num_domains`` - 1, one per example, or one for
      all. Examples of any other number belong nowhere and become 0.
    scale: shaped like the features, or one row of these per domain; None is 1.
    bias: the same; None is 0.
    num_domains: how many there are. Up to 16 are told apart by comparing, which
      costs a little for each; of more, every example gathers its own.
    axis: see :func:`batch_norm`, as are all that follow; not axis 0.
    epsilon: the same.
    mask: the same.
    axis_name: the same.
    dtype: the same.

  Returns:
    y, and the moments of every domain, stacked along axis 0.

  Raises:
    TypeError: if ``domain`` is not of integers.
    ValueError: if it does not fit ``x``, and as :func:`batch_norm` does.

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
  pool = _pool.Pool.of(x, axis, axis_name, num_domains)
  y, moments = _normalize.normalize(
    pool,
    epsilon,
    dtype or x.dtype,
    x,
    *_normalize.fit_parameters(pool, x, scale, bias),
    _pool.fit_mask(x, mask),
    _pool.fit_members(x, domain),
  )
  return y, pool.squeezed(moments)
