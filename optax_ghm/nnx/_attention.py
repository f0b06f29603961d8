"""Attention for NNX that sows its largest logits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

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
  module: nnx.Module | None = None,
  promote_dtype: Any = dtypes.promote_dtype,
  is_causal: bool = False,
  axis_name: arrays.AxisName = None,
) -> jax.Array:
  """``flax.nnx.dot_product_attention`` that sows its largest logits.

  With ``sow_weights=True``, Flax's attention layers hand themselves to their
  ``attention_fn``. This one then sows no weights, but the largest logit of each
  head, as ``max_logits`` of type ``nnx.Intermediate``: the maximum of all calls
  of the layer. ``nnx.capture`` collects what is sown, and
  :func:`optax_ghm.calibration.qk_clip` takes it as it is.

  Args:
    query: (..., queries, heads, features).
    key: (..., keys, heads, features), or fewer heads.
    value: (..., keys, heads of the key, features).
    bias: added to the logits.
    mask: where it is False, nothing is attended to, and no logit counts.
    broadcast_dropout: whether all examples and heads lose the same weights.
    dropout_rng: the key of the dropout.
    dropout_rate: share of the weights that become 0.
    deterministic: whether there is no dropout.
    dtype: of the computation; by default that of the inputs.
    precision: of the products, as in ``jax.lax``.
    module: the layer that sows.
    promote_dtype: function that promotes the inputs to one dtype.
    is_causal: whether later keys are hidden, too.
    axis_name: mapped axis, or axes, over which the batch is split; give it by
      ``functools.partial``. See
      :func:`~optax_ghm.calibration.dot_product_attention_with_max_logits`.

  Returns:
    The attention, (..., queries, heads, features).

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from optax_ghm.nnx import dot_product_attention
    >>> class Model(nnx.Module):
    ...   def __init__(self, rngs):
    ...     self.attention = nnx.MultiHeadAttention(
    ...       num_heads=2,
    ...       in_features=8,
    ...       decode=False,
    ...       rngs=rngs,
    ...       attention_fn=dot_product_attention,
    ...     )
    ...
    ...   def __call__(self, x):
    ...     return self.attention(x, sow_weights=True)
    >>> model = Model(nnx.Rngs(0))
    >>> y, max_logits = nnx.capture(model, nnx.Intermediate)(
    ...   jnp.ones((1, 3, 8))
    ... )
    >>> max_logits['attention']['max_logits'].shape
    (2,)
  """
  query, key, value = promote_dtype((query, key, value), dtype=dtype)
  attended, max_logits = _attention.dot_product_attention_with_max_logits(
    query,
    key,
    value,
    bias,
    mask,
    is_causal=is_causal,
    dropout_rng=dropout_rng,
    dropout_rate=0.0 if deterministic else dropout_rate,
    broadcast_dropout=broadcast_dropout,
    precision=precision,
    axis_name=axis_name,
  )
  if module is not None:
    module.sow(
      nnx.Intermediate,
      'max_logits',
      max_logits,
      reduce_fn=jnp.maximum,
      init_fn=lambda: max_logits,
    )
  return attended
