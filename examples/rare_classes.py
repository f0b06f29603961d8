"""Rare classes, wrong labels, hidden rare groups: what each loss makes of them.

- Rare classes: scikit-learn's digits, 100 examples of the most frequent class
  down to 3 of the rarest, some labels of the training data wrong. The AUPRC,
  the mean over the classes, does not move by a shift toward rare classes alone.
- Hidden groups: half of the classes upright and half turned by 90 degrees, but
  3 % of each the other way round. No class weight can name these.

Every method was tuned over twelve candidates, of learning rates and of its own
parameter, on other splits of the same images than those reported (``--tune``
does it again). Tuning knows the hidden groups; training never does.

  python examples/rare_classes.py         # rare classes, 5 % wrong labels
  python examples/rare_classes.py --full  # everything, more seeds
"""

import argparse
import functools
import json
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn import datasets, metrics

import optax_ghm

HERE = pathlib.Path(__file__).parent
TUNED = HERE / 'rare_classes_tuned.json'
CLASSES, TEST_SIZE, MOST, LEAST = 10, 50, 100, 3  # examples per class
RARE_STYLE = 0.03  # of every class, in training
BATCH, STEPS, HIDDEN = 128, 300, 64
RATES = tuple(np.geomspace(1e-3, 0.1, 12).tolist())
FOUR = RATES[1::3]
PARTS = {
  'rare classes': ('balanced accuracy', 'worst class', 'AUPRC'),
  'hidden groups': ('rare style', 'common style'),
}
MAIN = {'rare classes': 2, 'hidden groups': 0}  # the score to compare by
WRONG = {'clean labels': 0.0, '5 % wrong': 0.05, '20 % wrong': 0.2}


class Split(NamedTuple):
  """Training data, maybe with wrong labels, and clean test data."""

  x: np.ndarray
  y: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray
  batches: np.ndarray  # indices, (steps, BATCH)
  params: tuple[np.ndarray, ...]  # at the start


def split(part, wrong, seed):
  pixels, labels = datasets.load_digits(return_X_y=True)
  x = np.asarray(pixels, np.float32).reshape(-1, 8, 8) / 16
  y = np.asarray(labels, np.int32)
  rng = np.random.default_rng(seed)
  if part == 'rare classes':
    sizes = rng.permutation(np.geomspace(MOST, LEAST, CLASSES))
  else:
    sizes = np.full(CLASSES, MOST)
  train, test = [], []
  for label, size in enumerate(np.round(sizes).astype(int)):
    members = rng.permutation(np.flatnonzero(y == label))
    test.append(members[:TEST_SIZE])
    train.append(members[TEST_SIZE:][:size])
  train, test = np.concatenate(train), np.concatenate(test)
  x_train, y_train, x_test, y_test = x[train], y[train], x[test], y[test]
  if part == 'hidden groups':
    turned = rng.permutation(CLASSES) < CLASSES // 2
    rare = np.arange(train.size) % MOST < RARE_STYLE * MOST
    x_train = turn(x_train, turned[y_train] ^ rare)
    # Every test image in the rare style of its class, then in the common one.
    common = turned[y_test]
    x_test = np.concatenate([turn(x_test, ~common), turn(x_test, common)])
    y_test = np.concatenate([y_test, y_test])
  changed = rng.permutation(train.size)[: round(wrong * train.size)]
  y_train[changed] += rng.integers(1, CLASSES, changed.size, dtype=np.int32)
  return Split(
    x_train.reshape(-1, 64),
    y_train % CLASSES,
    x_test.reshape(-1, 64),
    y_test,
    rng.integers(train.size, size=(STEPS, BATCH), dtype=np.int32),
    layer(rng, 64, HIDDEN, np.sqrt(2 / 64)) + layer(rng, HIDDEN, CLASSES, 0.02),
  )


def layer(rng, inputs, outputs, scale):
  weights = rng.normal(0, scale, (inputs, outputs))
  return weights.astype(np.float32), np.zeros(outputs, np.float32)


def turn(x, where):
  """Images turned by 90 degrees where told."""
  return np.where(where[:, None, None], np.rot90(x, axes=(1, 2)), x)


def stack(part, wrong, seeds):
  """The splits of all seeds."""
  splits = [split(part, wrong, seed) for seed in seeds]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *splits)


# Losses: from logits, labels and how many examples every class has.


def cross_entropy(logits, labels, counts):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def inverse_frequency(logits, labels, counts, *, power):
  weights = jnp.maximum(counts, 1) ** -power
  average = jnp.sum(counts * weights) / jnp.sum(counts)
  return (weights / average)[labels] * cross_entropy(logits, labels, counts)


