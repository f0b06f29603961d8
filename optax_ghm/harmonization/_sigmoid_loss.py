"""GHM-C for binary, multi-label and one-vs-rest logits."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, masks
from optax_ghm.harmonization import _density, _losses, _weighting


def sigmoid_ghm_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  weighting: _weighting.HarmonyWeighting = _weighting.DEFAULT,
  mask: ArrayLike | None = None,
  weights: ArrayLike | None = None,
  axis_name: arrays.AxisName = None,
) -> jax.Array:
  r"""GHM-C for binary and multi-label logits: harmonized cross-entropy.

  .. math::
    \ell_i = w_i \beta_i
      \left(-y_i \log p_i - (1 - y_i) \log(1 - p_i)\right),
    \quad p_i = \sigma(x_i), \quad g_i = |p_i - y_i|

  where :math:`\beta_i` is the harmony weight of the gradient norm g
  (:func:`harmony_weights`). Every element is an example of its own. The
  weights are constants to differentiation: the gradient is
  :math:`\partial \ell_i / \partial x_i = w_i \beta_i (p_i - y_i)`.

  Args:
    logits: unnormalized log-odds x, any shape and floating dtype; computed in
      at least float32.
    labels: probabilities y in [0, 1], or integers or booleans, broadcastable to
      ``logits``.
    weighting: which weight a norm in [0, 1] has; a density without momentum.
    mask: bool, broadcastable to ``logits``: which elements count.
    weights: real numbers w, broadcastable to ``logits``: as how many examples
      each element counts, in the density and in the loss.
    axis_name: mapped axis, or axes, over which the batch is split.

  Returns:
    The losses, of the shape of ``logits``, float32 (float64 for 64-bit logits),
    to be averaged over the elements that count, as by ``losses.sum() /
    jnp.maximum(mask.sum(), 1)``: a batch may hold none. Where the mask is False
    or the weight 0, the loss and its gradient are 0, even if the logit is NaN.
    Another NaN logit gives a loss of NaN and changes nothing for the others. An
    infinite logit counts as the largest number.

  Raises:
    TypeError: if ``logits`` are not floating, or ``mask`` is not bool.
    ValueError: if ``labels``, ``mask`` or ``weights`` do not broadcast to
      ``logits``, or if the density has a momentum.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> logits = jnp.array([-4.0, -4.0, -4.0, 1.0])  # many easy, one hard
    >>> labels = jnp.array([0, 0, 0, 0])
    >>> losses = optax_ghm.sigmoid_ghm_loss(logits, labels)
    >>> [round(float(x), 3) for x in losses]
    [0.018, 0.018, 0.018, 1.361]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, section 3.3, 2019
  """
  plain = _cross_entropy(logits, labels, mask, weights)
  return _losses.harmonize(*plain, weighting, axis_name)[0]


def sigmoid_ghm_loss_with_state(
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
  """:func:`sigmoid_ghm_loss` with a memory of past batches.

  ``state`` is that of the density, from ``weighting.init()`` or the last call.
  With ``train=False``, for evaluation, the state is read and stays as it is.
  The formula and the other arguments are those of :func:`sigmoid_ghm_loss`.

  Returns:
    The losses and the next state.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> weighting = optax_ghm.HarmonyWeighting(
    ...   density=optax_ghm.WindowedDensity(momentum=0.9)
    ... )
    >>> state = weighting.init()
    >>> for logits in jnp.array([[-4.0, -4.0, 1.0], [-3.0, -4.0, 2.0]]):
    ...   losses, state = optax_ghm.sigmoid_ghm_loss_with_state(
    ...     logits, jnp.zeros(3), state, weighting=weighting
    ...   )
    >>> losses.shape
    (3,)
  """
  plain = _cross_entropy(logits, labels, mask, weights)
  return _losses.harmonize(*plain, weighting, axis_name, state, train)


def sigmoid_ghm_loss_with_integer_labels(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  weighting: _weighting.HarmonyWeighting = _weighting.DEFAULT,
  mask: ArrayLike | None = None,
  weights: ArrayLike | None = None,
  axis_name: arrays.AxisName = None,
) -> jax.Array:
  r"""GHM-C for one-vs-rest logits and integer labels with a background class.

  The loss is :func:`sigmoid_ghm_loss` with one-hot targets. A label outside of
  ``[0, num_classes)``, such as -1 or ``num_classes``, is the background: its
  targets are all 0, and its logits are pushed down like those of wrong classes.
  Detectors often give -1 to the anchors to ignore, which would train them as
  background here: say ``mask=labels != -1``. An example to ignore is one that
  ``mask`` leaves out, whatever its label.

  Args:
    logits: unnormalized log-odds, shape (..., num_classes), floating;
      computed in at least float32.
    labels: integers, shape (...).
    weighting: which weight a norm in [0, 1] has; a density without momentum.
    mask: bool: which examples count, if it has fewer axes than ``logits`` and
      broadcasts to ``labels``, or which logits.
    weights: real numbers, of such a shape: as how many examples each example or
      each logit counts, in the density and in the loss.
    axis_name: mapped axis, or axes, over which the batch is split.

  Returns:
    The losses, shape (..., num_classes), one per logit, with NaN and infinity
    treated as in :func:`sigmoid_ghm_loss`.

  Raises:
    TypeError: if ``logits`` are not floating, ``labels`` not integers or
      ``mask`` not bool.
    ValueError: if the shapes do not fit, or if the density has a momentum.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> logits = jnp.array([[2.0, -3.0], [-4.0, -4.0], [0.0, 0.0]])
    >>> labels = jnp.array([0, -1, -2])  # class 0, background, to be ignored
    >>> losses = optax_ghm.sigmoid_ghm_loss_with_integer_labels(
    ...   logits, labels, mask=labels != -2
    ... )
    >>> losses[2]
    Array([0., 0.], dtype=float32)

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, section 3.3, 2019
  """
  plain = _one_vs_rest(logits, labels, mask, weights)
  return _losses.harmonize(*plain, weighting, axis_name)[0]


def sigmoid_ghm_loss_with_integer_labels_with_state(
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
  """:func:`sigmoid_ghm_loss_with_integer_labels` with a memory of past batches.

  ``state`` is that of the density, from ``weighting.init()`` or the last call.
  With ``train=False``, for evaluation, the state is read and stays as it is.
  The formula and the other arguments are those of
  :func:`sigmoid_ghm_loss_with_integer_labels`.

  Returns:
    The losses and the next state.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> weighting = optax_ghm.HarmonyWeighting(
    ...   density=optax_ghm.WindowedDensity(momentum=0.9)
    ... )
    >>> losses, state = (
    ...   optax_ghm.sigmoid_ghm_loss_with_integer_labels_with_state(
    ...     jnp.zeros((4, 3)),
    ...     jnp.arange(4),
    ...     weighting.init(),
    ...     weighting=weighting,
    ...   )
    ... )
    >>> losses.shape
    (4, 3)
  """
  plain = _one_vs_rest(logits, labels, mask, weights)
  return _losses.harmonize(*plain, weighting, axis_name, state, train)


def _cross_entropy(logits, labels, mask, weights):
  """Losses without harmony weights, their norms, and the amounts."""
  logits = _losses.floats('logits', logits)
  labels = _losses.broadcast('labels', labels, logits)
  amounts = masks.amounts(mask, weights, logits.shape)
  logits, labels = _losses.keep(logits, amounts), _losses.keep(labels, amounts)
  losses, probabilities = _cross_entropy_and_probability(logits, labels)
  norms = jnp.abs(lax.stop_gradient(probabilities - labels))
  return losses, norms, amounts


def _one_vs_rest(logits, labels, mask, weights):
  logits, labels = _losses.with_integer_labels(logits, labels)
  targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)

  def per_logit(broadcast, x):
    of_examples = x is not None and jnp.ndim(x) < logits.ndim
    return broadcast(x, labels.shape)[..., None] if of_examples else x

  mask = per_logit(masks.broadcast_mask, mask)
  weights = per_logit(masks.broadcast_weights, weights)
  return _cross_entropy(logits, targets, mask, weights)


@jax.custom_jvp
def _cross_entropy_and_probability(logits, labels):
  """Cross-entropy and probability, both from one exponential."""
  e = jnp.exp(-jnp.abs(logits))
  positive = logits >= 0
  probabilities = jnp.where(positive, 1.0, e) / (1 + e)
  losses = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(e)
  # Infinity counts as the largest number; inf - inf and inf * 0 would be NaN.
  largest = jnp.where(positive, 1 - labels, labels) * jnp.finfo(e.dtype).max
  losses = jnp.where(jnp.isinf(logits), largest, losses)
  return losses, probabilities


@_cross_entropy_and_probability.defjvp
def _cross_entropy_and_probability_jvp(primals, tangents):
  logits, labels = primals
  d_logits, d_labels = tangents
  losses, p = _cross_entropy_and_probability(logits, labels)
  return (losses, p), (
    (p - labels) * d_logits - _losses.finite(logits) * d_labels,
    p * (1 - p) * d_logits,
  )
