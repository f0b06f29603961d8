"""What the papers on batch normalization claim, tried on small networks.

Four experiments use BatchNorm, BatchRenorm and recalibrate in networks of three
hidden layers of 100 units, trained by SGD without momentum on scikit-learn's
digits, or on MNIST (mnist.npz). The short version has fewer steps and only the
first and the last of them. For each, this is what the paper reports at its own
scale, what is tried here, and what came out of the long version (``--full``)
with three seeds:

speed: Ioffe and Szegedy (2015) train three layers of 100 sigmoids on MNIST, 60
examples a batch. With batch norm test accuracy rises sooner and ends higher
(figure 1); on ImageNet, Inception with batch norm and five times the learning
rate needs 14 times fewer steps. Here, steps are counted until test accuracy (of
1000 images) is at 90 % in two checks in a row, at several learning rates. With
batch norm it took 16 to 90 times fewer on digits where both got there, and 2 to
5 times fewer on MNIST. At a learning rate of 10 only batch norm is reliable.

smoothness: Santurkar et al. (2018) train VGG on CIFAR-10. Along the gradient of
a training step, from 0.5 to 4 times the learning rate, loss and gradient vary
less with batch norm (figure 4). Here, the same is measured on the batch of the
next step, in training mode: the range of the loss over eight such steps, and
the largest L2 change of the gradient, as it is and divided by the distance. All
were smaller with batch norm, but on MNIST the last one hardly.

renorm: Ioffe (2017) trains Inception-v3 on ImageNet. Normalized in groups of 4,
batch norm ends at 74.2 % and renormalization at 76.5 %; in batches of 32 that
are 16 classes with 2 images each, at 67 % and 78.5 %, which is what independent
batches give. Here, a step takes the mean gradient of 64 examples, of which only
a few are normalized together, or examples of one or two classes; running
averages normalize the test set. Renormalization won in groups of 2 and of few
classes, but in groups of 4 on MNIST only: on digits they do no harm.
Recalibrating hardly helped, because the weights are what is wrong. In groups of
2 Flax's fast variance, a difference of squares, is too inexact; without it,
Flax's module is as good as BatchNorm.

adabn: Li et al. (2016) replace a network's statistics by those of unlabeled
data of the target domain: Inception-BN on Office-31 gains 1.2 points of
accuracy on average. Here, images with other contrast, brightness and noise are
classified with source statistics, with statistics of recalibrate on all target
inputs, and normalized by test batches of 64. Contrast, which is affine, is
undone entirely, and brightness nearly; noise in part, and hardly on digits.
Clean images lose nothing.

  python examples/batch_norm.py
  python examples/batch_norm.py --full
  python examples/batch_norm.py --full --only renorm --seeds 5
  python examples/batch_norm.py --full --data mnist --path FOLDER
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import optax_ghm as ghm
from optax_ghm.linen import BatchNorm, BatchRenorm, recalibrate

mpl.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

CLASSES, WIDTH, LAYERS = 10, 100, 3
RATES, GOAL = (0.1, 0.3, 1.0, 10.0), 0.9
STEP_SIZES = tuple(np.linspace(0.5, 4, 8))
SMOOTHNESS_RATE, RENORM_RATE = 0.1, 0.1
FLAX_EXACT = 'Flax, exact'  # use_fast_variance=False
RECALIBRATED = 'BatchNorm, recalibrated'
GRADIENT_BATCH, TEST_BATCH = 64, 64
HERE = pathlib.Path(__file__).parent


class Data(NamedTuple):
  """Pixels from 0 to 1, those for training in the order of their classes."""

  x: jax.Array
  labels: jax.Array
  x_test: jax.Array
  labels_test: jax.Array


def load(name, path=pathlib.Path()):
  """Scikit-learn's digits, a third for testing, or MNIST as it is."""
  if name == 'mnist':
    with np.load(path / 'mnist.npz') as file:
      parts = [file[k] for k in ('x_train', 'y_train', 'x_test', 'y_test')]
    x, labels, x_test, labels_test = parts
    x, x_test = x / np.float32(255), x_test / np.float32(255)
  else:
    digits, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digits))
    x, x_test = np.split(digits[order] / 16, [2 * len(order) // 3])
    labels, labels_test = np.split(classes[order], [len(x)])
  order = np.argsort(labels, kind='stable')
  return Data(
    jnp.asarray(x[order], jnp.float32).reshape(len(x), -1),
    jnp.asarray(labels[order], jnp.int32),
    jnp.asarray(x_test, jnp.float32).reshape(len(x_test), -1),
    jnp.asarray(labels_test, jnp.int32),
  )


class Network(nn.Module):
  """Dense layers, each normalized, if at all, before its activation."""

  norm: Callable[..., Any] | None = None
  activation: Callable[[jax.Array], jax.Array] = nn.relu
  kernel_init: Any = nn.initializers.he_normal()

  @nn.compact
  def __call__(self, x, train, **options):
    for _ in range(LAYERS):
      x = nn.Dense(
        WIDTH, use_bias=self.norm is None, kernel_init=self.kernel_init
      )(x)
      if self.norm is not None:
        x = self.norm(use_running_average=not train)(x, **options)
      x = self.activation(x)
    return nn.Dense(CLASSES, kernel_init=self.kernel_init)(x)


class Batches(NamedTuple):
  """How many are normalized together, how many such there are in a step."""

  size: int
  groups: int = 1
  classes: int | None = None


def draw(batches, labels, steps, seed):
  """Indices (steps, groups, size): shuffled epochs, or of random classes."""
  rng = np.random.default_rng(seed)
  labels, groups = np.asarray(labels), (steps, batches.groups)
  if batches.classes is None:
    count = steps * batches.groups * batches.size
    epochs = range(-(-count // len(labels)))
    order = np.concatenate([rng.permutation(len(labels)) for _ in epochs])
    return order[:count].reshape(*groups, batches.size)
  classes = rng.permuted(
    np.broadcast_to(range(CLASSES), (*groups, CLASSES)), axis=-1
  )
  classes = classes[..., np.arange(batches.size) % batches.classes]
  first = np.searchsorted(labels, range(CLASSES))
  counts = np.bincount(labels, minlength=CLASSES)
  return first[classes] + rng.integers(counts[classes])


def loss_fn(model, params, stats, x, labels):
  """Mean loss of batches that are normalized one by one; next statistics."""

  def of_one(x, labels):
    logits, updated = model.apply(
      {'params': params, 'batch_stats': stats},
      x,
      train=True,
      mutable=['batch_stats'],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updated.get('batch_stats', {})

  losses, updated = jax.vmap(of_one)(x, labels)
  mean = jax.tree.map(lambda u: u.mean(0).astype(u.dtype), updated)
  return losses.mean(), mean


def accuracy(model, variables, x, labels):
  logits: Any = model.apply(variables, x, train=False)
  return (logits.argmax(-1) == labels).mean()


@functools.partial(jax.jit, static_argnums=0)
def accuracies(model, variables, x, labels):
  """By running averages, one for each seed."""
  return jax.vmap(lambda v: accuracy(model, v, x, labels))(variables)


@functools.partial(jax.jit, static_argnums=(0, 1))
def descend(model, look, data, rate, variables, now, upcoming):
  """SGD on batches at the indices, in stretches after which it looks."""
  tx = optax.sgd(rate)

  def batch(at):
    return data.x[at], data.labels[at]

  def step(carry, at):
    params, stats = carry
    grads, stats = jax.grad(loss_fn, argnums=1, has_aux=True)(
      model, params, stats, *batch(at)
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    return (optax.apply_updates(params, updates), stats), None

  def stretch(carry, indices):
    now, upcoming = indices
    (params, stats), _ = jax.lax.scan(step, carry, now)
    variables = {'params': params, 'batch_stats': stats}
    return (params, stats), look(variables, *batch(upcoming))

  def run(variables, now, upcoming):
    start = variables['params'], variables.get('batch_stats', {})
    (params, stats), seen = jax.lax.scan(stretch, start, (now, upcoming))
    return {'params': params, 'batch_stats': stats}, seen

  return jax.vmap(run)(variables, now, upcoming)


def train(model, data, batches, steps, rate, seeds, look=None, every=None):
  """Variables after SGD and what look saw, with an axis of seeds before all.

  It is called as ``look(variables, x, labels)`` every so many steps, with the
  batches of the step that comes next.
  """
  every = every or steps
  at = [draw(batches, data.labels, steps + 1, seed) for seed in range(seeds)]
  at = np.stack(at).astype(np.int32)
  now, upcoming = at[:, :-1], at[:, every::every]
  now = now.reshape(*upcoming.shape[:2], every, *now.shape[2:])
  variables = jax.jit(
    jax.vmap(lambda key: model.init(key, data.x[:2], train=True))
  )(jax.vmap(jax.random.key)(np.arange(seeds)))
  return descend(model, look or no_look, data, rate, variables, now, upcoming)


def no_look(variables, x, labels):
  del variables, x, labels
  return ()


def percentages(values):
  """Mean and deviation, in %."""
  values = 100 * np.asarray(values)
  return f'{values.mean():.1f}±{values.std():.1f}'


def make_table(title, columns, rows):
  table = Table(title=title)
  for i, column in enumerate(columns):
    table.add_column(column, justify='right' if i else 'left')
  for row in rows:
    table.add_row(*row)
  return table


def steps_to_goal(accuracies, every):
  """The first of two checks in a row that reach the goal, or None."""
  good = np.asarray(accuracies) >= GOAL
  both = np.flatnonzero(good[:-1] & good[1:])
  return int(both[0] + 1) * every if len(both) else None


def speed(data, seeds, full, ax):
  """Ioffe and Szegedy 2015: sooner, and at larger learning rates."""
  start = time.perf_counter()
  steps, every = (6_000, 20) if full else (1_200, 20)
  rates = RATES if full else RATES[1:3]
  x, labels = data.x_test[:1_000], data.labels_test[:1_000]
  norms = {
    'plain': None,
    'batch norm': functools.partial(BatchNorm, momentum=0.9, debias=True),
  }
  curves = {}
  for name, norm in norms.items():
    # Sigmoids and small Gaussian weights, as in the paper.
    model = Network(norm, nn.sigmoid, nn.initializers.normal(0.1))

    def look(variables, *_, model=model):
      return accuracy(model, variables, x, labels)

    for rate in rates:
      _, curve = train(
        model, data, Batches(60), steps, rate, seeds, look, every
      )
      curves[name, rate] = np.asarray(curve)
  rows = []
  for rate in rates:
    row = [f'{rate:g}']
    for name in norms:
      when = [steps_to_goal(curve, every) for curve in curves[name, rate]]
      row += [
        ' '.join('-' if t is None else str(t) for t in when),
        percentages(curves[name, rate][:, -1]),
      ]
    rows.append(row)
  times = every * (1 + np.arange(steps // every))
  for (name, rate), curve in curves.items():
    ax.plot(
      times,
      curve.mean(0),
      '--' if name == 'plain' else '-',
      color=f'C{RATES.index(rate)}',
      label=f'{rate:g}' if name == 'batch norm' else None,
    )
  ax.set(xlabel='step', ylabel='test accuracy', xscale='log', title='speed')
  ax.legend(
    title='learning rate\n(dashed: plain)',
    loc=(0.31, 0.3),
    fontsize=7,
    title_fontsize=7,
  )
  seconds = time.perf_counter() - start
  return make_table(
    f'speed: steps to {GOAL:.0%} test accuracy, each seed, and accuracy after'
    f' {steps} steps ({seconds:.0f} s)',
    ('learning rate', 'plain', '%', 'batch norm', '%'),
    rows,
  )


def landscape(model, rate, variables, x, labels):
  """Loss and change of the gradient at steps along the gradient."""
  params, stats = variables['params'], variables['batch_stats']

  def gradient(params):
    return jax.value_and_grad(loss_fn, argnums=1, has_aux=True)(
      model, params, stats, x, labels
    )

  _, grads = gradient(params)

  def at(size):
    moved = jax.tree.map(lambda p, g: p - rate * size * g, params, grads)
    (loss, _), there = gradient(moved)
    change = optax.tree.norm(optax.tree.sub(there, grads))
    return loss, change, change / (rate * size * optax.tree.norm(grads))

  return jax.vmap(at)(jnp.array(STEP_SIZES))


def smoothness(data, seeds, full, ax):
  """Santurkar et al. 2018: loss and gradient vary less along the gradient."""
  start = time.perf_counter()
  steps, every = (1_500, 10) if full else (100, 20)
  rows = []
  for name, norm in (('plain', None), ('batch norm', BatchNorm)):
    model = Network(norm)
    look = functools.partial(landscape, model, SMOOTHNESS_RATE)
    variables, (losses, changes, slopes) = train(
      model, data, Batches(60), steps, SMOOTHNESS_RATE, seeds, look, every
    )
    ranges = np.ptp(losses, -1)
    final = accuracies(model, variables, data.x_test, data.labels_test)
    early = max(1, ranges.shape[1] // 10)
    rows.append(
      (
        name,
        f'{np.median(ranges[:, :early]):.4f}',
        f'{np.median(ranges):.4f}',
        f'{np.median(changes.max(-1)):.3f}',
        f'{np.median(slopes.max(-1)):.2f}',
        percentages(final),
      )
    )
    times = every * (1 + np.arange(steps // every))
    ax.fill_between(
      times,
      losses[0].min(-1),
      losses[0].max(-1),
      alpha=0.5,
      label=name,
    )
  ax.set(xlabel='step', ylabel='loss along the gradient', yscale='log')
  ax.set(title='smoothness')
  ax.legend()
  seconds = time.perf_counter() - start
  return make_table(
    f'smoothness at learning rate {SMOOTHNESS_RATE:g}: medians over {steps}'
    f' steps and all seeds ({seconds:.0f} s)',
    (
      '',
      'range of loss, at first',
      'range of loss',
      'gradient change',
      'per distance',
      'accuracy, %',
    ),
    rows,
  )


def in_training(model):
  """What recalibrate calls, for variables of all seeds."""

  def apply(variables, x):
    return jax.vmap(
      lambda v: model.apply(v, x, train=True, mutable=['batch_stats'])
    )(variables)

  return apply


def renorm(data, seeds, full, ax):
  """Ioffe 2017: batches that are small or not independent."""
  start = time.perf_counter()
  steps = 1_000 if full else 60
  kinds = (32, None), (4, None), (2, None), (32, 2), (4, 1)
  settings = {
    f'{size}' if classes is None else f'{size} of {classes}': Batches(
      size, GRADIENT_BATCH // size, classes
    )
    for size, classes in (kinds if full else kinds[-1:])
  }
  # The shares of training at which the paper widens its limits.
  r_max, d_max = ghm.renorm_schedules(
    start=steps // 25, r_end=steps // 3, d_end=steps // 5
  )
  norms = {
    'Flax': nn.BatchNorm,
    FLAX_EXACT: functools.partial(nn.BatchNorm, use_fast_variance=False),
    'BatchNorm': BatchNorm,
    'BatchRenorm': functools.partial(BatchRenorm, r_max=r_max, d_max=d_max),
  }
  if not full:
    del norms[FLAX_EXACT]
  test = data.x_test, data.labels_test
  scores = {name: [] for name in (*norms, RECALIBRATED)}
  for batches in settings.values():
    for name, norm in norms.items():
      model = Network(norm)
      variables, _ = train(model, data, batches, steps, RENORM_RATE, seeds)
      scores[name].append(accuracies(model, variables, *test))
      if name == 'BatchNorm':
        at = draw(batches, data.labels, 2_048 // GRADIENT_BATCH, seeds)
        inputs = data.x[at.reshape(-1, batches.size)]
        variables = recalibrate(in_training(model), variables, inputs)
        scores[RECALIBRATED].append(accuracies(model, variables, *test))
  for name, by_setting in scores.items():
    values = 100 * np.array(by_setting)
    ax.errorbar(
      np.arange(len(settings)) + 0.1 * list(scores).index(name),
      values.mean(1),
      values.std(1),
      fmt='o',
      capsize=3,
      label=name,
    )
  ax.set_xticks(np.arange(len(settings)) + 0.2, settings)
  ax.set(ylabel='test accuracy, %', title='renorm')
  ax.set(xlabel='normalized together (of how many classes)')
  ax.legend(fontsize=7)
  seconds = time.perf_counter() - start
  return make_table(
    f'renorm: test accuracy in % after {steps} steps, by how many examples are'
    f' normalized together, of how many classes ({seconds:.0f} s)',
    ('', *settings),
    [(name, *map(percentages, values)) for name, values in scores.items()],
  )


def shifts():
  """Changes of images, by name; all but contrast lose something."""

  def noisy(x, deviation):
    noise = np.random.default_rng(0).normal(0, deviation, x.shape)
    return jnp.clip(x + jnp.asarray(noise, x.dtype), 0, 1)

  return {
    'clean': lambda x: x,
    'contrast 0.5': lambda x: 0.5 + 0.5 * (x - 0.5),
    'contrast 0.2': lambda x: 0.5 + 0.2 * (x - 0.5),
    'brightness +0.2': lambda x: jnp.clip(x + 0.2, 0, 1),
    'brightness +0.5': lambda x: jnp.clip(x + 0.5, 0, 1),
    'noise 0.2': lambda x: noisy(x, 0.2),
    'noise 0.4': lambda x: noisy(x, 0.4),
    'contrast 0.5, noise 0.2': lambda x: noisy(0.5 + 0.5 * (x - 0.5), 0.2),
  }


def adabn(data, seeds, full, ax):
  """Li et al. 2016: the statistics of the target domain."""
  start = time.perf_counter()
  steps = 1_500 if full else 500
  model = Network(BatchNorm)
  variables, _ = train(model, data, Batches(60), steps, 0.1, seeds)
  count = len(data.x_test) // TEST_BATCH * TEST_BATCH
  labels = data.labels_test[:count]

  @jax.jit
  def by_batches(variables, x):
    def logits(v, x):
      return model.apply(v, x, train=True, update_running_average=False)

    batches = x.reshape(-1, TEST_BATCH, x.shape[-1])
    by_seed: Any = jax.vmap(
      lambda v: jax.vmap(functools.partial(logits, v))(batches)
    )(variables)
    found = by_seed.argmax(-1).reshape(seeds, -1)
    return (found == labels).mean(-1)

  scores = {}
  for name, shift in list(shifts().items())[: None if full else 3]:
    x = shift(data.x_test[:count])
    adapted = recalibrate(
      in_training(model), variables, x.reshape(-1, TEST_BATCH, x.shape[-1])
    )
    scores[name] = (
      accuracies(model, variables, x, labels),
      accuracies(model, adapted, x, labels),
      by_batches(variables, x),
    )
  kinds = 'source statistics', 'AdaBN', f'test batches of {TEST_BATCH}'
  for i, kind in enumerate(kinds):
    means = [100 * float(values[i].mean()) for values in scores.values()]
    ax.barh(np.arange(len(scores)) + 0.27 * (i - 1), means, 0.27, label=kind)
  ax.set_yticks(np.arange(len(scores)), scores)
  ax.invert_yaxis()
  ax.set(xlabel='test accuracy, %', title='adabn')
  ax.legend(fontsize=7)
  seconds = time.perf_counter() - start
  return make_table(
    f'adabn: test accuracy in % ({seconds:.0f} s)',
    ('', *kinds),
    [(name, *map(percentages, values)) for name, values in scores.items()],
  )


EXPERIMENTS = {
  'speed': speed,
  'smoothness': smoothness,
  'renorm': renorm,
  'adabn': adabn,
}
DEMO = 'speed', 'adabn'


def main(arguments=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', choices=list(EXPERIMENTS))
  parser.add_argument('--data', choices=('digits', 'mnist'), default='digits')
  parser.add_argument(
    '--path',
    type=pathlib.Path,
    default=pathlib.Path(),
    help='folder of mnist.npz',
  )
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument(
    '--output', type=pathlib.Path, default=HERE / 'output' / 'batch_norm.png'
  )
  parser.add_argument('--full', action='store_true', help='the long version')
  args = parser.parse_args(arguments)
  data, console = load(args.data, args.path), Console()
  figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout='constrained')
  for ax, (name, experiment) in zip(
    axes.flat, EXPERIMENTS.items(), strict=True
  ):
    if args.only == name or (not args.only and (args.full or name in DEMO)):
      with console.status(name):
        table = experiment(data, args.seeds, args.full, ax)
      console.print(table)
    else:
      ax.set_axis_off()
  args.output.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(args.output, dpi=120)
  console.print(f'written: {args.output}')


if __name__ == '__main__':
  main()