def focal(logits, labels, counts, *, gamma):
  losses = cross_entropy(logits, labels, counts)
  # From below: a power has no derivative at 0.
  return jnp.maximum(-jnp.expm1(-losses), 1e-6) ** gamma * losses


def weighted(logits, labels, counts, **setting):
  weighting = optax_ghm.HarmonyWeighting(**setting)
  return optax_ghm.softmax_ghm_loss_with_integer_labels(
    logits, labels, weighting=weighting
  )


def adjusted(loss):
  return lambda logits, labels, counts, **setting: loss(
    optax_ghm.adjust_logits(logits, counts), labels, counts, **setting
  )


POWERS = [{'power': p} for p in (0.5, 0.75, 1.0)]
GAMMAS = [{'gamma': g} for g in (0.5, 1.0, 2.0)]
GCE = {'exponent': 0.0, 'normalize': False}
GENERALIZED = [{**GCE, 'robustness': q} for q in (0.2, 0.5, 0.8)]
GHM = [{'exponent': 1.0, 'robustness': 0.0}]  # which is optax_ghm.GHM
METHODS = {
  'rare classes': {
    'cross-entropy': (cross_entropy, [{}]),
    'inverse frequency': (inverse_frequency, POWERS),
    'focal': (focal, GAMMAS),
    'logit adjustment': (adjusted(cross_entropy), [{}]),
    'generalized CE, adjusted': (adjusted(weighted), GENERALIZED),
    'GHM, adjusted': (adjusted(weighted), GHM),
    'default, adjusted': (adjusted(weighted), [{}]),
  },
  'hidden groups': {  # the classes are of equal size
    'cross-entropy': (cross_entropy, [{}]),
    'focal': (focal, GAMMAS),
    'generalized CE': (weighted, GENERALIZED),
    'GHM': (weighted, GHM),
    'default': (weighted, [{}]),
  },
}


def network(params, x):
  w1, b1, w2, b2 = params
  return jax.nn.relu(x @ w1 + b1) @ w2 + b2


@functools.partial(jax.jit, static_argnames=('loss', 'setting'))
def train(splits, rates, *, loss, setting):
  """Logits of test examples, norms of training ones: (rates, splits, ...)."""

  def run(rate, split):
    counts = jnp.bincount(split.y, length=CLASSES)
    steps = split.batches.shape[0]
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, batch):
      params, opt_state = carry

      def mean_loss(params):
        logits = network(params, split.x[batch])
        labels = split.y[batch]
        return jnp.mean(loss(logits, labels, counts, **dict(setting)))

      grads = jax.grad(mean_loss)(params)
      updates, opt_state = optimizer.update(grads, opt_state)
      return (optax.apply_updates(params, updates), opt_state), None

    start = split.params, optimizer.init(split.params)
    (params, _), _ = jax.lax.scan(step, start, split.batches)
    logits = optax_ghm.adjust_logits(network(params, split.x), counts)
    norms = -jnp.expm1(-cross_entropy(logits, split.y, counts))
    return network(params, split.x_test), norms

  over_splits = jax.vmap(run, (None, 0))
  return jax.vmap(over_splits, (0, None))(jnp.asarray(rates), splits)


def measure(part, logits, labels):
  """The scores of one trained network, as in ``PARTS``."""
  right = logits.argmax(-1) == labels
  if part == 'hidden groups':
    return right.reshape(2, -1).mean(-1)
  recalls = [right[labels == c].mean() for c in range(CLASSES)]
  auprc = metrics.average_precision_score(
    np.eye(CLASSES)[labels], np.asarray(jax.nn.softmax(logits)), average='macro'
  )
  return np.array([np.mean(recalls), np.min(recalls), auprc])


def run_method(part, name, splits, rates, setting):
  """Scores, (rates, splits, scores), and the norms of training examples."""
  how = {'loss': METHODS[part][name][0], 'setting': tuple(setting.items())}
  logits, norms = jax.device_get(train(splits, rates, **how))
  scores = [
    [measure(part, z, y) for z, y in zip(of_rate, splits.y_test, strict=True)]
    for of_rate in logits
  ]
  return np.array(scores), norms


def tune(part, name, splits):
  """The candidate with the best mean score; the worst class does not count."""
  settings = METHODS[part][name][1]
  rates = RATES if len(settings) == 1 else FOUR
  candidates = []
  for setting in settings:
    scores, _ = run_method(part, name, splits, rates, setting)
    scores = scores[..., [0, -1]].mean((1, 2))
    at = scores.argmax()
    candidates.append((scores[at], {'rate': rates[at], 'setting': setting}))
  return max(candidates, key=lambda c: c[0])[1]


