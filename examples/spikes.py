"""A character model, bad batches, and what clipping makes of them.

A small transformer learns text that this script makes: sentences of invented
words. Its learning rate is near the edge, and now and then a batch is bad: its
characters are random, and its loss is a hundred times too large, as a wrong
normalizer makes it. Compared are no clip, the best of several constant ones,
chosen on other seeds, and those that adapt, with their defaults.

  python examples/spikes.py
  python examples/spikes.py --bad 0 --learning-rate 0.03
"""

import argparse
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from rich.table import Table

import optax_ghm as ghm

mpl.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

ALPHABET = 'abcdefghijklmnopqrstuvwxyz .'
CONTEXT, BATCH, WIDTH = 32, 16, 48
BAD_SCALE = 100.0
CONSTANT_NORMS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
TUNING_SEEDS = (100, 101)
HERE = pathlib.Path(__file__).parent


def make_text(length, seed=0):
  """Sentences of invented words, each word calling for some to follow it."""
  rng = np.random.default_rng(seed)
  consonants, vowels = list('bdfgklmnprstvz'), list('aeiou')
  words = [
    ''.join(
      rng.choice(consonants) + rng.choice(vowels)
      for _ in range(rng.integers(1, 4))
    )
    for _ in range(40)
  ]
  follow = rng.dirichlet(np.full(len(words), 0.1), size=len(words))
  text, at = [], 0
  while sum(map(len, text)) < length:
    sentence = []
    for _ in range(rng.integers(3, 9)):
      at = rng.choice(len(words), p=follow[at])
      sentence.append(words[at])
    text.append(' '.join(sentence) + '. ')
  characters = ''.join(text)[:length]
  return np.array([ALPHABET.index(c) for c in characters], np.int32)


