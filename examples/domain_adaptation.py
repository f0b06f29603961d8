"""Training where there are labels, for a place where there are none.

Networks are trained on a labeled source domain, with an unlabeled target domain
beside it: on the source alone; with each domain's own batch statistics; by
DANN, whose reversed gradient keeps the features from telling the domains apart;
and by CDAN, which does the same class by class. The domain loss has several
weights, the reversal two schedules, and the training two lengths. Scores of
unlabeled target examples decide which network is taken. The labels of the
target serve the report alone: how good each network is, and how good the one
that each score chooses.

  python examples/domain_adaptation.py         # a few networks, short trainings
  python examples/domain_adaptation.py --full  # all of them, three seeds
  python examples/domain_adaptation.py --full --data mnist --path FOLDER
  python examples/domain_adaptation.py --full --data amazon --path FOLDER

The data are
- digits: from scikit-learn's digits to a textured and inverted copy of others;
- mnist: from MNIST (mnist.npz) to MNIST-M (mnistm_10k.npz), with the arrays
  x_train, y_train, x_test and y_test in uint8. The first digits of MNIST are
  those of MNIST-M, and are left out of the source;
- amazon: from reviews of books to reviews of other goods, as in the DANN paper
  (amazon_reviews.npz, with CSR matrices such as books_train_data).

With --skewness every channel of every image is brought to positive skewness, so
that the fewer pixels are the light ones. It helps much on MNIST-M, as was seen
from labels of the target: it is not among the choices.
"""

import argparse
import dataclasses
import functools
import pathlib
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from rich.table import Table
from scipy import stats
from sklearn import datasets

import optax_ghm
from optax_ghm import reversal
from optax_ghm.linen import DomainBatchNorm, GradientReversal, recalibrate

HERE = pathlib.Path(__file__).parent
BATCH, AVERAGING = 64, 0.99
DEMO_STEPS = 240
OPTIMIZER = optax.adam(1e-3, b1=0.5)


class Task(NamedTuple):
  """Labeled source, unlabeled target, and target data to report on."""

  x_source: np.ndarray
  y_source: np.ndarray
  x_held_out: np.ndarray
  y_held_out: np.ndarray
  x_target: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray
  trunk: nn.Module
  classes: int
  steps: int


@dataclasses.dataclass(frozen=True)
class Method:
  """What is trained.

  Attributes:
    adversary: None, 'dann' (sees the features) or 'cdan' (sees them times the
      predicted classes).
    entropy: whether sure predictions count more for the adversary (CDAN+E).
    weight: factor of the domain loss; 2 makes it the sum of the two domains'
      means.
    gamma: how steeply λ rises over the training; at 1,000 it is 1 at once.
    own_statistics: whether each domain is batch-normalized by its own
      statistics, in training and when it is scored (DomainBatchNorm).
    standardize: 'no'; 'moments', every image to mean 0 and deviation 1;
      'skewness', every channel of an image to the same, with positive skewness.
  """

  adversary: Literal['dann', 'cdan'] | None = None
  entropy: bool = False
  weight: float = 2.0
  gamma: float = 10.0
  own_statistics: bool = True
  standardize: Literal['no', 'moments', 'skewness'] = 'moments'


CDAN_E = Method('cdan', entropy=True)
OF_ANY_DATA = {
  'source only': Method(own_statistics=False),
  'DANN': Method('dann'),
  'DANN, weight 0.5': Method('dann', weight=0.5),
  'CDAN, λ = 1 at once': Method('cdan', gamma=1000.0),
  'CDAN+E': CDAN_E,
  'CDAN+E, weight 6': dataclasses.replace(CDAN_E, weight=6.0),
}
OF_IMAGES = {
  **OF_ANY_DATA,
  "the target's own statistics": Method(),
  'CDAN+E, statistics of both': dataclasses.replace(
    CDAN_E, own_statistics=False
  ),
  'DANN, images as they are': Method('dann', standardize='no'),
}
DEMO = 'source only', 'DANN', 'CDAN+E'
LARGER_IS_BETTER = {
  'mutual information': True,
  'MaNo': True,
  'entropy': False,
  'neighbor density': True,
  'MixVal': True,
  'source accuracy': True,
  'weighted risk': False,
  'DEV': False,
}


# Data.


