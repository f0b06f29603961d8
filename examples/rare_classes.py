"""Rare classes and wrong labels: what each loss makes of them.

Trains the same small network on long-tailed data with cross-entropy, focal
loss, inverse-frequency weights, gradient harmonization, and harmonization with
inverse-frequency weights; with clean labels and with a share of wrong ones.
Every method was tuned on validation data over twelve candidates (``--tune``
does it again). The script prints mean and standard deviation over the seeds,
and draws the distribution of gradient norms before and after harmonization.

  python examples/harmonize.py         # wrong labels alone
  python examples/harmonize.py --full  # with clean labels, more seeds
  python examples/harmonize.py --full --data mammography --path FILE
  python examples/harmonize.py --full --data mnist --path FILE  # mnist.npz
"""

import argparse
import dataclasses
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
from rich.progress import Progress
from rich.table import Table
from sklearn import datasets

import optax_ghm

HERE = pathlib.Path(__file__).parent
BATCH, CHECKPOINTS = 128, 12
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
WRONG = {'clean labels': 0.0, '5 % wrong labels': 0.05}


class Split(NamedTuple):
  """One seed's data. ``wrong`` marks the training labels that were changed."""

  x: np.ndarray
  y: np.ndarray
  wrong: np.ndarray
  x_val: np.ndarray
  y_val: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray


@dataclasses.dataclass(frozen=True)
class Task:
  """A data set: class sizes for training, and how long to train."""

  x: np.ndarray
  y: np.ndarray
  train_sizes: tuple[int, ...]  # of the classes, in an order drawn per seed
  held_out: int | float  # per class and split: a number, or a share
  hidden: int
  steps: int

  @property
  def classes(self):
    """How many classes there are."""
    return len(self.train_sizes)

  def split(self, seed, share_wrong):
    """Training data with wrong labels, and clean validation and test data."""
    rng = np.random.default_rng(seed)
    sizes = np.array(self.train_sizes)
    if self.classes > 2:
      sizes = rng.permutation(sizes)
    train, val, test = [], [], []
    for label, size in enumerate(sizes):
      members = rng.permutation(np.flatnonzero(self.y == label))
      held = self.held_out
      held = held if isinstance(held, int) else int(held * len(members))
      val.append(members[:held])
      test.append(members[held : 2 * held])
      train.append(members[2 * held :][:size])
    train, val, test = map(np.concatenate, (train, val, test))
    wrong = rng.uniform(size=len(train)) < share_wrong
    y = self.y[train].copy()
    y[wrong] += rng.integers(1, self.classes, size=wrong.sum(), dtype=np.int32)
    y %= self.classes
    x = self.x
    return Split(x[train], y, wrong, x[val], self.y[val], x[test], self.y[test])


def load(name, path):
  if name == 'digits':
    pixels, labels = datasets.load_digits(return_X_y=True)
    x, y, long_tail = np.divide(pixels, 16), np.asarray(labels), (100, 30)
    held_out, hidden, steps = 35, 64, 300
  elif name == 'mammography':
    file = np.load(path)
    x, y, long_tail = file['X'], file['y'], None  # as rare as it is
    x = (x - x.mean(0)) / x.std(0)
    held_out, hidden, steps = 0.25, 64, 600
  else:
    file = np.load(path)
    x, y, long_tail = file['x_train'] / 255, file['y_train'], (2000, 100)
    x = x.reshape(-1, 784)
    held_out, hidden, steps = 500, 128, 600
  sizes = np.bincount(y.astype(int))
  if long_tail:
    most, ratio = long_tail
    sizes = np.round(most * ratio ** -np.linspace(0, 1, 10)).astype(int)
  return Task(
    x.astype(np.float32),
    y.astype(np.int32),
    tuple(sizes.tolist()),
    held_out,
    hidden,
    steps,
  )


# The methods: from logits, labels and the inverse frequency of every class to
# one loss per example, and the four settings that each is tuned over.


def cross_entropy(logits, labels, inverse):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def focal(logits, labels, inverse, *, gamma, alpha):
  targets = jax.nn.one_hot(labels, logits.shape[-1])
  losses = optax.losses.sigmoid_focal_loss(
    logits, targets, gamma=gamma, alpha=alpha
  )
  return losses.sum(-1)


def inverse_frequency(logits, labels, inverse, *, power):
  losses = cross_entropy(logits, labels, inverse)
  return (inverse**power)[labels] * losses


def harmonized(logits, labels, inverse, *, width):
  return optax_ghm.softmax_ghm_loss_with_integer_labels(
    logits, labels, density=optax_ghm.WindowedDensity(width=width)
  )


def both(logits, labels, inverse, *, width, power):
  return optax_ghm.softmax_ghm_loss_with_integer_labels(
    logits,
    labels,
    density=optax_ghm.WindowedDensity(width=width),
    weights=(inverse**power)[labels],  # count in the density and in the loss
  )


