"""Harmony weights: the inverse of the gradient density."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, masks
from optax_ghm.harmonization import _density, _windowed


def harmony_weights(
  norms: jax.Array,
  state: _density.DensityState | None = None,
  *,
  density: _density.DensityEstimator = _windowed.DEFAULT,
  mask: ArrayLike | None = None,
  weights: ArrayLike | None = None,
  axis_name: arrays.AxisName = None,
  train: bool = True,
) -> tuple[jax.Array, _density.DensityState]:
  r"""Weighs every example by how sparse its gradient norm is.

  .. math::
    \beta_i = \frac{N}{GD(g_i)}, \qquad \text{by default divided by }
    \frac{\sum_k w_k \beta_k}{\sum_k w_k}

  The division makes the weights average to 1 over the batch, and the learning
  rate keeps its meaning; ``density.normalize=False`` gives the raw weights.
  Harmony weights are constants to differentiation.

  Args:
    norms: gradient norms g of the examples, any shape and floating dtype.
    state: state of ``density``; None is that before the first batch.
    density: estimator of the gradient density GD.
    mask: bool, broadcastable to ``norms``: which examples count.
    weights: real numbers w, broadcastable to ``norms``: as how many examples
      each example counts in the density. They multiply the result, too. They
      are added up in float32: a million of them in one region count to 1 %.
    axis_name: mapped axis, or axes, over which the batch is split; the price
      is one all-reduce of the estimator's histogram.
    train: False reads the density of the batches before from the state, and
      leaves the state as it is. The weight of an example then does not depend
      on its batch, and weights average to 1 over the examples remembered.

  Returns:
    The factors :math:`w_i \beta_i` of the losses, float32 with the shape of
    ``norms``, and the next state. The factors are finite and non-negative.
    They are 0 for examples whose mask is False or weight 0, and for examples
    whose norm is NaN or infinite in float32, which ``state.non_finite`` counts.
    A batch without examples leaves the running density as it is.

  Raises:
    TypeError: if ``norms`` are not real and floating, ``mask`` is not bool or
      ``weights`` are not real.
    ValueError: if ``mask`` or ``weights`` do not broadcast to ``norms``, or
      ``state`` is of another estimator.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> weights, state = optax_ghm.harmony_weights(jnp.array([0.5] * 3 + [0.9]))
    >>> [round(float(w), 3) for w in weights]
    [0.667, 0.667, 0.667, 2.0]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, 2019
  """
  norms = jnp.asarray(norms)
  if not jnp.issubdtype(norms.dtype, jnp.floating):
    raise TypeError(f'norms must be real floats, got dtype {norms.dtype}.')
  amounts = masks.amounts(mask, weights, norms.shape)
  state = _density.init(density) if state is None else state
  return weigh(norms, amounts, state, density, axis_name, train)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def weigh(norms, amounts, state, density, axis_name, train):
  """The harmony weights of examples that count as ``amounts``; the state."""
  state_like = jax.eval_shape(lambda: _density.init(density))
  expected = jax.tree.map(jnp.shape, state_like)
  if jax.tree.map(jnp.shape, state) != expected:
    raise ValueError(
      'state must come from init() of the same estimator, of shapes'
      f' {expected}; got {jax.tree.map(jnp.shape, state)}.'
    )
  norms, amounts, state = lax.stop_gradient((norms, amounts, state))
  regions, state = density.update(
    norms.astype(jnp.float32), state, amounts, axis_name, train
  )
  total = jnp.sum(regions.count)
  beta = jnp.where(
    regions.density > 0, total / _density.nonzero(regions.density), 0.0
  )
  if density.normalize:
    average = jnp.sum(regions.count * beta) / _density.nonzero(total)
    beta = beta / _density.nonzero(average)
  harmony = regions.at_examples(beta)
  if amounts is not None and amounts.dtype != bool:
    harmony = amounts * harmony
  return harmony, state


def init_without_momentum(density):
  """The state for a call without one, which forgets what it learns.

  Raises:
    ValueError: if the density has a momentum, and so needs a state.
  """
  momentum = getattr(density, 'momentum', 0)
  if momentum > 0:
    raise ValueError(
      f'A density with momentum={momentum} needs its state: give density.init()'
      ' to harmonize, or to the ..._with_state form of a loss.'
    )
  return _density.init(density)
