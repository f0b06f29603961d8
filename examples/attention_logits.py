"""Attention logits that explode, and what holds them.

The character model of ``spikes.py``, in which the queries and keys learn thirty
times too fast, as they do in large models when nobody looks. The largest logit
then grows without an end, the softmax becomes an argmax, and the loss stays
high. No batch is bad, and the gradients do not spike. Compared are what clips
the gradient, what clips the update, what leaves steps out, QK-clip, and a
normalization of queries and keys. The long version has all of them, more steps,
and chooses one setting of each method on other seeds.

  python examples/attention_logits.py
  python examples/attention_logits.py --full
"""

import argparse
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table
from spikes import CONTEXT, Transformer, batch_at, make_text

import optax_ghm as ghm
from optax_ghm.calibration import qk_clip
from optax_ghm.nnx import dot_product_attention

mpl.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

RATE, FASTER = 0.003, 30.0
TUNING_SEEDS = (100, 101)
DEMO = 'calibrated (clip_by_zscore)', 'qk_clip', 'normalized queries'
HERE = pathlib.Path(__file__).parent


def make_model(normalize_qk, key):
  """The model of ``spikes.py``, whose attention sows its largest logits."""
  return Transformer(
    nnx.Rngs(key),
    normalize_qk=normalize_qk,
    attention_fn=dot_product_attention,
  )


def adamw(weight_decay=1e-4, clip_update=None):
  """AdamW that moves queries and keys too fast."""

  def is_query_or_key(path, _):
    return any(key.key in ('query', 'key') for key in path)

  return optax.chain(
    optax.scale_by_adam(),
    clip_update or optax.identity(),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(RATE),
    optax.masked(
      optax.scale(FASTER),
      functools.partial(jax.tree_util.tree_map_with_path, is_query_or_key),
    ),
  )


class Method(NamedTuple):
  """How to train, up to one number.

  Attributes:
    optimizer: from the number to the optimizer.
    choices: of the number, the one of the short version first.
    normalize_qk: whether the model normalizes queries and keys.
  """

  optimizer: Any
  choices: tuple
  normalize_qk: bool = False


DECAYS = 0.01, 0.1, 1.0, 10.0
METHODS = {
  'AdamW': Method(adamw, DECAYS),
  'constant clip': Method(
    lambda norm: optax.chain(ghm.clip_by_norm(norm), adamw()),
    (0.3, 0.03, 0.1, 1.0),
  ),
  'calibrated (clip_by_zscore)': Method(
    lambda z: ghm.calibrated(adamw(), ghm.clip_by_zscore(z)),
    (1.0, 0.1, 0.3, 2.5),
  ),
  'skip_spikes': Method(
    lambda k: ghm.skip_spikes(adamw(), sigmas=k), (3.0, 1.5, 2.0, 6.0)
  ),
  'clip_by_rms behind the moments': Method(
    lambda rms: adamw(clip_update=ghm.clip_by_rms(rms)), (0.1, 0.01, 0.03, 0.3)
  ),
  'qk_clip': Method(
    lambda threshold: optax.chain(adamw(), qk_clip(threshold)),
    (3.0, 1.0, 10.0, 30.0),
  ),
  'normalized queries': Method(adamw, DECAYS, normalize_qk=True),
}


def cross_entropy(graph, params, windows):
  """The mean loss, and what the attention sows."""
  model = nnx.merge(graph, params)
  logits, sown = nnx.capture(model, nnx.Intermediate)(
    windows[:, :-1], sow_weights=True
  )
  loss = optax.softmax_cross_entropy_with_integer_labels(
    logits, windows[:, 1:]
  ).mean()
  return loss, nnx.as_pure(sown)


@functools.partial(jax.jit, static_argnums=0)
def start(normalize_qk, keys):
  """For every seed: parameters."""
  return jax.vmap(
    lambda key: nnx.as_pure(nnx.state(make_model(normalize_qk, key)))
  )(keys)


