"""Losses weighed by the harmony of their gradient norms: GHM-C and GHM-R.

Each returns one loss per example, unreduced, as ``optax.losses`` do, and the
next state of the density estimator. The weights are constants to
differentiation: the gradient of a loss is its plain gradient times the weight.
"""

import jax
import jax.numpy as jnp
from jax import lax

from optax_ghm._core import arrays, masks
from optax_ghm._core.softmax_cross_entropy import softmax_cross_entropy
from optax_ghm.harmonization import _density, _weights


def sigmoid_ghm_loss(
  logits: jax.Array,
  labels: jax.Array,
  state: _density.DensityState | None = None,
  *,
  density: _density.DensityEstimator = _weights.DEFAULT_DENSITY,
  mask: jax.Array | None = None,
  axis_name: arrays.AxisName = None,
  train: bool = True,
) -> tuple[jax.Array, _density.DensityState]:
  r"""GHM-C for binary and multi-label logits: harmonised cross-entropy.

  .. math::
    \ell_i = \beta_i \left(-y_i \log p_i - (1 - y_i) \log(1 - p_i)\right),
    \quad p_i = \sigma(x_i), \quad g_i = |p_i - y_i|

  where :math:`\beta_i = N / GD(g_i)` is the harmony weight of the gradient norm
  g (:func:`harmony_weights`). Every element is an example of its own. The
  gradient is :math:`\partial \ell_i / \partial x_i = \beta_i (p_i - y_i)`.

  Args:
    logits: unnormalised log-odds, any shape and floating dtype; computed in at
      least float32.
    labels: probabilities in [0, 1], or integers or booleans, broadcastable to
      ``logits``.
    state: of ``density``; None starts afresh.
    density: estimator of the gradient density over [0, 1].
    mask: broadcastable to ``logits``: which elements count (bool), or as what
      fraction of an example each counts in the density (float). The loss is 0
      where the mask is not above 0, and not multiplied by it elsewhere.
    axis_name: mapped axis, or axes, over which the batch is split.
    train: False reads the state and leaves it as it is, for evaluation.

  Returns:
    The losses, of the shape of ``logits``, float32 (float64 for 64-bit logits),
    and the next state. Reduce them with a mean over the elements that count.
    NaN logits give NaN at their place, are counted in ``state.non_finite``, and
    change nothing for the others. Infinite logits are as good as the largest
    number: g is 0 or 1.

  Raises:
    TypeError: if ``logits`` are not floating.
    ValueError: if ``labels`` or ``mask`` do not broadcast to ``logits``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> logits = jnp.array([-4.0, -4.0, -4.0, 1.0])  # many easy, one hard
    >>> labels = jnp.array([0, 0, 0, 0])
    >>> losses, state = optax_ghm.sigmoid_ghm_loss(logits, labels)
    >>> [round(float(x), 3) for x in losses]
    [0.01, 0.01, 0.01, 3.128]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, section 3.3, 2019
  """
  logits = _float_logits('logits', logits)
  labels = _broadcast('labels', labels, logits.shape, logits.dtype)
  logits, labels = _keep(logits, mask), _keep(labels, mask)
  losses, probabilities = _sigmoid_cross_entropy(logits, labels)
  g = jnp.abs(lax.stop_gradient(probabilities - labels))
  return _harmonized(losses, g, state, density, mask, axis_name, train)


def sigmoid_ghm_loss_with_integer_labels(
  logits: jax.Array,
  labels: jax.Array,
  state: _density.DensityState | None = None,
  *,
  density: _density.DensityEstimator = _weights.DEFAULT_DENSITY,
  mask: jax.Array | None = None,
  axis_name: arrays.AxisName = None,
  train: bool = True,
) -> tuple[jax.Array, _density.DensityState]:
  r"""GHM-C for one-vs-rest logits and integer labels with a background class.

  :func:`sigmoid_ghm_loss` on the one-hot labels. A label outside of
  ``[0, num_classes)``, such as ``num_classes`` for the background in a
  detector, is no class: its row of targets is all zeros.

  Args:
    logits: unnormalised log-odds, shape (..., num_classes).
    labels: integers, shape (...).
    state: of ``density``; None starts afresh.
    density: estimator of the gradient density over [0, 1].
    mask: broadcastable to ``labels`` or, with all axes of ``logits``, to these.
    axis_name: mapped axis, or axes, over which the batch is split.
    train: False reads the state and leaves it as it is.

  Returns:
    The losses, shape (..., num_classes), and the next state.

  Raises:
    TypeError: if ``logits`` are not floating or ``labels`` not integers.
    ValueError: if the shapes do not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> logits = jnp.array([[2.0, -3.0], [-4.0, -4.0]])
    >>> labels = jnp.array([0, 2])  # class 0, background
    >>> losses, _ = optax_ghm.sigmoid_ghm_loss_with_integer_labels(
    ...   logits, labels
    ... )
    >>> losses.shape
    (2, 2)

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, section 3.3, 2019
  """
  logits, labels = _integer_labels(logits, labels)
  if mask is not None and jnp.ndim(mask) < logits.ndim:
    mask = jnp.expand_dims(jnp.asarray(mask), -1)
  return sigmoid_ghm_loss(
    logits,
    _one_hot(labels, logits),
    state,
    density=density,
    mask=mask,
    axis_name=axis_name,
    train=train,
  )


