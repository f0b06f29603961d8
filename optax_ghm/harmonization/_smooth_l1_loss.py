"""GHM-R for regression."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, masks
from optax_ghm.harmonization import (
  _authentic_smooth_l1_loss,
  _density,
  _losses,
  _weighting,
)


def smooth_l1_ghm_loss(
  predictions: ArrayLike,
  targets: ArrayLike,
  *,
  mu: float | jax.Array = 0.1,
  weighting: _weighting.HarmonyWeighting = _weighting.DEFAULT,
  mask: ArrayLike | None = None,
  weights: ArrayLike | None = None,
  axis_name: arrays.AxisName = None,
) -> jax.Array:
  r"""GHM-R: harmonized authentic smooth L1 loss (ASL1) for regression.

  .. math::
    \ell_i = w_i \beta_i \left(\sqrt{d_i^2 + \mu^2} - \mu\right), \quad
    d = \text{predictions} - \text{targets}, \quad
    g_i = \frac{|d_i|}{\sqrt{d_i^2 + \mu^2}}

  where :math:`\beta_i` is the harmony weight of the gradient norm g
  (:func:`harmony_weights`), a constant to differentiation. ASL1
  (:func:`authentic_smooth_l1_loss`) resembles smooth L1 but has all its
  derivatives, and its gradient norm in [0, 1) tells large errors apart where
  that of smooth L1 is a constant 1.

  Args:
    predictions: any shape and floating dtype; computed in at least float32.
    targets: broadcastable to ``predictions``.
    mu: where the loss turns from quadratic to linear, in units of the targets;
      above 0. With the 0.02 of mmdetection, training from scratch failed: the
      boxes of our detector had an AP50 of 39.8. With 0.1 they were level with
      those of the Huber loss.
    weighting: which weight a norm in [0, 1] has; a density without momentum.
    mask: bool, broadcastable to ``predictions``: which elements count.
    weights: real numbers w, broadcastable to ``predictions``: as how many
      examples each element counts, in the density and in the loss.
    axis_name: mapped axis, or axes, over which the batch is split.

  Returns:
    The losses, of the shape of ``predictions``, to be averaged over the
    elements that count, by ``losses.sum() / jnp.maximum(mask.sum(), 1)``. Where
    the mask is False or the weight 0, the loss and its gradient are 0. Another
    NaN gives a loss of NaN at its place. An infinite d counts as the largest
    number.

  Raises:
    TypeError: if ``predictions`` are not floating, or ``mask`` is not bool.
    ValueError: if shapes do not fit, ``mu`` is not above 0, or the density has
      a momentum.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> losses = optax_ghm.smooth_l1_ghm_loss(
    ...   jnp.array([0.01, -0.01, 3.0]), jnp.zeros(3)
    ... )
    >>> [round(float(x), 4) for x in losses]
    [0.0007, 0.0007, 0.6364]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, section 3.4, 2019
  """
  plain = _authentic_smooth_l1(predictions, targets, mu, mask, weights)
  return _losses.harmonize(*plain, weighting, axis_name)[0]


def smooth_l1_ghm_loss_with_state(
  predictions: ArrayLike,
  targets: ArrayLike,
  state: _density.DensityState,
  *,
  mu: float | jax.Array = 0.1,
  weighting: _weighting.HarmonyWeighting = _weighting.DEFAULT,
  mask: ArrayLike | None = None,
  weights: ArrayLike | None = None,
  axis_name: arrays.AxisName = None,
  train: bool = True,
) -> tuple[jax.Array, _density.DensityState]:
  """:func:`smooth_l1_ghm_loss` with a memory of past batches.

  ``state`` is that of the density, from ``weighting.init()`` or the last call.
  With ``train=False``, for evaluation, the state is read and stays as it is.
  The formula and the other arguments are those of :func:`smooth_l1_ghm_loss`.

  Returns:
    The losses and the next state.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> weighting = optax_ghm.HarmonyWeighting(
    ...   density=optax_ghm.WindowedDensity(momentum=0.9)
    ... )
    >>> losses, state = optax_ghm.smooth_l1_ghm_loss_with_state(
    ...   jnp.array([0.01, 3.0]),
    ...   jnp.zeros(2),
    ...   weighting.init(),
    ...   weighting=weighting,
    ... )
    >>> losses.shape
    (2,)
  """
  plain = _authentic_smooth_l1(predictions, targets, mu, mask, weights)
  return _losses.harmonize(*plain, weighting, axis_name, state, train)


def _authentic_smooth_l1(predictions, targets, mu, mask, weights):
  """Losses without harmony weights, their norms, and the amounts."""
  difference, mu = _authentic_smooth_l1_loss.difference_and_mu(
    predictions, targets, mu
  )
  amounts = masks.amounts(mask, weights, difference.shape)
  difference = _losses.keep(difference, amounts)
  slope, _ = _authentic_smooth_l1_loss.slopes(lax.stop_gradient(difference), mu)
  return (
    _authentic_smooth_l1_loss.distance(difference, mu),
    jnp.abs(slope),
    amounts,
  )