@functools.partial(jax.jit, static_argnums=0)
def gradients(graph, params, keys, t, text):
  """For every seed, at step t: the loss, its gradients, the largest logits."""

  def of_seed(params, key):
    windows = batch_at(text, jax.random.fold_in(key, t), bad=False)
    (loss, sown), grads = jax.value_and_grad(
      lambda params: cross_entropy(graph, params, windows), has_aux=True
    )(params)
    return loss, grads, sown

  return jax.vmap(of_seed)(params, keys)


@functools.partial(jax.jit, static_argnums=0)
def validation_losses(graph, params, text):
  windows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)]
  windows = windows.reshape(-1, CONTEXT + 1)
  losses = jax.vmap(lambda params: cross_entropy(graph, params, windows)[0])
  return losses(params)


def train(method, number, steps, texts, seeds):
  """Validation losses; the losses and the largest logits on the way.

  All have a leading axis of seeds.
  """
  graph = nnx.graphdef(
    nnx.eval_shape(functools.partial(make_model, method.normalize_qk, 0))
  )
  tx = optax.with_extra_args_support(method.optimizer(number))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  @jax.vmap
  def update(params, state, grads, loss, sown):
    updates, state = tx.update(
      grads, state, params, value=loss, max_logits=sown
    )
    largest = jnp.max(jnp.stack(jax.tree.leaves(sown)))
    return optax.apply_updates(params, updates), state, largest

  keys = jax.vmap(jax.random.key)(jnp.array(seeds))
  params, history = start(method.normalize_qk, keys), []
  state = jax.jit(jax.vmap(tx.init))(params)
  for t in range(steps):
    loss, grads, sown = gradients(graph, params, keys, t, texts[0])
    params, state, largest = update(params, state, grads, loss, sown)
    history.append((loss, largest))
  history = [np.stack(u, -1) for u in zip(*history, strict=True)]
  return np.asarray(validation_losses(graph, params, texts[1])), history


def plot(histories, path):
  """Largest logits and losses over time, of the first seed."""
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4), layout='constrained'
  )
  for name, (loss, largest) in histories.items():
    left.semilogy(largest[0], label=name)
    smooth = np.convolve(loss[0], np.full(9, 1 / 9), 'valid')
    right.plot(np.arange(8, len(loss[0])), smooth, label=name)
  left.set(xlabel='step', ylabel='largest logit of all heads')
  right.set(xlabel='step', ylabel='training loss')
  right.legend()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--full', action='store_true', help='the long version')
  parser.add_argument('--steps', type=int, help='400 or, in short, 100')
  parser.add_argument('--seeds', type=int, help='3 or, in short, 2')
  parser.add_argument(
    '--picture',
    type=pathlib.Path,
    default=HERE / 'output' / 'attention_logits.png',
  )
  args = parser.parse_args()
  steps = args.steps or (400 if args.full else 100)
  seeds = range(args.seeds or (3 if args.full else 2))
  text = make_text(120_000)
  texts = jnp.asarray(text[:100_000]), jnp.asarray(text[100_000:105_000])
  table = Table(title=f'{steps} steps: validation loss and largest logit')
  for column in ('', 'loss ± deviation', 'each seed', 'logit', 'seconds'):
    table.add_column(column)
  histories, console = {}, Console()
  for name in METHODS if args.full else DEMO:
    method, began = METHODS[name], time.perf_counter()
    number = method.choices[0]
    if args.full:
      scores = {
        choice: train(method, choice, steps, texts, TUNING_SEEDS)[0].mean()
        for choice in method.choices
      }
      console.print(f'{name}: {scores}')
      number = min(scores, key=lambda x: np.nan_to_num(scores[x], nan=1e9))
    losses, histories[name] = train(method, number, steps, texts, seeds)
    table.add_row(
      f'{name}, {number:g}',
      f'{losses.mean():.3f} ± {losses.std():.3f}',
      ' '.join(f'{loss:.3f}' for loss in losses),
      f'{histories[name][1][:, -1].max():.0f}',
      f'{time.perf_counter() - began:.0f}',
    )
  console.print(table)
  plot(histories, args.picture)
  console.print(f'written: {args.picture}')


if __name__ == '__main__':
  main()
