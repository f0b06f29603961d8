"""What domain-adversarial training needs around the reversal."""

import jax
import jax.numpy as jnp
import optax

from optax_ghm._core import arrays
from optax_ghm._core.softmax_cross_entropy import softmax_cross_entropy


def domain_loss(
  logits: jax.Array,
  domains: jax.Array,
  *,
  domain_weights: jax.Array | None = None,
  example_weights: jax.Array | None = None,
  axis_name: arrays.AxisName = None,
) -> jax.Array:
  r"""Cross-entropy of the domains, every domain with a share of its own.

  .. math::
    \ell_i = N\, \omega_{d_i} \frac{w_i}{\sum_{j: d_j = d_i} w_j}
      \left(-\log \operatorname{softmax}(z_i)_{d_i}\right)

  so that its mean over the batch is :math:`\sum_d \omega_d` times the weighted
  mean inside domain d, however many of the N examples are of each domain.

  Args:
    logits: (N, D), one per domain; or (N,), the logit of domain 1 against
      domain 0.
    domains: integers, (N,). Examples whose domain is not in [0, D) get loss 0.
    domain_weights: :math:`\omega`, (D,); None is 1 / D each, which for two
      domains is half the domain term of the paper. A domain without an example
      contributes 0.
    example_weights: w, (N,), not negative, such as :func:`entropy_weights`;
      None is 1 each. No gradient flows through them.
    axis_name: mapped axis, or axes, over which the batch is split; N and the
      sums are then those of the whole batch.

  Returns:
    One loss per example, (N,), in the dtype of ``logits``.

  Raises:
    TypeError: if ``domains`` are not integers or ``logits`` not floating.
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
  if not jnp.issubdtype(domains.dtype, jnp.integer):
    raise TypeError(f'domains must be integers, got dtype {domains.dtype}.')
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise TypeError(f'logits must be floating, got dtype {logits.dtype}.')
  if logits.ndim not in (1, 2) or logits.shape[:1] != domains.shape:
    raise ValueError(
      'logits must be of shape (N,) or (N, D) for domains of shape (N,), got'
      f' {logits.shape} and {domains.shape}.'
    )
  count = 2 if logits.ndim == 1 else logits.shape[1]
  if count < 2:
    raise ValueError(
      'logits of shape (N, D) must be those of two domains or more, got'
      f' {logits.shape}: for one logit, give (N,).'
    )
  if domain_weights is None:
    domain_weights = jnp.full((count,), 1 / count, jnp.float32)
  elif jnp.shape(domain_weights) != (count,):
    raise ValueError(
      f'domain_weights must be of shape ({count},), one per domain, got'
      f' {jnp.shape(domain_weights)}.'
    )
  if example_weights is None:
    example_weights = jnp.ones(domains.shape, jnp.float32)
  elif jnp.shape(example_weights) != domains.shape:
    raise ValueError(
      f'example_weights must be of shape {domains.shape}, one per example, got'
      f' {jnp.shape(example_weights)}.'
    )
  dtype = arrays.at_least_float32(logits.dtype)
  domains = domains.astype(jnp.int32)
  known = (domains >= 0) & (domains < count)
  label = jnp.where(known, domains, 0)
  # Masked before the loss, so that no gradient of it is NaN times 0.
  seen = jnp.expand_dims(known, tuple(range(1, logits.ndim)))
  z = jnp.where(seen, logits.astype(dtype), 0)
  if logits.ndim == 1:
    losses = optax.sigmoid_binary_cross_entropy(z, label.astype(dtype))
  else:
    losses = softmax_cross_entropy(z, label)

  # (N, D): which domain, so that sums over it need no gather when sharded.
  member = known[:, None] & (
    label[:, None] == jnp.arange(count, dtype=label.dtype)[None]
  )
  weights = jax.lax.stop_gradient(jnp.asarray(example_weights).astype(dtype))
  amount = jnp.where(member, weights[:, None], 0)
  total, size = arrays.psum(
    (jnp.sum(amount, axis=0), jnp.asarray(domains.size, dtype)), axis_name
  )
  # A domain of no weight contributes 0, one with a NaN among them NaN.
  share = jnp.asarray(domain_weights).astype(dtype) / jnp.where(
    total == 0, 1, total
  )
  factor = jnp.sum(jnp.where(member, amount * share[None], 0), axis=1)
  return jnp.where(known, size * factor * losses, 0).astype(logits.dtype)