METHODS = {
  'cross-entropy': (cross_entropy, [{}]),
  'focal loss': (
    focal,
    [{'gamma': g, 'alpha': a} for g in (1.0, 2.0) for a in (None, 0.75)],
  ),
  'inverse frequency': (
    inverse_frequency,
    [{'power': p} for p in (0.25, 0.5, 0.75, 1.0)],
  ),
  'harmonized': (harmonized, [{'width': w} for w in (0.03, 0.1, 0.3, 1.0)]),
  'harmonized × inverse frequency': (
    both,
    [{'width': w, 'power': p} for w in (0.3, 1.0) for p in (0.5, 1.0)],
  ),
}


def network(params, x):
  hidden = jax.nn.relu(x @ params['w1'] + params['b1'])
  return hidden @ params['w2'] + params['b2']


def initial_params(key, inputs, hidden, classes):
  one, two = jax.random.split(key)
  return {
    'w1': jax.random.normal(one, (inputs, hidden)) * np.sqrt(2 / inputs),
    'b1': jnp.zeros(hidden),
    'w2': jax.random.normal(two, (hidden, classes)) * np.sqrt(1 / hidden),
    'b2': jnp.zeros(classes),
  }


def recalls(params, x, y, classes):
  hit = (network(params, x).argmax(-1) == y).astype(jnp.float32)
  return jnp.stack([hit.mean(where=y == c) for c in range(classes)])


@functools.partial(jax.jit, static_argnames=('loss', 'task', 'setting'))
def train(splits, seeds, learning_rates, *, loss, task, setting):
  """Trains all seeds at all learning rates; measures at every checkpoint.

  Returns:
    Validation and test recalls per class, the share of gradient that wrong
    labels take, and the gradient norms, each (rates, seeds, checkpoints, ...).
  """
  hidden, classes, steps = task
  loss = functools.partial(loss, **dict(setting))

  def run(learning_rate, seed, split):
    key = jax.random.key(seed)
    size = split.y.shape[0]
    frequency = jnp.bincount(split.y, length=classes) / size
    inverse = 1 / (classes * jnp.maximum(frequency, 1 / size))
    optimizer = optax.adam(learning_rate)
    params = initial_params(key, split.x.shape[-1], hidden, classes)

    def step(carry, i):
      params, opt_state = carry
      batch = jax.random.choice(jax.random.fold_in(key, i), size, (BATCH,))

      def mean_loss(params):
        logits = network(params, split.x[batch])
        return loss(logits, split.y[batch], inverse).mean()

      updates, opt_state = optimizer.update(
        jax.grad(mean_loss)(params), opt_state
      )
      return (optax.apply_updates(params, updates), opt_state), None

    def checkpoint(carry, i):
      every = steps // CHECKPOINTS
      carry, _ = jax.lax.scan(step, carry, i * every + jnp.arange(every))
      params, _ = carry
      logits = network(params, split.x)
      pull = jax.grad(lambda z: loss(z, split.y, inverse).sum())(logits)
      pull = jnp.linalg.norm(pull, axis=-1)
      own = jax.nn.one_hot(split.y, classes)
      norm = jnp.abs(jax.nn.softmax(logits) - own).sum(-1) / 2
      return carry, (
        recalls(params, split.x_val, split.y_val, classes),
        recalls(params, split.x_test, split.y_test, classes),
        (pull * split.wrong).sum() / pull.sum(),
        norm,
      )

    carry = (params, optimizer.init(params))
    return jax.lax.scan(checkpoint, carry, jnp.arange(CHECKPOINTS))[1]

  over_seeds = jax.vmap(run, (None, 0, 0))
  return jax.vmap(over_seeds, (0, None, None))(learning_rates, seeds, splits)


def run_method(task, splits, seeds, name, setting, learning_rates):
  loss, _ = METHODS[name]
  results = train(
    splits,
    jnp.asarray(seeds),
    jnp.asarray(learning_rates),
    loss=loss,
    task=(task.hidden, task.classes, task.steps),
    setting=tuple(sorted(setting.items())),
  )
  return jax.device_get(results)


def tune(task, splits, seeds, name):
  """The setting with the best mean balanced validation accuracy."""
  best = (-1.0, {})
  settings = METHODS[name][1]
  rates = LEARNING_RATES
  if len(settings) == 1:  # as many candidates for those with nothing to set
    rates = tuple(np.geomspace(1e-3, 1e-1, 12).tolist())
  for setting in settings:
    val = run_method(task, splits, seeds, name, setting, rates)[0]
    score = val.mean(-1).mean(1)  # balanced accuracy, mean over the seeds
    rate, checkpoint = np.unravel_index(score.argmax(), score.shape)
    chosen = {
      'setting': setting,
      'learning_rate': rates[rate],
      'checkpoint': int(checkpoint),
    }
    best = max(best, (float(score.max()), chosen), key=lambda b: b[0])
  return best[1]


