"""Batch normalization of every few examples of a batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

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
  """Normalizes every ``ghost_size`` examples by their own mean and variance.

  A large batch has less noise in its statistics, and may generalize worse for
  it. Small ghost batches bring the noise back. The moments are those of the
  whole batch, so that running averages describe all of the data, with the
  differences between ghost batches included.

  Args:
    x: real floating array, examples along axis 0.
    scale: shaped like the features; None is 1.
    bias: shaped like the features; None is 0.
    ghost_size: how many consecutive examples are normalized together; divides
      the number of examples (of a device). In an export, that may be symbolic:
      ``'8 * b'`` for a ``ghost_size`` of 8.
    axis: the feature axes, not axis 0.
    epsilon: added to the variance.
    mask: bool, broadcastable to ``x``: which elements count.
    axis_name: mapped axes over which the moments are merged. Ghost batches
      never reach beyond a device.
    dtype: of the result; None is that of ``x``.

  Returns:
    y, shaped like ``x``, and the moments of the whole batch, through which no
    gradient flows.

  Raises:
    TypeError: if ``x`` is not real and floating, or ``mask`` not bool.
    ValueError: if ``ghost_size`` does not divide the number of examples, or
      another argument does not fit ``x``.

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
  batch = _pool.Pool.of(x, axis, mask=mask)
  _pool.check_examples_first(batch.axes, axis)
  examples = x.shape[0]
  if ghost_size < 1 or examples % ghost_size != 0:
    raise ValueError(
      f'ghost_size must divide the {examples} examples, got {ghost_size}.'
    )

  def split(u):
    u = jnp.broadcast_to(u, (examples, *u.shape[1:]))
    return u.reshape(examples // ghost_size, ghost_size, *u.shape[1:])

  ghosts = _pool.Pool(
    tuple(a + 1 for a in batch.axes), mask=jax.tree.map(split, batch.mask)
  )
  in_ghosts = split(x)
  of_ghosts, *_ = jax.typeof(in_ghosts).sharding.spec

  def for_each(u):
    sharding = jax.typeof(u).sharding
    return jnp.broadcast_to(
      u[None],
      ghosts.shape(in_ghosts),
      out_sharding=sharding.update(
        spec=PartitionSpec(of_ghosts, *sharding.spec)
      ),
    )

  parameters = map(for_each, _normalize.fit_parameters(batch, x, scale, bias))
  y, moments = _normalize.normalize(
    epsilon, dtype or x.dtype, ghosts, in_ghosts, *parameters, None
  )
  moments = ghosts.squeeze(moments).pool(axis=0, axis_name=axis_name)
  return y.reshape(x.shape), moments
