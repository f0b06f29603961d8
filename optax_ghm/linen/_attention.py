"""Attention for Linen that sows its largest logits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes

from optax_ghm._core import arrays
from optax_ghm.calibration import _attention


def dot_product_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  broadcast_dropout: bool = True,
  dropout_rng: jax.Array | None = None,
  dropout_rate: float = 0.0,
  deterministic: bool = False,
  dtype: Any = None,
  precision: Any = None,
  module: nn.Module | None = None,
  force_fp32_for_softmax: bool = False,
  qk_attn_weights_einsum: Any = None,
  attn_weights_value_einsum: Any = None,
  axis_name: arrays.AxisName = None,
) -> jax.Array:
  """``flax.linen.dot_product_attention`` that sows its largest logits.

  With ``sow_weights=True``, Flax's attention layers hand themselves to their
  ``attention_fn``. This one then sows no weights, but the largest logit of each
  head, as ``max_logits`` in the collection ``'intermediates'``: the maximum of
  all calls of the layer. :func:`optax_ghm.calibration.qk_clip` takes this
  collection as it is. Where it is not mutable, nothing is measured.

  Args:
    query: (..., queries, heads, features).
    key: (..., keys, heads, features).
    value: (..., keys, heads, features).
    bias: added to the logits.
    mask: where it is False, nothing is attended to, and no logit counts.
    broadcast_dropout: whether all examples and heads lose the same weights.
    dropout_rng: the key of the dropout.
    dropout_rate: share of the weights that become 0.
    deterministic: whether there is no dropout.
    dtype: of the computation; by default that of the inputs.
    precision: of the products, as in ``jax.lax``.
    module: the layer that sows.
    force_fp32_for_softmax: whether the softmax of 16-bit logits is float32.
    qk_attn_weights_einsum: not supported.
    attn_weights_value_einsum: not supported.
    axis_name: mapped axis, or axes, over which the batch is split; give it by
      ``functools.partial``. See
      :func:`~optax_ghm.calibration.dot_product_attention_with_max_logits`.

  Returns:
    The attention, (..., queries, heads, features).

  Raises:
    ValueError: if one of the einsums is given.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from optax_ghm.linen import dot_product_attention
    >>> class Model(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x):
    ...     attention = nn.MultiHeadDotProductAttention(
    ...       num_heads=2, attention_fn=dot_product_attention
    ...     )
    ...     return attention(x, sow_weights=True)
    >>> x = jnp.ones((1, 3, 8))
    >>> params = Model().init(jax.random.key(0), x)['params']
    >>> y, updated = Model().apply(
    ...   {'params': params}, x, mutable=['intermediates']
    ... )
    >>> jax.tree.map(jnp.shape, updated['intermediates'])
    {'MultiHeadDotProductAttention_0': {'max_logits': (2,)}}
  """
  if qk_attn_weights_einsum or attn_weights_value_einsum:
    raise ValueError(
      'qk_attn_weights_einsum and attn_weights_value_einsum are not supported'
      ' by this attention_fn.'
    )
  query, key, value = dtypes.promote_dtype(query, key, value, dtype=dtype)
  attended, max_logits = _attention.dot_product_attention_with_max_logits(
    query,
    key,
    value,
    bias,
    mask,
    dropout_rng=dropout_rng,
    dropout_rate=0.0 if deterministic else dropout_rate,
    broadcast_dropout=broadcast_dropout,
    precision=precision,
    force_fp32_for_softmax=force_fp32_for_softmax,
    axis_name=axis_name,
  )
  if module is not None:
    module.sow(
      'intermediates',
      'max_logits',
      max_logits,
      reduce_fn=jnp.maximum,
      init_fn=lambda: max_logits,
    )
  return attended