def load_digits(seed):
  """Half of the digits as they are; the others textured and inverted."""
  rng = np.random.default_rng(seed)
  pixels, y = datasets.load_digits(return_X_y=True)
  x = np.divide(pixels, 16).reshape(-1, 8, 8, 1).astype(np.float32)
  order = rng.permutation(len(x))
  x, y = x[order], np.asarray(y)[order].astype(np.int32)
  source, half, test = 700, 900, 1350
  coarse = rng.uniform(0.1, 0.6, (len(x), 3, 3, 3)).astype(np.float32)
  texture = np.asarray(jax.image.resize(coarse, (len(x), 8, 8, 3), 'linear'))
  other = np.abs(texture - x)  # light strokes turn dark, as in MNIST-M
  x = np.repeat(x, 3, -1)
  return Task(
    *(x[:source], y[:source], x[source:half], y[source:half]),
    *(other[half:test], other[test:], y[test:]),
    trunk=Images(kernel=3, stride=1),
    classes=10,
    steps=1000,
  )


def load_mnist(folder):
  source = np.load(folder / 'mnist.npz')
  target = np.load(folder / 'mnistm_10k.npz')
  unseen = len(target['x_train'])  # MNIST-M's digits are MNIST's first
  x = np.repeat(source['x_train'][unseen:, ..., None], 3, -1)
  y = source['y_train'][unseen:].astype(np.int32)
  return Task(
    *(x[5000:], y[5000:], x[:5000], y[:5000]),
    *(target['x_train'], target['x_test'], target['y_test'].astype(np.int32)),
    trunk=Images(kernel=5, stride=2),
    classes=10,
    steps=1500,
  )


def load_amazon(folder, target):
  file = np.load(folder / 'amazon_reviews.npz')

  def dense(split):
    indptr = file[f'{split}_indptr']
    x = np.zeros((len(indptr) - 1, 5000), np.float32)
    rows = np.repeat(np.arange(len(x)), np.diff(indptr))
    x[rows, file[f'{split}_indices']] = np.log1p(file[f'{split}_data'])
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    return x, (file[f'{split}_y'] > 0).astype(np.int32)

  x, y = dense('books_train')
  return Task(
    *(x[400:], y[400:], x[:400], y[:400]),
    *(dense(f'{target}_train')[0], *dense(f'{target}_test')),
    trunk=Words(),
    classes=2,
    steps=1000,
  )


# Network.


class Images(nn.Module):
  """Two convolutions and a dense layer, each batch-normalized by domain."""

  kernel: int
  stride: int

  @nn.compact
  def __call__(self, x, domain, train):
    size = (self.kernel, self.kernel)

    def norm(x):
      return DomainBatchNorm(
        use_running_average=not train,
        momentum=0.9,
        num_domains=2,
        shared_affine=True,
      )(x, domain)

    x = nn.Conv(32, size, self.stride, padding='VALID')(x)
    x = nn.relu(norm(x))
    x = nn.Conv(48, size, padding='VALID')(x)
    n, h, w, c = x.shape
    x = x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
    x = nn.relu(norm(x)).reshape(n, -1)
    return nn.relu(norm(nn.Dense(100)(x)))


class Words(nn.Module):
  """One hidden layer, as the paper has it for the reviews."""

  @nn.compact
  def __call__(self, x, domain, train):
    return nn.relu(nn.Dense(100)(x))


class Network(nn.Module):
  """Features, a class predictor, and the adversary behind the reversal."""

  trunk: nn.Module
  classes: int
  method: Method

  def setup(self):
    self.predictor = nn.Dense(self.classes)
    self.adversary = nn.Sequential([nn.Dense(500), nn.relu, nn.Dense(1)])
    self.reverse = GradientReversal()

  def __call__(self, x, domain, train=False):
    if not self.method.own_statistics:
      domain = jnp.zeros_like(domain)
    features = self.trunk(self.prepare(x), domain, train)
    return features, self.predictor(features)

  def prepare(self, x):
    if x.ndim < 4 or self.method.standardize == 'no':
      return x
    skewness = self.method.standardize == 'skewness'
    mean = functools.partial(
      jnp.mean, axis=(1, 2) if skewness else (1, 2, 3), keepdims=True
    )
    x = x - mean(x)
    x = x / jnp.sqrt(mean(x**2) + 1e-6)
    return jnp.where(mean(x**3) < 0, -x, x) if skewness else x

  def domain_logits(self, features, class_logits, scale):
    if self.method.adversary == 'cdan':
      features = optax_ghm.multilinear_map(
        features, jax.lax.stop_gradient(jax.nn.softmax(class_logits))
      )
    return self.adversary(self.reverse(features, scale))[:, 0]

  def initialize(self, x):
    return self.domain_logits(*self(x, 0), 0.0)


