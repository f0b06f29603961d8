"""The models that people train, small: the shapes of Flax's own examples.

A residual network, a language model, a translator, a tagger, an LSTM encoder
and decoder, a graph network, an autoencoder, a text classifier and an
actor-critic in Linen; a convolutional network and a Gemma in NNX. See
model_zoo_trainings.py for how they are trained.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn, nnx

WORDS, WIDTH, HEADS = 48, 32, 4
zeros, normal = nn.initializers.zeros, nn.initializers.normal


class Bottleneck(nn.Module):
  """The last scale starts at 0, so that the block starts as an identity."""

  filters: int
  strides: int

  @nn.compact
  def __call__(self, x):
    def norm(y, **kwargs):
      return nn.BatchNorm(False, momentum=0.9, **kwargs)(y)

    conv = functools.partial(nn.Conv, use_bias=False)
    y = nn.relu(norm(conv(self.filters, (1, 1))(x)))
    y = nn.relu(norm(conv(self.filters, (3, 3), self.strides)(y)))
    y = norm(conv(4 * self.filters, (1, 1))(y), scale_init=zeros)
    if x.shape != y.shape:
      x = norm(conv(4 * self.filters, (1, 1), self.strides)(x))
    return nn.relu(x + y)


class ResNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (7, 7), 2, use_bias=False)(x)
    x = nn.relu(nn.BatchNorm(False, momentum=0.9)(x))
    for i, blocks in enumerate((2, 2)):
      for j in range(blocks):
        x = Bottleneck(8 * 2**i, 2 if i and not j else 1)(x)
    return nn.Dense(10)(x.mean((1, 2)))


class Block(nn.Module):
  """A layer of a transformer, with the norms before or after what is added."""

  post_norm: bool = False
  causal: bool = False
  dropout: float = 0.1

  @nn.compact
  def __call__(self, x, valid, encoded=None, encoded_valid=None):
    mask = nn.make_attention_mask(valid, valid)
    if self.causal:
      mask = nn.combine_masks(mask, nn.make_causal_mask(valid))
    kernels = nn.initializers.xavier_uniform()
    drop = nn.Dropout(self.dropout, deterministic=False)

    def attention(y, *memory, mask):
      layer = nn.MultiHeadDotProductAttention(
        HEADS, kernel_init=kernels, use_bias=False
      )
      return drop(layer(y, *memory, mask=mask))

    def hidden(y):
      y = drop(nn.relu(nn.Dense(4 * WIDTH, kernel_init=kernels)(y)))
      return drop(nn.Dense(WIDTH, kernel_init=kernels)(y))

    def add(x, function):
      if self.post_norm:
        return nn.LayerNorm()(x + function(x))
      return x + function(nn.LayerNorm()(x))

    x = add(x, functools.partial(attention, mask=mask))
    if encoded is not None:
      across = nn.make_attention_mask(valid, encoded_valid)
      x = add(x, lambda y: attention(y, encoded, mask=across))
    return add(x, hidden)


def positions(length):
  at = np.arange(length)[:, None] / 10000 ** (np.arange(0, WIDTH, 2) / WIDTH)
  return np.concatenate([np.sin(at), np.cos(at)], 1).astype(np.float32)


class LanguageModel(nn.Module):
  """The logits come from the embeddings."""

  depth: int = 4

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(WORDS, WIDTH, embedding_init=normal(1.0))
    shifted = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    x = embed(shifted) + positions(tokens.shape[1])
    for _ in range(self.depth):
      x = Block(causal=True)(x, tokens > 0)
    return embed.attend(nn.LayerNorm()(x)) / np.float32(WIDTH**0.5)


class Translator(nn.Module):
  """An encoder, a decoder, and the embeddings that all share."""

  depth: int = 2

  @nn.compact
  def __call__(self, source, target):
    embed = nn.Embed(WORDS, WIDTH, embedding_init=normal(1.0))
    x = embed(source) + positions(source.shape[1])
    for _ in range(self.depth):
      x = Block()(x, source > 0)
    encoded = nn.LayerNorm()(x)
    shifted = jnp.pad(target, ((0, 0), (1, 0)))[:, :-1]
    x = embed(shifted) + positions(target.shape[1])
    for _ in range(self.depth):
      x = Block(causal=True)(x, target > 0, encoded, source > 0)
    return embed.attend(nn.LayerNorm()(x)) / np.float32(WIDTH**0.5)


class Tagger(nn.Module):
  """An encoder with its norms after the sums, as BERT's."""

  depth: int = 6

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(WORDS, WIDTH)(tokens) + nn.Embed(16, WIDTH)(jnp.arange(16))
    x = nn.LayerNorm()(x)
    for _ in range(self.depth):
      x = Block(post_norm=True)(x, tokens > 0)
    return nn.Dense(8)(x)


