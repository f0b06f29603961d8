"""The measuring attention is Flax's, and its largest logits are the largest."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from jax.sharding import PartitionSpec as P

import optax_ghm.linen as ghm_linen
import optax_ghm.nnx as ghm_nnx
from optax_ghm.calibration import (
  dot_product_attention_with_max_logits,
  qk_clip,
)
from tests.support import sharded

BATCH, LENGTH, HEADS, FEATURES = 3, 7, 4, 8


def normal(*shape, seed=0, dtype=np.float32):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def make_inputs(kv_heads=HEADS, dtype=np.float32):
  shapes = [(BATCH, LENGTH, heads, FEATURES) for heads in (HEADS, kv_heads)]
  shapes.append(shapes[-1])
  return [normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]


LINEN = nn.dot_product_attention, ghm_linen.dot_product_attention
NNX = nnx.dot_product_attention, ghm_nnx.dot_product_attention
BIAS = normal(1, HEADS, LENGTH, LENGTH, seed=5)
MASK = np.array(normal(BATCH, 1, LENGTH, LENGTH, seed=6) > -1)
MASK[0, 0, 2] = False  # a query with nothing to attend to
DROPOUT = {
  'dropout_rng': np.array([0, 7], np.uint32),
  'dropout_rate': 0.3,
  'deterministic': False,
}


@pytest.mark.parametrize(
  ('faces', 'kv_heads', 'dtype', 'options'),
  [
    (LINEN, 4, np.float32, {}),
    (LINEN, 4, np.float32, {'bias': BIAS, 'mask': MASK} | DROPOUT),
    (LINEN, 4, np.float32, DROPOUT | {'broadcast_dropout': False}),
    (LINEN, 4, jnp.bfloat16, {'mask': MASK, 'force_fp32_for_softmax': True}),
    (LINEN, 4, jnp.bfloat16, {'dtype': np.float32}),
    (NNX, 4, np.float32, {'bias': BIAS, 'mask': MASK, 'is_causal': True}),
    (NNX, 2, np.float32, {'mask': MASK} | DROPOUT),
    (NNX, 1, np.float32, {'is_causal': True}),
    (NNX, 4, jnp.bfloat16, {'mask': MASK}),
  ],
)
def test_values_and_gradients_are_those_of_flax(
  faces, kv_heads, dtype, options
):
  inputs = make_inputs(kv_heads, dtype)

  def both(attention):
    def loss(inputs):
      attended = attention(*inputs, **options)
      return jnp.sum(jnp.sin(attended.astype(jnp.float32))), attended

    return jax.grad(loss, has_aux=True)(inputs)

  with jax.numpy_dtype_promotion('standard'):  # for Flax's masks
    actual, expected = jax.jit(lambda: (both(faces[1]), both(faces[0])))()
  chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
  tolerance = 1e-5 if dtype == np.float32 else 2e-2
  chex.assert_trees_all_close(
    *jax.tree.map(np.float32, (actual, expected)),
    rtol=tolerance,
    atol=tolerance,
  )


def largest(query, key, mask=True):
  """By the definition, in float64."""
  key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
  logits = np.einsum('bqhd,bkhd->bhqk', np.float64(query), np.float64(key))
  logits = logits / np.sqrt(query.shape[-1])
  return np.where(mask, logits, -np.inf).max((0, 2, 3))


@functools.cache
def measured(**static):
  attention = functools.partial(dot_product_attention_with_max_logits, **static)
  return jax.jit(lambda *args: attention(*args)[1])


@pytest.mark.parametrize('kv_heads', [4, 2])
def test_largest_logits(kv_heads):
  query, key, value = make_inputs(kv_heads)
  actual = measured()(query, key, value, BIAS, MASK)
  np.testing.assert_allclose(actual, largest(query, key, MASK), 1e-5)
  causal = np.tri(LENGTH, dtype=bool)
  actual = measured(is_causal=True)(query, key, value)
  np.testing.assert_allclose(actual, largest(query, key, mask=causal), 1e-5)


def test_what_is_hidden_does_not_count_and_nan_does():
  query, key, value = make_inputs()
  mask = np.ones((BATCH, HEADS, LENGTH, LENGTH), bool)
  mask[:, 1], mask[..., 3] = False, False
  key[:, 3] = 1e6
  key[1, 2, 2] = np.nan
  actual = np.asarray(measured()(query, key, value, None, mask))
  expected = largest(query, key, mask=mask)
  np.testing.assert_allclose(actual[[0, 3]], expected[[0, 3]], 1e-5)
  assert actual[1] == np.finfo(np.float32).min and np.isnan(actual[2])


def test_no_gradient_flows_through_the_largest_logits():
  inputs = make_inputs()
  zero = jax.jit(jax.grad(lambda args: jnp.sum(measured()(*args))))(inputs)
  assert not any(np.any(x) for x in zero)


def test_mistakes_are_named():
  query, key, value = make_inputs(3)
  with pytest.raises(ValueError, match='multiple .* got 4, 3 and 3'):
    dot_product_attention_with_max_logits(query, key, value)
  query, key, value = make_inputs()
  with pytest.raises(ValueError, match='dropout_rng must be given'):
    jax.eval_shape(measured(dropout_rate=0.5), query, key, value)
  with pytest.raises(ValueError, match='einsum are not supported'):
    ghm_linen.dot_product_attention(
      query, key, value, qk_attn_weights_einsum=np.einsum
    )


def attention_of_shards(query, key, value, mask, axis_name=None):
  attended, max_logits = dot_product_attention_with_max_logits(
    query, key, value, mask=mask, axis_name=axis_name
  )
  return {'attended': attended}, {'largest': max_logits}


SPLIT = [normal(16, LENGTH, HEADS, FEATURES, seed=i) for i in range(3)]
CASES = {
  'batch': sharded.Case(
    attention_of_shards,
    (*SPLIT, np.array(normal(16, 1, LENGTH, LENGTH, seed=6) > -1)),
    P('d'),
    (P('d'), P()),
    sent=[HEADS],
  )
}


@sharded.parametrize(CASES)
def test_a_split_batch_has_the_largest_logits_of_all(case, mode):
  sharded.check(case, mode)


# In a training step: no logit of the next pass is beyond the threshold.

THRESHOLD = 2.0
X = normal(2, 5, 8, seed=3)
SHARPER = jax.nn.initializers.normal(1.0)


class Layer(nn.Module):
  """Attention that is called twice, as a cell of ``nn.scan``."""

  @nn.compact
  def __call__(self, x, _=None):
    attention = nn.MultiHeadDotProductAttention(
      num_heads=HEADS,
      kernel_init=SHARPER,
      bias_init=SHARPER,
      attention_fn=ghm_linen.dot_product_attention,
    )
    small = attention(x / 8, sow_weights=True)
    return small + attention(x, sow_weights=True), None


class Stack(nn.Module):
  """Three layers, stacked."""

  @nn.compact
  def __call__(self, x):
    layers = nn.scan(
      nn.remat(Layer),
      variable_axes={'params': 0, 'intermediates': 0},
      split_rngs={'params': True},
      length=3,
    )
    return layers()(x)[0]


def test_linen():
  model, tx = Stack(), optax.chain(optax.sgd(0.0), qk_clip(THRESHOLD))

  @jax.jit
  def two_steps():
    params, sown = model.init(jax.random.key(0), X)['params'], []
    state = tx.init(params)
    for _ in range(2):

      def loss(params):
        y, updated = model.apply(
          {'params': params}, X, mutable=['intermediates']
        )
        return jnp.sum(y), updated['intermediates']

      grads, intermediates = jax.grad(loss, has_aux=True)(params)
      updates, state = tx.update(grads, state, params, max_logits=intermediates)
      params = optax.apply_updates(params, updates)
      sown.append(jax.tree.leaves(intermediates))
    return sown, state[1]

  ((before,), (after,)), state = jax.device_get(two_steps())
  assert before.shape == (3, HEADS) and np.all(before > THRESHOLD)
  # The first layer sees the same inputs again.
  np.testing.assert_allclose(after[0], THRESHOLD, rtol=1e-4)
  assert state.max_logit == after.max()
  assert state.heads_clipped == np.sum(after > THRESHOLD)


class Model(nnx.Module):
  def __init__(self):
    self.layers = nnx.List(
      nnx.MultiHeadAttention(
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        in_features=8,
        kernel_init=SHARPER,
        decode=False,
        attention_fn=ghm_nnx.dot_product_attention,
        rngs=nnx.Rngs(kv_heads),
      )
      for kv_heads in (HEADS, 2)
    )

  def __call__(self, x):
    return [layer(x, sow_weights=True, is_causal=True) for layer in self.layers]


def test_nnx():
  @jax.jit
  def two_steps():
    model, sown = Model(), []
    tx = optax.chain(optax.sgd(0.0), qk_clip(THRESHOLD))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(2):

      @nnx.capture(nnx.Intermediate)
      def forward(model):
        return jnp.sum(jnp.stack(model(X)))

      grads, max_logits = nnx.grad(forward, has_aux=True)(model)
      optimizer.update(model, grads, max_logits=max_logits)
      sown.append(jax.tree.leaves(nnx.as_pure(max_logits)))
    return sown

  with jax.numpy_dtype_promotion('standard'):  # for nnx.Optimizer
    (one, two), others = jax.device_get(two_steps())
  assert np.max(one) > THRESHOLD and np.max(two) > THRESHOLD
  for before, after in zip((one, two), others, strict=True):
    expected = np.minimum(before, THRESHOLD)
    np.testing.assert_allclose(after, expected, rtol=1e-4)
