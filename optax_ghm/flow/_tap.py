"""Taps: what the gradient is where it passes an activation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays, norms
from optax_ghm._core.identity import identity

LOWEST, OCTAVES, CELLS = -96, 2, 64
"""The histogram: cell i counts magnitudes from 2^(LOWEST + OCTAVES * i)."""


_SMALL, _LARGE = 2.0**-80, 2.0**96
"""Units in which squares of small and of large numbers are summed."""


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
  r"""Statistics of the cotangents that went through a tap.

  The gradient with respect to a sink, which is such statistics too, all zero.
  Whatever adds gradients up (a module called twice, micro-batches, shards, the
  examples of ``jax.vmap``) adds these up as well, and all of them stay those of
  all the cotangents together; of ``largest`` that is an upper bound.

  Behind the names are few arrays, since every result of a compiled step costs
  something. Leading axes, of layers in a ``scan`` say, lead in all of them.

  Attributes:
    numbers: (..., 9), float32: what the properties of this class read.
    histogram: (..., 64), float32, or None: how many magnitudes lie in
      :math:`[4^{i-48}, 4^{i-47})`; the first and the last cell hold what is
      beyond. Zeros and what is not finite are in none.
    example_squares: (..., examples, 3), float32, or None: the sums of squares
      of every example, first axis of the cotangent, in units of 2^-80, 1 and
      2^96.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> def loss(x, sink):
    ...   return jnp.sum(jnp.square(flow.tap(x, sink)))
    >>> stats = jax.grad(loss, argnums=1)(jnp.array([1.5, 2.0]), flow.sink())
    >>> print(stats.norm, stats.largest, stats.calls, stats.zeros)
    5.0 4.0 1.0 0.0
  """

  numbers: jax.Array
  histogram: jax.Array | None = None
  example_squares: jax.Array | None = None

  @property
  def calls(self) -> jax.Array:
    """How many cotangents were added up; 0 where none arrived."""
    return self._column('calls')

  @property
  def elements(self) -> jax.Array:
    """How many numbers they had; a complex one is two."""
    return self._column('elements')

  @property
  def sum(self) -> jax.Array:
    """The sum of all numbers."""
    return self._column('sum')

  @property
  def zeros(self) -> jax.Array:
    """How many are 0."""
    return self._column('zeros')

  @property
  def non_finite(self) -> jax.Array:
    """How many are NaN or infinite; the sums and norms then are so too."""
    return self._column('non_finite')

  @property
  def norm(self) -> jax.Array:
    """Euclidean norm, right from 1e-38 to the end of float32."""
    start = COLUMNS.index('small_squares')
    return _root(self.numbers[..., start : start + 3])

  @property
  def rms(self) -> jax.Array:
    """Root mean square; 0 where none arrived."""
    return self.norm / jnp.sqrt(jnp.maximum(self.elements, 1))

  @property
  def largest(self) -> jax.Array:
    """Largest magnitude; for ``calls`` > 1, the least known upper bound."""
    total = self._column('largest')
    return jnp.where(self.calls > 1, jnp.minimum(total, self.norm), total)

  @property
  def example_norms(self) -> jax.Array:
    """Euclidean norm of every example, (..., examples).

    Raises:
      ValueError: if they were not asked for.
    """
    if self.example_squares is None:
      raise ValueError('this sink was made without examples.')
    return _root(self.example_squares)

  def _column(self, name):
    return self.numbers[..., COLUMNS.index(name)]


def _root(squares):
  small, middle, large = (jnp.sqrt(squares[..., i]) for i in range(3))
  return norms.norm(jnp.stack([small * _SMALL, middle, large * _LARGE], -1), -1)


def sink(
  *,
  histogram: bool = False,
  examples: int | None = None,
  stack: tuple[int, ...] = (),
) -> TapStats:
  """What :func:`tap` writes to: statistics of nothing yet, all zero.

  Args:
    histogram: whether to keep one of the magnitudes.
    examples: how many examples there are, to keep the norm of each.
    stack: sizes of leading axes, for sinks that a loop over layers slices.

  Returns:
    The sink; its gradient is the statistics.

  Examples:
    >>> from optax_ghm import flow
    >>> flow.sink(examples=32).example_norms.shape
    (32,)
    >>> flow.sink(stack=(12,)).norm.shape
    (12,)
  """

  def zeros(*shape):
    return jnp.zeros(stack + shape, jnp.float32)

  return TapStats(
    numbers=zeros(len(COLUMNS)),
    histogram=zeros(CELLS) if histogram else None,
    example_squares=None if examples is None else zeros(examples, 3),
  )


def tap(x: Any, sink: TapStats) -> Any:
  r"""Identity; the gradient of ``sink`` is the statistics of the cotangent.

  .. math::
    y = x, \qquad \bar x = \bar y, \qquad \bar s = \text{statistics}(\bar y)

  Every other gradient is what it is without the tap, bit for bit as long as the
  compiler adds in the same order. The statistics are float32 and come of one
  pass over the cotangent, with, in a sharded ``jit``, two all-reduces of their
  own size. Under ``jit``, ``vmap``, ``scan``, ``remat``, ``cond`` and
  ``shard_map`` they follow the rules of any gradient: sinks that are scanned
  over get the statistics of their own step, one that is shared gets those of
  all. Where no gradient passes, ``calls`` is 0.

  Statistics are not linear in the cotangent, so forward mode (``jax.jvp``,
  ``jax.hessian``) raises.

  Args:
    x: array or pytree of arrays; what is neither floating nor complex passes
      untapped.
    sink: from :func:`sink`, a new one in every step: what is in it has no
      influence.

  Returns:
    ``x``.

  Raises:
    ValueError: if the sink was made for another number of examples.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> def loss(w, sink):
    ...   hidden = flow.tap(w * jnp.arange(4.0), sink)
    ...   return jnp.sum(jax.nn.relu(hidden - 1))
    >>> grad, stats = jax.grad(loss, argnums=(0, 1))(1.0, flow.sink())
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
  if sink.example_squares is not None:
    examples = sink.example_squares.shape[0]
    for leaf in tapped:
      if leaf.shape[:1] != (examples,):
        raise ValueError(
          f'the sink is for {examples} examples along the first axis, got an'
          f' array of shape {leaf.shape}.'
        )
  # Shards that share a sink add up: that is what the gradient of pcast does.
  axes = frozenset().union(*map(arrays.varying_axes, tapped))
  axes -= arrays.varying_axes(sink.numbers)
  if axes:
    sink = jax.tree.map(
      lambda u: jax.lax.pcast(u, tuple(sorted(axes)), to='varying'), sink
    )
  passed = iter(_tap(None, tapped, sink))
  return structure.unflatten(
    next(passed) if arrays.is_inexact(leaf) else leaf for leaf in leaves
  )


