"""Batch normalisation of parts of a batch, each by itself."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm.batch_normalization import _moments, _normalize, _pool


def ghost_batch_norm(
  x: jax.Array,
  scale: jax.Array | None = None,
  bias: jax.Array | None = None,
  *,
  ghost_size: int,
  axis: int | tuple[int, ...] = -1,
  epsilon: float = 1e-5,
  mask: jax.Array | None = None,
  axis_name: arrays.AxisName = None,
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
  whole = _pool.Pool.of(x, axis, groups=1)  # axis 0 holds the examples
  if ghost_size < 1 or len(x) % ghost_size:
    raise ValueError(
      f'ghost_size must divide the {len(x)} examples, got {ghost_size}.'
    )
  mask = _pool.fit_mask(x, mask)
  if mask is not None:
    mask = jnp.broadcast_to(mask, (len(x), *mask.shape[1:]))

  def by_ghost(u):
    return u.reshape(len(x) // ghost_size, ghost_size, *u.shape[1:])

  pool = _pool.Pool(tuple(a + 1 for a in whole.axes), ghosts=True)
  y, moments = _normalize.normalize(
    pool,
    epsilon,
    dtype or x.dtype,
    by_ghost(x),
    *_normalize.fit_parameters(pool, by_ghost(x), scale, bias),
    None if mask is None else by_ghost(mask),
  )
  moments = _moments.pool_moments(
    pool.squeezed(moments), axis=0, axis_name=axis_name
  )
  return y.reshape(x.shape), moments
