"""The loss of a domain classifier, with a fixed share for every domain."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, masks
from optax_ghm._core.softmax_cross_entropy import softmax_cross_entropy


def domain_loss(
  logits: jax.Array,
  domains: jax.Array,
  *,
  domain_weights: ArrayLike | None = None,
  mask: ArrayLike | None = None,
  weights: ArrayLike | None = None,
  axis_name: arrays.AxisName = None,
) -> jax.Array:
  r"""Cross-entropy of domain labels, with a fixed share for every domain.

  .. math::
    \ell_i = N\, \omega_{d_i} \frac{w_i}{\sum_{j: d_j = d_i} w_j}
      \left(-\log \operatorname{softmax}(z_i)_{d_i}\right)

  The mean over the batch is :math:`\sum_d \omega_d` times the weighted mean
  inside domain d, however many of the N examples each domain has.

  Args:
    logits: (N, D), one per domain; or (N,) or (N, 1), the logit of domain 1
      against domain 0.
    domains: (N,), integers from 0 to D - 1, or bool for two domains. An example
      with another integer has loss 0.
    domain_weights: :math:`\omega`, float, (D,) or one number. None is 1 / D,
      which for two domains is half the domain term of the paper. A domain
      without an example contributes 0.
    mask: bool, (N,), which examples count. The loss of the others is 0, and N
      includes them, so that the mean over the batch stays as above.
    weights: w, float, (N,), such as :func:`entropy_weights`. Negative numbers
      and NaN count as 0. None is 1 for each example. No gradient flows back to
      them.
    axis_name: mapped axis, or axes, over which the batch is split. N and the
      sums are then taken over the whole batch.

  Returns:
    One loss per example, (N,), in the dtype of ``logits``.

  Raises:
    TypeError: if ``domains`` are neither integers nor bool, ``logits`` not
      floating, ``mask`` not bool, or ``weights`` not real numbers.
    ValueError: if the shapes do not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> domains = jnp.array([0, 0, 0, 1])
    >>> losses = optax_ghm.domain_loss(jnp.zeros(4), domains)
    >>> [round(float(loss), 3) for loss in losses]
    [0.462, 0.462, 0.462, 1.386]

  References:
    Ganin et al., `Domain-Adversarial Training of Neural Networks
    <https://arxiv.org/abs/1505.07818>`_, 2016, equation 9
  """
  logits, domains = jnp.asarray(logits), jnp.asarray(domains)
  if not (jnp.issubdtype(domains.dtype, jnp.integer) or domains.dtype == bool):
    raise TypeError(
      f'domains must be integers or bool, got dtype {domains.dtype}.'
    )
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise TypeError(f'logits must be floating, got dtype {logits.dtype}.')
  if logits.ndim == 2 and logits.shape[1] == 1:
    logits = logits[:, 0]
  if (
    logits.ndim not in (1, 2)
    or domains.shape != logits.shape[:1]
    or logits.shape[1:] == (0,)
  ):
    raise ValueError(
      'logits must be of shape (N,), (N, 1) or (N, D) for domains of shape'
      f' (N,), got {logits.shape} and {domains.shape}.'
    )
  count = 2 if logits.ndim == 1 else logits.shape[1]
  domain_weights = masks.broadcast_weights(
    1 / count if domain_weights is None else domain_weights,
    (count,),
    'domain_weights',
  )
  weights = masks.broadcast_weights(
    1.0 if weights is None else weights, domains.shape
  )
  dtype = arrays.at_least_float32(logits.dtype)
  domains = domains.astype(jnp.int32)
  known = (domains >= 0) & (domains < count)
  mask = masks.broadcast_mask(mask, domains.shape)
  if mask is not None:
    known &= mask
  label = jnp.where(known, domains, 0)
  # Masked before the loss, so that no gradient of it is NaN times 0.
  seen = jnp.expand_dims(known, range(1, logits.ndim))
  z = jnp.where(seen, logits.astype(dtype), 0)
  if logits.ndim == 1:
    losses = optax.sigmoid_binary_cross_entropy(z, label.astype(dtype))
  else:
    losses = softmax_cross_entropy(z, label)

  # (N, D), by comparison, since a gather by label is slow when sharded.
  member = known[:, None] & jax.nn.one_hot(label, count, dtype=bool)
  weights = jax.lax.stop_gradient(jnp.asarray(weights, dtype))
  amount = jnp.where(member, weights[:, None], 0)
  total, size = arrays.psum(
    (jnp.sum(amount, axis=0), jnp.asarray(domains.size, dtype)), axis_name
  )
  # A domain without any weight contributes 0.
  share = jnp.asarray(domain_weights, dtype) / jnp.where(total == 0, 1, total)
  factor = jnp.sum(jnp.where(member, amount * share[None], 0), axis=1)
  return (size * factor * losses).astype(logits.dtype)
