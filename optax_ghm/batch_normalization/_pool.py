"""Which elements of an array are normalized together, and their sums."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from optax_ghm._core import arrays

FAR_FROM_ZERO = 4.0
"""In standard deviations: below it the mean's own rounding cannot be seen."""


MOST_COMPARED = 16
"""Groups that are told apart by comparing, which fuses; of more one gathers."""


@dataclasses.dataclass(frozen=True)
class Pool:
  """Which elements of an array are normalised together.

  Statistics have the rank of the array, with size 1 along what is pooled, and
  the number of groups along axis 0 if there are any.

  Attributes:
    axes: what is summed over.
    axis_name: mapped axes to sum over too.
    groups: how many groups of examples (along axis 0) are kept apart, if any;
      ``members``, below, says which one an example is in.
    ghosts: whether axis 0, kept apart as well, is of ghost batches.
  """

  axes: tuple[int, ...]
  axis_name: arrays.AxisName = None
  groups: int | None = None
  ghosts: bool = False

  @classmethod
  def of(
    cls,
    x: jax.Array,
    axis: int | tuple[int, ...],
    axis_name: arrays.AxisName = None,
    groups: int | None = None,
  ) -> 'Pool':
    """Everything but the feature axes ``axis`` of ``x``."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise TypeError(f'x must be a real floating array, got {x.dtype}.')
    features = tuple(np.atleast_1d(axis).tolist())
    if x.ndim == 0:
      raise ValueError('x must have at least one axis, got a single number.')
    if not all(-x.ndim <= a < x.ndim for a in features):
      raise ValueError(
        f'axis must name feature axes of x, of shape {x.shape}, got {axis}.'
      )
    features = {a % x.ndim for a in features}
    axes = tuple(a for a in range(x.ndim) if a not in features)
    if groups is not None and 0 not in axes:
      raise ValueError(f'axis 0 of x holds the examples, got axis={axis}.')
    if groups is not None and groups < 1:
      raise ValueError(f'num_domains must be at least 1, got {groups}.')
    return cls(axes, axis_name, groups)

  @property
  def idle(self) -> tuple[int, ...]:
    """The axes that statistics have for their rank alone."""
    return self.axes if self.groups is None else self.axes[1:]

  def shape(self, x: jax.Array) -> tuple[int, ...]:
    """The shape of statistics of ``x``."""
    shape = [1 if a in self.axes else n for a, n in enumerate(x.shape)]
    return tuple(shape) if self.groups is None else (self.groups, *shape[1:])

  def squeezed(self, moments: Any) -> Any:
    """Statistics without the axes that they have for their rank alone."""
    return jax.tree.map(lambda u: jnp.squeeze(u, self.idle), moments)

  def total(
    self,
    f: Callable[..., jax.Array],
    *operands: jax.Array | None,
    members: jax.Array | None = None,
    spelling: int = 0,
  ) -> jax.Array:
    """The sums of ``f(*operands)`` on this device."""
    spelled, inserted = _spell(spelling, operands)
    terms = f(*spelled)
    kept = [a for a in range(terms.ndim) if a not in inserted]
    over = (*inserted, *(kept[a] for a in self.idle))
    sums = jnp.expand_dims(jnp.sum(terms, over), self.idle)
    return self._by_group(sums, members)

  def each(
    self,
    f: Callable[..., jax.Array],
    *operands: jax.Array | None,
    spelling: int = 0,
  ) -> jax.Array:
    """``f(*operands)``, element by element."""
    spelled, inserted = _spell(spelling, operands)
    return jnp.squeeze(f(*spelled), inserted)

  def spread(self, u: jax.Array, members: jax.Array | None = None) -> jax.Array:
    """Statistics as they apply to every example: 0 to one of no group."""
    if self.groups is None or members is None:
      return u
    if self.groups > MOST_COMPARED:
      of = jax.typeof(members).sharding
      spec = PartitionSpec(*of.spec, *jax.typeof(u).sharding.spec[1:])
      own = u.at[members].get(mode='clip', out_sharding=of.update(spec=spec))
      known = self.known(u, members)
      return own if known is None else jnp.where(known, own, 0)
    spread = jnp.zeros_like(u[:1])
    for group in range(self.groups):
      belongs = jnp.expand_dims(members == group, tuple(range(1, u.ndim)))
      spread = jnp.where(belongs, u[group : group + 1], spread)
    return spread

  def known(self, x: jax.Array, members: jax.Array | None) -> jax.Array | None:
    """Which examples are of a group, of the rank of ``x``; None is all."""
    if self.groups is None or members is None:
      return None
    known = (members >= 0) & (members < self.groups)
    return jnp.expand_dims(known, tuple(range(1, x.ndim)))

  def everywhere(self, *sums: jax.Array) -> tuple[jax.Array, ...]:
    """The sums over all devices, by one all-reduce."""
    if self.axis_name is None:
      return sums
    return tuple(arrays.psum(jnp.stack(sums), self.axis_name))

  def measure(
    self,
    x: jax.Array,
    mask: jax.Array | None,
    members: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Count, mean, what the mean lacks by rounding, and variance."""

    def total(f, *more, spelling):
      """Over what counts; what does not is kept out of gradients, too."""

      def terms(mask, x, *more):
        if mask is None:
          return f(x, *more)
        return jnp.where(mask, f(jnp.where(mask, x, 0), *more), 0)

      return self.total(
        terms, mask, x, *more, members=members, spelling=spelling
      )

    count, sums = self.everywhere(
      self._count(x, mask, members), total(lambda x: x, spelling=0)
    )
    divisor = jnp.maximum(count, 1)
    mean = sums / divisor
    # No constant NaN, which jax_debug_nans would take for a result.
    mean = _rounded(jnp.where(jnp.isfinite(mean), mean, mean - mean))
    center = self.spread(mean, members)
    squares = total(
      lambda x, center: jnp.square(x - center), center, spelling=1
    )

    def deviations():
      return total(lambda x, center: x - center, center, spelling=2)

    if self.axis_name is None:
      far = jnp.square(mean) * divisor > FAR_FROM_ZERO**2 * squares
      rest = jax.lax.cond(
        jnp.any(far), deviations, lambda: jnp.zeros_like(mean)
      )
    else:
      rest, squares = self.everywhere(deviations(), squares)
    rest = rest / divisor
    variance = jnp.maximum(squares / divisor - jnp.square(rest), 0)
    # Both may be beyond float32, of a feature beside one that is far from 0.
    variance = jnp.where(jnp.isinf(squares), jnp.inf, variance)
    return count, mean, rest, variance

  def _count(self, x, mask, members):
    dtype = arrays.at_least_float32(x.dtype)
    if mask is None:
      mask = jnp.ones((1,) * x.ndim, bool)
    repeats = math.prod(x.shape[a] for a in self.idle if mask.shape[a] == 1)
    counts = repeats * jnp.sum(mask, self.idle, dtype=dtype, keepdims=True)
    shape = (x.shape[0], *self.shape(x)[1:]) if self.groups else self.shape(x)
    return self._by_group(jnp.broadcast_to(counts, shape), members)

  def _by_group(self, sums, members):
    """Sums per example as sums per group, if there are groups."""
    if self.groups is None:
      return sums
    groups = jnp.arange(self.groups, dtype=members.dtype)
    belongs = groups[:, None] == members[None]
    weights = belongs.astype(sums.dtype)
    together = arrays.contract(weights, sums)

    def apart():
      own = jnp.expand_dims(belongs, tuple(range(2, sums.ndim + 1)))
      bad = jnp.sum(jnp.where(own, sums[None], 0), 1)
      finite = jnp.where(jnp.isfinite(sums), sums, 0)
      return jnp.where(jnp.isfinite(bad), arrays.contract(weights, finite), bad)

    # 0 times NaN is NaN: what is not finite would be in every group. The others
    # then have the sums, bit for bit, that they have without it.
    return jax.lax.cond(
      jnp.all(jnp.isfinite(together)), lambda: together, apart
    )


