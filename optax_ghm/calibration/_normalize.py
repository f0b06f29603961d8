"""Normalizing gradients: by their norm, to unit variance, to mean 0."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ghm._core import arrays, counters, scopes


class NormalizeState(NamedTuple):
  """State of :func:`normalize_by_norm` and :func:`standardize`.

  Scalars, or as many as there are norms.

  Attributes:
    divisor: of the last step for which it was finite and not 0.
    skipped: int32, how many steps were not: these become 0.
  """

  divisor: jax.Array
  skipped: jax.Array


def normalize_by_norm(
  scope: scopes.Scope = 'global', *, axis_name: arrays.AxisName = None
) -> optax.GradientTransformationExtraArgs:
  r"""Divides gradients by their norm: of the tree, groups, leaves or units.

  .. math:: g \leftarrow g / \lVert g \rVert

  so that the learning rate alone says how far a step goes. Of the whole tree it
  is ``optax.normalize_by_update_norm`` without its ε.

  Args:
    scope: what has a norm together, see :func:`clip_by_norm`.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`NormalizeState`. What
    is 0, has NaN or inf, or a norm beyond 8e37, becomes 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.normalize_by_norm('leaf')
    >>> grads = {'w': jnp.array([3.0, 4.0]), 'b': jnp.array([1e-30])}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> print(updates['w'], updates['b'])
    [0.6 0.8] [1.]

  References:
    Hazan et al., `Beyond Convexity: Stochastic Quasi-Convex Optimization
    <https://arxiv.org/abs/1507.02030>`_, 2015

    You et al., `Large Batch Training of Convolutional Networks
    <https://arxiv.org/abs/1708.03888>`_, 2017
  """

  def init_fn(params):
    shape = scopes.scoped(scope, params).shape
    return NormalizeState(
      jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
    )

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    scoped = scopes.scoped(scope, updates)
    norm = scoped.norms(updates, axis_name)
    good = jnp.isfinite(norm) & (norm > 0)
    good &= norm < arrays.LARGEST_RECIPROCAL
    factor = jnp.where(good, 1 / jnp.where(good, norm, 1), 0)
    return scoped.scale(updates, factor), _next_state(state, norm, good)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _next_state(state, divisor, divided):
  return NormalizeState(
    jnp.where(divided, divisor, state.divisor),
    counters.count_if(~divided, state.skipped),
  )


_NO_DEVIATION = 1e-6
"""A deviation below so many times the largest number is rounding."""


def standardize(
  *, axis_name: arrays.AxisName = None
) -> optax.GradientTransformationExtraArgs:
  r"""Brings every leaf of two or more axes to mean 0 and variance 1: ZNorm.

  .. math:: g \leftarrow (g - \mu) / \sigma

  with the mean and the deviation over all numbers of the leaf. Scalars and
  vectors, that is biases and scales, pass unchanged, NaN among them.

  Args:
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`NormalizeState` of σ, 1
    for what passes unchanged. A leaf of equal numbers, or with NaN or inf,
    becomes 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.standardize()
    >>> grads = {
    ...   'kernel': jnp.array([[0.0, 4.0], [4.0, 0.0]]),
    ...   'bias': jnp.ones(2),
    ... }
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> print(updates['kernel'], updates['bias'])
    [[-1.  1.]
     [ 1. -1.]] [1. 1.]

  References:
    Yun, `ZNorm: Z-Score Gradient Normalization Accelerating Skip-Connected
    Network Training without Architectural Modification
    <https://arxiv.org/abs/2408.01215>`_, 2024
  """

  def init_fn(params):
    shape = scopes.scoped('leaf', params).shape
    return NormalizeState(
      jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
    )

  def over_shards(reduce, x):
    return x if axis_name is None else reduce(x, axis_name)

  def standardized(leaf):
    """The leaf and its deviation, or what shows that there is none."""
    if leaf.ndim < 2:
      return leaf, jnp.ones([], jnp.float32)
    x = leaf.astype(arrays.at_least_float32(leaf.dtype))
    # In units of the largest, so that nothing overflows.
    largest = over_shards(jax.lax.pmax, jnp.max(jnp.abs(x)))
    unit = arrays.divisor(largest)
    x = arrays.multiply(x, 1 / unit)
    size = over_shards(jax.lax.psum, jnp.ones_like(unit) * leaf.size)
    for _ in range(2):  # the second time, what rounding left of the first mean
      total = over_shards(jax.lax.psum, jnp.sum(x))
      x -= arrays.multiply(total, 1 / size)
    square = over_shards(jax.lax.psum, jnp.sum(jnp.square(jnp.abs(x))))
    deviation = jnp.sqrt(square / size)
    good = deviation > _NO_DEVIATION  # not if it is NaN
    scaled = arrays.multiply(x, 1 / jnp.where(good, deviation, 1))
    update = jnp.where(good, scaled, 0).astype(leaf.dtype)
    return update, jnp.where(good, deviation * unit, 0).astype(jnp.float32)

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    leaves, structure = jax.tree.flatten(updates)
    deviations = []
    for i, leaf in enumerate(leaves):
      if arrays.is_inexact(leaf) and leaf.size:
        leaves[i], deviation = standardized(leaf)
        deviations.append(deviation)
    divisor = jnp.stack(deviations) if deviations else state.divisor
    return structure.unflatten(leaves), _next_state(state, divisor, divisor > 0)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def centralize(
  units: scopes.Units = scopes.FLAX_UNITS,
  *,
  axis_name: arrays.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Takes the mean over its fan-in from every unit: gradient centralization.

  .. math:: g_{ij} \leftarrow g_{ij} - \frac1n \sum_{k = 1}^n g_{kj}

  for kernels (in, out). ``optax.centralize`` takes the mean over all axes but
  the first, which is right for kernels (out, in); here a unit is that of Flax's
  layouts. Biases, scales, and all of rank 0 or 1 pass unchanged.

  Args:
    units: other layouts than those of :func:`flax_unit_axes`.
    axis_name: mapped axis, or axes, over which the *fan-in* of every leaf is
      split.

  Returns:
    A ``GradientTransformationExtraArgs`` without state. A unit with NaN or inf
    becomes NaN, for a guard behind it to see.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.centralize()
    >>> grads = {'kernel': jnp.array([[1.0, 5.0], [3.0, 5.0]])}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> print(updates['kernel'])
    [[-1.  0.]
     [ 1.  0.]]

  References:
    Yong et al., `Gradient Centralization: A New Optimization Technique for Deep
    Neural Networks <https://arxiv.org/abs/2004.01461>`_, 2020
  """

  def centralized(path, leaf):
    if not (arrays.is_inexact(leaf) and leaf.size):
      return leaf
    if not scopes.is_kernel(path, leaf):
      return leaf
    axes = units.axes(path, leaf)
    x = leaf.astype(arrays.at_least_float32(leaf.dtype))
    mean = jnp.mean(x, axis=axes, keepdims=True)
    if axis_name is not None:
      mean = jax.lax.pmean(mean, axis_name)
    return (x - mean).astype(leaf.dtype)

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    return jax.tree_util.tree_map_with_path(centralized, updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update_fn
  )
