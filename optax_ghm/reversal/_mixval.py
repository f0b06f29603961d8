"""MixVal: whether a model is of one mind about mixed target examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, masks
from optax_ghm.reversal import _predictions


class MixedExamples(NamedTuple):
  """Mixed examples of the target, from :func:`mix_examples`.

  Attributes:
    x: as the examples, in their dtype: the mixed examples.
    label: int32, (N,), the class predicted for the larger part of each; -1
      where a logit was not finite.
    same_class: bool, (N,), whether one class was predicted for both parts.
    mask: bool, (N,), which examples count.
  """

  x: jax.Array
  label: jax.Array
  same_class: jax.Array
  mask: jax.Array


def mix_examples(
  key: jax.Array,
  x: jax.Array,
  logits: jax.Array,
  mask: ArrayLike | None = None,
  *,
  share: ArrayLike = 0.55,
) -> MixedExamples:
  r"""Mixes every example with another one, for :func:`mixval`.

  .. math::
    \tilde x_i = \alpha x_i + (1 - \alpha) x_{\pi(i)}, \qquad
    \tilde y_i = \operatorname{argmax} z_i

  Args:
    key: PRNG key of π, which puts the examples in a random circle and takes the
      next one.
    x: floating, (N, ...), examples of the target, such as one batch.
    logits: floating, (N, C), what the model says of them.
    mask: bool, (N,), which examples count. The others are mixed with nothing
      that counts.
    share: α, from ½ to 1.

  Returns:
    :class:`MixedExamples`.

  Raises:
    TypeError: if ``x`` or ``logits`` are not floating, or ``mask`` is not bool.
    ValueError: if the shapes do not fit, or ``share`` is not from ½ to 1.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import reversal
    >>> x, logits = jnp.zeros((2, 28, 28)), jnp.array([[1.0, 3.0], [2.0, 0.0]])
    >>> mixed = reversal.mix_examples(jax.random.key(0), x, logits)
    >>> mixed.x.shape, mixed.label
    ((2, 28, 28), Array([1, 0], dtype=int32))
  """
  counters.check_range('share', share, 0.5, 1)
  x, logits = jnp.asarray(x), _predictions.check_logits(logits)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f'x must be floating, got dtype {x.dtype}.')
  if x.shape[:1] != logits.shape[:1]:
    raise ValueError(
      'x and logits must have the same first axis, got shapes'
      f' {x.shape} and {logits.shape}.'
    )
  logits = arrays.replicated(logits)
  mask = masks.broadcast_mask(mask, logits.shape[:1])
  if mask is None:
    mask = jnp.ones(logits.shape[:1], bool)
  # The examples that count come first, in random order, each before its other.
  order = jnp.argsort(
    jnp.where(mask, jax.random.uniform(key, mask.shape, jnp.float32), 2)
  )
  place = jnp.arange(mask.size)
  following = (place + 1) % jnp.maximum(jnp.sum(mask), 1)
  other = jnp.zeros_like(order).at[order].set(order[following])
  finite = jnp.all(jnp.isfinite(logits), 1)
  label = jnp.where(finite, jnp.argmax(logits, 1), -1).astype(jnp.int32)
  share = jnp.asarray(share, x.dtype)
  return MixedExamples(
    x=share * x + (1 - share) * jnp.take(x, other, 0),
    label=label,
    same_class=label == label[other],
    mask=mask,
  )


def mixval(logits: jax.Array, mixed: MixedExamples) -> jax.Array:
  r"""Whether a model sees the larger part of a mixed example: MixVal.

  .. math::
    \frac{1}{2} \left(
      \operatorname{mean}_{i: \hat y_i = \hat y_{\pi(i)}} a_i +
      \operatorname{mean}_{i: \hat y_i \ne \hat y_{\pi(i)}} a_i \right), \qquad
    a_i = [\operatorname{argmax} f(\tilde x_i) = \tilde y_i]

  Mixtures of examples of one predicted class probe how dense the class is,
  those of two classes probe the boundary between them. From 0 to 1; **higher is
  better**. On a few hundred examples the score changes by a few hundredths with
  the key: give every model the same key, and average over several.

  Args:
    logits: floating, (N, C), what the model says of ``mixed.x``. Where a logit
      is not finite, the example is a failure.
    mixed: from :func:`mix_examples`. Batches are joined before, leaf by leaf:
      ``jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)``.

  Returns:
    float32, a scalar: if one of the means is over nothing, the other one.

  Raises:
    TypeError: if ``logits`` are not floating.
    ValueError: if the shapes do not fit.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import reversal
    >>> def model(x):
    ...   return jnp.stack([x, -x], 1)
    >>> x = jax.random.normal(jax.random.key(0), (1000,))
    >>> mixed = reversal.mix_examples(jax.random.key(1), x, model(x))
    >>> print(f'{reversal.mixval(model(mixed.x), mixed):.2f}')
    0.78

  References:
    Hu et al., `Mixed Samples as Probes for Unsupervised Model Selection in
    Domain Adaptation <https://openreview.net/forum?id=ackajXqei2>`_, 2023
  """
  counters.check_type('mixed', mixed, MixedExamples)
  logits = _predictions.check_logits(logits)
  if logits.shape[:1] != mixed.label.shape:
    raise ValueError(
      'logits and mixed.label must have the same first axis, got shapes'
      f' {logits.shape} and {mixed.label.shape}.'
    )
  finite = jnp.all(jnp.isfinite(logits), 1)
  right = finite & (jnp.argmax(logits, 1).astype(jnp.int32) == mixed.label)
  group = jnp.stack([mixed.same_class, ~mixed.same_class]) & mixed.mask[None]
  count = jnp.sum(group, 1, dtype=jnp.float32)
  means = jnp.sum(group & right[None], 1, dtype=jnp.float32) / jnp.maximum(
    count, 1
  )
  return jnp.mean(means, where=count > 0)