def softmax_ghm_loss_with_integer_labels(
  logits: jax.Array,
  labels: jax.Array,
  state: _density.DensityState | None = None,
  *,
  density: _density.DensityEstimator = _weights.DEFAULT_DENSITY,
  mask: jax.Array | None = None,
  axis_name: arrays.AxisName = None,
  train: bool = True,
) -> tuple[jax.Array, _density.DensityState]:
  r"""GHM-C for multi-class logits: harmonised softmax cross-entropy.

  .. math::
    \ell_i = -\beta_i \log p_{i, y_i}, \quad p_i = \mathrm{softmax}(x_i), \quad
    g_i = \tfrac12 \lVert p_i - e_{y_i} \rVert_1 = 1 - p_{i, y_i}

  The norm is half the L1 norm of the gradient at the logits, the probability
  that is in the wrong place. It lies in [0, 1] for any number of classes, is
  the binary :math:`|p - y|` for two, and is known from the loss alone. For the
  Euclidean norm, put :func:`harmonize` before any cross-entropy.

  Args:
    logits: unnormalised log-probabilities, shape (..., num_classes).
    labels: integers in [0, num_classes), shape (...). Others, such as -1
      for examples to ignore, give NaN: mask them out.
    state: of ``density``; None starts afresh.
    density: estimator of the gradient density over [0, 1].
    mask: broadcastable to ``labels``; see :func:`sigmoid_ghm_loss`.
    axis_name: mapped axis, or axes, over which the batch is split.
    train: False reads the state and leaves it as it is.

  Returns:
    The losses, shape (...), float32 (float64 for 64-bit logits), and the next
    state.

  Raises:
    TypeError: if ``logits`` are not floating or ``labels`` not integers.
    ValueError: if the shapes do not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> logits = jnp.array([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> losses, _ = optax_ghm.softmax_ghm_loss_with_integer_labels(
    ...   logits, jnp.array([0, 0, 2])
    ... )
    >>> [round(float(x), 3) for x in losses]
    [0.025, 0.025, 2.512]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, 2019 (the binary form)
  """
  logits, labels = _integer_labels(logits, labels)
  logits, labels = _keep(logits, mask, inner_axes=1), _keep(labels, mask)
  classes = logits.shape[-1]
  losses = softmax_cross_entropy(logits, jnp.clip(labels, 0, classes - 1))
  is_class = (labels >= 0) & (labels < classes)
  # NaN there only: a constant one would be the first that jax_debug_nans sees.
  nan_elsewhere = jnp.sqrt(is_class.astype(losses.dtype) - 1)
  losses = jnp.where(is_class, losses, nan_elsewhere)
  g = -jnp.expm1(-lax.stop_gradient(losses))
  return _harmonized(losses, g, state, density, mask, axis_name, train)


def smooth_l1_ghm_loss(
  predictions: jax.Array,
  targets: jax.Array,
  state: _density.DensityState | None = None,
  *,
  mu: float = 0.02,
  density: _density.DensityEstimator = _weights.DEFAULT_DENSITY,
  mask: jax.Array | None = None,
  axis_name: arrays.AxisName = None,
  train: bool = True,
) -> tuple[jax.Array, _density.DensityState]:
  r"""GHM-R: harmonised authentic smooth L1 loss (ASL1) for regression.

  .. math::
    \ell_i = \beta_i \left(\sqrt{d_i^2 + \mu^2} - \mu\right), \quad
    d = \text{predictions} - \text{targets}, \quad
    g_i = \frac{|d_i|}{\sqrt{d_i^2 + \mu^2}}

  ASL1 resembles smooth L1 but has all its derivatives, and its gradient norm
  g in [0, 1) tells large errors apart where that of smooth L1 is a constant 1.

  Args:
    predictions: any shape and floating dtype; computed in at least float32.
    targets: broadcastable to ``predictions``.
    state: of ``density``; None starts afresh.
    mu: where the loss turns from quadratic to linear, in units of the targets;
      above 0.
    density: estimator of the gradient density over [0, 1].
    mask: broadcastable to ``predictions``; see :func:`sigmoid_ghm_loss`.
    axis_name: mapped axis, or axes, over which the batch is split.
    train: False reads the state and leaves it as it is.

  Returns:
    The losses, of the shape of ``predictions``, and the next state. NaN gives
    NaN at its place; an infinite d is as good as the largest number: g is 1.

  Raises:
    TypeError: if ``predictions`` are not floating.
    ValueError: if shapes do not fit, or ``mu`` is not above 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> losses, _ = optax_ghm.smooth_l1_ghm_loss(
    ...   jnp.array([0.01, -0.01, 3.0]), jnp.zeros(3)
    ... )
    >>> [round(float(x), 4) for x in losses]
    [0.0024, 0.0024, 2.9849]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, section 3.4, 2019
  """
  if not isinstance(mu, jax.Array) and not mu > 0:
    raise ValueError(f'mu must be above 0, got {mu}.')
  predictions = _float_logits('predictions', predictions)
  targets = _broadcast('targets', targets, predictions.shape, predictions.dtype)
  difference = _keep(predictions - targets, mask)
  mus = jnp.full_like(difference, mu)
  mus = jnp.maximum(mus, jnp.finfo(mus.dtype).tiny)  # less would be flushed
  losses = _authentic_smooth_l1(difference, mus)
  g = jnp.abs(_slope(lax.stop_gradient(difference), mus))
  return _harmonized(losses, g, state, density, mask, axis_name, train)


