"""Logit adjustment: the prior of the classes goes into the training logits."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from optax_ghm.harmonization import _losses


def adjust_logits(
  logits: ArrayLike, class_counts: ArrayLike, strength: ArrayLike = 1.0
) -> jax.Array:
  r"""Adds the log of the class prior, for softmax cross-entropy.

  .. math::
    z_c + \tau \log \pi_c, \qquad \pi_c = \frac{n_c}{\sum_k n_k}

  Train on the adjusted logits and predict by the raw ones: with τ = 1 the raw
  logits then rank the classes as if all of them were equally frequent, which is
  what balanced accuracy asks for. A model that was trained without adjustment
  is adjusted afterward, in prediction, by ``strength=-1.0``.

  The loss can be any that takes softmax logits, such as those of Optax or
  :func:`optax_ghm.softmax_ghm_loss_with_integer_labels`. For one logit per
  class against the rest see :func:`optax_ghm.adjust_sigmoid_logits`.

  Args:
    logits: z, shape (..., classes), floating.
    class_counts: n, how many examples each class has: real numbers of shape
      (classes,), or shares of a whole. They may be traced, and
      :class:`optax_ghm.ClassCounts` estimates them while training. Of a class
      without an example there is taken to be half an example; half as many as
      of the rarest other class, if that has less than one. Negative numbers,
      NaN and infinity count as 0. No gradient flows back to them.
    strength: τ, a number. With 0 the logits stay as they are.

  Returns:
    The adjusted logits, of the shape of ``logits``; float32 if these have 16
    bits, since bfloat16 would round a logit near −14 to a multiple of 1/16.
    The gradient with respect to ``logits`` has their dtype.

  Raises:
    TypeError: if ``logits`` are not floating.
    ValueError: if ``class_counts`` are not one number for each class.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> logits, labels = jnp.zeros((3, 2)), jnp.array([0, 0, 1])
    >>> adjusted = optax_ghm.adjust_logits(logits, jnp.array([900, 100]))
    >>> [round(float(z), 2) for z in adjusted[0]]
    [-0.11, -2.3]
    >>> losses = optax.softmax_cross_entropy_with_integer_labels(
    ...   adjusted, labels
    ... )
    >>> [round(float(loss), 2) for loss in losses]
    [0.11, 0.11, 2.3]

  References:
    Menon et al., `Long-tail learning via logit adjustment
    <https://arxiv.org/abs/2007.07314>`_, ICLR 2021, equations 9 and 10
  """
  logits = _losses.floats('logits', logits)
  if logits.ndim == 0:
    raise ValueError('logits must have an axis of classes, got shape ().')
  counts = _counts('class_counts', class_counts, logits, (logits.shape[-1:],))
  counts = _or(counts, _least(counts))
  return _add(logits, jax.nn.log_softmax(jnp.log(counts)), strength)


def adjust_sigmoid_logits(
  logits: ArrayLike,
  class_counts: ArrayLike,
  examples: ArrayLike,
  strength: ArrayLike = 1.0,
) -> jax.Array:
  r"""Adds the log-odds of the prior, for sigmoid cross-entropy.

  .. math::
    z_c + \tau \log \frac{n_c}{N - n_c}

  This is :func:`optax_ghm.adjust_logits` for logits that each decide between a
  class and the rest, as in detectors and multi-label models, where an example
  may have several classes or none, and N is not the sum of the counts. Train on
  the adjusted logits and predict by the raw ones: with τ = 1 a raw logit is
  then above 0 where the example speaks for the class, however rare that is.

  Raw logits of 0 already predict the prior, so the bias of the last layer
  starts at 0 here, and not at :func:`optax_ghm.prior_bias`.

  Args:
    logits: z, shape (..., classes) or, with one count, any shape; floating.
    class_counts: n, how many examples have each class: real numbers of shape
      (classes,), or one. They may be traced. Where a class or its absence has
      no example, there is taken to be half an example; half as many as of the
      rarest class, if that has less than one. Negative numbers, NaN and
      infinity count as 0. No gradient flows back to them.
    examples: N, how many examples there are, those without a class included;
      one number, or one for each class, if some labels are not known.
    strength: τ, a number. With 0 the logits stay as they are.

  Returns:
    The adjusted logits, of the shape of ``logits``; float32 if these have 16
    bits, as in :func:`optax_ghm.adjust_logits`.

  Raises:
    TypeError: if ``logits`` are not floating.
    ValueError: if ``class_counts`` or ``examples`` are neither one number nor
      one for each class.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> counts = jnp.array([500, 10])  # among 1,000 examples
    >>> logits = optax_ghm.adjust_sigmoid_logits(
    ...   jnp.zeros((4, 2)), counts, 1000
    ... )
    >>> [round(float(z), 2) for z in logits[0]]
    [0.0, -4.6]

  References:
    Menon et al., `Long-tail learning via logit adjustment
    <https://arxiv.org/abs/2007.07314>`_, ICLR 2021, whose argument this is for
    two classes, the class and the rest
  """
  logits = _losses.floats('logits', logits)
  shapes = ((), logits.shape[-1:])
  counts = _counts('class_counts', class_counts, logits, shapes)
  rest = _counts('examples', examples, logits, shapes) - counts
  least = _least(counts)
  log_odds = jnp.log(_or(counts, least)) - jnp.log(_or(rest, least))
  return _add(logits, log_odds, strength)


def _counts(name, counts, logits, shapes):
  """Counts in the dtype of the logits; 0 for numbers that count nothing."""
  counts = jnp.asarray(counts, logits.dtype)
  if counts.shape not in shapes:
    raise ValueError(
      f'{name} of shape {counts.shape} do not fit logits of shape'
      f' {logits.shape}: expected {" or ".join(map(str, shapes))}.'
    )
  return lax.stop_gradient(jnp.where(jnp.isfinite(counts), _or(counts, 0), 0))


def _least(counts):
  """What is taken for no example: half an example, or less."""
  return jnp.min(_or(counts, 1), initial=1) / 2


def _or(counts, other):
  """The counts above 0, and above what XLA flushes to 0; else the other."""
  some = counts >= 2 * jnp.finfo(counts.dtype).tiny
  return jnp.where(some, counts, jnp.asarray(other, counts.dtype))


def _add(logits, prior, strength):
  prior = jnp.asarray(strength, logits.dtype) * prior
  return logits + jnp.expand_dims(prior, tuple(range(logits.ndim - prior.ndim)))
