"""Gradient reversal: identity forward, minus lambda times the gradient back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays


def reverse_gradient(x: Any, scale: ArrayLike = 1.0) -> Any:
  r"""Identity forward; backward, the cotangent times minus ``scale``.

  .. math::
    R_\lambda(x) = x, \qquad \frac{\partial R_\lambda}{\partial x} = -\lambda I

  Between the features and a domain classifier it makes the classifier tell the
  domains apart while the features are trained to prevent it. Its law is
  :math:`\nabla (f \circ R_\lambda) = -\lambda\, (\nabla f) \circ R_\lambda`, in
  every mode of differentiation and of any order: the Hessian of
  :math:`f \circ R_\lambda` is :math:`\lambda^2` times that of f. (Only
  ``jax.linear_transpose``, which does not differentiate, sees the identity.)

  Args:
    x: array or pytree of arrays. Leaves that are not floating or complex arrays
      (integers, PRNG keys, Python numbers) pass unchanged.
    scale: λ, a real number or an array, cast to the dtype of each leaf: a
      scalar, traced or not, such as the value of :func:`dann_reversal_schedule`
      at this step; or one per example, its axes those that ``x`` begins with,
      0 for an example that must not be seen. Its own gradient is zero.

  Returns:
    ``x``, bit for bit. The cotangent is multiplied, nothing else: NaN and
    infinite cotangents stay so, also where ``scale`` is 0.

  Raises:
    TypeError: if ``scale`` is complex.
    ValueError: if the shape of ``scale`` is not broadcastable to the leading
      axes of a leaf.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> def loss(x):
    ...   return jnp.sum(optax_ghm.reverse_gradient(x, 0.5) ** 2)
    >>> loss(jnp.array([1.0, 2.0])), jax.grad(loss)(jnp.array([1.0, 2.0]))
    (Array(5., dtype=float32), Array([-1., -2.], dtype=float32))

  References:
    Ganin and Lempitsky, `Unsupervised Domain Adaptation by Backpropagation
    <https://arxiv.org/abs/1409.7495>`_, 2015
  """
  scale = _real(scale)

  def reverse_leaf(leaf):
    if not arrays.is_inexact(leaf):
      return leaf
    leaf = jnp.asarray(leaf)
    return _reverse(leaf, _factor(leaf, scale))

  return jax.tree.map(reverse_leaf, x)


@jax.custom_jvp
def _reverse(x, factor):
  del factor
  return x


@_reverse.defjvp
def _reverse_jvp(primals, tangents):
  x, factor = primals
  # Linear in the tangent, so its transpose is the rule of the backward pass.
  return _reverse(x, factor), arrays.multiply(tangents[0], factor)


def _real(scale):
  scale = jnp.asarray(scale)
  if jnp.issubdtype(scale.dtype, jnp.complexfloating):
    raise TypeError(f'scale must be real, got dtype {scale.dtype}.')
  return scale


def _factor(leaf, scale):
  """Minus the scale, in the leaf's precision, over the leaf's leading axes."""
  factor = -scale.astype(jnp.finfo(leaf.dtype).dtype)
  fits = factor.ndim <= leaf.ndim and all(
    n in (1, m) for n, m in zip(factor.shape, leaf.shape, strict=False)
  )
  if not fits:
    raise ValueError(
      'scale must be a number, or an array over the leading axes of every leaf'
      f' of x: got shape {factor.shape} for a leaf of shape {leaf.shape}.'
    )
  return jnp.expand_dims(factor, tuple(range(factor.ndim, leaf.ndim)))


class ReverseState(NamedTuple):
  """State of :func:`reverse` with a schedule.

  Attributes:
    reversals: int32, how many updates were reversed so far.
  """

  reversals: jax.Array


def reverse(
  scale: optax.ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Multiplies the updates by minus ``scale``: ascent instead of descent.

  .. math:: u \leftarrow -\lambda u

  In a chain, the adversary of a min-max problem, which climbs the loss that the
  others descend; take its parameters apart with ``optax.partition`` or
  ``optax.masked``. Inside the backward pass, ``in_backward(reverse(scale))`` is
  :func:`reverse_gradient` to reverse mode.

  Args:
    scale: λ, a number, or a schedule of the number of updates so far.

  Returns:
    A ``GradientTransformationExtraArgs``. Its state is ``EmptyState`` for a
    number and :class:`ReverseState` for a schedule. Leaves that are not
    floating or complex arrays pass unchanged.

  Raises:
    TypeError: if ``scale`` is complex.

  Examples:
    The saddle point of x² + 2xy − y², x minimising and y maximising:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> tx = optax.chain(
    ...   optax.masked(optax_ghm.reverse(), {'x': False, 'y': True}),
    ...   optax.sgd(0.1),
    ... )
    >>> params = {'x': jnp.array(1.0), 'y': jnp.array(1.0)}
    >>> loss = lambda p: p['x'] ** 2 + 2 * p['x'] * p['y'] - p['y'] ** 2
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...   updates, state = tx.update(jax.grad(loss)(params), state)
    ...   params = optax.apply_updates(params, updates)
    >>> bool(jnp.abs(params['x']) + jnp.abs(params['y']) < 1e-6)
    True

  References:
    Ganin et al., `Domain-Adversarial Training of Neural Networks
    <https://arxiv.org/abs/1505.07818>`_, 2016
  """
  if not callable(scale):
    scale = _real(scale)

  def init_fn(params):
    del params
    if callable(scale):
      return ReverseState(reversals=jnp.zeros([], jnp.int32))
    return optax.EmptyState()

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    current = scale
    if callable(scale):
      current = _real(scale(state.reversals))
      state = ReverseState(jnp.asarray(optax.safe_increment(state.reversals)))

    def reverse_leaf(leaf):
      if not arrays.is_inexact(leaf):
        return leaf
      leaf = jnp.asarray(leaf)
      return arrays.multiply(leaf, _factor(leaf, current))

    return jax.tree.map(reverse_leaf, updates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
