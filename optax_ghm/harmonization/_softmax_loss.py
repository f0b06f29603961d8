"""GHM-C for multi-class logits."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, masks
from optax_ghm._core.softmax_cross_entropy import softmax_cross_entropy
from optax_ghm.harmonization import _density, _losses, _weighting


def softmax_ghm_loss_with_integer_labels(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  weighting: _weighting.HarmonyWeighting = _weighting.DEFAULT,
  mask: ArrayLike | None = None,
  weights: ArrayLike | None = None,
  axis_name: arrays.AxisName = None,
) -> jax.Array:
  r"""GHM-C for multi-class logits: harmonized softmax cross-entropy.

  .. math::
    \ell_i = -w_i \beta_i \log p_{i, y_i}, \quad
    p_i = \mathrm{softmax}(x_i), \quad
    g_i = \tfrac12 \lVert p_i - e_{y_i} \rVert_1 = 1 - p_{i, y_i}

  where :math:`\beta_i` is the harmony weight of the gradient norm g
  (:func:`harmony_weights`), a constant to differentiation. The norm is half
  the L1 norm of the gradient at the logits: the probability in the wrong
  place. It lies in [0, 1] for any number of classes, is the binary
  :math:`|p - y|` for two, and is known from the loss alone. For the Euclidean
  norm, put :func:`harmonize` before any cross-entropy.

  Args:
    logits: unnormalized log-probabilities x, shape (..., num_classes),
      floating; computed in at least float32.
    labels: integers y in [0, num_classes), shape (...). Any other label, such
      as -1 for an example to ignore, gives NaN unless ``mask`` leaves it out.
    weighting: which weight a norm in [0, 1] has; a density without momentum.
    mask: bool, broadcastable to ``labels``: which examples count.
    weights: real numbers w, broadcastable to ``labels``: as how many examples
      each example counts, in the density and in the loss.
    axis_name: mapped axis, or axes, over which the batch is split.

  Returns:
    The losses, shape (...), float32 (float64 for 64-bit logits), to be averaged
    over the examples that count, by ``losses.sum() / jnp.maximum(mask.sum(),
    1)``. Where the mask is False or the weight 0, the loss and its gradient are
    0, even if the logits are NaN.

  Raises:
    TypeError: if ``logits`` are not floating, ``labels`` not integers or
      ``mask`` not bool.
    ValueError: if the shapes do not fit, or if the density has a momentum.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> logits = jnp.array([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> losses = optax_ghm.softmax_ghm_loss_with_integer_labels(
    ...   logits, jnp.array([0, 0, 2])
    ... )
    >>> [round(float(x), 3) for x in losses]
    [0.038, 0.038, 1.385]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, 2019 (the binary form)
  """
  plain = _cross_entropy(logits, labels, mask, weights)
  return _losses.harmonize(*plain, weighting, axis_name)[0]


def softmax_ghm_loss_with_integer_labels_with_state(
  logits: ArrayLike,
  labels: ArrayLike,
  state: _density.DensityState,
  *,
  weighting: _weighting.HarmonyWeighting = _weighting.DEFAULT,
  mask: ArrayLike | None = None,
  weights: ArrayLike | None = None,
  axis_name: arrays.AxisName = None,
  train: bool = True,
) -> tuple[jax.Array, _density.DensityState]:
  """:func:`softmax_ghm_loss_with_integer_labels` with a memory of past batches.

  ``state`` is that of the density, from ``weighting.init()`` or the last call.
  With ``train=False``, for evaluation, the state is read and stays as it is.
  The formula and the other arguments are those of
  :func:`softmax_ghm_loss_with_integer_labels`.

  Returns:
    The losses and the next state.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> weighting = optax_ghm.HarmonyWeighting(
    ...   density=optax_ghm.WindowedDensity(momentum=0.9)
    ... )
    >>> losses, state = (
    ...   optax_ghm.softmax_ghm_loss_with_integer_labels_with_state(
    ...     jnp.zeros((4, 3)),
    ...     jnp.zeros(4, int),
    ...     weighting.init(),
    ...     weighting=weighting,
    ...   )
    ... )
    >>> losses.shape
    (4,)
  """
  plain = _cross_entropy(logits, labels, mask, weights)
  return _losses.harmonize(*plain, weighting, axis_name, state, train)


def _cross_entropy(logits, labels, mask, weights):
  """Losses without harmony weights, their norms, and the amounts."""
  logits, labels = _losses.with_integer_labels(logits, labels)
  amounts = masks.amounts(mask, weights, labels.shape)
  losses = softmax_cross_entropy(
    _losses.keep(logits, amounts), _losses.keep(labels, amounts)
  )
  return losses, -jnp.expm1(-lax.stop_gradient(losses)), amounts
