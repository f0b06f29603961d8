"""Which elements of an array are normalized together, and sums over them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from optax_ghm._core import arrays, masks
from optax_ghm.batch_normalization import _loops

FAR_FROM_ZERO = 4.0
"""In standard deviations: below, rounding of the mean makes no difference."""


MOST_COMPARED = 16
"""Up to so many groups, comparisons, which fuse, are faster than gathering."""


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['mask', 'members'],
  meta_fields=['axes', 'axis_name', 'groups'],
)
@dataclasses.dataclass(frozen=True)
class Pool:
  """The elements of an array that are normalized together.

  Statistics have the rank of the array, with size 1 along the axes that are
  summed over. If examples are in groups, axis 0 of the statistics has the
  length of the number of groups.

  Attributes:
    axes: the axes of the array to sum over.
    axis_name: mapped axes to sum over too.
    mask: which elements count, a bool array of the rank of the array; None
      counts all.
    groups: how many groups of examples, along axis 0, have statistics of their
      own; 0 if the examples are in no groups.
    members: the group of every example. Examples of any other number than 0 to
      ``groups`` - 1 belong to no group.
  """

  axes: tuple[int, ...]
  axis_name: arrays.AxisName = None
  groups: int = 0
  mask: jax.Array | None = None
  members: jax.Array | None = None

  @classmethod
  def of(
    cls, x, axis, axis_name=None, mask=None, domain=None, num_domains=0
  ) -> 'Pool':
    """Pools all axes but ``axis``, after checking that the arguments fit."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise TypeError(f'x must be a real floating array, got {x.dtype}.')
    features = tuple(np.atleast_1d(axis).tolist())
    if not x.ndim or not all(-x.ndim <= a < x.ndim for a in features):
      raise ValueError(
        f'axis must name feature axes of x, of shape {x.shape}, got {axis}.'
      )
    features = {a % x.ndim for a in features}
    axes = tuple(a for a in range(x.ndim) if a not in features)
    mask = masks.fit_mask(mask, x.shape)
    if domain is None:
      return cls(axes, axis_name, mask=mask)
    check_examples_first(axes, axis)
    if num_domains < 1:
      raise ValueError(f'num_domains must be at least 1, got {num_domains}.')
    return cls(axes, axis_name, num_domains, mask, _fit_members(x, domain))

  @property
  def unit_axes(self) -> tuple[int, ...]:
    """The axes along which statistics have size 1."""
    return self.axes[1:] if self.groups else self.axes

  def shape(self, x):
    """The shape of statistics of ``x``."""
    shape = [1 if a in self.axes else n for a, n in enumerate(x.shape)]
    return (self.groups, *shape[1:]) if self.groups else tuple(shape)

  def squeeze(self, statistics):
    """Removes the axes of size 1 from a tree of statistics."""
    return jax.tree.map(lambda u: jnp.squeeze(u, self.unit_axes), statistics)

  def total(self, loop, f, *operands):
    """Sums ``f(*operands)`` over the examples of this device."""
    terms = _loops.distinct_producers(loop, f, *operands)
    return self._by_group(jnp.sum(terms, self.unit_axes, keepdims=True))

  def broadcast(self, u):
    """The statistics of every example's group; 0 if it has none."""
    if self.members is None:
      return u
    if self.groups > MOST_COMPARED:
      of = jax.typeof(self.members).sharding
      spec = PartitionSpec(*of.spec, *jax.typeof(u).sharding.spec[1:])
      sharding = of.update(spec=spec)
      own = u.at[self.members].get(mode='clip', out_sharding=sharding)
      return masked(self.has_group(u.ndim), own)
    result = jnp.zeros_like(u[:1])
    for group in range(self.groups):
      belongs = jnp.expand_dims(self.members == group, tuple(range(1, u.ndim)))
      result = jnp.where(belongs, u[group : group + 1], result)
    return result

  def has_group(self, ndim):
    """Which examples belong to a group, with ``ndim`` axes; None means all."""
    if self.members is None:
      return None
    belongs = (self.members >= 0) & (self.members < self.groups)
    return jnp.expand_dims(belongs, tuple(range(1, ndim)))

  def all_reduce(self, *sums):
    """Adds the sums of all devices, by one all-reduce."""
    if self.axis_name is None:
      return sums
    return tuple(arrays.psum(jnp.stack(sums), self.axis_name))

  def measure(self, x):
    """Returns count, mean, rounding error of the mean, and variance.

    The rounding error is the mean of the deviations from the rounded mean.
    """

    def total(loop, f, *operands):
      def terms(mask, x, *operands):
        # Both, so that gradients do not meet what is masked out either.
        return masked(mask, f(masked(mask, x), *operands))

      return self.total(loop, terms, self.mask, x, *operands)

    count, sums = self.all_reduce(self._count(x), total('sum', lambda x: x))
    divisor = jnp.maximum(count, 1)
    mean = sums / divisor
    # A constant NaN would be reported by jax_debug_nans.
    mean = _round(jnp.where(jnp.isfinite(mean), mean, mean - mean))
    center = self.broadcast(mean)
    squares = total('squares', lambda x, c: jnp.square(x - c), center)

    def deviations():
      return total('deviations', lambda x, c: x - c, center)

    if self.axis_name is None:
      far = jnp.square(mean) * divisor > FAR_FROM_ZERO**2 * squares
      error = jax.lax.cond(
        jnp.any(far), deviations, lambda: jnp.zeros_like(mean)
      )
    else:
      error, squares = self.all_reduce(deviations(), squares)
    error = error / divisor
    var = jnp.maximum(squares / divisor - jnp.square(error), 0)
    # The difference of two infinities would be NaN.
    var = jnp.where(jnp.isinf(squares), jnp.inf, var)
    return count, mean, error, var

  def _count(self, x):
    dtype = arrays.at_least_float32(x.dtype)
    mask = jnp.ones((1,) * x.ndim, bool) if self.mask is None else self.mask
    summed = [a for a in self.unit_axes if mask.shape[a] == 1]
    repeats = math.prod(x.shape[a] for a in summed)
    counts = jnp.sum(mask, self.unit_axes, dtype=dtype, keepdims=True)
    shape = [1 if a in self.unit_axes else n for a, n in enumerate(x.shape)]
    return self._by_group(jnp.broadcast_to(repeats * counts, shape))

  def _by_group(self, sums):
    """Adds the sums of examples within each group, if there are groups."""
    if self.members is None:
      return sums
    belongs = jnp.arange(self.groups)[:, None] == self.members[None]
    weights = belongs.astype(sums.dtype)
    together = arrays.contract(weights, sums)

    def apart():
      own = jnp.expand_dims(belongs, tuple(range(2, sums.ndim + 1)))
      bad = jnp.sum(jnp.where(own, sums[None], 0), 1)
      finite = jnp.where(jnp.isfinite(sums), sums, 0)
      return jnp.where(jnp.isfinite(bad), arrays.contract(weights, finite), bad)

    # 0 times NaN is NaN: the product of matrices spreads a number that is not
    # finite to all groups. The other groups have to keep their exact sums.
    return jax.lax.cond(
      jnp.all(jnp.isfinite(together)), lambda: together, apart
    )


