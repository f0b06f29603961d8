"""The conditioning of conditional adversarial domain adaptation (CDAN)."""

import math

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays


def multilinear_map(features: jax.Array, predictions: jax.Array) -> jax.Array:
  r"""Conditions a domain classifier on the predicted class by outer products.

  .. math:: T(f, g) = \operatorname{vec}(f \otimes g)

  The domain classifier sees the features class by class, and cannot be fooled
  by the alignment of one class with another. The authors' code stops the
  gradient at the predictions: give
  ``jax.lax.stop_gradient(jax.nn.softmax(logits))``.

  Args:
    features: (..., F).
    predictions: (..., C), class probabilities.

  Returns:
    (..., F · C), the C products of a feature side by side. The paper takes
    :func:`~optax_ghm.randomized_multilinear_map` where F · C is above 4,096.

  Raises:
    ValueError: if the leading axes differ.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> optax_ghm.multilinear_map(jnp.array([1.0, 2.0]), jnp.array([0.5, 0.5]))
    Array([0.5, 0.5, 1. , 1. ], dtype=float32)

  References:
    Long et al., `Conditional Adversarial Domain Adaptation
    <https://arxiv.org/abs/1705.10667>`_, 2018
  """
  _check_leading(features, predictions)
  product = jnp.einsum(
    '...f,...c->...fc',
    features,
    predictions,
    precision=jax.lax.Precision.HIGHEST,  # the gradient sums over C and F
  )
  *leading, count, classes = product.shape
  return product.reshape(*leading, count * classes)


def multilinear_projections(
  key: jax.Array,
  features: int,
  classes: int,
  outputs: int = 1024,
) -> tuple[jax.Array, jax.Array]:
  """Draws the random matrices of :func:`~optax_ghm.randomized_multilinear_map`.

  They are standard normal. Draw them once and keep them for the whole training.

  Args:
    key: PRNG key.
    features: F, the number of features.
    classes: C, the number of classes.
    outputs: d, the number of products.

  Returns:
    float32 matrices of shapes (F, d) and (C, d).

  Examples:
    >>> import jax
    >>> from optax_ghm import reversal
    >>> feature_matrix, class_matrix = reversal.multilinear_projections(
    ...   jax.random.key(0), 256, 10
    ... )
    >>> feature_matrix.shape, class_matrix.shape
    ((256, 1024), (10, 1024))
  """
  one, two = jax.random.split(key)
  return (
    jax.random.normal(one, (features, outputs), jnp.float32),
    jax.random.normal(two, (classes, outputs), jnp.float32),
  )


def randomized_multilinear_map(
  features: jax.Array,
  predictions: jax.Array,
  projections: tuple[jax.Array, jax.Array],
) -> jax.Array:
  r"""Conditions a domain classifier on the predicted class by random products.

  .. math::
    T(f, g) = \frac{1}{\sqrt d} (R_f f) \odot (R_g g), \qquad
    \operatorname{E} \langle T(f, g), T(f', g') \rangle =
      \langle f, f' \rangle \langle g, g' \rangle

  The expectation is the inner product of two :func:`multilinear_map`; the
  variance falls as 1 / d.

  Args:
    features: (..., F).
    predictions: (..., C), class probabilities.
    projections: of shapes (F, d) and (C, d), from
      :func:`optax_ghm.reversal.multilinear_projections`, cast to the dtype of
      the features and of the predictions.

  Returns:
    (..., d).

  Raises:
    ValueError: if the shapes do not fit.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> from optax_ghm import reversal
    >>> projections = reversal.multilinear_projections(
    ...   jax.random.key(0), 4096, 100
    ... )
    >>> optax_ghm.randomized_multilinear_map(
    ...   jnp.ones((8, 4096)), jnp.ones((8, 100)) / 100, projections
    ... ).shape
    (8, 1024)

  References:
    Long et al., `Conditional Adversarial Domain Adaptation
    <https://arxiv.org/abs/1705.10667>`_, 2018
  """
  _check_leading(features, predictions)
  feature_matrix, class_matrix = projections
  outputs = feature_matrix.shape[-1]
  shapes = feature_matrix.shape, class_matrix.shape
  expected = (features.shape[-1], outputs), (predictions.shape[-1], outputs)
  if shapes != expected:
    raise ValueError(
      f'projections must be of shapes (F, d) and (C, d), here {expected}, got'
      f' {shapes}.'
    )
  left = features @ feature_matrix.astype(features.dtype)
  right = predictions @ class_matrix.astype(predictions.dtype)
  return left * right / math.sqrt(outputs)


def _check_leading(features, predictions):
  if features.shape[:-1] != predictions.shape[:-1]:
    raise ValueError(
      'features and predictions must have the same leading axes, got'
      f' {features.shape} and {predictions.shape}.'
    )


def entropy_weights(logits: jax.Array) -> jax.Array:
  r"""Weights of examples for a domain classifier: more for sure predictions.

  .. math::
    w = 1 + e^{-H}, \qquad H = -\sum_c p_c \log p_c, \qquad
    p = \operatorname{softmax}(z)

  These are the weights of CDAN+E. Examples with sure predictions, which are
  easier to transfer, count up to twice as much.

  Args:
    logits: (..., C), of the class predictor. No gradient flows back to them.

  Returns:
    (...), from 1 to 2, in the dtype of ``logits``; 0 where a logit is NaN or
    the largest is infinite. :func:`domain_loss` takes them as ``weights`` and
    divides by their sum in each domain, as the authors' code does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> sure, unsure = optax_ghm.entropy_weights(
    ...   jnp.array([[99.0, 0.0], [0.0, 0.0]])
    ... )
    >>> float(sure), float(unsure)
    (2.0, 1.5)

  References:
    Long et al., `Conditional Adversarial Domain Adaptation
    <https://arxiv.org/abs/1705.10667>`_, 2018, equation 8
  """
  dtype = arrays.at_least_float32(logits.dtype)
  log_p = jax.nn.log_softmax(jax.lax.stop_gradient(logits).astype(dtype))
  p = jnp.exp(log_p)
  # A class that is ruled out has p = 0 and log p = -inf: it adds nothing.
  terms = jnp.where(p == 0, 0, p * log_p)
  weights = 1 + jnp.exp(jnp.sum(terms, axis=-1))
  return jnp.nan_to_num(weights).astype(logits.dtype)
