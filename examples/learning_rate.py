"""Which learning rate, which schedule, which batch size, on handwritten digits.

A network of one hidden layer learns scikit-learn's digits. What the range test
suggests, with probes of 200 steps and of as many as are trained, is measured
against a grid of learning rates, as a constant rate and as the peak of a
warm-up and a decay; so are the defaults of what Optax has for those who would
not choose, against their own grids. What counts is the cross-entropy of
held-out digits, mean over the last tenth of the steps. Then the batch size: how
many steps of SGD reach a loss, each at the best of its learning rates, and what
the gradient noise scale says.

  python examples/learning_rate.py
  python examples/learning_rate.py --full
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
from rich.console import Console
from rich.table import Table
from sklearn import datasets

import optax_ghm as ghm

mpl.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

HERE = pathlib.Path(__file__).parent
BATCH, HIDDEN, PARTS = 32, 64, 5
TARGET, MICRO = 0.15, 8
BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512)


def load():
  """Digits to learn from, and digits held out."""
  x, y = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(y))
  x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
  return (x[540:], y[540:]), (x[:540], y[:540])


def init(key):
  keys = jax.random.split(key)
  return {
    'hidden': jax.random.normal(keys[0], (64, HIDDEN)) * np.sqrt(2 / 64),
    'bias': jnp.zeros(HIDDEN),
    'out': jax.random.normal(keys[1], (HIDDEN, 10)) * np.sqrt(1 / HIDDEN),
  }


def loss(params, batch):
  x, y = batch
  hidden = jax.nn.relu(x @ params['hidden'] + params['bias'])
  logits = hidden @ params['out']
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.partial(jax.jit, static_argnums=(1, 2))
def starts_of(data, steps, batch, seeds):
  """For every seed: parameters, and the batches of all steps."""

  def of_seed(seed):
    keys = jax.random.split(jax.random.key(seed))
    shape = steps, batch
    chosen = jax.random.randint(keys[1], shape, 0, len(data[0]))
    return init(keys[0]), jax.tree.map(lambda a: a[chosen], data)

  return jax.vmap(of_seed)(seeds)


class Method(NamedTuple):
  """What trains, and which learning rates it may have.

  Attributes:
    make: from a learning rate and the number of steps to an optimizer.
    grid: exponents of the lowest and the highest rate.
    of: the optimizer whose range test suggests a rate, or the default rate.
    parameters: from the state and the parameters to those that count.
  """

  make: Callable[..., optax.GradientTransformation]
  grid: tuple[float, float]
  of: Callable[..., optax.GradientTransformation] | float
  parameters: Callable[..., Any] = lambda state, params: params


def constant(optimizer, low):
  return Method(lambda rate, steps: optimizer(rate), (low, low + 5), optimizer)


def scheduled(optimizer, low):
  def make(peak, steps):
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    return optimizer(lambda count: peak * shape(count))

  return Method(make, (low, low + 5), optimizer)


def on_plateau(optimizer, low):
  def make(rate, steps):
    lowered = optax.contrib.reduce_on_plateau(
      0.5, patience=3, accumulation_size=max(steps // 40, 1)
    )
    return optax.chain(optimizer(rate), lowered)

  return Method(make, (low, low + 5), optimizer)


momentum = functools.partial(optax.sgd, momentum=0.9)
METHODS = {
  'sgd': constant(optax.sgd, -4),
  'sgd, warm-up and cosine': scheduled(optax.sgd, -4),
  'momentum': constant(momentum, -4),
  'momentum, warm-up and cosine': scheduled(momentum, -4),
  'adam': constant(optax.adam, -5),
  'adam, warm-up and cosine': scheduled(optax.adam, -5),
  'adam, reduce_on_plateau': on_plateau(optax.adam, -5),
  'lion': constant(optax.lion, -6),
  'lion, warm-up and cosine': scheduled(optax.lion, -6),
  'schedule_free_adamw': Method(
    lambda rate, steps: optax.contrib.schedule_free_adamw(rate, steps // 10),
    (-5, 0),
    optax.adam,
    optax.contrib.schedule_free_eval_params,
  ),
  'prodigy': Method(
    lambda rate, steps: optax.contrib.prodigy(rate), (-3, 2), 1.0
  ),
  'dadapt_adamw': Method(
    lambda rate, steps: optax.contrib.dadapt_adamw(rate), (-3, 2), 1.0
  ),
}
DEMO = 'adam', 'adam, warm-up and cosine', 'prodigy'
DRAWN = 'sgd', 'momentum', 'adam', 'lion'


def train(method, rates, starts, held_out):
  """Held-out losses at the end, (seeds, rates), for rates of that shape."""

  def run(params, batches, rate):
    steps = len(batches[1])
    tx = optax.with_extra_args_support(method.make(rate, steps))

    def step(carry, batch):
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params, batch)
      updates, state = tx.update(grads, state, params, value=value)
      return (optax.apply_updates(params, updates), state), None

    def part(carry, batches):
      (params, state), _ = jax.lax.scan(step, carry, batches)
      end = loss(method.parameters(state, params), held_out)
      return (params, state), end

    tail = steps // 10 // PARTS * PARTS
    first = jax.tree.map(lambda a: a[:-tail], batches)
    last = jax.tree.map(
      lambda a: a[-tail:].reshape(PARTS, -1, *a.shape[1:]), batches
    )
    before = loss(params, held_out)
    carry, _ = jax.lax.scan(step, (params, tx.init(params)), first)
    _, ends = jax.lax.scan(part, carry, last)
    end = ends.mean()
    return jnp.where(end < before, end, before)

  at_rates = jax.vmap(run, (None, None, 0))
  return np.asarray(jax.jit(jax.vmap(at_rates))(*starts, jnp.asarray(rates)))


def suggested(method, starts, probe_steps):
  """A learning rate for every seed, and the gradients it took."""
  seeds = len(starts[1][1])
  if isinstance(method.of, float):
    return np.full(seeds, method.of), 0
  found, cost = [], []
  for seed in range(seeds):
    params, batches = jax.tree.map(lambda a: a[seed], starts)  # noqa: B023
    test = ghm.learning_rate_range_test(
      loss,
      params,
      jax.tree.map(lambda a: a[:100], batches),
      method.of,
      probe_steps=probe_steps,
    )
    found.append(np.nan if test.suggestion is None else test.suggestion)
    cost.append(len(test.losses) + probe_steps * len(test.probe_rates))
  return np.array(found), np.mean(cost)


# The batch size.


@functools.partial(jax.jit, static_argnums=(2, 3))
def steps_to_target(data, rates, batch, steps, seeds):
  """Steps of SGD until the loss of 400 digits is below the target."""
  some = jax.tree.map(lambda a: a[:400], data)

  def run(seed, rate):
    key, params = jax.random.key(seed), init(jax.random.key(seed + 1000))

    def step(params, t):
      chosen = jax.random.randint(
        jax.random.fold_in(key, t), [batch], 0, len(data[0])
      )
      grads = jax.grad(loss)(params, jax.tree.map(lambda a: a[chosen], data))
      return jax.tree.map(lambda p, g: p - rate * g, params, grads), None

    def ten(params, t):
      params, _ = jax.lax.scan(step, params, t + jnp.arange(10))
      return params, loss(params, some) < TARGET

    _, below = jax.lax.scan(ten, params, jnp.arange(0, steps, 10))
    return jnp.where(below.any(), 10 * (1 + below.argmax()), steps * 10)

  return jax.vmap(jax.vmap(run, (None, 0)), (0, None))(seeds, rates)


def noise_scales(data, rate, steps, seeds):
  """The noise scale of every seed, while SGD approaches the target."""
  tx = optax.chain(ghm.noise_scale_aggregate(MICRO), optax.sgd(rate))

  @jax.jit
  @jax.vmap
  def run(params, batches):
    def step(carry, batch):
      params, state = carry
      batch = jax.tree.map(lambda a: a.reshape(8, MICRO, *a.shape[1:]), batch)
      grads = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
      updates, state = tx.update(grads, state, params)
      noise = optax.tree.get(state, 'noise').noise_scale
      return (optax.apply_updates(params, updates), state), noise

    return jax.lax.scan(step, (params, tx.init(params)), batches)[1][-1]

  return np.asarray(run(*starts_of(data, steps, 8 * MICRO, seeds)))


def batch_sizes(data, sizes, seeds):
  """Rows of batch size, best rate, steps and examples; and the noise scale."""
  rates, rows = jnp.geomspace(0.1, 3.0, 7), []
  for batch in sizes:
    most = max(200, 4_000 // batch)
    found = np.median(steps_to_target(data, rates, batch, most, seeds), 0)
    best = int(found.argmin())
    rows.append((batch, float(rates[best]), found[best], batch * found[best]))
  by_size = {row[0]: row for row in rows}
  _, rate, steps, _ = by_size[64]
  scales = noise_scales(data, rate, int(steps), seeds)
  return rows, float(np.median(scales))


def plot(curves, rows, scale, path):
  """Loss over learning rate with the suggestions; steps over batch size."""
  figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout='constrained')
  colors = {}
  for name, (rates, losses, found, ends) in curves.items():
    optimizer, _, schedule = name.partition(', ')
    if optimizer not in DRAWN or 'plateau' in schedule:
      continue
    axis = axes[int(bool(schedule))]
    color = colors.setdefault(optimizer, f'C{len(colors)}')
    label = None if schedule else optimizer
    axis.loglog(rates, np.median(losses, 0), color=color, label=label)
    axis.loglog(found, ends, 'o', color=color, mec='black', ms=5)
  axes[0].set(title='constant', ylabel='held-out loss')
  axes[1].set(title='peak of warm-up and cosine')
  for axis in axes[:2]:
    axis.set(xlabel='learning rate')
  figure.legend(
    loc='outside lower left', ncols=4, title='dots: what is suggested'
  )
  batch, _, steps, examples = np.array(rows).T
  axes[2].loglog(batch, steps, 'o-', label='steps')
  axes[2].loglog(batch, examples, 'o-', label='examples')
  axes[2].axvline(scale, color='0.5', ls='--', label='noise scale')
  axes[2].set(title=f'SGD until the loss is {TARGET}', xlabel='batch size')
  axes[2].legend()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=80)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--full', action='store_true', help='the long version')
  parser.add_argument('--steps', type=int, help='600 or, in short, 200')
  parser.add_argument('--seeds', type=int, default=3)
  output = HERE / 'output' / 'learning_rate.png'
  parser.add_argument('--picture', type=pathlib.Path, default=output)
  args = parser.parse_args()
  steps = args.steps or (600 if args.full else 200)
  console, began = Console(), time.perf_counter()
  data, held_out = load()
  starts = starts_of(data, steps, BATCH, jnp.arange(args.seeds))
  table = Table(title=f'{steps} steps: held-out loss, median of seeds')
  lengths = sorted({200, steps})
  for column in ('', 'best rate', 'its loss'):
    table.add_column(column)
  for length in lengths:
    for column in (f'probes of {length}', 'ratio', 'gradients'):
      table.add_column(column)
  curves, found = {}, {}
  for name in METHODS if args.full else DEMO:
    method = METHODS[name]
    rates = np.logspace(*method.grid, 25 if args.full else 11)
    for length in lengths:
      if (method.of, length) not in found:
        found[method.of, length] = suggested(method, starts, length)
    tests = [found[method.of, length] for length in lengths]
    every = [np.nan_to_num(rate) for rate, _ in tests]
    every += [np.full(args.seeds, rate) for rate in rates]
    losses = train(method, np.stack(every, 1), starts, held_out)
    ends, losses = np.split(losses, [len(tests)], 1)
    curve = np.median(losses, 0)
    row = [name, f'{rates[curve.argmin()]:.2g}', f'{curve.min():.3f}']
    for (rate, cost), end in zip(tests, ends.T, strict=True):
      ratio = np.median(end) / curve.min()
      row += [f'{np.median(rate):.2g}', f'{ratio:.2f}', f'{cost:.0f}']
    curves[name] = rates, losses, tests[-1][0], ends[:, -1]
    table.add_row(*row)
  console.print(table)
  sizes = BATCH_SIZES if args.full else (16, 64)
  rows, scale = batch_sizes(data, sizes, jnp.arange(args.seeds))
  table = Table(title=f'SGD until the loss is {TARGET}')
  for column in ('batch size', 'best rate', 'steps', 'examples'):
    table.add_column(column)
  for batch, rate, count, examples in rows:
    table.add_row(f'{batch}', f'{rate:.2g}', f'{count:.0f}', f'{examples:.0f}')
  console.print(table, f'noise scale: {scale:.0f} examples')
  plot(curves, rows, scale, args.picture)
  console.print(f'written: {args.picture}')
  console.print(f'{time.perf_counter() - began:.0f} s')


if __name__ == '__main__':
  main()