class TrainState(NamedTuple):
  """The state of a training run."""

  params: Any
  averaged: Any
  opt_state: Any
  statistics: Any


# Training.


def as_floats(x):
  return x.astype(np.float32) / (255 if x.dtype == np.uint8 else 1)


@functools.partial(jax.jit, static_argnames=('network', 'steps'))
def train_step(state, i, key, data, *, network, steps):
  """Step ``i`` of a training run of ``steps`` steps."""
  x_source, y_source, x_target = data
  method = network.method
  scale = optax_ghm.dann_reversal_schedule(steps, gamma=method.gamma)(i)

  one, two = jax.random.split(jax.random.fold_in(key, i))
  here = jax.random.choice(one, len(x_source), (BATCH,))
  there = jax.random.choice(two, len(x_target), (BATCH,))
  x, domain = x_source[here], jnp.zeros(BATCH, jnp.int32)
  if method.own_statistics or method.adversary:
    x = jnp.concatenate([x, x_target[there]])
    domain = jnp.repeat(jnp.arange(2), BATCH)

  def loss(params):
    (features, logits), updated = network.apply(
      {'params': params, 'batch_stats': state.statistics},
      as_floats(x),
      domain,
      train=True,
      mutable=['batch_stats'],
    )
    total = optax.softmax_cross_entropy_with_integer_labels(
      logits[:BATCH], y_source[here]
    ).mean()
    if method.adversary:
      domain_logits = network.apply(
        {'params': params},
        features,
        logits,
        scale,
        method=Network.domain_logits,
      )
      weights = optax_ghm.entropy_weights(logits) if method.entropy else None
      total += (
        method.weight
        * optax_ghm.domain_loss(domain_logits, domain, weights=weights).mean()
      )
    return total, updated.get('batch_stats', {})

  grads, statistics = jax.grad(loss, has_aux=True)(state.params)
  updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  averaged = optax.incremental_update(
    params, state.averaged, 1 - jnp.minimum(AVERAGING, (1 + i) / (10 + i))
  )
  return TrainState(params, averaged, opt_state, statistics)


