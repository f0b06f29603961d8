"""Training where there are labels, for a place where there are none.

One network is trained on a labeled source domain alone, and then with an
unlabeled target domain beside it: by DANN, whose reversed gradient keeps the
features from telling the domains apart, and by CDAN, which does the same class
by class. The script prints the accuracy on the target domain for every seed,
and draws the features before and after with the schedule of the reversal. No
target label is trained on, but the settings were chosen while looking at these
scores.

  python examples/domain_adaptation.py         # the plain and the whole method
  python examples/domain_adaptation.py --full  # all between them, three seeds
  python examples/domain_adaptation.py --full --data mnist --path FOLDER
  python examples/domain_adaptation.py --full --ablation
  python examples/domain_adaptation.py --full --data amazon --path FOLDER

The data are
- digits: from scikit-learn's digits to a textured and inverted copy of others;
- mnist: from MNIST (mnist.npz) to MNIST-M (mnistm_10k.npz), with the arrays
  x_train, y_train, x_test and y_test in uint8. The first digits of MNIST are
  those of MNIST-M, and are left out of the source;
- amazon: from reviews of books to reviews of other goods, as in the DANN paper
  (amazon_reviews.npz, with CSR matrices such as books_train_data).
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
from sklearn import datasets

import optax_ghm
from optax_ghm import conflict
from optax_ghm.linen import DomainBatchNorm, GradientReversal, recalibrate

HERE = pathlib.Path(__file__).parent
BATCH, AVERAGING = 64, 0.99
DEMO_STEPS = 300
OPTIMIZER = optax.adam(1e-3, b1=0.5)
HARMONIZED = {
  'gh': conflict.gh_weights,
  'gh++': conflict.gh_plus_plus_weights,
}


class Task(NamedTuple):
  """Labeled source, unlabeled target, and target data to score on."""

  x_source: np.ndarray
  y_source: np.ndarray
  x_target: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray
  trunk: nn.Module
  classes: int
  steps: int
  standardize: Literal['no', 'moments', 'skewness']


@dataclasses.dataclass(frozen=True)
class Method:
  """What is trained.

  Attributes:
    standardize: 'no'; 'moments', every image to mean 0 and deviation 1;
      'skewness', every channel of an image to the same and to positive
      skewness, so that the fewer pixels are the light ones; or 'task', as the
      task says.
    own_statistics: whether each domain is batch-normalized by its own
      statistics, in training and when it is scored (DomainBatchNorm).
    own_affine: whether each domain has its own scale and bias, too (DSBN).
    adversary: None, 'dann' (sees the features) or 'cdan' (sees them times the
      predicted classes).
    entropy: whether sure predictions count more for the adversary (CDAN+E).
    weight: factor of the domain loss; 2 makes it the sum of the two domains'
      means.
    averaged: whether the averaged parameters are scored, or the last ones.
    conflict: None, 'gh' or 'gh++': harmonization of the two losses' gradients.
  """

  standardize: Literal['no', 'moments', 'skewness', 'task'] = 'task'
  own_statistics: bool = True
  own_affine: bool = False
  adversary: Literal['dann', 'cdan'] | None = 'cdan'
  entropy: bool = True
  weight: float = 2.0
  averaged: bool = True
  conflict: Literal['gh', 'gh++'] | None = None


FULL = Method()
PLAIN = Method(standardize='no', own_statistics=False, adversary=None)
METHODS = {  # each adds one thing to the one before
  'source only': PLAIN,
  '+ standardized images': Method(own_statistics=False, adversary=None),
  "+ the target's own statistics": Method(adversary=None),
  '+ adversary (DANN)': Method(adversary='dann', entropy=False),
  '+ conditioning (CDAN)': Method(entropy=False),
  '+ entropy weights (CDAN+E)': FULL,
}
ABLATION = {  # each takes or changes one thing of the whole
  'all of it (CDAN+E)': FULL,
  'images not standardized': Method(standardize='no'),
  'only to mean and deviation': Method(standardize='moments'),
  'one batch norm for both domains': Method(own_statistics=False),
  'scale and bias per domain, too': Method(own_affine=True),
  'no conditioning (DANN+E)': Method(adversary='dann'),
  'no entropy weights (CDAN)': Method(entropy=False),
  'half the domain loss': Method(weight=1.0),
  'last weights, not averaged': Method(averaged=False),
  'with GH at the features': Method(conflict='gh'),
  'with GH++ at the features': Method(conflict='gh++'),
  'DANN alone': Method(
    standardize='no', own_statistics=False, adversary='dann', entropy=False
  ),
}
REVIEWS = {
  'source only': Method(adversary=None),
  'DANN': Method(adversary='dann', entropy=False),
}


# Data.


def load_digits(seed):
  """Half of the digits as they are; the others textured and inverted."""
  rng = np.random.default_rng(seed)
  pixels, y = datasets.load_digits(return_X_y=True)
  x = np.divide(pixels, 16).reshape(-1, 8, 8, 1).astype(np.float32)
  order = rng.permutation(len(x))
  x, y = x[order], np.asarray(y)[order].astype(np.int32)
  half, test = 900, 1350
  coarse = rng.uniform(0.1, 0.6, (len(x), 3, 3, 3)).astype(np.float32)
  texture = np.asarray(jax.image.resize(coarse, (len(x), 8, 8, 3), 'linear'))
  other = np.abs(texture - x)  # light strokes turn dark, as in MNIST-M
  return Task(
    np.repeat(x[:half], 3, -1),
    y[:half],
    other[half:test],
    other[test:],
    y[test:],
    Images(kernel=3, stride=1),
    classes=10,
    steps=1000,
    standardize='moments',
  )


def load_mnist(folder):
  source = np.load(folder / 'mnist.npz')
  target = np.load(folder / 'mnistm_10k.npz')
  unseen = len(target['x_train'])  # MNIST-M's digits are MNIST's first
  return Task(
    np.repeat(source['x_train'][unseen:, ..., None], 3, -1),
    source['y_train'][unseen:].astype(np.int32),
    target['x_train'],
    target['x_test'],
    target['y_test'].astype(np.int32),
    Images(kernel=5, stride=2),
    classes=10,
    steps=3000,
    standardize='skewness',  # strokes are the fewer pixels, here
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

  x_source, y_source = dense('books_train')
  x_target, _ = dense(f'{target}_train')
  x_test, y_test = dense(f'{target}_test')
  return Task(
    x_source,
    y_source,
    x_target,
    x_test,
    y_test,
    Words(),
    classes=2,
    steps=1000,
    standardize='no',
  )


# Network.


class Images(nn.Module):
  """Two convolutions and a dense layer, each batch-normalized by domain."""

  kernel: int
  stride: int

  @nn.compact
  def __call__(self, x, domain, train, own_affine):
    size = (self.kernel, self.kernel)

    def norm(x):
      return DomainBatchNorm(
        use_running_average=not train,
        momentum=0.9,
        num_domains=2,
        shared_affine=not own_affine,
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
  def __call__(self, x, domain, train, own_affine):
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

  def __call__(self, x, domain=0, train=False):
    """Features, the adversary's branch of them, and class logits."""
    if not self.method.own_statistics:
      domain = jnp.zeros_like(domain)
    features = for_domain = for_class = self.trunk(
      self.prepare(x), domain, train, self.method.own_affine
    )
    if self.method.conflict:
      weights = HARMONIZED[self.method.conflict]
      for_domain, for_class = conflict.fork(features, weights=weights)
    return features, for_domain, self.predictor(for_class)

  def prepare(self, x):
    x = x.astype(jnp.float32) / (255 if x.dtype == jnp.uint8 else 1)
    if self.method.standardize == 'no':
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
    _, for_domain, logits = self(x)
    return self.domain_logits(for_domain, logits, 0.0)


