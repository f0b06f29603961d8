"""Batch normalisation of parts of a batch, each by itself."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ghm import (
  batch_normalizing as _batch_normalizing,
  moments as _moments,
  norms as _norms,
)


def ghost_batch_norm(
  x: jax.Array,
  scale: jax.Array | None = None,
  bias: jax.Array | None = None,
  *,
  ghost_size: int,
  axis: int | tuple[int, ...] = -1,
  epsilon: float = 1e-5,
  mask: jax.Array | None = None,
  axis_name: _norms.AxisName = None,
  dtype: Any = None,
) -> tuple[jax.Array, _moments.Moments]:
  """:func:`batch_norm` of every ``ghost_size`` examples by themselves.

  What a large batch loses in noise, and with it in generalization, small ghost
  batches give back. The moments are those of the whole batch, merged, so that
  running averages of them are of the population, with what ghosts differ by.

  Args:
    x: real floating array, examples along axis 0.
    scale: see :func:`batch_norm`, as are all that are not named here.
    bias: the same.
    ghost_size: examples that are normalised together, those that follow each
      other; it divides the number of examples (of a device).
    axis: the feature axes, not axis 0.
    epsilon: the same.
    mask: the same.
    axis_name: mapped axes over which the moments are merged; ghosts never reach
      beyond a device.
    dtype: the same.

  Returns:
    y, and the moments of the whole batch.

  Raises:
    ValueError: if ``ghost_size`` does not divide the examples, and as
      :func:`batch_norm` does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> x = jnp.array([[1.0], [3.0], [50.0], [70.0]])
    >>> y, moments = optax_ghm.ghost_batch_norm(x, ghost_size=2, epsilon=0.0)
    >>> y[:, 0]
    Array([-1.,  1., -1.,  1.], dtype=float32)
    >>> moments.mean
    Array([31.], dtype=float32)

  References:
    Hoffer, Hubara, Soudry, `Train longer, generalize better
    <https://arxiv.org/abs/1705.08741>`_, 2017
  """
  x = jnp.asarray(x)
  whole = _moments.Pool.of(x, axis, groups=1)  # axis 0 holds the examples
  if ghost_size < 1 or len(x) % ghost_size:
    raise ValueError(
      f'ghost_size must divide the {len(x)} examples, got {ghost_size}.'
    )
  mask = _moments.fit_mask(x, mask)
  if mask is not None:
    mask = jnp.broadcast_to(mask, (len(x), *mask.shape[1:]))

  def by_ghost(u):
    return u.reshape(len(x) // ghost_size, ghost_size, *u.shape[1:])

  pool = _moments.Pool(tuple(a + 1 for a in whole.axes), ghosts=True)
  y, moments = _batch_normalizing.normalize(
    pool,
    epsilon,
    dtype or x.dtype,
    by_ghost(x),
    *_batch_normalizing.fit_parameters(pool, by_ghost(x), scale, bias),
    None if mask is None else by_ghost(mask),
  )
  moments = _moments.pool_moments(
    pool.squeezed(moments), axis=0, axis_name=axis_name
  )
  return y.reshape(x.shape), moments


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
  axis_name: _norms.AxisName = None,
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
  pool = _moments.Pool.of(x, axis, axis_name, num_domains)
  y, moments = _batch_normalizing.normalize(
    pool,
    epsilon,
    dtype or x.dtype,
    x,
    *_batch_normalizing.fit_parameters(pool, x, scale, bias),
    _moments.fit_mask(x, mask),
    _moments.fit_members(x, domain),
  )
  return y, pool.squeezed(moments)
