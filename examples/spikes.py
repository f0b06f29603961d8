"""A character model, bad batches, and what clipping makes of them.

A small transformer learns text that this script makes: sentences of invented
words. Its learning rate is near the edge, and now and then a batch is bad: its
characters are random, and its loss is a hundred times too large, as a wrong
normalizer makes it. Compared are no clip, a constant one, and two that adapt,
with their defaults. The long version has all that adapt, more steps, and the
best of several constant clips, chosen on other seeds.

  python examples/spikes.py
  python examples/spikes.py --full
  python examples/spikes.py --full --bad 0 --learning-rate 0.03
"""

import argparse
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
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
DEMO = 'no clip', 'constant clip', 'calibrated (clip_by_zscore)', 'skip_spikes'
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


class Layer(nnx.Module):
  """Attention and a network of two layers; it normalizes before both."""

  def __init__(self, rngs, **options):
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      num_heads=4, in_features=WIDTH, decode=False, rngs=rngs, **options
    )
    self.second_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
    self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x, mask, **options):
    x += self.attention(self.norm(x), mask=mask, **options)
    return x + self.down(nnx.gelu(self.up(self.second_norm(x))))


class Transformer(nnx.Module):
  """Two layers; the options are those of attention."""

  def __init__(self, rngs, **options):
    self.embed = nnx.Embed(len(ALPHABET), WIDTH, rngs=rngs)
    position = nnx.initializers.normal(0.1)(rngs.params(), (CONTEXT, WIDTH))
    self.position = nnx.Param(position)
    self.layers = nnx.List(Layer(rngs, **options) for _ in range(2))
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.head = nnx.Linear(WIDTH, len(ALPHABET), rngs=rngs)

  def __call__(self, tokens, **options):
    x = self.embed(tokens) + self.position[...]
    mask = nnx.make_causal_mask(tokens)
    for layer in self.layers:
      x = layer(x, mask, **options)
    return self.head(self.norm(x))


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Transformer(nnx.Rngs(0))))
"""All of the model but its parameters, which have an axis of seeds."""


def batch_at(text, key, bad):
  """Random windows of the text; random characters where the batch is bad."""
  where, noise = jax.random.split(key)
  starts = jax.random.randint(where, [BATCH, 1], 0, len(text) - CONTEXT - 1)
  windows = text[starts + jnp.arange(CONTEXT + 1)]
  wrong = jax.random.randint(noise, windows.shape, 0, len(ALPHABET))
  return jnp.where(bad, wrong, windows)


def cross_entropy(params, windows):
  logits = nnx.merge(GRAPH, params)(windows[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, windows[:, 1:]
  ).mean()


@functools.partial(jax.jit, static_argnums=0)
def start(steps, bad_share, keys):
  """For every seed: parameters, the key of its batches, which are bad."""

  def of_seed(key):
    init, which, data = jax.random.split(key, 3)
    params = nnx.as_pure(nnx.state(Transformer(nnx.Rngs(init))))
    bad = jax.random.uniform(which, [steps]) < bad_share
    return params, data, bad & (jnp.arange(steps) >= steps // 10)

  return jax.vmap(of_seed)(keys)


@jax.jit
def gradients(params, data, bad, t, text):
  """For every seed, at step t: the loss, its gradients and their norm."""

  def of_seed(params, key, bad):
    windows = batch_at(text, jax.random.fold_in(key, t), bad)
    scale = jnp.where(bad, BAD_SCALE, 1.0)
    loss, grads = jax.value_and_grad(
      lambda params: scale * cross_entropy(params, windows)
    )(params)
    return loss, grads, optax.tree.norm(grads)

  return jax.vmap(of_seed)(params, data, bad[:, t])


@jax.jit
def validation_losses(params, text):
  windows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)]
  windows = windows.reshape(-1, CONTEXT + 1)
  return jax.vmap(lambda params: cross_entropy(params, windows))(params)