@identity
def _tap(static, cotangents, sink):
  del static
  several = [_measure(u, sink) for u in jax.tree.leaves(cotangents)]
  return cotangents, functools.reduce(_together, several)


def _measure(cotangent, sink):
  """The statistics of one array, of what the sink has room for."""
  x = cotangent
  if jnp.iscomplexobj(x):
    x = jnp.stack([x.real, x.imag], axis=-1)
  x = x.astype(jnp.float32)
  x = x[None] if x.ndim == 0 else x
  # By example, so that what is then added over examples is one small array.
  of_example = tuple(range(1, x.ndim))
  magnitude = jnp.abs(x)
  largest = jnp.max(magnitude, of_example, initial=0)
  squares = _squares(x, largest, of_example)
  columns = {
    'elements': jnp.full_like(largest, x.size // max(len(x), 1)),
    'sum': jnp.sum(x, of_example),
    'small_squares': squares[:, 0],
    'squares': squares[:, 1],
    'large_squares': squares[:, 2],
    'zeros': jnp.sum((x == 0).astype(jnp.float32), of_example),
    'non_finite': jnp.sum((~jnp.isfinite(x)).astype(jnp.float32), of_example),
  }
  sums = jnp.sum(jnp.stack(list(columns.values()), axis=-1), axis=0)
  most = jnp.max(largest, initial=0)
  return TapStats(
    numbers=jnp.concatenate([jnp.ones_like(sums[:1]), sums, most[None]]),
    histogram=None if sink.histogram is None else _histogram(magnitude),
    example_squares=None if sink.example_squares is None else squares,
  )


def _squares(x, largest, of_example):
  """Sums of squares by example, each in the unit that its size asks for."""
  unit = jnp.where(largest < 2.0**-40, jnp.float32(_SMALL), 1)
  unit = jnp.where(largest > 2.0**40, _LARGE, unit)
  reciprocal = jnp.expand_dims(1 / unit, of_example)
  total = jnp.sum(jnp.square(x * reciprocal), of_example)
  return jnp.stack(
    [jnp.where(unit == each, total, 0) for each in (_SMALL, 1, _LARGE)], -1
  )


def _histogram(magnitude):
  """How many magnitudes are in each cell, by the exponents of float32."""
  bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
  exponent = jax.lax.shift_right_logical(bits, jnp.full_like(bits, 23)) - 127
  cell = jnp.clip((exponent - LOWEST) // OCTAVES, 0, CELLS - 1)
  counted = (magnitude > 0) & (magnitude < jnp.inf)
  replicated = jax.sharding.NamedSharding(
    jax.typeof(cell).sharding.mesh, jax.sharding.PartitionSpec()
  )
  return (
    jnp.zeros([CELLS], jnp.float32)
    .at[cell]
    .add(
      counted.astype(jnp.float32),
      mode='promise_in_bounds',
      out_sharding=replicated,
    )
  )


def _together(one, other):
  """The statistics of two arrays of one call."""
  numbers = one.numbers + other.numbers
  numbers = numbers.at[COLUMNS.index('calls')].set(1)
  return TapStats(
    numbers=numbers.at[COLUMNS.index('largest')].set(
      jnp.maximum(one.numbers[-1], other.numbers[-1])
    ),
    **{
      name: None
      if getattr(one, name) is None
      else getattr(one, name) + getattr(other, name)
      for name in ('histogram', 'example_squares')
    },
  )
