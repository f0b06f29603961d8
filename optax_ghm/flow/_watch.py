"""Watching an optimizer: gradients, updates and parameters, leaf by leaf."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ghm._core import leaf_rows, scopes, trees
from optax_ghm._core.arrays import at_least_float32, is_split
from optax_ghm._core.norms import global_norm, group_norms

PATIENCE = 10
"""A unit is dead after so many measured steps in a row without a gradient."""


COLUMNS = (
  'gradient_norm',
  'update_norm',
  'parameter_norm',
  'elements',
  'zeros',
  'non_finite',
  'units',
  'dead_units',
  'signal_to_noise',
  'cosine',
)


class WatchState(NamedTuple):
  """State of :func:`watch`.

  Attributes:
    measured: (leaves, 10), float32: a row for every parameter that has a
      gradient, in the order of ``jax.tree.leaves``; :func:`leaf_names` names
      the rows, and the properties of this class read the columns.
    quiet: of every unit, how many measured steps in a row it had no gradient.
    watched: the state of the optimizer.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax_ghm import flow
    >>> tx = flow.watch(optax.sgd(0.5))
    >>> params = jnp.array([3.0, 4.0])
    >>> updates, state = tx.update(
    ...   jnp.array([0.0, 2.0]), tx.init(params), params
    ... )
    >>> print(state.gradient_norm, state.update_norm, state.update_ratio)
    [2.] [1.] [0.2]
  """

  measured: jax.Array
  quiet: jax.Array
  watched: optax.OptState

  @property
  def gradient_norm(self) -> jax.Array:
    """Of what came in."""
    return self._column('gradient_norm')

  @property
  def update_norm(self) -> jax.Array:
    """Of what went out; 0 where the squares are below float32, inf beyond."""
    return self._column('update_norm')

  @property
  def parameter_norm(self) -> jax.Array:
    """Of the parameters before the step."""
    return self._column('parameter_norm')

  @property
  def update_ratio(self) -> jax.Array:
    """Update norm over parameter norm; inf for parameters that are all 0."""
    return self.update_norm / self.parameter_norm

  @property
  def elements(self) -> jax.Array:
    """How many numbers the leaf has."""
    return self._column('elements')

  @property
  def zeros(self) -> jax.Array:
    """How many of its gradient are 0."""
    return self._column('zeros')

  @property
  def non_finite(self) -> jax.Array:
    """How many of its gradient are NaN or infinite."""
    return self._column('non_finite')

  @property
  def units(self) -> jax.Array:
    """How many units are looked at, none of embeddings and biased kernels."""
    return self._column('units')

  @property
  def dead_units(self) -> jax.Array:
    """Those without any gradient in the last 10 measured steps or more."""
    return self._column('dead_units')

  @property
  def signal_to_noise(self) -> jax.Array:
    """See :func:`watch`; 0 unless asked for."""
    return self._column('signal_to_noise')

  @property
  def cosine(self) -> jax.Array:
    """See :func:`watch`; 0 unless asked for."""
    return self._column('cosine')

  def _column(self, name):
    return self.measured[..., COLUMNS.index(name)]


def leaf_names(params: Any) -> list[str]:
  """Names of the rows that :func:`watch` measures.

  Args:
    params: the parameters.

  Returns:
    For every leaf that has a gradient, its path joined by slashes.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import flow
    >>> flow.leaf_names({'dense': {'kernel': jnp.ones((2, 2))}, 'step': 3})
    ['dense/kernel']
  """
  return [trees.path_name(path) for path, _ in trees.counted_with_path(params)]


def watch(
  optimizer: optax.GradientTransformation, *, moments: bool = False
) -> optax.GradientTransformationExtraArgs:
  r"""Measures what goes into and comes out of an optimizer, leaf by leaf.

  For every leaf with gradient g, update u and parameter w, the state holds
  :math:`\lVert g \rVert`, :math:`\lVert u \rVert`, :math:`\lVert w \rVert`, the
  zeros and the non-finite numbers of g, and how many units are dead: entries of
  a bias, or where there is none, columns of a kernel
  (:func:`optax_ghm.flax_unit_axes`), whose gradient was 0 in the last 10
  measured steps.

  With ``moments``, also, of Adam's own moments after the step,

  .. math::
    \text{signal to noise} = \frac{\sum \mu^2}{\sum \nu}, \qquad
    \text{cosine} = \frac{\langle g, \mu \rangle}
      {\lVert g \rVert \lVert \mu \rVert}

  Some 1 / (1 - b2) steps after the start, they are both 1 for a gradient that
  never changes, and for one that is pure noise (1 - b1) / (1 + b1) = 0.05 and
  :math:`\sqrt{1 - b_1^2}` = 0.44.

  Updates are those of the optimizer, bit for bit. To measure every n-th step
  only, make ``update``'s extra argument ``measure`` False in the others. It is
  a Python bool, a static argument of the step: two steps are compiled, and the
  one that does not measure does nothing more than the optimizer.

  Args:
    optimizer: any Optax transformation.
    moments: whether to measure those; they are read from the only fields ``mu``
      and ``nu`` in the optimizer's state.

  Returns:
    The optimizer, watched. ``update`` needs ``params``.

  Raises:
    ValueError: in ``init``, if there are no such moments; in ``update``, if
      ``params`` is None.
    TypeError: in ``update``, if ``measure`` is not a Python bool.

  Examples:
    >>> import functools
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax_ghm import flow
    >>> tx = flow.watch(optax.sgd(0.5))
    >>> params = {'kernel': jnp.ones((4, 2)), 'bias': jnp.zeros(2)}
    >>> @functools.partial(jax.jit, static_argnames='measure')
    ... def step(grads, state, params, measure):
    ...   updates, state = tx.update(grads, state, params, measure=measure)
    ...   return optax.apply_updates(params, updates), state
    >>> state = tx.init(params)
    >>> for i in range(3):
    ...   params, state = step(params, state, params, measure=i % 2 == 0)
    >>> flow.leaf_names(params)
    ['bias', 'kernel']
    >>> state.update_norm
    Array([0.        , 0.35355338], dtype=float32)
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def init_fn(params):
    watched = optimizer.init(params)
    if moments:
      _moments(watched, params)
    leaves, units = trees.counted(params), 0
    for leaf, axes in zip(leaves, _unit_axes(params), strict=True):
      if axes is not None:
        units += leaf.size // int(np.prod([leaf.shape[i] for i in axes]))
    # orbax cannot save what has no cell.
    return WatchState(
      measured=jnp.zeros([max(len(leaves), 1), len(COLUMNS)], jnp.float32),
      quiet=jnp.zeros([max(units, 1)], jnp.float32),
      watched=watched,
    )

  def update_fn(updates, state, params=None, *, measure=True, **extra_args):
    if params is None and jax.tree.leaves(updates):
      raise ValueError('params must be given to update(), and were None.')
    if not isinstance(measure, bool):
      raise TypeError(
        'measure must be a Python bool, a static argument of the compiled'
        f' step, got {measure!r}.'
      )
    gradients = updates
    updates, watched = optimizer.update(
      updates, state.watched, params, **extra_args
    )
    if not measure or not trees.counted(gradients):
      return updates, state._replace(watched=watched)
    columns, quiet = _measure(gradients, updates, params, state.quiet)
    if moments:
      columns |= _of_moments(gradients, watched)
    rows = columns['gradient_norm'].shape
    return updates, WatchState(
      measured=jnp.stack(
        [
          jnp.asarray(columns.get(name, np.zeros(rows)), jnp.float32)
          for name in COLUMNS
        ],
        axis=1,
      ),
      quiet=quiet,
      watched=watched,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _measure(gradients, updates, params, quiet):
  """The columns that any optimizer has, and the next ``quiet``."""
  leaves = trees.counted(gradients)
  gradient_norm = _each_norm(leaves)

  is_quiet, units = [], []
  for leaf, axes in zip(leaves, _unit_axes(gradients), strict=True):
    if axes is not None:
      is_quiet.append(_replicated(jnp.all(leaf == 0, axes)).ravel())
    units.append(0 if axes is None else is_quiet[-1].size)
  if is_quiet:
    while len(is_quiet) > 1:  # XLA compiles a few dozen at a time soonest
      is_quiet = [
        jnp.concatenate(is_quiet[i : i + leaf_rows.TOGETHER])
        for i in range(0, len(is_quiet), leaf_rows.TOGETHER)
      ]
    quiet = jnp.where(is_quiet[0], quiet + 1, 0)
  of_leaf = np.repeat(np.arange(len(leaves)), units)
  is_dead = (quiet[: len(of_leaf)] >= PATIENCE).astype(jnp.float32)
  elements = np.array([leaf.size for leaf in leaves], np.float32)
  return {
    'gradient_norm': gradient_norm,
    # In one sum where it is made: to rescale them, all would be written out.
    'update_norm': jnp.sqrt(_by_leaf(_squares, trees.counted(updates))),
    'parameter_norm': group_norms(
      trees.counted(params), np.arange(len(leaves)), len(leaves)
    ),
    'elements': elements,
    'zeros': elements - _by_leaf(_non_zero, leaves),
    'non_finite': _by_leaf(_non_finite, leaves),
    'units': np.array(units, np.float32),
    'dead_units': jnp.zeros(len(leaves), jnp.float32).at[of_leaf].add(is_dead),
  }, quiet


def _by_leaf(reduce, leaves):
  """A sum over every leaf, small ones of a size together."""
  arrays, order = leaf_rows.rows(leaves, np.arange(len(leaves)))
  sums = [reduce(rows, tuple(range(1, rows.ndim))) for rows in arrays]
  return jnp.concatenate(sums)[np.argsort(order)]


def _squares(x, axes):
  x = x.astype(at_least_float32(x.dtype))
  return jnp.sum((x.conj() * x).real, axes, dtype=jnp.float32)


def _non_zero(x, axes):
  return jnp.sum((x != 0).astype(jnp.float32), axes)


def _non_finite(x, axes):
  def count():
    return jnp.sum((~jnp.isfinite(x)).astype(jnp.float32), axes)

  if x.size <= leaf_rows.TOGETHER * leaf_rows.SMALL:
    return count()
  # Only if there are any, which their sum of squares, known by now, tells.
  fine = jnp.all(jnp.isfinite(_squares(x, axes)))
  return jax.lax.cond(fine, lambda: jnp.zeros(x.shape[:1], jnp.float32), count)


def _each_norm(leaves):
  """Of every gradient, as soon as it is there: none is kept for the others."""
  small = [i for i, leaf in enumerate(leaves) if leaf.size <= leaf_rows.SMALL]
  together = group_norms(
    [leaves[i] for i in small], np.arange(len(small)), len(small)
  )
  norms = dict(zip(small, together, strict=True))
  for i, leaf in enumerate(leaves):
    if i not in norms:
      norms[i] = global_norm(leaf)
  return jnp.stack([norms[i].astype(jnp.float32) for i in range(len(leaves))])


def _moments(watched, params):
  """Adam's, from the state of an optimizer."""
  found = [
    [value for _, value in optax.tree.get_all_with_path(watched, name)]
    for name in ('mu', 'nu')
  ]
  if any(len(values) != 1 for values in found) or any(
    jax.tree.structure(values[0]) != jax.tree.structure(params)
    for values in found
  ):
    raise ValueError(
      'moments=True needs an optimizer whose state has one field mu and one'
      f' field nu, shaped as the parameters; found {len(found[0])} and'
      f' {len(found[1])}.'
    )
  return [values[0] for values in found]


def _of_moments(gradients, watched):
  mu, nu = _moments(watched, gradients)
  signal_to_noise, cosine = [], []
  for g, m, v in zip(*map(trees.counted, (gradients, mu, nu)), strict=True):
    squares = _inner(m, m)
    signal_to_noise.append(_ratio(squares, jnp.sum(v.real, dtype=jnp.float32)))
    lengths = jnp.sqrt(_inner(g, g)) * jnp.sqrt(squares)
    cosine.append(_ratio(_inner(g, m), lengths))
  return {
    'signal_to_noise': jnp.stack(signal_to_noise),
    'cosine': jnp.stack(cosine),
  }


def _inner(x, y):
  dtype = at_least_float32(x.dtype)
  return jnp.sum(
    (x.astype(dtype).conj() * y.astype(dtype)).real, dtype=jnp.float32
  )


def _ratio(x, y):
  return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))


def _unit_axes(tree):
  """What a unit of every leaf sums over; None for leaves without units.

  Those are embeddings, since unused tokens rest without being dead, and kernels
  with a bias, whose gradient says the same at less cost.
  """
  leaves = [
    (path, trees.path_name(path), leaf)
    for path, leaf in trees.counted_with_path(tree)
  ]
  names = {name for _, name, _ in leaves}
  every: list[tuple[int, ...] | None] = []
  for path, name, leaf in leaves:
    parent, _, own = name.rpartition('/')
    if not scopes.is_kernel(path, leaf):
      every.append(())
    elif own == 'embedding' or f'{parent}/bias'.removeprefix('/') in names:
      every.append(None)
    else:
      every.append(scopes.flax_unit_axes(path, leaf))
  return every


def _replicated(x):
  if not is_split(x):
    return x
  return jax.sharding.reshard(x, jax.sharding.PartitionSpec())