class Seq2Seq(nn.Module):
  """An LSTM reads a sum, another one writes the result."""

  @nn.compact
  def __call__(self, question, answer):
    question = jax.nn.one_hot(question, 12)
    carry, _ = nn.RNN(nn.LSTMCell(64), return_carry=True)(question)
    before = jnp.pad(answer, ((0, 0), (1, 0)))[:, :-1]
    before = jax.nn.one_hot(before, 12)
    y = nn.RNN(nn.LSTMCell(64))(before, initial_carry=carry)
    return nn.Dense(12)(y)


class GraphNetwork(nn.Module):
  """Messages along edges, sums at nodes, the mean of each graph."""

  graphs: int = 16
  steps: int = 3

  @nn.compact
  def __call__(self, nodes, senders, receivers, graph):
    def mlp(x):
      for _ in range(2):
        x = nn.relu(nn.Dense(WIDTH)(x))
        x = nn.Dropout(0.1, deterministic=False)(x)
      return x

    x = nn.Dense(WIDTH)(nodes)
    for _ in range(self.steps):
      sent = jax.ops.segment_sum(mlp(x)[senders], receivers, len(nodes))
      x = nn.LayerNorm()(x + sent)
    count = jax.ops.segment_sum(jnp.ones(len(nodes)), graph, self.graphs)
    mean = jax.ops.segment_sum(x, graph, self.graphs) / count[:, None]
    return nn.Dense(12)(mean)


class Autoencoder(nn.Module):
  """A variational one, with a Bernoulli at every pixel."""

  @nn.compact
  def __call__(self, x):
    hidden = nn.relu(nn.Dense(128, name='encoder')(x))
    mean = nn.Dense(10, name='mean')(hidden)
    log_variance = nn.Dense(10, name='log_variance')(hidden)
    noise = jax.random.normal(self.make_rng('dropout'), mean.shape)
    z = mean + jnp.exp(log_variance / 2) * noise
    hidden = nn.relu(nn.Dense(128, name='decoder')(z))
    return nn.Dense(64, name='pixels')(hidden), mean, log_variance


