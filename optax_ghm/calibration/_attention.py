"""Dot-product attention that also tells its largest logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ghm._core import arrays


def dot_product_attention_with_max_logits(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  *,
  is_causal: bool = False,
  dropout_rng: jax.Array | None = None,
  dropout_rate: float = 0.0,
  broadcast_dropout: bool = True,
  precision: Any = None,
  force_fp32_for_softmax: bool = False,
  axis_name: arrays.AxisName = None,
) -> tuple[jax.Array, jax.Array]:
  r"""Dot-product attention, and the largest logit of every head.

  .. math::
    S = \frac{q k^\top}{\sqrt d}, \qquad
    \operatorname{softmax}(S + b)\, v, \qquad
    S_{\max, h} = \max_{i, j} S_{h i j}

  Numbers and gradients are those of Flax's ``dot_product_attention``. A logit
  that the mask hides does not count. The bias does not either, since what
  scales queries and keys does not scale it; one that hides belongs in the mask.
  To measure costs one more reading of the logits and no memory.
  :func:`~optax_ghm.calibration.qk_clip` takes the largest logits;
  ``dot_product_attention`` of ``optax_ghm.linen`` and ``optax_ghm.nnx`` are
  this function in the slot ``attention_fn`` of Flax's modules.

  Args:
    query: (..., queries, heads, features).
    key: (..., keys, heads, features), or fewer heads, each of which serves as
      many heads of the query, one after another.
    value: (..., keys, heads of the key, features).
    bias: added to the logits, broadcastable to (..., heads, queries, keys).
    mask: broadcastable to the same; where it is False or 0, nothing is
      attended to.
    is_causal: whether later keys are hidden, too.
    dropout_rng: the key of the dropout of the weights.
    dropout_rate: share of the weights that become 0.
    broadcast_dropout: whether all examples and heads lose the same weights.
    precision: of the products, as in ``jax.lax``.
    force_fp32_for_softmax: whether the softmax of 16-bit logits, and with it
      the attention, is float32.
    axis_name: mapped axis, or axes, over which the batch is split. The largest
      logits are then those of all devices.

  Returns:
    The attention, (..., queries, heads, features), and the largest logits,
    float32 (heads,). No gradient flows through them. If a logit is NaN, so is
    the largest of its head. A head that has nothing to attend to has the least
    finite number of the dtype.

  Raises:
    ValueError: if the heads of the query are no multiple of those of the key,
      or there is a dropout without a key.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import calibration
    >>> query = jnp.array([[[3.0, 0.0, 0.0, 4.0]]])  # 1 query, 1 head
    >>> key = jnp.array([[[2.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 4.0]]])
    >>> attend = calibration.dot_product_attention_with_max_logits
    >>> _, max_logits = attend(query, key, key)
    >>> print(max_logits)  # 4 · 4 / √4
    [8.]
  """
  heads, kv_heads = query.shape[-2], key.shape[-2]
  if heads % kv_heads or value.shape[-2] != kv_heads:
    raise ValueError(
      'the heads of the query must be a multiple of those of the key and the'
      f' value, got {heads}, {kv_heads} and {value.shape[-2]}.'
    )
  dtype = query.dtype
  query = query / np.sqrt(query.shape[-1]).astype(dtype)
  if heads == kv_heads:
    logits = jnp.einsum(
      '...qhd,...khd->...hqk', query, key, precision=precision
    )
  else:
    query = query.reshape(*query.shape[:-2], kv_heads, -1, query.shape[-1])
    logits = jnp.einsum(
      '...qhgd,...khd->...hgqk', query, key, precision=precision
    )
    logits = logits.reshape(*logits.shape[:-4], heads, *logits.shape[-2:])

  measured = jax.lax.stop_gradient(logits)
  if bias is not None:
    logits += bias
  if is_causal:
    lower = jnp.tri(*logits.shape[-2:], dtype=bool)
    lower = jnp.expand_dims(lower, range(logits.ndim - 2))
    mask = lower if mask is None else lower & (mask != 0)
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    measured = jnp.where(mask, measured, jnp.finfo(dtype).min)
  others = [i for i in range(logits.ndim) if i != logits.ndim - 3]
  max_logits = jnp.max(measured, others)
  max_logits = max_logits.astype(jnp.float32)
  if axis_name is not None:
    max_logits = jax.lax.pmax(max_logits, axis_name)

  dtype = jnp.dtype(jnp.float32) if force_fp32_for_softmax else dtype
  weights = jax.nn.softmax(logits.astype(dtype))
  if dropout_rate > 0:
    if dropout_rng is None:
      raise ValueError('dropout_rng must be given for a dropout, and was None.')
    ones = [1] * (weights.ndim - 2)
    shape = [*ones, *weights.shape[-2:]] if broadcast_dropout else weights.shape
    keep = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, shape)
    weights *= keep.astype(dtype) / jnp.asarray(1 - dropout_rate, dtype)

  value = value.astype(dtype)
  if heads == kv_heads:
    attended = jnp.einsum(
      '...hqk,...khd->...qhd', weights, value, precision=precision
    )
  else:
    shape = (*weights.shape[:-3], kv_heads, -1, *weights.shape[-2:])
    attended = jnp.einsum(
      '...hgqk,...khd->...qhgd',
      weights.reshape(shape),
      value,
      precision=precision,
    )
    attended = attended.reshape(*attended.shape[:-3], heads, value.shape[-1])
  return attended, max_logits
