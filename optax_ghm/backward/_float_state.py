"""Optimizer states as floating numbers, since only these have gradients."""

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays


def to_floats(leaf):
  """A leaf of a state as floats; an integer a * 2**16 + b becomes (a, b)."""
  leaf = jnp.asarray(leaf)
  if arrays.is_inexact(leaf):
    return leaf
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if leaf.dtype.itemsize < 4:
    leaf = leaf.astype(jnp.int32)
  words = jax.lax.bitcast_convert_type(leaf, jnp.int32)
  return jnp.stack([words >> 16, words & 0xFFFF], axis=-1).astype(jnp.float32)


def from_floats(leaf, like, calls):
  """The mean of ``calls`` states that were added up, in the dtype of ``like``.

  Integers that are equal in all calls are exact for up to 512 calls, and also
  where their sum was divided by a number and is off by rounding.
  """
  calls = jnp.expand_dims(calls, range(calls.ndim, leaf.ndim))
  mean = leaf / calls.astype(leaf.dtype)
  if arrays.is_inexact(like):
    return mean
  high, low = mean[..., 0], mean[..., 1]
  whole = jnp.floor(high + 0.01)
  remainder = high - whole
  remainder = jnp.where(remainder < 0.01, 0, remainder)  # which is rounding
  low = jnp.round(remainder * 2**16 + low)
  words = whole.astype(jnp.int32) * 2**16 + low.astype(jnp.int32)
  if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
    data = jax.lax.bitcast_convert_type(words, jnp.uint32)
    impl = jax.random.key_impl(jnp.empty((), like.dtype))
    return jax.random.wrap_key_data(data, impl=impl)
  if like.dtype.itemsize < 4:
    return words.astype(like.dtype)
  return jax.lax.bitcast_convert_type(words, like.dtype)
