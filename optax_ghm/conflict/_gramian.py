"""The inner products of several losses' gradients, and their angles."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optax_ghm._core import arrays, per_example

Weights = Callable[[jax.Array], jax.Array]
"""From the Gramian of the losses' gradients to the losses' weights."""


def gramian(rows: Any, *, axis_name: arrays.AxisName = None) -> jax.Array:
  r"""The inner products of all pairs of the losses' gradients.

  .. math::
    G_{ij} = \langle g_i, g_j \rangle

  Args:
    rows: a pytree of gradients, with the m losses along the first axis of every
      floating or complex leaf, as ``jax.jacrev`` makes them. Other leaves do
      not count.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    (m, m), summed in float32, or in float64 where a leaf has 64 bits. It is
    right for gradients whose norms are from 1e-15 to 1e15. The row and the
    column of a gradient with NaN are NaN.

  Raises:
    ValueError: if there is no such leaf, or they differ in their first axis.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import conflict
    >>> rows = {'w': jnp.array([[3.0, 4.0], [0.0, 1.0]]), 'b': jnp.zeros(2)}
    >>> conflict.gramian(rows)
    Array([[25.,  4.],
           [ 4.,  1.]], dtype=float32)
  """
  leaves = per_example.leading(rows, what='loss')
  if not leaves:
    raise ValueError('rows must hold a floating or complex leaf, got none.')
  total = sum(
    _products(part)
    for leaf in leaves
    for part in arrays.parts(arrays.widen(leaf))
  )
  return arrays.psum(total, axis_name)


def _products(rows):
  if per_example.are_few(rows):  # a matrix product would transpose a copy
    return jax.lax.map(functools.partial(_products_with, rows), rows)
  return _products_with(rows, rows)


def _products_with(rows, others):
  axes = tuple(range(1, rows.ndim))
  theirs = tuple(range(others.ndim - len(axes), others.ndim))
  whole = PartitionSpec(*[None] * (1 + others.ndim - len(axes)))
  return jax.lax.dot_general(
    rows,
    others,
    ((axes, theirs), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    out_sharding=jax.typeof(rows).sharding.update(spec=whole),
  )


def weigh(weights: Weights, gramian: jax.Array) -> jax.Array:
  """The weights of a Gramian, checked.

  Raises:
    ValueError: if they do not have the shape of the losses.
  """
  found = weights(gramian)
  if jnp.shape(found) != gramian.shape[:1]:
    raise ValueError(
      f'weights must return an array of shape {gramian.shape[:1]} for a Gramian'
      f' of shape {gramian.shape}, got {found!r}.'
    )
  return jnp.asarray(found)


class Directions(NamedTuple):
  """A Gramian, taken apart into lengths and angles.

  Attributes:
    norms: (m,), of the gradients; 0 where a gradient is not finite.
    cosines: (m, m), of the angles between the gradients: 1 on the diagonal. A
      gradient that is 0 or not finite is at right angles to all others.
    finite: (m,), bool.
  """

  norms: jax.Array
  cosines: jax.Array
  finite: jax.Array

  @property
  def points(self) -> jax.Array:
    """(m,), bool: which gradients have a direction."""
    return self.norms > 0

  @property
  def divisors(self) -> jax.Array:
    """The norms, with 1 in the place of 0."""
    return jnp.where(self.points, self.norms, 1)

  @property
  def shortness(self) -> jax.Array:
    """The shortest norm that is not 0 over every norm.

    It is 0 for a gradient without direction, or 1 if none has any.
    """
    shortest = jnp.min(jnp.where(self.points, self.norms, jnp.inf))
    ratios = jnp.where(self.points, shortest / self.divisors, 0)
    return jnp.where(jnp.any(self.points), ratios, 1)

  @property
  def shares(self) -> jax.Array:
    """The weights of the mean over the finite gradients."""
    count = self.finite.astype(self.norms.dtype)
    return count / jnp.maximum(jnp.sum(count), 1)


def directions(gramian: jax.Array) -> Directions:
  """Takes a Gramian apart.

  Raises:
    ValueError: if it is not a square matrix.
  """
  gramian = arrays.widen(jnp.asarray(gramian))
  if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1]:
    raise ValueError(
      'gramian must be a square matrix, as optax_ghm.conflict.gramian makes it,'
      f' got shape {gramian.shape}.'
    )
  squares = jnp.diagonal(gramian)
  finite = jnp.isfinite(squares)
  points = finite & (squares > 0)
  divisors = jnp.sqrt(jnp.where(points, squares, 1))
  norms = jnp.where(points, divisors, 0)
  known = jnp.outer(points, points) & ~jnp.eye(len(gramian), dtype=bool)
  # The parts that do not count are replaced before the division, so that no
  # derivative is NaN.
  cosines = jnp.where(known, gramian, 0) / jnp.outer(divisors, divisors)
  cosines = jnp.clip(cosines, -1, 1) + jnp.eye(len(gramian), dtype=norms.dtype)
  return Directions(norms, cosines, finite)