def _harmonized(losses, g, state, density, mask, axis_name, train):
  """The losses times the harmony weights of their gradient norms."""
  weights, state = _weights.harmony_weights(
    g,
    state,
    density=density,
    mask=mask,
    axis_name=axis_name,
    train=train,
  )
  return weights.astype(losses.dtype) * losses, state


def _keep(x, mask, inner_axes=0):
  """0 where the mask is, so that neither value nor gradient can be NaN there.

  The last ``inner_axes`` of ``x`` lie within an example.
  """
  if mask is None:
    return x
  examples = x.shape[: x.ndim - inner_axes]
  counts = masks.counts(masks.broadcast_mask(mask, examples))
  counts = lax.expand_dims(counts, range(len(examples), x.ndim))
  return jnp.where(counts, x, jnp.zeros_like(x))


@jax.custom_jvp
def _sigmoid_cross_entropy(logits, labels):
  """Cross-entropy and probability, both from one exponential."""
  e = jnp.exp(-jnp.abs(logits))
  positive = logits >= 0
  probabilities = jnp.where(positive, 1.0, e) / (1 + e)
  losses = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(e)
  # Infinity as the largest number, where inf - inf and inf * 0 would be NaN.
  infinite = jnp.where(positive, 1 - labels, labels) * jnp.finfo(e.dtype).max
  losses = jnp.where(jnp.isinf(logits), infinite, losses)
  return losses, probabilities


@_sigmoid_cross_entropy.defjvp
def _sigmoid_cross_entropy_jvp(primals, tangents):
  logits, labels = primals
  d_logits, d_labels = tangents
  losses, p = _sigmoid_cross_entropy(logits, labels)
  return (losses, p), (
    (p - labels) * d_logits - _finite(logits) * d_labels,
    p * (1 - p) * d_logits,
  )


@jax.custom_jvp
def _authentic_smooth_l1(difference, mu):
  # sqrt(d² + μ²) - μ, without its cancellation near 0 and overflow far out
  difference = _finite(difference)
  return difference * (difference / (jnp.hypot(difference, mu) + mu))


@_authentic_smooth_l1.defjvp
def _authentic_smooth_l1_jvp(primals, tangents):
  difference, mu = primals
  root = jnp.hypot(_finite(difference), mu)
  return _authentic_smooth_l1(difference, mu), (
    _slope(difference, mu) * tangents[0] + (mu / root - 1) * tangents[1]
  )


def _slope(difference, mu):
  difference = _finite(difference)
  return difference / jnp.hypot(difference, mu)


def _finite(x):
  """Infinity as the largest number."""
  limits = jnp.finfo(x.dtype)
  return jnp.clip(x, limits.min, limits.max)


def _one_hot(labels, logits):
  return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


def _float_logits(name, x):
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f'{name} must be floating, got dtype {x.dtype}.')
  return x.astype(arrays.at_least_float32(x.dtype))


def _broadcast(name, x, shape, dtype):
  x = jnp.asarray(x)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    raise TypeError(f'{name} must be real, got dtype {x.dtype}.')
  try:
    return jnp.broadcast_to(x, shape).astype(dtype)
  except ValueError:
    raise ValueError(
      f'{name} of shape {x.shape} do not broadcast to shape {shape}.'
    ) from None


def _integer_labels(logits, labels):
  logits, labels = _float_logits('logits', logits), jnp.asarray(labels)
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(f'labels must be integers, got dtype {labels.dtype}.')
  if logits.ndim < 1 or labels.shape != logits.shape[:-1]:
    raise ValueError(
      f'labels of shape {labels.shape} do not fit logits of shape'
      f' {logits.shape}: expected {logits.shape[:-1]}.'
    )
  if labels.dtype.itemsize < 4:  # which may not hold the number of classes
    labels = labels.astype(jnp.int32)
  return logits, labels
