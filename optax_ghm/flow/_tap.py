"""The tap: statistics of the gradient where it passes an activation."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays
from optax_ghm._core.identity import identity

HISTOGRAM_CELLS, OCTAVES_PER_CELL, LOWEST_EXPONENT = 64, 2, -96
"""Cell i of a histogram begins at 2^(OCTAVES_PER_CELL i + LOWEST_EXPONENT)."""

# float32 holds the squares of numbers from 1e-19 to 1e19 only, so squares are
# summed in three units: one for small numbers, 1, and one for large numbers.
_SMALL, _LARGE = 2.0**-80, 2.0**96

COLUMNS = (
  'calls',
  'elements',
  'sum',
  'small_squares',
  'squares',
  'large_squares',
  'zeros',
  'non_finite',
  'largest',
)


class TapStats(NamedTuple):
  r"""Statistics of the cotangents that passed a tap.

  :func:`empty_tap` makes statistics that are all zero. The gradient with
  respect to them is the filled statistics. Whatever adds gradients up (a module
  that is called twice, micro-batches, shards, the examples of ``jax.vmap``)
  adds statistics up as well, and the sums describe all cotangents together.
  ``largest`` is then an upper bound.

  The statistics are kept in few arrays, because every result of a compiled step
  takes time. Leading axes, such as the layers of a ``scan``, come first in all
  of the arrays, which may be arrays of NumPy as well.

  Attributes:
    numbers: (..., 9), float32. The properties of this class read its columns.
    histogram: (..., 64), float32, or None: how many magnitudes lie in
      :math:`[4^{i-48}, 4^{i-47})`. The first and the last cell also hold
      whatever is beyond. Zeros and non-finite numbers are in no cell.
    example_squares: (..., examples, 3), float32, or None: the sum of squares of
      every example (first axis of the cotangent), in units of 2^-160, 1 and
      2^192.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> def loss(x, stats):
    ...   return jnp.sum(jnp.square(flow.tap(x, stats)))
    >>> stats = jax.grad(loss, argnums=1)(
    ...   jnp.array([1.5, 2.0]), flow.empty_tap()
    ... )
    >>> print(stats.norm, stats.largest, stats.calls, stats.zeros)
    5.0 4.0 1.0 0.0
  """

  numbers: jax.Array
  histogram: jax.Array | None = None
  example_squares: jax.Array | None = None

  @property
  def calls(self) -> jax.Array:
    """Number of cotangents; 0 if none arrived."""
    return self._column('calls')

  @property
  def elements(self) -> jax.Array:
    """Number of elements; a complex one is two."""
    return self._column('elements')

  @property
  def sum(self) -> jax.Array:
    """Sum of all elements."""
    return self._column('sum')

  @property
  def zeros(self) -> jax.Array:
    """Number of elements that are 0."""
    return self._column('zeros')

  @property
  def non_finite(self) -> jax.Array:
    """Number of elements that are NaN or inf."""
    return self._column('non_finite')

  @property
  def norm(self) -> jax.Array:
    """Euclidean norm of all elements."""
    start = COLUMNS.index('small_squares')
    return _root(self.numbers[..., start : start + 3])

  @property
  def rms(self) -> jax.Array:
    """Root mean square; 0 if no cotangent arrived."""
    xp = self.numbers.__array_namespace__()
    return self.norm / xp.sqrt(xp.maximum(self.elements, 1))

  @property
  def largest(self) -> jax.Array:
    """Largest magnitude, or for ``calls`` > 1 an upper bound of it."""
    xp = self.numbers.__array_namespace__()
    bound = self.numbers[..., -1]
    return xp.where(self.calls > 1, xp.minimum(bound, self.norm), bound)

  @property
  def example_norms(self) -> jax.Array:
    """Euclidean norm of every example, (..., examples).

    Raises:
      ValueError: if the empty tap was made without ``examples``.
    """
    if self.example_squares is None:
      raise ValueError('this tap was made without examples.')
    return _root(self.example_squares)

  def _column(self, name):
    return self.numbers[..., COLUMNS.index(name)]


def _root(squares):
  """The root of the three sums together, without overflow."""
  xp = squares.__array_namespace__()
  lengths = xp.stack(
    [
      xp.sqrt(squares[..., i]) * unit
      for i, unit in enumerate((_SMALL, 1.0, _LARGE))
    ],
    axis=-1,
  )
  largest = xp.max(lengths, axis=-1, keepdims=True)
  normal = (largest >= 2.0**-126) & (largest < xp.inf)
  # XLA divides by way of the reciprocal, which is 0 for more than 2^126.
  unit = xp.where(normal, xp.minimum(largest, 2.0**120), 1)
  return unit[..., 0] * xp.sqrt(xp.sum(xp.square(lengths / unit), axis=-1))


def empty_tap(
  *,
  histogram: bool = False,
  examples: int | None = None,
  stack: tuple[int, ...] = (),
) -> TapStats:
  """Statistics that are all zero, for :func:`tap` to fill.

  Args:
    histogram: whether to count the magnitudes in a histogram.
    examples: the number of examples, if the norm of each is wanted.
    stack: sizes of leading axes, for a loop over layers that slices them.

  Returns:
    The empty statistics. Their gradient is the filled statistics.

  Examples:
    >>> from optax_ghm import flow
    >>> flow.empty_tap(examples=32).example_norms.shape
    (32,)
    >>> flow.empty_tap(stack=(12,)).norm.shape
    (12,)
  """

  def zeros(*shape):
    return jnp.zeros(stack + shape, jnp.float32)

  return TapStats(
    numbers=zeros(len(COLUMNS)),
    histogram=zeros(HISTOGRAM_CELLS) if histogram else None,
    example_squares=None if examples is None else zeros(examples, 3),
  )


def tap(x: Any, stats: TapStats) -> Any:
  r"""Identity whose gradient with respect to ``stats`` describes the cotangent.

  .. math::
    y = x, \qquad \bar x = \bar y, \qquad \bar s = \text{statistics}(\bar y)

  Every other gradient is what it is without the tap, bit for bit as long as the
  compiler adds in the same order. The statistics are float32 and take one pass
  over the cotangent and, in a sharded ``jit``, two all-reduces of their own
  size. Under ``jit``, ``vmap``, ``scan``, ``remat``, ``cond`` and ``shard_map``
  they obey the rules of any gradient: statistics that are scanned over are
  those of their own step, statistics that are shared are those of all steps.
  ``calls`` is 0 where no gradient passes.

  Statistics are not linear in the cotangent, so forward mode (``jax.jvp``,
  ``jax.hessian``) raises.

  Args:
    x: array or pytree of arrays. Leaves that are neither floating nor complex
      pass untapped.
    stats: empty statistics from :func:`empty_tap`. Their values are not used.

  Returns:
    ``x``.

  Raises:
    ValueError: if the statistics are for another number of examples.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> def loss(w, stats):
    ...   hidden = flow.tap(w * jnp.arange(4.0), stats)
    ...   return jnp.sum(jax.nn.relu(hidden - 1))
    >>> grad, stats = jax.grad(loss, argnums=(0, 1))(1.0, flow.empty_tap())
    >>> print(grad, stats.zeros, stats.elements)
    5.0 2.0 4.0

  References:
    Glorot & Bengio, `Understanding the difficulty of training deep feedforward
    neural networks <https://proceedings.mlr.press/v9/glorot10a.html>`_, 2010
  """
  leaves, structure = jax.tree.flatten(x)
  tapped = [leaf for leaf in leaves if arrays.is_inexact(leaf)]
  if not tapped:
    return x
  if stats.example_squares is not None:
    examples = stats.example_squares.shape[0]
    for leaf in tapped:
      if leaf.shape[:1] != (examples,):
        raise ValueError(
          f'the tap is for {examples} examples along the first axis, got an'
          f' array of shape {leaf.shape}.'
        )
  # The gradient of pcast adds up the statistics of shards that share a tap.
  axes = frozenset().union(*map(arrays.varying_axes, tapped))
  axes -= arrays.varying_axes(stats.numbers)
  if axes:
    stats = jax.tree.map(
      lambda u: jax.lax.pcast(u, tuple(sorted(axes)), to='varying'), stats
    )
  # One by one: what the loss does not use must not reach a scan's transpose.
  shared = _share(None, [stats] * len(tapped))
  passed = map(functools.partial(_tap, None), tapped, shared)
  return structure.unflatten(
    next(passed) if arrays.is_inexact(leaf) else leaf for leaf in leaves
  )


@identity
def _tap(static, cotangent, stats):
  del static
  return cotangent, _measure(cotangent, stats)


@identity
def _share(static, filled):
  """Merges what the arrays of one call have filled; JAX would add it."""
  del static
  used = [stats for stats in filled if stats.numbers is not None]
  return ([functools.reduce(_merge, used), *[None] * (len(filled) - 1)],)


def _measure(x, stats):
  """The statistics of one array, as many as ``stats`` has room for."""
  if jnp.iscomplexobj(x):
    x = jnp.stack([x.real, x.imag], axis=-1)
  x = x.astype(jnp.float32)
  x = x[None] if x.ndim == 0 else x
  # First by example, so that only one small array is summed over examples.
  inner_axes = tuple(range(1, x.ndim))
  magnitude = jnp.abs(x)
  largest = jnp.max(magnitude, inner_axes, initial=0)
  squares = _squares(x, largest, inner_axes)
  of_examples = None
  if stats.example_squares is not None:
    of_examples = arrays.laid_out_as(squares, stats.example_squares)
  columns = [
    jnp.full_like(largest, math.prod(x.shape[1:])),
    jnp.sum(x, inner_axes),
    *(squares[:, i] for i in range(3)),
    jnp.sum((x == 0).astype(jnp.float32), inner_axes),
    jnp.sum((~jnp.isfinite(x)).astype(jnp.float32), inner_axes),
  ]
  sums = jnp.sum(jnp.stack(columns, axis=-1), axis=0)
  most = jnp.max(largest, initial=0)
  return TapStats(
    numbers=jnp.concatenate([jnp.ones_like(sums[:1]), sums, most[None]]),
    histogram=None if stats.histogram is None else _histogram(magnitude),
    example_squares=of_examples,
  )


def _squares(x, largest, inner_axes):
  """Sums of squares by example, each in the unit that its size asks for."""
  unit = jnp.where(largest < 2.0**-40, jnp.float32(_SMALL), 1)
  unit = jnp.where(largest > 2.0**40, _LARGE, unit)
  reciprocal = jnp.expand_dims(1 / unit, inner_axes)
  total = jnp.sum(jnp.square(x * reciprocal), inner_axes)
  return jnp.stack(
    [jnp.where(unit == each, total, 0) for each in (_SMALL, 1, _LARGE)], -1
  )


def _histogram(magnitude):
  """How many magnitudes are in each cell, by the exponents of float32."""
  bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
  exponent = jax.lax.shift_right_logical(bits, jnp.full_like(bits, 23)) - 127
  cell = (exponent - LOWEST_EXPONENT) // OCTAVES_PER_CELL
  cell = jnp.clip(cell, 0, HISTOGRAM_CELLS - 1)
  counted = (magnitude > 0) & (magnitude < jnp.inf)
  replicated = jax.sharding.NamedSharding(
    jax.typeof(cell).sharding.mesh, jax.sharding.PartitionSpec()
  )
  empty = jnp.zeros([HISTOGRAM_CELLS], jnp.float32)
  return empty.at[cell].add(
    counted.astype(jnp.float32),
    mode='promise_in_bounds',
    out_sharding=replicated,
  )


def _merge(one, other):
  """The statistics of two arrays of one call."""
  total = jax.tree.map(jnp.add, one, other)
  most = jnp.maximum(one.numbers[-1], other.numbers[-1])
  numbers = total.numbers.at[COLUMNS.index('calls')].set(1)
  numbers = numbers.at[COLUMNS.index('largest')].set(most)
  return total._replace(numbers=numbers)
