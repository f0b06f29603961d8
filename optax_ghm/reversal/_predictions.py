"""Scores of a model from nothing but its predictions where labels are missing.

A model is scored on unlabeled examples of the target domain. All that the
scores need of them is a few sums, which add up over batches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, masks


class PredictionSums(NamedTuple):
  r"""Sums over predictions, from :func:`prediction_sums`.

  The sums of two batches add up to those of both: ``sums + more``.

  Attributes:
    count: int32, the number of examples.
    entropy: the sum of the entropies of the predictions, in nats.
    probabilities: (C,), the sum of the class probabilities.
    surprise: the sum of the mean over the classes of :math:`-\log p`.
    softmax_powers: the sum of the fourth powers of the probabilities.
    taylor_powers: the same with the polynomial of :func:`mano` in the place of
      the exponential function.
  """

  count: jax.Array
  entropy: jax.Array
  probabilities: jax.Array
  surprise: jax.Array
  softmax_powers: jax.Array
  taylor_powers: jax.Array

  # pyrefly: ignore[bad-override]
  def __add__(self, other: 'PredictionSums') -> 'PredictionSums':
    counters.check_type('other', other, PredictionSums)
    return jax.tree.map(jnp.add, self, other)


def prediction_sums(
  logits: jax.Array,
  mask: ArrayLike | None = None,
  *,
  axis_name: arrays.AxisName = None,
) -> PredictionSums:
  r"""Sums up predictions for scores that need no labels.

  The scores are :func:`prediction_entropy`, :func:`mutual_information` and
  :func:`mano`.

  Args:
    logits: floating, (N, C), with C at least 2. Where a logit is NaN or
      infinite, the prediction counts as the one that knows nothing, 1 / C for
      each class, so that a model that breaks down gets a bad score.
    mask: bool, (N,), which examples count.
    axis_name: mapped axis, or axes, over which the examples are split.

  Returns:
    :class:`PredictionSums` in float32. Those of several batches add up:
    ``sums + more``.

  Raises:
    TypeError: if ``logits`` are not floating or ``mask`` is not bool.
    ValueError: if the shapes do not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import reversal
    >>> sums = reversal.prediction_sums(jnp.array([[9.0, 0.0], [9.0, 0.0]]))
    >>> more = reversal.prediction_sums(jnp.array([[0.0, 9.0], [0.0, 0.0]]))
    >>> both = sums + more
    >>> both.count, f'{reversal.prediction_entropy(both):.3f}'
    (Array(4, dtype=int32), '0.174')
  """
  logits = check_logits(logits)
  mask = masks.broadcast_mask(mask, logits.shape[:1])
  if mask is None:
    mask = jnp.ones(logits.shape[:1], bool)
  z = known_logits(logits)
  log_p = jax.nn.log_softmax(z)
  p = jnp.exp(log_p)
  taylor = 1 + z + z**2 / 2
  taylor -= jnp.min(taylor, 1, keepdims=True)
  total = jnp.sum(taylor, 1, keepdims=True)
  # Equal logits have nothing left: they are the prediction that knows nothing.
  q = jnp.where(total > 0, taylor, 1) / jnp.where(total > 0, total, z.shape[1])
  of_each = (
    entropy(p),
    p,
    jnp.mean(-log_p, 1),
    jnp.sum(p**4, 1),
    jnp.sum(q**4, 1),
  )
  sums = (
    jnp.sum(mask, dtype=jnp.int32),
    *(
      jnp.sum(x, 0, where=jnp.expand_dims(mask, range(1, x.ndim)))
      for x in of_each
    ),
  )
  return PredictionSums(*arrays.psum(sums, axis_name))


def prediction_entropy(sums: PredictionSums) -> jax.Array:
  r"""The mean entropy of predictions: how unsure a model is.

  .. math::
    \frac{1}{N} \sum_i H(p_i), \qquad H(p) = -\sum_c p_c \log p_c

  From 0 to log C; **lower is better**. It cannot tell a model that is sure from
  one that is right, and is best for a model that gives every example the same
  class: prefer :func:`mutual_information`.

  Args:
    sums: of the predictions on the target, from :func:`prediction_sums`.

  Returns:
    float32, a scalar, in nats; NaN without any example.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import reversal
    >>> sums = reversal.prediction_sums(jnp.array([[9.0, 0.0], [0.0, 0.0]]))
    >>> print(f'{reversal.prediction_entropy(sums):.3f}')
    0.347

  References:
    Morerio et al., `Minimal-Entropy Correlation Alignment for Unsupervised Deep
    Domain Adaptation <https://arxiv.org/abs/1711.10288>`_, 2018
  """
  counters.check_type('sums', sums, PredictionSums)
  return sums.entropy / sums.count.astype(jnp.float32)


def mutual_information(sums: PredictionSums) -> jax.Array:
  r"""The mutual information of examples and predictions: sure and diverse.

  .. math::
    H(\bar p) - \frac{1}{N} \sum_i H(p_i), \qquad
    \bar p = \frac{1}{N} \sum_i p_i

  From 0 to log C; **higher is better**. Unlike :func:`prediction_entropy` it is
  0 for a model that gives every example the same class. It supposes that the
  classes are about equally frequent in the target.

  Args:
    sums: of the predictions on the target, from :func:`prediction_sums`.

  Returns:
    float32, a scalar, in nats; NaN without any example.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import reversal
    >>> sums = reversal.prediction_sums(jnp.array([[9.0, 0.0], [0.0, 9.0]]))
    >>> print(f'{reversal.mutual_information(sums):.3f}')
    0.692

  References:
    Bridle et al., `Unsupervised Classifiers, Mutual Information and "Phantom
    Targets"
    <https://papers.nips.cc/paper/1991/hash/a8abb4bb284b5b27aa7cb790dc20f80b-Abstract.html>`_,
    1991

    Shi and Sha, `Information-Theoretical Learning of Discriminative Clusters
    for Unsupervised Domain Adaptation <https://arxiv.org/abs/1206.6438>`_, 2012
  """
  unsure = prediction_entropy(sums)
  mean = sums.probabilities / sums.count.astype(jnp.float32)[..., None]
  return entropy(mean) - unsure


def mano(sums: PredictionSums, threshold: ArrayLike = 0.0) -> jax.Array:
  r"""The norm of the matrix of normalized logits: MaNo.

  .. math::
    \left(\frac{1}{N C} \sum_{i, c} q_{ic}^4\right)^{1/4}, \qquad
    q_{ic} = \frac{v(z_{ic})}{\sum_k v(z_{ik})}

  With the threshold 0, q is the softmax: v(z) = exp z. From 1 / C to
  :math:`C^{-1/4}`; **higher is better**.

  The paper takes the softmax only if it is calibrated, which is told by
  :math:`\Phi = -\frac{1}{N C} \sum_{i, c} \log p_{ic}` beyond a threshold of 5,
  and else :math:`v(z) = 1 + z + z^2 / 2`, less its smallest value in the
  example. Models on either side of the threshold then have scores that cannot
  be compared, and with two classes all models below it have the same.

  Args:
    sums: of the predictions on the target, from :func:`prediction_sums`.
    threshold: the largest Φ for which the polynomial is taken; the paper's is
      5.

  Returns:
    float32, a scalar; NaN without any example.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import reversal
    >>> sums = reversal.prediction_sums(jnp.array([[9.0, 0.0], [0.0, 0.0]]))
    >>> print(f'{reversal.mano(sums):.3f}')
    0.728

  References:
    Xie et al., `MaNo: Exploiting Matrix Norm for Unsupervised Accuracy
    Estimation Under Distribution Shifts <https://arxiv.org/abs/2405.18979>`_,
    2024
  """
  counters.check_type('sums', sums, PredictionSums)
  count = sums.count.astype(jnp.float32)
  calibrated = sums.surprise / count > threshold
  powers = jnp.where(calibrated, sums.softmax_powers, sums.taylor_powers)
  return (powers / (count * sums.probabilities.shape[-1])) ** 0.25


def check_logits(logits: jax.Array, name: str = 'logits') -> jax.Array:
  """The logits as an array, floating and of shape (N, C)."""
  logits = jnp.asarray(logits)
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise TypeError(f'{name} must be floating, got dtype {logits.dtype}.')
  if logits.ndim != 2 or logits.shape[1] < 2:
    raise ValueError(
      f'{name} must be of shape (N, C) with two classes or more, got'
      f' {logits.shape}. For one logit z per example give'
      ' jnp.stack([jnp.zeros_like(z), z], 1).'
    )
  return logits


def known_logits(logits: jax.Array) -> jax.Array:
  """float32 logits, all 0 in an example where one of them is not finite."""
  finite = jnp.all(jnp.isfinite(logits), 1, keepdims=True)
  return jnp.where(finite, logits, 0).astype(jnp.float32)


def entropy(p: jax.Array) -> jax.Array:
  """The entropies of distributions over the last axis, in nats."""
  # 0 log 0 is 0.
  tiny = jnp.finfo(p.dtype).tiny
  return -jnp.sum(p * jnp.log(jnp.maximum(p, tiny)), -1)