def masked(mask, u):
  """Returns ``u``, and 0 where there is a mask and it does not hold."""
  return u if mask is None else jnp.where(mask, u, 0)


def check_examples_first(axes, axis):
  """Raises unless axis 0 of ``x`` is among the axes that are summed over."""
  if 0 not in axes:
    raise ValueError(f'axis 0 of x holds the examples, got axis={axis}.')


def _fit_members(x, domain):
  domain = jnp.asarray(domain)
  if not (domain.dtype == bool or jnp.issubdtype(domain.dtype, jnp.integer)):
    raise TypeError(f'domain must be integers or bool, got {domain.dtype}.')
  if domain.shape not in ((), x.shape[:1]):
    raise ValueError(
      f'domain must have the shape () or {x.shape[:1]}, one number for each'
      f' example, got {domain.shape}.'
    )
  return jnp.broadcast_to(domain.astype(int), x.shape[:1])


def _round(mean):
  """Rounds the mean to one binary digit less than its dtype has.

  XLA repeats the division by the count in every loop that needs the mean, and
  may fuse it with the subtraction without rounding in between. The loops would
  then see different means, and the deviations would not add up to the rounding
  error of the one that is returned. An explicit rounding stays in every loop.
  """
  info = jnp.finfo(mean.dtype)
  return jax.lax.reduce_precision(mean, info.nexp, info.nmant - 1)