def train(task, method, seed, steps):
  """Yields the network after a third of the steps, and after all of them."""
  network = Network(task.trunk, task.classes, method)
  key = jax.random.key(seed)
  variables = jax.jit(network.init, static_argnames='method')(
    key, as_floats(task.x_source[:2]), method=Network.initialize
  )
  params, statistics = variables['params'], variables.get('batch_stats', {})
  state = TrainState(params, params, OPTIMIZER.init(params), statistics)
  data = tuple(map(jnp.asarray, (task.x_source, task.y_source, task.x_target)))
  for i in range(steps):  # not a scan: XLA's convolutions are slow inside one
    state = train_step(state, i, key, data, network=network, steps=steps)
    if i + 1 in (steps // 3, steps):
      variables = {'params': state.averaged, 'batch_stats': state.statistics}
      yield (
        i + 1,
        functools.partial(
          predict, network, with_statistics(network, variables, task, seed)
        ),
      )


def with_statistics(network, variables, task, seed):
  """The averaged parameters with batch statistics of their own.

  The images are passed in the mixture that the network was trained on.
  """
  if not variables['batch_stats']:
    return variables
  rng, seen, method = np.random.default_rng(seed), {}, network.method
  if not method.own_statistics:
    seen[0] = task.x_source
  if method.own_statistics or method.adversary:
    seen[1] = task.x_target
  return recalibrate(
    in_training(network),
    variables,
    [
      (
        np.concatenate(
          [as_floats(x[rng.choice(len(x), 128)]) for x in seen.values()]
        ),
        np.repeat(np.array(list(seen), np.int32), 128),
      )
      for _ in range(40)
    ],
  )


@functools.cache  # so that it is compiled once
def in_training(network):
  return lambda variables, batch: network.apply(
    variables, *batch, train=True, mutable=['batch_stats']
  )


@functools.partial(jax.jit, static_argnames='network')
def apply(variables, x, domain, *, network):
  return network.apply(variables, as_floats(x), domain)


def predict(network, variables, x, domain):
  """Features and logits of all examples, in batches of one size."""
  count = -(-len(x) // 250)
  parts = np.split(np.resize(x, (250 * count, *x.shape[1:])), count)
  of_parts = [apply(variables, part, domain, network=network) for part in parts]
  return tuple(
    np.concatenate(results)[: len(x)] for results in zip(*of_parts, strict=True)
  )


# Scores without a label of the target.


def scores(task, network, known, seed):
  """All scores of a network; ``known`` are features that it was trained on."""
  features, logits = network(task.x_held_out, 0)
  target, target_logits = network(task.x_target, 1)
  # The same mixtures of examples for every network.
  mixed = mix(jax.random.key(seed), as_floats(task.x_target), target_logits)
  mixed_logits = network(np.asarray(mixed.x), 1)[1]
  values = scores_of_predictions(
    known=known,
    target=target,
    held_out=features,
    losses=optax.softmax_cross_entropy_with_integer_labels(
      logits, task.y_held_out
    ),
    target_logits=target_logits,
    mixed=mixed,
    mixed_logits=mixed_logits,
  )
  values['source accuracy'] = accuracy(logits, task.y_held_out) / 100
  return {name: float(values[name]) for name in LARGER_IS_BETTER}


mix = jax.jit(reversal.mix_examples)


@jax.jit
def scores_of_predictions(
  *, known, target, held_out, losses, target_logits, mixed, mixed_logits
):
  sums = reversal.prediction_sums(target_logits)
  ratios = reversal.density_ratios(known, target, held_out)
  return {
    'mutual information': reversal.mutual_information(sums),
    'MaNo': reversal.mano(sums),
    'entropy': reversal.prediction_entropy(sums),
    'neighbor density': reversal.soft_neighborhood_density(target_logits),
    'MixVal': reversal.mixval(mixed_logits, mixed),
    'weighted risk': reversal.importance_weighted_risk(losses, ratios),
    'DEV': reversal.deep_embedded_validation(losses, ratios),
  }


# Report.


class Trained(NamedTuple):
  """One network of one seed: its scores, and what it makes of test data."""

  name: str
  scores: dict
  accuracy: float  # on the target, in %
  probabilities: np.ndarray
  features: list  # of some examples of the source, and of the target


def run(task, methods, seed, steps, log=lambda text: None):
  """Trains and scores every candidate; the accuracies are for the report."""
  trained = []
  for name, method in methods.items():
    start = time.monotonic()
    for step, network in train(task, method, seed, steps):
      known, _ = network(task.x_source[:5000], 0)
      features, logits = network(task.x_test, 1)
      trained.append(
        Trained(
          f'{name}, {step} steps',
          scores(task, network, known, seed),
          accuracy(logits, task.y_test),
          np.asarray(jax.nn.softmax(logits)),
          [known[:400], features[:400]],
        )
      )
    log(
      f'{name}, seed {seed}: {trained[-1].accuracy:.1f} % on the target,'
      f' {time.monotonic() - start:.0f} s'
    )
  return trained


def accuracy(predictions, labels):
  return 100 * np.mean(predictions.argmax(1) == labels)


def by_score(trained, score):
  """The networks, the best by this score first."""
  sign = 1 if LARGER_IS_BETTER[score] else -1
  return sorted(trained, key=lambda t: -sign * t.scores[score])


def vote(trained, labels):
  """The accuracy of three together, the best by the mutual information."""
  best = by_score(trained, 'mutual information')[:3]
  return accuracy(np.mean([t.probabilities for t in best], 0), labels)


def report(title, by_seed, votes):
  """Two tables: of all networks with their scores, and of the scores."""
  networks = Table(title=f'{title}: means over the seeds, best first')
  networks.add_column('network', no_wrap=True)
  for name in (*LARGER_IS_BETTER, 'target accuracy, %'):
    networks.add_column(name, justify='right')
  columns = [list(column) for column in zip(*by_seed, strict=True)]
  columns.sort(key=lambda column: -np.mean([t.accuracy for t in column]))
  for column in columns:
    accuracies = [t.accuracy for t in column]
    networks.add_row(
      column[0].name,
      *(
        f'{np.mean([t.scores[name] for t in column]):.3f}'
        for name in LARGER_IS_BETTER
      ),
      f'{np.mean(accuracies):.1f} ± {np.std(accuracies):.1f}',
    )
  choices = Table(title=f'{title}: what each score chooses')
  for name in (
    'score',
    'rank correlation',
    'accuracy, %',
    'points lost',
    'most',
  ):
    choices.add_column(name, justify='left' if name == 'score' else 'right')
  best = np.array([max(t.accuracy for t in seed) for seed in by_seed])

  def add(name, correlation, accuracies):
    choices.add_row(
      name,
      correlation,
      f'{np.mean(accuracies):.1f} ± {np.std(accuracies):.1f}',
      f'{np.mean(best - accuracies):.1f}',
      f'{np.max(best - accuracies):.1f}',
    )

  for name, larger in LARGER_IS_BETTER.items():
    ranked = [by_score(seed, name) for seed in by_seed]
    correlation = [
      stats.spearmanr(
        -np.arange(len(seed)), [t.accuracy for t in seed]
      ).statistic
      for seed in ranked
    ]
    add(
      f'{"largest" if larger else "smallest"} {name}',
      f'{np.mean(correlation):.2f}',
      np.array([seed[0].accuracy for seed in ranked]),
    )
  add('vote of three, by mutual information', '', np.array(votes))
  add('labels of the target', '', best)
  return networks, choices


def plot(trained, path):
  """Features of both domains, and two scores against the truth."""
  import matplotlib as mpl  # noqa: PLC0415

  mpl.use('Agg')
  import matplotlib.pyplot as plt  # noqa: PLC0415

  figure, axes = plt.subplots(1, 4, figsize=(18, 4.3), layout='constrained')
  of_source = by_score(trained, 'source accuracy')[0]
  of_target = by_score(trained, 'mutual information')[0]
  for axis, network in zip(axes, (of_source, of_target), strict=False):
    both = np.concatenate(network.features)
    center = both.mean(0)
    _, _, directions = np.linalg.svd(both - center, full_matrices=False)
    for points, marker, color, label in zip(
      network.features, 'ox', ('C0', 'C3'), ('source', 'target'), strict=True
    ):
      shown = (points - center) @ directions[:2].T
      axis.scatter(*shown.T, s=12, marker=marker, c=color, alpha=0.6, lw=1)
      axis.scatter([], [], marker=marker, c=color, label=label)
    axis.set(title=network.name, xticks=[], yticks=[])
    axis.set_xlabel('first principal component of the features')
  axes[0].set_ylabel('second')
  axes[0].legend(frameon=False)
  for axis, name, network in (
    (axes[2], 'source accuracy', of_source),
    (axes[3], 'mutual information', of_target),
  ):
    axis.plot(
      [t.scores[name] for t in trained], [t.accuracy for t in trained], 'ko'
    )
    axis.plot(
      network.scores[name],
      network.accuracy,
      'C1o',
      ms=12,
      mfc='none',
      mew=2,
      label='chosen by it',
    )
    axis.set(xlabel=name, ylabel='target accuracy, %')
    axis.legend(frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=130)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--data', choices=('digits', 'mnist', 'amazon'), default='digits'
  )
  parser.add_argument(
    '--path', type=pathlib.Path, help='folder of the data, if not digits'
  )
  parser.add_argument('--full', action='store_true', help='the long version')
  parser.add_argument('--seeds', type=int, help='3 or, in short, 1')
  parser.add_argument('--steps', type=int, help='of each training')
  parser.add_argument(
    '--skewness', action='store_true', help='bring images to it; see above'
  )
  parser.add_argument('--only', help='methods whose name has this in it')
  parser.add_argument(
    '--output',
    type=pathlib.Path,
    default=HERE / 'output' / 'domain_adaptation.png',
  )
  args = parser.parse_args()
  if args.data != 'digits' and not args.path:
    parser.error(f'--data {args.data} needs --path')
  methods = OF_ANY_DATA if args.data == 'amazon' else OF_IMAGES
  if args.only:
    methods = {n: m for n, m in methods.items() if args.only in n}
  elif not args.full:
    methods = {name: methods[name] for name in DEMO}
  if not methods:
    parser.error(f'no method has {args.only!r} in its name')
  if args.skewness:
    methods = {
      name: dataclasses.replace(method, standardize='skewness')
      for name, method in methods.items()
    }
  tasks = {'textured digits': load_digits}
  if args.data == 'mnist':
    task = load_mnist(args.path)
    tasks = {'MNIST-M': lambda seed: task}
  elif args.data == 'amazon':
    tasks = {
      target: functools.partial(
        lambda target, seed: load_amazon(args.path, target), target
      )
      for target in ('dvd', 'electronics', 'kitchen')
    }

  console = Console()
  console.width = max(console.width, 150)
  by_seed = []
  for target, load in tasks.items():
    by_seed, votes = [], []
    for seed in range(args.seeds or (3 if args.full else 1)):
      task = load(seed)
      steps = args.steps or (task.steps if args.full else DEMO_STEPS)
      by_seed.append(run(task, methods, seed, steps, console.log))
      votes.append(vote(by_seed[-1], task.y_test))
    for table in report(target, by_seed, votes):
      console.print(table)
  plot(by_seed[0], args.output)  # of the last target, where there are several
  console.print(f'picture: {args.output}')


if __name__ == '__main__':
  main()