class TrainState(NamedTuple):
  """The state of a training run."""

  params: Any
  averaged: Any
  opt_state: Any
  statistics: Any


# Training.


@functools.partial(jax.jit, static_argnames=('network', 'steps'))
def train_step(state, i, key, data, *, network, steps):
  """Step ``i`` of a training run of ``steps`` steps."""
  x_source, y_source, x_target = data
  method = network.method
  scale = optax_ghm.dann_reversal_schedule(steps)(i)

  one, two = jax.random.split(jax.random.fold_in(key, i))
  here = jax.random.choice(one, len(x_source), (BATCH,))
  there = jax.random.choice(two, len(x_target), (BATCH,))
  x, domain = x_source[here], jnp.zeros(BATCH, jnp.int32)
  if method.own_statistics or method.adversary:
    x = jnp.concatenate([x, x_target[there]])
    domain = jnp.repeat(jnp.arange(2), BATCH)

  def loss(params):
    (_, for_domain, logits), updated = network.apply(
      {'params': params, 'batch_stats': state.statistics},
      x,
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
        for_domain,
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


@functools.partial(jax.jit, static_argnames='network')
def evaluate(variables, x, domain, *, network):
  features, _, logits = network.apply(variables, x, domain)
  return features, logits.argmax(-1)


def run(task, method, seed, steps):
  """Trains; returns target accuracy and some features of both domains."""
  if method.standardize == 'task':
    method = dataclasses.replace(method, standardize=task.standardize)
  network = Network(task.trunk, task.classes, method)
  key = jax.random.key(seed)
  variables = network.init(key, task.x_source[:2], method=Network.initialize)
  params, statistics = variables['params'], variables.get('batch_stats', {})
  state = TrainState(params, params, OPTIMIZER.init(params), statistics)
  data = tuple(map(jnp.asarray, (task.x_source, task.y_source, task.x_target)))
  for i in range(steps):  # not a scan: XLA's convolutions are slow inside one
    state = train_step(state, i, key, data, network=network, steps=steps)
  params = state.averaged if method.averaged else state.params
  variables = {'params': params, 'batch_stats': state.statistics}
  if state.statistics:
    # The averaged parameters have other statistics than the last ones: pass the
    # images once more, in the mixture that the network was trained on.
    rng, seen = np.random.default_rng(seed), {}
    if not method.own_statistics:
      seen[0] = task.x_source
    if method.own_statistics or method.adversary:
      seen[1] = task.x_target
    variables = recalibrate(
      lambda variables, batch: network.apply(
        variables, *batch, train=True, mutable=['batch_stats']
      ),
      variables,
      [
        (
          np.concatenate([x[rng.choice(len(x), 128)] for x in seen.values()]),
          np.repeat(np.array(list(seen), np.int32), 128),
        )
        for _ in range(40)
      ],
    )
  predicted = [
    np.asarray(evaluate(variables, x, 1, network=network)[1])
    for x in np.array_split(task.x_test, max(len(task.x_test) // 500, 1))
  ]
  accuracy = (np.concatenate(predicted) == task.y_test).mean()
  show = 400
  features = [
    np.asarray(evaluate(variables, x[:show], domain, network=network)[0])
    for domain, x in enumerate((task.x_source, task.x_test))
  ]
  return accuracy, features


# Report.


def plot(features, labels, steps, path):
  """Principal components of the features of both domains, and lambda."""
  import matplotlib as mpl  # noqa: PLC0415

  mpl.use('Agg')
  import matplotlib.pyplot as plt  # noqa: PLC0415

  figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout='constrained')
  for axis, (name, domains) in zip(axes, features.items(), strict=False):
    both = np.concatenate(domains)
    both = both - both.mean(0)
    _, _, directions = np.linalg.svd(both, full_matrices=False)
    for domain, marker, color, label in zip(
      domains, 'ox', ('C0', 'C3'), labels, strict=True
    ):
      points = (domain - np.concatenate(domains).mean(0)) @ directions[:2].T
      axis.scatter(*points.T, s=12, marker=marker, c=color, alpha=0.6, lw=1)
      axis.scatter([], [], marker=marker, c=color, label=label)
    axis.set(title=name, xticks=[], yticks=[])
    axis.set_xlabel('first principal component of the features')
  axes[0].set_ylabel('second')
  axes[0].legend(frameon=False)
  time_ = np.arange(steps)
  axes[2].plot(time_, optax_ghm.dann_reversal_schedule(steps)(time_), 'k')
  axes[2].set(title='The reversal over training', xlabel='step', ylabel='λ')
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
    '--ablation', action='store_true', help='what made the difference'
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
  console = Console()
  args.seeds = args.seeds or (3 if args.full else 1)
  methods = ABLATION if args.ablation else METHODS
  tasks = {'textured digits': load_digits}
  if args.data == 'mnist':
    task = load_mnist(args.path)
    tasks = {'MNIST-M': lambda seed: task}
  elif args.data == 'amazon':
    methods = REVIEWS
    tasks = {
      target: functools.partial(
        lambda target, seed: load_amazon(args.path, target), target
      )
      for target in ('dvd', 'electronics', 'kitchen')
    }
  if not (args.full or args.only or args.ablation):
    methods = dict(list(methods.items())[:: len(methods) - 1])
  if args.only:
    methods = {n: m for n, m in methods.items() if args.only in n}
    if not methods:
      parser.error(f'no method has {args.only!r} in its name')

  features, steps = {}, 0
  for target, load in tasks.items():
    table = Table(title=f'accuracy on {target}, in %')
    table.add_column('trained')
    for seed in range(args.seeds):
      table.add_column(f'seed {seed}', justify='right')
    table.add_column('mean', justify='right')
    table.add_column('seconds per seed', justify='right')
    for name, method in methods.items():
      accuracies, start = [], time.monotonic()
      console.log(f'{target}: training {name}')
      for seed in range(args.seeds):
        task = load(seed)
        steps = args.steps or (task.steps if args.full else DEMO_STEPS)
        accuracy, shown = run(task, method, seed, steps)
        accuracies.append(100 * accuracy)
        if seed == 0:
          features[name] = shown
      seconds = (time.monotonic() - start) / args.seeds
      table.add_row(
        name,
        *(f'{a:.1f}' for a in accuracies),
        f'{np.mean(accuracies):.1f} ± {np.std(accuracies):.1f}',
        f'{seconds:.0f}',
      )
      console.log(f'{target}: {name} {np.round(accuracies, 1)}')
    console.print(table)
  # The picture is of the last target, where there are several.
  ends = {n: features[n] for n in (*list(features)[:1], *list(features)[-1:])}
  plot(ends, ('source', 'target'), steps, args.output)
  console.print(f'picture: {args.output}')


if __name__ == '__main__':
  main()