class TextClassifier(nn.Module):
  """A bidirectional LSTM, and attention that looks at the keys alone."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(WORDS, WIDTH, embedding_init=normal(0.1))(tokens)
    lengths = jnp.sum(tokens > 0, axis=1)
    x = nn.Bidirectional(
      nn.RNN(nn.OptimizedLSTMCell(WIDTH)), nn.RNN(nn.OptimizedLSTMCell(WIDTH))
    )(x, seq_lengths=lengths)
    score = nn.Dense(1, use_bias=False)(
      nn.tanh(nn.Dense(WIDTH, use_bias=False)(x))
    )
    score = jnp.where(tokens > 0, score[..., 0], -jnp.inf)
    x = jnp.einsum('nl,nlf->nf', nn.softmax(score), x)
    return nn.Dense(2, use_bias=False)(nn.tanh(nn.Dense(WIDTH)(x)))


class ActorCritic(nn.Module):
  """One trunk for the policy and the value of a frame."""

  @nn.compact
  def __call__(self, frames):
    x = frames.astype(jnp.float32) / 255
    x = nn.relu(nn.Conv(16, (8, 8), 4)(x))
    x = nn.relu(nn.Conv(32, (4, 4), 2)(x))
    x = nn.relu(nn.Conv(32, (3, 3))(x))
    x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
    return nn.log_softmax(nn.Dense(6)(x)), nn.Dense(1)(x)[:, 0]


class ConvNet(nnx.Module):
  def __init__(self, rngs):
    self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
    self.norm1 = nnx.BatchNorm(16, rngs=rngs)
    self.dropout1 = nnx.Dropout(0.025, rngs=rngs)
    self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
    self.norm2 = nnx.BatchNorm(32, rngs=rngs)
    self.linear1 = nnx.Linear(128, 64, rngs=rngs)
    self.dropout2 = nnx.Dropout(0.025, rngs=rngs)
    self.linear2 = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, x):
    pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
    x = pool(nnx.relu(self.norm1(self.dropout1(self.conv1(x)))))
    x = pool(nnx.relu(self.norm2(self.conv2(x))))
    x = nnx.relu(self.dropout2(self.linear1(x.reshape(len(x), -1))))
    return self.linear2(x)


class RMSNorm(nnx.Module):
  """What is learned is how far the scale is from 1."""

  def __init__(self, width, rngs):
    self.scale = nnx.Param(jnp.zeros(width))

  def __call__(self, x):
    square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + 1e-6) * (1 + self.scale[...])


class Einsum(nnx.Module):
  def __init__(self, equation, shape, rngs):
    self.equation = equation
    self.w = nnx.Param(normal()(rngs.params(), shape))

  def __call__(self, x):
    return jnp.einsum(self.equation, x, self.w[...])


def rotated(x):
  """Queries or keys (batch, position, head, feature), turned by position."""
  half = x.shape[-1] // 2
  angle = np.arange(x.shape[1])[:, None] / 10000 ** (np.arange(half) / half)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
  a, b = jnp.split(x, 2, axis=-1)
  cos, sin = cos.astype(np.float32), sin.astype(np.float32)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class GemmaBlock(nnx.Module):
  """Grouped queries, capped logits, a gated hidden layer, four norms."""

  def __init__(self, rngs):
    head = WIDTH // HEADS
    self.pre_attention_norm = RMSNorm(WIDTH, rngs)
    self.q_einsum = Einsum('btd,ndh->btnh', (HEADS, WIDTH, head), rngs)
    self.kv_einsum = Einsum('btd,ckdh->cbtkh', (2, 2, WIDTH, head), rngs)
    self.attn_vec_einsum = Einsum('btnh,nhd->btd', (HEADS, head, WIDTH), rngs)
    self.post_attention_norm = RMSNorm(WIDTH, rngs)
    self.pre_ffw_norm = RMSNorm(WIDTH, rngs)
    linear = functools.partial(
      nnx.Linear, use_bias=False, kernel_init=normal(), rngs=rngs
    )
    self.gate_proj = linear(WIDTH, 4 * WIDTH)
    self.up_proj = linear(WIDTH, 4 * WIDTH)
    self.down_proj = linear(4 * WIDTH, WIDTH)
    self.post_ffw_norm = RMSNorm(WIDTH, rngs)

  def __call__(self, x):
    y = self.pre_attention_norm(x)
    query = rotated(self.q_einsum(y)).reshape(*y.shape[:2], 2, HEADS // 2, -1)
    key, value = self.kv_einsum(y)
    logits = jnp.einsum('btkgh,bskh->bkgts', query, rotated(key))
    logits = 50 * jnp.tanh(logits / (50 * (WIDTH // HEADS) ** 0.5))
    causal = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
    weights = jax.nn.softmax(jnp.where(causal, logits, -2e38))
    y = jnp.einsum('bkgts,bskh->btkgh', weights, value)
    y = self.attn_vec_einsum(y.reshape(*y.shape[:2], HEADS, -1))
    x = x + self.post_attention_norm(y)
    y = self.pre_ffw_norm(x)
    y = self.down_proj(jax.nn.gelu(self.gate_proj(y)) * self.up_proj(y))
    return x + self.post_ffw_norm(y)


class Embedder(nnx.Module):
  def __init__(self, rngs):
    self.input_embedding = nnx.Param(normal()(rngs.params(), (WORDS, WIDTH)))

  def __call__(self, tokens):
    return self.input_embedding[...][tokens] * np.float32(WIDTH**0.5)

  def decode(self, x):
    return x @ self.input_embedding[...].T


class Gemma(nnx.Module):
  def __init__(self, rngs, depth=3):
    self.embedder = Embedder(rngs)
    self.layers = nnx.List([GemmaBlock(rngs) for _ in range(depth)])
    self.final_norm = RMSNorm(WIDTH, rngs)

  def __call__(self, tokens):
    x = self.embedder(tokens)
    for layer in self.layers:
      x = layer(x)
    logits = self.embedder.decode(self.final_norm(x))
    return 30 * jnp.tanh(logits / 30)