def fit_members(x: jax.Array, members: ArrayLike) -> jax.Array:
  """The group of every example, as integers along axis 0."""
  members = jnp.asarray(members)
  if not jnp.issubdtype(members.dtype, jnp.integer):
    raise TypeError(f'domain must be integers, got {members.dtype}.')
  if members.shape not in ((), x.shape[:1]):
    raise ValueError(
      f'domain must be one integer, or one for each of {x.shape[:1]} examples,'
      f' got the shape {members.shape}.'
    )
  return jnp.broadcast_to(members.astype(int), x.shape[:1])


def fit_mask(x: jax.Array, mask: jax.Array | None) -> jax.Array | None:
  """The mask as booleans, of the rank of x."""
  if mask is None:
    return None
  mask = jnp.asarray(mask)
  if mask.ndim > x.ndim or any(
    m not in (1, n)
    for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)
  ):
    raise ValueError(
      f'mask, of shape {mask.shape}, must be broadcastable to x, {x.shape}.'
    )
  missing = tuple(range(x.ndim - mask.ndim))
  return jnp.expand_dims(mask if mask.dtype == bool else mask != 0, missing)


def _rounded(mean):
  """One digit less than it has.

  XLA divides anew in every loop that needs the mean, and may do so together
  with the subtraction, without rounding in between: what one loop leaves for
  the next to make up for would not be what that finds. This it has to round.
  """
  info = jnp.finfo(mean.dtype)
  return jax.lax.reduce_precision(mean, info.nexp, info.nmant - 1)


_SPELLINGS = ((), (0,), (1,), (0, 1), (0, 2), (1, 2))


def _spell(spelling, operands):
  """The same arrays in other words, in at least float32.

  XLA on CPUs computes once, and writes out, what several of its loops need: the
  array in float32, say, or its deviations. Axes of size 1, put elsewhere for
  every consumer, and out of reach of the simplifier, make them differ.
  """
  inserted = _SPELLINGS[spelling] if jax.default_backend() == 'cpu' else ()

  def spell(u):
    if inserted:
      u = jax.lax.optimization_barrier(jnp.expand_dims(u, inserted))
    if not arrays.is_inexact(u):
      return u
    return u.astype(arrays.at_least_float32(u.dtype))

  return [None if u is None else spell(u) for u in operands], inserted