def print_table(console, part, wrong, rows):
  main, seeds = MAIN[part], len(rows['cross-entropy'])
  table = Table(
    title=f'{part}, {wrong}, {seeds} seeds: mean ± deviation, %',
    caption='last column: paired over seeds, ± standard error',
  )
  for name in ('method', *PARTS[part], f'{PARTS[part][main]} − CE'):
    table.add_column(name, justify='left' if name == 'method' else 'right')
  for name, scores in rows.items():
    columns = 100 * scores.T
    cells = [f'{s.mean():.1f} ± {s.std(ddof=1):.1f}' for s in columns]
    gain = columns[main] - 100 * rows['cross-entropy'][:, main]
    error = gain.std(ddof=1) / np.sqrt(seeds)
    table.add_row(name, *cells, f'{gain.mean():+.1f} ± {error:.1f}')
  console.print(table)


def plot(norms, results, path):
  """Who pulls, by three weightings, and what comes of it."""
  import matplotlib as mpl  # noqa: PLC0415

  mpl.use('Agg')
  import matplotlib.pyplot as plt  # noqa: PLC0415

  columns = 1 + len(results)
  figure, (left, *others) = plt.subplots(1, columns, figsize=(6 * columns, 4))
  edges = np.linspace(0, 1, 31)
  for label, weighting in (
    ('plain', optax_ghm.HarmonyWeighting(exponent=0.0, robustness=0.0)),
    ('GHM', optax_ghm.GHM),
    ('the default', optax_ghm.HarmonyWeighting()),
  ):
    weigh = functools.partial(optax_ghm.harmony_weights, weighting=weighting)
    weights, _ = jax.vmap(weigh)(norms)
    total, _ = np.histogram(norms, edges, weights=norms * np.asarray(weights))
    left.plot((edges[1:] + edges[:-1]) / 2, total / total.sum(), label=label)
  left.set(yscale='log', title='Who pulls at the end, 5 % wrong labels')
  left.set_xlabel('gradient norm 1 − p of the example')
  left.set_ylabel('share of the gradient')
  left.legend(frameon=False)
  for axis, (part, scenarios) in zip(others, results.items(), strict=True):
    height = 0.8 / len(scenarios)
    for i, (wrong, rows) in enumerate(scenarios.items()):
      scores = 100 * np.array(list(rows.values()))[..., MAIN[part]]
      where = np.arange(len(rows)) + (i + 0.5) * height - 0.4
      mean, error = scores.mean(1), scores.std(1, ddof=1)
      axis.barh(where, mean, 0.9 * height, xerr=error, label=wrong)
    axis.set_yticks(range(len(METHODS[part])), METHODS[part])
    axis.invert_yaxis()
    axis.set(
      title=part, xlabel=f'{PARTS[part][MAIN[part]]}, mean ± deviation, %'
    )
    axis.set_xlim(left=60 if part == 'rare classes' else 0)
  others[-1].legend(loc='upper left', bbox_to_anchor=(1, 1), frameon=False)
  figure.tight_layout()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--full', action='store_true', help='the long version')
  parser.add_argument('--seeds', type=int, help='12 or, in short, 5')
  parser.add_argument('--tune', action='store_true', help='tune all again')
  output = HERE / 'output' / 'rare_classes.png'
  parser.add_argument('--output', type=pathlib.Path, default=output)
  args = parser.parse_args()
  full = args.full or args.tune
  seeds = range(args.seeds or (12 if full else 5))
  console, start = Console(), time.monotonic()
  tuned = {} if args.tune else json.loads(TUNED.read_text())
  parts = list(PARTS) if full else ['rare classes']
  noise = list(WRONG) if full else ['5 % wrong']
  jobs = [(p, w, n) for p in parts for w in noise for n in METHODS[p]]
  results, norms = {}, None
  for part, wrong, name in track(jobs, 'training', console=console):
    of_scenario = tuned.setdefault(part, {}).setdefault(wrong, {})
    if args.tune:
      splits = stack(part, WRONG[wrong], range(100, 106))
      of_scenario[name] = tune(part, name, splits)
    rate, setting = of_scenario[name].values()
    splits = stack(part, WRONG[wrong], seeds)
    scores, norm = run_method(part, name, splits, (rate,), setting)
    results.setdefault(part, {}).setdefault(wrong, {})[name] = scores[0]
    if (wrong, name) == ('5 % wrong', 'logit adjustment'):
      norms = norm[0]
  if args.tune:
    TUNED.write_text(json.dumps(tuned, indent=1) + '\n')
  for part, scenarios in results.items():
    for wrong, rows in scenarios.items():
      print_table(console, part, wrong, rows)
  plot(norms, results, args.output)
  console.print(f'picture: {args.output}')
  console.print(f'{time.monotonic() - start:.0f} s')


if __name__ == '__main__':
  main()
