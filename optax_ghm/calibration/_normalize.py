"""Normalizing gradients: by their norm, to unit variance, to mean 0."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ghm._core import arrays, counters, scopes, stateful, trees


class NormalizeState(NamedTuple):
  """State of ``normalize_by_norm`` and ``standardize``.

  Both fields are scalars, or vectors with one entry per group, leaf or unit.

  Attributes:
    divisor: divisor of the last step that could be divided.
    skipped: int32, number of steps that could not be divided: they become 0.
  """

  divisor: jax.Array
  skipped: jax.Array


def _init(scope, params):
  shape = scopes.scoped(scope, params).shape
  return NormalizeState(
    jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
  )


def _next_state(state, divisor, divided):
  scopes.check_same_tree(state.divisor, divisor.shape)
  return NormalizeState(
    jnp.where(divided, divisor, state.divisor),
    counters.count_if(~divided, state.skipped),
  )


def normalize_by_norm(
  *, scope: scopes.Scope = 'global', axis_name: arrays.AxisName = None
) -> stateful.StatefulTransformation[NormalizeState]:
  r"""Divides gradients by their norm.

  .. math:: g \leftarrow g / \lVert g \rVert

  The learning rate alone then says how far a step goes. For the whole tree,
  this is ``optax.normalize_by_update_norm`` without its ε.

  Args:
    scope: what has a norm together; see :func:`clip_by_norm`.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`~optax_ghm.calibration.NormalizeState`. Gradients become 0 if they
    are all 0, hold NaN or inf, or have a norm beyond 8e37, whose reciprocal
    float32 does not hold.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> tx = optax_ghm.normalize_by_norm(scope='leaf')
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

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    scoped = scopes.scoped(scope, updates)
    norm = scoped.norms(updates, axis_name)
    good = jnp.isfinite(norm) & (norm > 0)
    # The reciprocals of the largest norms are flushed to 0, which is no factor.
    factor = jnp.where(good, 1 / jnp.where(good, norm, 1), 0)
    state = _next_state(state, norm, factor > 0)
    return scoped.scale(updates, factor), state

  return stateful.StatefulTransformation(
    lambda params: _init(scope, params), update_fn
  )


def standardize(
  *, axis_name: arrays.AxisName = None
) -> stateful.StatefulTransformation[NormalizeState]:
  r"""Brings every leaf of two or more axes to mean 0 and variance 1: ZNorm.

  .. math:: g \leftarrow (g - \mu) / \sigma

  The mean and the standard deviation are over all numbers of the leaf. Scalars
  and vectors, that is biases and scales, pass unchanged, even if they are NaN.

  Args:
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`~optax_ghm.calibration.NormalizeState` of σ, which is 1 for leaves
    that pass unchanged. A leaf becomes 0 if its numbers are equal, or if one is
    NaN or inf.

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

  def standardized(leaf):
    """The leaf and its deviation, which is 0 if the leaf has none."""
    if leaf.ndim < 2:
      return leaf, jnp.ones([], jnp.float32)
    x = arrays.widen(leaf)
    largest = jnp.max(jnp.abs(x))
    if axis_name is not None:
      largest = jax.lax.pmax(largest, axis_name)
    # In units of the largest number, so that no square overflows.
    unit = arrays.divisor(largest)
    x = arrays.multiply(x, 1 / unit)
    size = arrays.psum(jnp.ones_like(unit) * leaf.size, axis_name)
    for _ in range(2):  # the second mean is what rounding left of the first
      total = arrays.psum(jnp.sum(x), axis_name)
      x -= arrays.multiply(total, 1 / size)
    square = arrays.psum(jnp.sum(jnp.square(jnp.abs(x))), axis_name)
    deviation = jnp.sqrt(square / size)
    # A deviation below 1e-6 of the largest number is rounding.
    good = deviation > 1e-6
    scaled = arrays.multiply(x, 1 / jnp.where(good, deviation, 1))
    update = jnp.where(good, scaled, 0).astype(leaf.dtype)
    return update, jnp.where(good, deviation * unit, 0).astype(jnp.float32)

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    leaves, structure = jax.tree.flatten(updates)
    deviations = []
    for i, leaf in enumerate(leaves):
      if trees.is_counted(leaf):
        leaves[i], deviation = standardized(leaf)
        deviations.append(deviation)
    divisor = jnp.stack(deviations) if deviations else state.divisor
    return structure.unflatten(leaves), _next_state(state, divisor, divisor > 0)

  return stateful.StatefulTransformation(
    lambda params: _init('leaf', params), update_fn
  )


def centralize(
  *,
  units: scopes.Units = scopes.FLAX_UNITS,
  axis_name: arrays.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Subtracts from every unit the mean over its fan-in.

  .. math:: g_{ij} \leftarrow g_{ij} - \frac1n \sum_{k = 1}^n g_{kj}

  The formula is for kernels (in, out); a unit is that of Flax's layouts.
  ``optax.centralize`` takes the mean over all axes but the first, which is
  right for kernels (out, in). Biases, scales, and all parameters of rank 0 or 1
  pass unchanged.

  Args:
    units: a layout other than :func:`~optax_ghm.calibration.flax_unit_axes`.
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
    if not (trees.is_counted(leaf) and scopes.is_kernel(path, leaf)):
      return leaf
    x = arrays.widen(leaf)
    mean = jnp.mean(x, axis=units.axes(path, leaf), keepdims=True)
    if axis_name is not None:
      mean = jax.lax.pmean(mean, axis_name)
    return (x - mean).astype(leaf.dtype)

  def centralize_all(updates, params):
    del params
    return jax.tree_util.tree_map_with_path(centralized, updates)

  return optax.with_extra_args_support(optax.stateless(centralize_all))
