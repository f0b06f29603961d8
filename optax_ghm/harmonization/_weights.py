"""Harmony weights: the inverse of the gradient density."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from optax_ghm._core import arrays
from optax_ghm.harmonization import _density, _windowed

DEFAULT_DENSITY = _windowed.WindowedDensity()


@functools.partial(jax.jit, static_argnames=('density', 'axis_name', 'train'))
def harmony_weights(
  norms: jax.Array,
  state: _density.DensityState | None = None,
  *,
  density: _density.DensityEstimator = DEFAULT_DENSITY,
  mask: jax.Array | None = None,
  axis_name: arrays.AxisName = None,
  train: bool = True,
) -> tuple[jax.Array, _density.DensityState]:
  r"""Weighs every example by how sparse its gradient norm is.

  .. math::
    \beta_i = \frac{N}{GD(g_i)}, \qquad \text{by default divided by }
    \frac{\sum_k m_k \beta_k}{\sum_k m_k}

  so that the weights average to 1 over the batch and the learning rate keeps
  its meaning; ``density.normalize=False`` gives the raw weights. Weights are
  constants to differentiation.

  Args:
    norms: gradient norms of the examples, any shape and floating dtype.
    state: of ``density``; None starts afresh.
    density: the estimator.
    mask: broadcastable to ``norms``: which examples count (bool), or as how
      many examples each counts in the density (float). It decides who has a
      weight, and does not multiply it. Floats are added up in float32, so that
      a million of them in one region still count to 1 %.
    axis_name: mapped axis, or axes, over which the batch is split: one
      all-reduce of the estimator's histogram.
    train: False reads the density of the state alone and leaves the state as it
      is, so that an example's weight does not depend on its batch; weights then
      average to 1 over the examples remembered.

  Returns:
    The weights, float32 with the shape of ``norms``: finite, non-negative, 0
    for examples that are masked out or whose norm is NaN or infinite (which
    ``state.non_finite`` counts); and the next state. An empty or wholly masked
    batch gives weights 0 and leaves the running density as it is.

  Raises:
    TypeError: if ``norms`` are not real and floating, or ``mask`` not real.
    ValueError: if ``mask`` does not broadcast to ``norms``, or ``state`` is of
      another estimator.

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
  if state is None:
    state = density.init()
  norms, state, mask = lax.stop_gradient((norms, state, mask))
  crowd, state = density.observe(norms, state, mask, axis_name, train)
  known = crowd.density > 0
  beta = jnp.where(known, crowd.total / _density.nonzero(crowd.density), 0.0)
  if density.normalize:
    weighed = jnp.sum(crowd.mass * beta)
    beta = beta * jnp.where(
      weighed > 0, jnp.sum(crowd.mass) / _density.nonzero(weighed), 1.0
    )
  return crowd.at_examples(beta), state