def train(tx, steps, bad_share, texts, seeds):
  """Validation losses at the end; norms, thresholds and losses on the way.

  All have a leading axis of seeds.
  """
  tx = optax.with_extra_args_support(tx)
  keys = jax.vmap(jax.random.key)(jnp.array(seeds))
  params, data, bad = start(steps, bad_share, keys)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  @jax.vmap
  def update(params, state, grads, loss):
    updates, state = tx.update(grads, state, params, value=loss)
    threshold = optax.tree.get(state, 'threshold', jnp.inf)
    return optax.apply_updates(params, updates), state, threshold

  state, history = jax.jit(jax.vmap(tx.init))(params), []
  for t in range(steps):
    loss, grads, norm = gradients(params, data, bad, t, texts[0])
    params, state, threshold = update(params, state, grads, loss)
    history.append((norm, threshold, loss))
  history = [np.stack(u, -1) for u in zip(*history, strict=True)]
  return np.asarray(validation_losses(params, texts[1])), history


def constant_clip(learning_rate, norm):
  return optax.chain(
    optax.clip_by_global_norm(norm), optax.adamw(learning_rate)
  )


def methods(learning_rate):
  adamw = optax.adamw(learning_rate)
  return {
    'no clip': adamw,
    'constant clip': constant_clip(learning_rate, 1.0),
    'calibrated (clip_by_zscore)': ghm.calibrated(adamw),
    'clip_by_percentile': ghm.calibrated(adamw, ghm.clip_by_percentile()),
    'clip_by_norm_ema': ghm.calibrated(adamw, ghm.clip_by_norm_ema()),
    'clip_by_parameter_norm': ghm.calibrated(
      adamw, ghm.clip_by_parameter_norm()
    ),
    'skip_spikes': ghm.skip_spikes(adamw),
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
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--full', action='store_true', help='the long version')
  parser.add_argument('--steps', type=int, help='400 or, in short, 200')
  parser.add_argument('--seeds', type=int, help='3 or, in short, 2')
  parser.add_argument(
    '--bad', type=float, default=0.02, help='share of batches'
  )
  parser.add_argument('--learning-rate', type=float, default=0.01)
  parser.add_argument(
    '--picture', type=pathlib.Path, default=HERE / 'output' / 'spikes.png'
  )
  args = parser.parse_args()
  args.steps = args.steps or (400 if args.full else 200)
  args.seeds = args.seeds or (3 if args.full else 2)
  text = make_text(120_000)
  texts = jnp.asarray(text[:100_000]), jnp.asarray(text[100_000:105_000])
  table = Table(
    title=f'{args.steps} steps of AdamW at {args.learning_rate:g},'
    f' {args.bad:.0%} bad batches: validation loss'
  )
  for column in ('', 'mean ± deviation', 'each seed', 'seconds'):
    table.add_column(column)
  histories, console = {}, Console()
  every = methods(args.learning_rate)
  settings = args.steps, args.bad, texts
  for name in every if args.full else DEMO:
    tx, label, began = every[name], name, time.perf_counter()
    console.print(f'{name}: ', end='')
    if name == 'constant clip' and args.full:
      clips = {c: constant_clip(args.learning_rate, c) for c in CONSTANT_NORMS}
      scores = {
        norm: train(clip, *settings, TUNING_SEEDS)[0].mean()
        for norm, clip in clips.items()
      }
      best = min(scores, key=lambda norm: np.nan_to_num(scores[norm], nan=1e9))
      tx, label = clips[best], f'{name} at {best:g}, the best of {len(scores)}'
    losses, histories[name] = train(tx, *settings, range(args.seeds))
    console.print(f'{losses.mean():.3f}')
    table.add_row(
      label,
      f'{losses.mean():.3f} ± {losses.std():.3f}',
      ' '.join(f'{loss:.3f}' for loss in losses),
      f'{time.perf_counter() - began:.0f}',
    )
  console.print(table)
  plot(histories, args.picture)
  console.print(f'written: {args.picture}')


if __name__ == '__main__':
  main()
