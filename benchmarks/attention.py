"""What it costs to measure attention logits, and to clip queries and keys.

Attention is one forward and backward pass in Flax's layout, with a causal mask.
Beside what tells the largest logits stands Flax's ``sow_weights``, with which a
user can look at the weights. QK-clip is one donated step of AdamW on the
transformer of ``clipping.py``, with eight heads.
"""

import functools
from typing import Any

import clipping
import harness
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from optax_ghm.calibration import (
  dot_product_attention_with_max_logits,
  qk_clip,
)

BATCH, LENGTH, HEADS, FEATURES = 4, 512, 8, 64


def inputs(dtype):
  def normal(i):
    shape = BATCH, LENGTH, HEADS, FEATURES
    return jax.random.normal(jax.random.key(i), shape, dtype)

  return normal(0), normal(1), normal(2)


def mask():
  return nn.make_causal_mask(jnp.ones((BATCH, LENGTH)))


def flax(query, key, value):
  return nn.dot_product_attention(query, key, value, mask=mask()), ()


def measuring(query, key, value):
  return dot_product_attention_with_max_logits(query, key, value, mask=mask())


def of_weights(query, key, value):
  """The weights are returned, as ``sow_weights`` does."""
  weights = nn.dot_product_attention_weights(query, key, mask=mask())
  return jnp.einsum('...hqk,...khd->...qhd', weights, value), weights


def with_gradients(attention):
  def loss(*inputs):
    attended, seen = attention(*inputs)
    return jnp.sum(jnp.square(attended.astype(jnp.float32))), seen

  return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


ATTENTION = {
  'flax.linen.dot_product_attention': flax,
  'dot_product_attention_with_max_logits': measuring,
  'Flax, and all weights are returned': of_weights,
}


def transformer():
  """With queries and keys of eight heads."""
  tree: dict[str, Any] = clipping.transformer()
  for name, layer in tree.items():
    if name.startswith('layer'):
      heads = {
        'kernel': (512, HEADS, FEATURES),
        'bias': (HEADS, FEATURES),
      }
      tree[name] = layer | {'query': heads, 'key': heads}
  return tree


def clipped_step(carry, grads, max_logits):
  params, state = carry
  tx = optax.chain(optax.adamw(1e-4), qk_clip(100.0))
  updates, state = tx.update(grads, state, params, max_logits=max_logits)
  return optax.apply_updates(params, updates), state


def plain_step(carry, grads, max_logits):
  del max_logits
  params, state = carry
  updates, state = optax.adamw(1e-4).update(grads, state, params)
  return optax.apply_updates(params, updates), state


def of_step():
  (grads,) = clipping.gradients(transformer())
  # Half of the heads are beyond the threshold.
  logits = jnp.linspace(50.0, 150.0, HEADS)
  return grads, {name: logits for name in grads if name.startswith('layer')}


def initial(name, data):
  params = jax.tree.map(lambda g: 10 * g, data[0])
  tx = optax.adamw(1e-4)
  if name == 'qk_clip':
    tx = optax.chain(tx, qk_clip(100.0))
  return params, tx.init(params)


CASES = {
  f'{jnp.dtype(dtype).name}, {BATCH} × {LENGTH} tokens': harness.Case(
    {name: with_gradients(f) for name, f in ATTENTION.items()},
    functools.partial(inputs, dtype),
    BATCH * HEADS * LENGTH**2,
    limit='flax.linen.dot_product_attention',
    quick=dtype == jnp.float32,
  )
  for dtype in (jnp.float32, jnp.bfloat16)
} | {
  'QK-clip behind AdamW, transformer': harness.Case(
    {'optax.adamw': plain_step, 'qk_clip': clipped_step},
    of_step,
    50_000_000,
    limit='optax.adamw',
    init=initial,
  )
}