def plot(norms, rows, path):
  """Who pulls, before and after harmonization, and what comes of it."""
  import matplotlib as mpl  # noqa: PLC0415

  mpl.use('Agg')
  import matplotlib.pyplot as plt  # noqa: PLC0415

  figure, (left, right) = plt.subplots(
    1, 2, figsize=(12, 4.5), layout='constrained'
  )
  weights, _ = jax.vmap(optax_ghm.harmony_weights)(norms)
  edges = np.linspace(0, 1, 31)
  for label, amount, style in (
    ('examples', np.ones_like(norms), 'k:'),
    ('gradient, cross-entropy', norms, 'C0'),
    ('gradient, harmonized', norms * np.asarray(weights), 'C3'),
  ):
    total, _ = np.histogram(norms, edges, weights=amount)
    share = np.where(total > 0, total / total.sum(), np.nan)
    left.plot((edges[1:] + edges[:-1]) / 2, share, style, label=label)
  left.set(
    yscale='log',
    xlabel='gradient norm g of the example',
    ylabel='share of the whole, per region of 1/30',
    title=f'Who pulls in a trained network, {list(WRONG)[-1]}',
  )
  left.legend(frameon=False)
  names = list(next(iter(rows.values())))
  for offset, (scenario, measured) in zip(
    (-0.2, 0.2), rows.items(), strict=False
  ):
    mean = [measured[n]['balanced'].mean() for n in names]
    deviation = [measured[n]['balanced'].std() for n in names]
    right.barh(
      np.arange(len(names)) + offset, mean, 0.38, xerr=deviation, label=scenario
    )
  right.set_yticks(range(len(names)), names)
  right.invert_yaxis()
  right.set(xlabel='balanced accuracy, mean ± standard deviation')
  right.set_xlim(0.5, 1)
  figure.legend(*right.get_legend_handles_labels(), loc='outside right upper')
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=130)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--data', choices=('digits', 'mammography', 'mnist'), default='digits'
  )
  parser.add_argument('--path', help='npz file of the data, if not digits')
  parser.add_argument('--full', action='store_true', help='the long version')
  parser.add_argument('--seeds', type=int, help='5 or, in short, 3')
  parser.add_argument('--tune', action='store_true', help='tune all again')
  parser.add_argument(
    '--output', type=pathlib.Path, default=HERE / 'output' / 'harmonize.png'
  )
  args = parser.parse_args()
  if args.data != 'digits' and not args.path:
    parser.error(f'--data {args.data} needs --path')
  args.seeds = args.seeds or (5 if args.full else 3)

  console = Console()
  start = time.monotonic()
  task = load(args.data, args.path)
  tuned_file = HERE / 'harmonize_tuned.json'
  tuned = json.loads(tuned_file.read_text()) if tuned_file.exists() else {}
  must_tune = args.tune or args.data not in tuned
  full = args.full or must_tune  # what is tuned is tuned for all
  scenarios = list(WRONG) if full else list(WRONG)[-1:]
  names = [name for name in METHODS if full or name != 'focal loss']
  # Tuned and reported on different seeds: other splits, other first weights.
  seeds, tuning_seeds = range(args.seeds), range(100, 100 + args.seeds)
  rows, norms = {}, None
  with Progress(console=console) as progress:
    bar = progress.add_task('training', total=len(scenarios) * len(names))
    for scenario in scenarios:
      share = WRONG[scenario]
      rows[scenario] = {}
      splits = stack(task, seeds, share)
      for name in names:
        progress.update(bar, description=f'{scenario}: {name}')
        if must_tune:
          tuned.setdefault(args.data, {}).setdefault(scenario, {})[name] = tune(
            task, stack(task, tuning_seeds, share), tuning_seeds, name
          )
        chosen = tuned[args.data][scenario][name]
        _, test, outliers, norm = (
          r[0, :, chosen['checkpoint']]
          for r in run_method(
            task,
            splits,
            seeds,
            name,
            chosen['setting'],
            (chosen['learning_rate'],),
          )
        )
        rows[scenario][name] = {
          'balanced': test.mean(-1),
          'worst': test.min(-1),
          'outliers': outliers,
        }
        if name == 'cross-entropy':
          norms = norm
        progress.advance(bar)
  if must_tune:
    tuned_file.write_text(json.dumps(tuned, indent=1) + '\n')

  for scenario, measured in rows.items():
    table = Table(title=f'{args.data}, {scenario}, {args.seeds} seeds')
    table.add_column('method')
    table.add_column('balanced accuracy', justify='right')
    table.add_column('worst class recall', justify='right')
    table.add_column('gradient of wrong labels', justify='right')
    best = max(m['balanced'].mean() for m in measured.values())
    for name, m in measured.items():
      style = 'bold' if m['balanced'].mean() == best else None
      table.add_row(name, *map(mean_and_deviation, m.values()), style=style)
    console.print(table)
  plot(norms, rows, args.output)
  console.print(f'picture: {args.output}')
  console.print(f'{time.monotonic() - start:.0f} s')


def stack(task, seeds, share):
  """The splits of all seeds, cut to the same training size."""
  splits = [task.split(seed, share) for seed in seeds]
  return Split(*(np.stack(field) for field in zip(*splits, strict=True)))


def mean_and_deviation(values):
  return f'{100 * values.mean():5.1f} ± {100 * values.std():4.1f} %'


if __name__ == '__main__':
  main()