class Transformer(nn.Module):
  """Two layers, before whose parts it normalizes."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(len(ALPHABET), WIDTH)(tokens)
    x += self.param('position', nn.initializers.normal(0.1), (CONTEXT, WIDTH))
    mask = nn.make_causal_mask(tokens)
    for _ in range(2):
      y = nn.LayerNorm()(x)
      attention: Any = nn.MultiHeadDotProductAttention(num_heads=4)
      x += attention(y, y, mask=mask)
      y = nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))
      x += nn.Dense(WIDTH)(nn.gelu(y))
    return nn.Dense(len(ALPHABET))(nn.LayerNorm()(x))


def batch_at(text, key, bad):
  """Random windows of the text; random characters where the batch is bad."""
  where, noise = jax.random.split(key)
  starts = jax.random.randint(where, [BATCH, 1], 0, len(text) - CONTEXT - 1)
  windows = text[starts + jnp.arange(CONTEXT + 1)]
  wrong = jax.random.randint(noise, windows.shape, 0, len(ALPHABET))
  return jnp.where(bad, wrong, windows)


def cross_entropy(params, windows):
  logits: Any = Transformer().apply({'params': params}, windows[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, windows[:, 1:]
  ).mean()


def measured():
  """Leaves gradients unchanged, and keeps their norm in its state."""
  return ghm.clip_by_norm(jnp.inf)


def train(make_optimizer, steps, bad_share, texts, setting, key):
  """Validation loss at the end; norms, thresholds and losses on the way."""
  tx = optax.with_extra_args_support(make_optimizer(setting))
  text, validation = texts
  init, which, data = jax.random.split(key, 3)
  tokens = jnp.zeros((1, CONTEXT), jnp.int32)
  params = Transformer().init(init, tokens)['params']
  bad = jax.random.uniform(which, [steps]) < bad_share
  bad &= jnp.arange(steps) >= steps // 10

  def step(carry, t):
    params, state, norm_state = carry
    windows = batch_at(text, jax.random.fold_in(data, t), bad[t])

    def loss(params):
      scale = jnp.where(bad[t], BAD_SCALE, 1.0)
      return scale * cross_entropy(params, windows)

    value, grads = jax.value_and_grad(loss)(params)
    norm_state: Any = measured().update(grads, norm_state)[1]
    updates, state = tx.update(grads, state, params, value=value)
    params = optax.apply_updates(params, updates)
    threshold = optax.tree.get(state, 'threshold', jnp.inf)
    return (params, state, norm_state), (norm_state.norm, threshold, value)

  carry = params, tx.init(params), measured().init(params)
  (params, *_), history = jax.lax.scan(step, carry, jnp.arange(steps))
  windows = validation[: len(validation) // (CONTEXT + 1) * (CONTEXT + 1)]
  windows = windows.reshape(-1, CONTEXT + 1)
  return cross_entropy(params, windows), history


def methods(learning_rate):
  """Makers of optimizers from a setting, which only the constant clip has."""
  adamw = optax.adamw(learning_rate)
  return {
    'no clip': lambda _: adamw,
    'constant clip': lambda norm: optax.chain(
      optax.clip_by_global_norm(norm), adamw
    ),
    'calibrated (clip_by_zscore)': lambda _: ghm.calibrated(adamw),
    'clip_by_percentile': lambda _: ghm.calibrated(
      adamw, ghm.clip_by_percentile()
    ),
    'clip_by_norm_ema': lambda _: ghm.calibrated(adamw, ghm.clip_by_norm_ema()),
    'clip_by_parameter_norm': lambda _: ghm.calibrated(
      adamw, ghm.clip_by_parameter_norm()
    ),
    'skip_spikes': lambda _: ghm.skip_spikes(adamw),
  }


def plot(histories, path):
  """Norms and thresholds over time, and the losses, all of the first seed."""
  colors = {'no clip': '0.6', 'constant clip': 'C1'}
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4), layout='constrained'
  )
  norm, threshold, _ = histories['calibrated (clip_by_zscore)']
  left.semilogy(norm[0], color='C0', lw=0.8, label='gradient norm')
  left.semilogy(threshold[0], color='C3', label='threshold')
  left.set(xlabel='step', ylabel='norm', title='calibrated (clip_by_zscore)')
  left.legend()
  for name in ('no clip', 'constant clip', 'calibrated (clip_by_zscore)'):
    loss = histories[name][2][0]
    good = loss < 2 * np.log(len(ALPHABET))
    steps = np.flatnonzero(good)
    smooth = np.convolve(loss[good], np.full(9, 1 / 9), 'valid')
    right.plot(steps[8:], smooth, color=colors.get(name, 'C0'), label=name)
  right.set(xlabel='step', ylabel='loss of good batches', yscale='log')
  right.legend()
  figure.savefig(path, dpi=120)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--steps', type=int, default=400)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument(
    '--bad', type=float, default=0.02, help='share of batches'
  )
  parser.add_argument('--learning-rate', type=float, default=0.01)
  parser.add_argument(
    '--picture', type=pathlib.Path, default=HERE.parent / 'docs' / 'spikes.png'
  )
  args = parser.parse_args()
  text = make_text(120_000)
  texts = jnp.asarray(text[:100_000]), jnp.asarray(text[100_000:105_000])
  table = Table(
    title=f'{args.steps} steps of AdamW at {args.learning_rate:g},'
    f' {args.bad:.0%} bad batches: validation loss'
  )
  for column in ('', 'mean ± deviation', 'each seed', 'seconds'):
    table.add_column(column)
  seeds = jnp.arange(args.seeds)
  histories, console = {}, Console()
  for name, maker in methods(args.learning_rate).items():
    start, setting = time.perf_counter(), 1.0
    run = jax.jit(
      jax.vmap(
        functools.partial(train, maker, args.steps, args.bad, texts), (None, 0)
      )
    )
    if name == 'constant clip':
      keys = jax.vmap(jax.random.key)(jnp.array(TUNING_SEEDS))
      scores = [run(norm, keys)[0].mean() for norm in CONSTANT_NORMS]
      setting = CONSTANT_NORMS[int(jnp.nanargmin(jnp.stack(scores)))]
    losses, history = run(setting, jax.vmap(jax.random.key)(seeds))
    histories[name] = jax.tree.map(np.asarray, history)
    label = f'{name} at {setting:g}, the best of {len(CONSTANT_NORMS)}'
    console.print(f'{name}: {losses.mean():.3f}')
    table.add_row(
      label if name == 'constant clip' else name,
      f'{losses.mean():.3f} ± {losses.std():.3f}',
      ' '.join(f'{loss:.3f}' for loss in losses),
      f'{time.perf_counter() - start:.0f}',
    )
  console.print(table)
  plot(histories, args.picture)
  console.print(f'written: {args.picture}')


if __name__ == '__main__':
  main()
