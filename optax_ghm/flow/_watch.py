"""Statistics of gradients, updates and parameters, leaf by leaf."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ghm._core import (
  arrays,
  counters,
  leaf_rows,
  norms,
  scopes,
  stateful,
  trees,
)
from optax_ghm.flow import _units

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
      gradient, in the order of ``jax.tree.leaves``. :func:`leaf_names` names
      the rows, and the properties of this class read the columns.
    zero_steps: (units,), float32: for how many measured steps in a row the
      gradient of every unit has been 0.
    inner_state: the state of the watched optimizer.

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
  zero_steps: jax.Array
  inner_state: optax.OptState

  @property
  def gradient_norm(self) -> jax.Array:
    """Norm of the gradient."""
    return self._column('gradient_norm')

  @property
  def update_norm(self) -> jax.Array:
    """Norm of the update, to 1e-19 and 1e19."""
    return self._column('update_norm')

  @property
  def parameter_norm(self) -> jax.Array:
    """Norm before the update."""
    return self._column('parameter_norm')

  @property
  def elements(self) -> jax.Array:
    """Number of elements."""
    return self._column('elements')

  @property
  def zeros(self) -> jax.Array:
    """Number of elements whose gradient is 0."""
    return self._column('zeros')

  @property
  def non_finite(self) -> jax.Array:
    """Number of NaN and inf in the gradient."""
    return self._column('non_finite')

  @property
  def units(self) -> jax.Array:
    """Number of units; 0 where a bias tells the same."""
    return self._column('units')

  @property
  def dead_units(self) -> jax.Array:
    """Number of dead units; of a stack, in its worst layer."""
    return self._column('dead_units')

  @property
  def signal_to_noise(self) -> jax.Array:
    """0 without ``moments``."""
    return self._column('signal_to_noise')

  @property
  def cosine(self) -> jax.Array:
    """0 without ``moments``."""
    return self._column('cosine')

  @property
  def update_ratio(self) -> jax.Array:
    """Update norm over parameter norm; inf for a parameter that is all 0."""
    return self.update_norm / self.parameter_norm

  def _column(self, name):
    return self.measured[..., COLUMNS.index(name)]


def watch(
  optimizer: optax.GradientTransformation,
  *,
  moments: bool = False,
  units: scopes.Units = scopes.FLAX_UNITS,
) -> stateful.StatefulTransformation[WatchState]:
  r"""Measures what goes into and comes out of an optimizer, leaf by leaf.

  For every leaf with gradient g, update u and parameter w, the state holds
  :math:`\lVert g \rVert`, :math:`\lVert u \rVert`, :math:`\lVert w \rVert`, the
  number of zeros and of non-finite elements of g, and the number of dead units.
  A unit is an element of a bias or, where there is no bias, a column of a
  kernel. It is dead if its gradient was 0 in the last 10 measured steps.

  Of a stack of layers, as ``nn.scan`` makes it, the layer with most dead units
  counts. Biases of two axes are taken for stacks, and kernels of three or five
  axes with as many outputs as inputs. Since they may also be of attention or of
  a convolution, a part without any gradient does not count. ``units`` says what
  they are.

  With ``moments``, the state also describes the moments of Adam after the step:

  .. math::
    \text{signal to noise} = \frac{\sum \mu^2}{\sum \nu}, \qquad
    \text{cosine} = \frac{\langle g, \mu \rangle}
      {\lVert g \rVert \lVert \mu \rVert}

  Some 1 / (1 - b2) steps after the start, both are 1 for a gradient that never
  changes. For pure noise they are (1 - b1) / (1 + b1) = 0.05 and
  :math:`\sqrt{1 - b_1^2}` = 0.44.

  The updates are those of the optimizer, bit for bit. To measure every n-th
  step only, set the extra argument ``measure`` of ``update`` to False in the
  other steps. It is a Python bool, a static argument of the step: two steps are
  compiled, and the step that does not measure costs what the optimizer costs.

  Args:
    optimizer: any Optax transformation.
    moments: whether to measure the moments. The state of the optimizer must
      have one field ``mu`` and one field ``nu``.
    units: the axes of a leaf that a unit sums over, as for the scopes of clips;
      the default is :func:`optax_ghm.calibration.flax_unit_axes`. Axes in front
      of these are those of a stack: ``units`` and ``dead_units`` of the state
      are those of the layer that has most dead ones.

  Returns:
    The watched optimizer. Its ``update`` needs ``params``.

  Raises:
    ValueError: in ``init``, if there are no such moments; in ``update``, if
      ``params`` is None, or if other leaves have a gradient than in ``init``.
    TypeError: if ``optimizer`` is no transformation, or ``units`` is not an
      :class:`optax_ghm.Units`; in ``update``,
      if ``measure`` is not a Python bool.

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

    With stacked layers, of shape (layers, in, out):

    >>> import optax_ghm
    >>> from optax_ghm.calibration import flax_unit_axes
    >>> def axes(path, leaf):
    ...   if path[0].key != 'stack':
    ...     return flax_unit_axes(path, leaf)
    ...   layer = jax.eval_shape(lambda leaf: leaf[0], leaf)
    ...   return tuple(i + 1 for i in flax_unit_axes(path, layer))
    >>> tx = flow.watch(optax.sgd(0.5), units=optax_ghm.Units(axes))
    >>> params = {'stack': {'kernel': jnp.ones((6, 4, 8))}}
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> print(state.units)
    [8.]
  """
  counters.check_type('optimizer', optimizer, counters.GradientTransformation)
  counters.check_type('units', units, scopes.Units)
  optimizer = optax.with_extra_args_support(optimizer)

  def init_fn(params):
    inner_state = optimizer.init(params)
    if moments:
      _moments(inner_state, params)
    rows, count = _sizes(_units.of_leaves(params, units))
    return WatchState(
      measured=jnp.zeros([rows, len(COLUMNS)], jnp.float32),
      zero_steps=jnp.zeros([count], jnp.float32),
      inner_state=inner_state,
    )

  def update_fn(updates, state, params=None, *, measure=True, **extra_args):
    if params is None and jax.tree.leaves(updates):
      raise ValueError('params must be given to update(), and were None.')
    if not isinstance(measure, bool):
      raise TypeError(
        'measure must be a Python bool, a static argument of the compiled'
        f' step, got {measure!r}.'
      )
    gradients, found = updates, _units.of_leaves(updates, units)
    made = len(state.measured), len(state.zero_steps)
    if found and made != _sizes(found):
      raise ValueError(
        'the state was made for {} leaves with {} units, the updates have {}'
        ' with {}: init must see a tree with None and MaskedNode in the same'
        ' places.'.format(*made, *_sizes(found))
      )
    updates, inner_state = optimizer.update(
      updates, state.inner_state, params, **extra_args
    )
    if not measure or not found:
      return updates, state._replace(inner_state=inner_state)
    columns = _measure(gradients, updates, params)
    zero_steps, columns['dead_units'] = _units.count_dead(
      gradients, found, state.zero_steps
    )
    columns['units'] = np.array([leaf.units for leaf in found])
    if moments:
      columns |= _measure_moments(gradients, inner_state)
    missing = np.zeros(columns['gradient_norm'].shape)
    measured = [
      jnp.asarray(columns.get(name, missing), jnp.float32) for name in COLUMNS
    ]
    return updates, WatchState(
      jnp.stack(measured, axis=1), zero_steps, inner_state
    )

  return stateful.StatefulTransformation(init_fn, update_fn)


def _sizes(found):
  """How many leaves and units; one at least, for orbax to save an array."""
  count = sum(leaf.layers * leaf.units for leaf in found)
  return max(len(found), 1), max(count, 1)


def _measure(gradients, updates, params):
  """The columns that any optimizer has, but those of units."""
  counted = trees.counted(gradients)
  gradient_norm = _each_norm(counted)
  elements = np.array([leaf.size for leaf in counted], np.float32)
  return {
    'gradient_norm': gradient_norm,
    # One sum where the update is made: rescaling would store all updates.
    'update_norm': jnp.sqrt(_by_leaf(_squares, trees.counted(updates))),
    'parameter_norm': norms.group_norms(
      trees.counted(trees.like(gradients, params)),
      np.arange(len(counted)),
      len(counted),
    ),
    'elements': elements,
    'zeros': elements
    - _by_leaf(
      lambda x, axes: jnp.sum((x != 0).astype(jnp.float32), axes), counted
    ),
    'non_finite': _by_leaf(_non_finite, counted),
  }


def _by_leaf(reduce, counted):
  """A sum over every leaf, with small leaves of one size in one array."""
  joined, order = leaf_rows.rows(counted, np.arange(len(counted)))
  sums = [reduce(rows, tuple(range(1, rows.ndim))) for rows in joined]
  return jnp.concatenate(sums)[np.argsort(order)]


def _squares(x, axes):
  return _inner(x, x, axes)


def _non_finite(x, axes):
  def count():
    return jnp.sum((~jnp.isfinite(x)).astype(jnp.float32), axes)

  if x.size <= leaf_rows.TOGETHER * leaf_rows.SMALL:
    return count()
  # The sum of squares, which is known by now, tells whether there are any.
  fine = jnp.all(jnp.isfinite(_squares(x, axes)))
  return jax.lax.cond(fine, lambda: jnp.zeros(x.shape[:1], jnp.float32), count)


def _each_norm(counted):
  """The norm of every leaf, each as soon as the leaf is there.

  One program for all large leaves would keep every gradient until the last.
  """
  small = [i for i, leaf in enumerate(counted) if leaf.size <= leaf_rows.SMALL]
  joined = norms.group_norms(
    [counted[i] for i in small], np.arange(len(small)), len(small)
  )
  found = dict(zip(small, joined, strict=True))
  for i, leaf in enumerate(counted):
    if i not in found:
      found[i] = norms.global_norm(leaf)
  return jnp.stack([found[i].astype(jnp.float32) for i in range(len(counted))])


def _moments(inner_state, params):
  """Adam's moments in the state of an optimizer."""
  found = [
    [value for _, value in optax.tree.get_all_with_path(inner_state, name)]
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


def _measure_moments(gradients, inner_state):
  mu, nu = _moments(inner_state, gradients)
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


def _inner(x, y, axes=None):
  dtype = arrays.at_least_float32(x.dtype)
  products = x.astype(dtype).conj() * y.astype(dtype)
  return jnp.sum(products.real, axes, dtype=jnp.float32)


def _ratio(x, y):
  return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))
