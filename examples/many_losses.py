"""Several losses and one network: does it help to reconcile them?

- Two digits: one lies over the other, and a network with one trunk and two
  heads names both; once as it is, and once with a loss of the right digit that
  is a hundred times too large.
- A string under load: a physics-informed network learns u from the equation
  u'' = f, from u at the left end, and from ten noisy measurements. The error is
  that of u, relative to the exact solution.

Every method chose among the same eight learning rates of Adam; the weighted sum
had its weights besides, and so nine times the trials for the digits, and 25
times for the string. They were chosen on other digits or other strings, and
from other seeds, than those reported (``--tune`` does it again). Tuning knows
exact solutions, of other strings; in practice, one holds out measurements.
Parameters of the methods are the defaults, but for smooth Tchebycheff, which
weighs every loss by 1 over its value at the start, with a smoothing of 0.1.

Of ten seeds (--full), it was found that
- nothing beats the tuned weighted sum, in any of the three;
- for the digits as they are, the plain sum is the tuned one, and all the others
  are within one point of it: reconciling does nothing;
- with one loss × 100, the plain sum gets 19 % of the left digits right instead
  of 85 %. So do UPGrad, PCGrad and uncertainty weights, and UPGrad in a fork
  does little better: they keep a loss from hurting another, and leave its scale
  as it is. MGDA gives up the other digit. What does not see the scales gets as
  much as the tuned sum, without weights: the geometric mean, FAMO, IMTL-G,
  ConFIG, Aligned-MTL, Nash-MTL, and UPGrad of gradients of length 1;
- for the string, UPGrad is as good as the tuned sum (2.5 % and 2.3 %), and the
  plain sum at its own best rate is not clearly worse (5.1 ± 1.7 %). MGDA,
  IMTL-G, Aligned-MTL, FAMO, smooth Tchebycheff and the geometric mean lose,
  some by far: many of them follow the losses that are almost solved;
- a rate ten times too small is forgiven: the string's error, as a geometric
  mean, is then about 8 % with UPGrad, and above 60 % with the plain sum.

Which rate is best for the string is uncertain itself. An earlier choice, on 8
strings instead of 32, made 5.6 ± 2.1 of the tuned sum and 5.2 ± 1.5 of UPGrad:
factors below two say little there. The 32, for the best rate of every method
and its two neighbors, were added after these scores had been seen.

  python examples/many_losses.py         # all but the first task, 3 seeds
  python examples/many_losses.py --full  # 10 seeds, every rate for the string
  python examples/many_losses.py --tune  # all is tuned again, then as --full
"""

import argparse
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn import datasets

from optax_ghm import conflict

mpl.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

HERE = pathlib.Path(__file__).parent
TUNED = HERE / 'many_losses_tuned.json'
TUNING_SEEDS = range(100, 108)
RATES = tuple(np.geomspace(1e-3, 0.3, 8).round(5).tolist())


class Problem(NamedTuple):
  """What one seed is about: data to train on, and data to score on."""

  params: tuple[np.ndarray, ...]  # at the start
  data: tuple[np.ndarray, ...]
  batches: np.ndarray  # what every step sees
  held_out: tuple[np.ndarray, ...]


class Task(NamedTuple):
  """Several losses of one network, and what it is scored by.

  Attributes:
    make: a problem from the part of the data to score on, and a seed.
    losses: from parameters, a problem and a batch to a vector of losses.
    scores: from parameters and a problem to a vector as long as ``columns``.
    columns: names of the scores.
    main: which of them counts; it is tuned.
    sign: 1 where more is better, -1 where less is.
    grid: weights of the losses that the weighted sum may take.
    sweep: those of them, in order, that are drawn.
    refining_seeds: on which the best rate is compared with its neighbors.
  """

  make: Callable[..., Problem]
  losses: Callable[..., jax.Array]
  scores: Callable[..., jax.Array]
  columns: tuple[str, ...]
  main: int
  sign: int
  grid: tuple[tuple[float, ...], ...]
  sweep: tuple[tuple[float, ...], ...]
  refining_seeds: range = range(0)


def layer(rng, inputs, outputs, gain=1.0):
  scale = gain / np.sqrt(inputs)
  weights = rng.normal(0, scale, (inputs, outputs)).astype(np.float32)
  return weights, np.zeros(outputs, np.float32)


# Two digits, one over the other: one trunk, and a head for each.

CANVAS, HIDDEN, FEATURES, CLASSES = 10, 48, 16, 10
PAIRS, BATCH = {'train': 4000, 'validation': 2000, 'test': 2000}, 64


def overlay(part, seed):
  """Pairs of digits on a canvas, and their labels, (pairs, 2)."""
  pixels, labels = datasets.load_digits(return_X_y=True)
  pixels = np.asarray(pixels, np.float32).reshape(-1, 8, 8) / 16
  order = np.random.default_rng(0).permutation(len(labels))
  ranges = {
    'train': (0, 1000),
    'validation': (1000, 1300),
    'test': (1300, None),
  }
  pool, number = order[slice(*ranges[part])], PAIRS[part]
  at = np.random.default_rng([seed, ranges[part][0]]).choice(pool, (number, 2))
  canvas = np.zeros((2, number, CANVAS, CANVAS), np.float32)
  canvas[0, :, :8, :8] = pixels[at[:, 0]]
  canvas[1, :, -8:, -8:] = pixels[at[:, 1]]
  images = canvas.max(0).reshape(number, -1)
  return images, np.asarray(labels, np.int32)[at]


def make_digits(part, seed, steps=500):
  rng = np.random.default_rng([seed, 1])
  params = (
    *layer(rng, CANVAS**2, HIDDEN, np.sqrt(2)),
    *layer(rng, HIDDEN, FEATURES, np.sqrt(2)),
    *layer(rng, FEATURES, CLASSES, 0.1),
    *layer(rng, FEATURES, CLASSES, 0.1),
  )
  batches = rng.integers(PAIRS['train'], size=(steps, BATCH), dtype=np.int32)
  return Problem(params, overlay('train', seed), batches, overlay(part, seed))


def trunk(params, images):
  w1, b1, w2, b2, *_ = params
  return jax.nn.relu(jax.nn.relu(images @ w1 + b1) @ w2 + b2)


def head(params, which, features):
  w, b = params[4 + 2 * which : 6 + 2 * which]
  return features @ w + b


def digits_losses(params, problem, batch, fork=lambda x: (x, x)):
  images, labels = (field[batch] for field in problem.data)
  return jnp.stack(
    [
      optax.softmax_cross_entropy_with_integer_labels(
        head(params, which, features), labels[:, which]
      ).mean()
      for which, features in enumerate(fork(trunk(params, images)))
    ]
  )


def digits_scores(params, problem):
  images, labels = problem.held_out
  features = trunk(params, images)
  left, right = (
    100 * jnp.mean(head(params, i, features).argmax(-1) == labels[:, i])
    for i in range(2)
  )
  return jnp.stack([left, right, (left + right) / 2, jnp.minimum(left, right)])


# A string under load: a physics-informed network learns u from u'' = f, from
# u at the left end, and from a few noisy measurements.

WIDTH, POINTS, MEASURED, NOISE = 32, 64, 10, 0.05


def make_string(part, seed, steps=1000):
  del part  # every seed is another string
  rng = np.random.default_rng([seed, 2])
  wave_numbers, phases = rng.uniform([3, 8], [6, 12]), rng.uniform(0, 6.28, 2)
  waves = np.stack([[1, 0.3], wave_numbers, phases]).astype(np.float32)
  x = rng.uniform(-1, 1, MEASURED).astype(np.float32)
  noise = rng.normal(0, NOISE, MEASURED).astype(np.float32)
  batches = rng.uniform(-1, 1, (steps, POINTS)).astype(np.float32)
  params = (
    *layer(rng, 1, WIDTH, 2.0),
    *layer(rng, WIDTH, WIDTH),
    *layer(rng, WIDTH, 1),
  )
  measured = np.asarray(displacement(waves, x)) + noise
  grid = np.linspace(-1, 1, 201, dtype=np.float32)
  return Problem(params, (waves, x, measured), batches, (grid,))


def displacement(waves, x):
  amplitudes, wave_numbers, phases = waves
  return jnp.sin(x[:, None] * wave_numbers + phases) @ amplitudes


def load(waves, x):
  amplitudes, wave_numbers, phases = waves
  waves = amplitudes * -(wave_numbers**2), wave_numbers, phases
  return displacement(waves, x)


def u(params, x):
  w1, b1, w2, b2, w3, b3 = params
  hidden = jnp.tanh(jnp.tanh(x[:, None] * w1 + b1) @ w2 + b2)
  return (hidden @ w3 + b3)[:, 0]


def residual(params, waves, x):
  def derivative(f):
    return lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]

  of_x = functools.partial(u, params)
  return derivative(derivative(of_x))(x) - load(waves, x)


def string_losses(params, problem, batch):
  waves, x, measured = problem.data
  end = jnp.array([-1.0])
  errors = (
    residual(params, waves, batch),
    u(params, end) - displacement(waves, end),
    u(params, x) - measured,
  )
  return jnp.stack([jnp.mean(error**2) for error in errors])


def string_scores(params, problem):
  (waves, x, measured), (grid,) = problem.data, problem.held_out
  exact, norm = displacement(waves, grid), jnp.linalg.norm
  error = norm(u(params, grid) - exact) / norm(exact)
  off = norm(residual(params, waves, grid)) / norm(load(waves, grid))
  misfit = jnp.sqrt(jnp.mean((u(params, x) - measured) ** 2))
  return 100 * jnp.stack([error, off, misfit])


POWERS = tuple((10.0 ** np.arange(-2, 2.1, 0.5)).round(4).tolist())
BALANCES = tuple((1.0, c) for c in POWERS)
WEIGHTS = tuple(
  (1.0, *others)
  for others in itertools.product((0.1, 1.0, 10.0, 100.0, 1000.0), repeat=2)
)
DIGITS = Task(
  make_digits,
  digits_losses,
  digits_scores,
  ('left', 'right', 'mean', 'worst'),
  2,
  1,
  BALANCES,
  BALANCES,
)
STRING = Task(
  make_string,
  string_losses,
  string_scores,
  ('error', 'residual', 'misfit'),
  0,
  -1,
  WEIGHTS,
  tuple((1.0, c, c) for c in (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)),
  range(108, 140),
)
SCENARIOS = {  # the task, and by what its losses are scaled
  'two digits': (DIGITS, (1.0, 1.0)),
  'two digits, the right loss × 100': (DIGITS, (1.0, 100.0)),
  'a string under load': (STRING, (1.0, 1.0, 1.0)),
}
_, SCALED, LAST = SCENARIOS


# Methods.


class Known(NamedTuple):
  """What a sum may depend on, besides the losses."""

  log_variances: jax.Array
  logits: jax.Array
  first: jax.Array  # the losses at the start


def tchebycheff(losses, known):
  return conflict.smooth_tchebycheff(losses, 1 / known.first, smoothing=0.1)


PLAIN, BASELINE = 'plain sum', 'tuned weighted sum'
METHODS = {
  'sum': {
    PLAIN: lambda losses, known: losses.sum(),
    BASELINE: lambda losses, known: losses.sum(),
    'uncertainty': lambda losses, known: conflict.uncertainty_weighted(
      losses, known.log_variances
    ),
    'geometric mean': lambda losses, known: conflict.geometric_mean(losses),
    'smooth Tchebycheff': tchebycheff,
    'FAMO': lambda losses, known: conflict.famo_loss(losses, known.logits),
  },
  'reconciled': {
    'UPGrad': conflict.upgrad_weights,
    'UPGrad of units': conflict.of_unit_gradients(conflict.upgrad_weights),
    'MGDA': conflict.mgda_weights,
    'CAGrad': conflict.cagrad_weights,
    'PCGrad': conflict.pcgrad_weights,  # in a fixed order
    'IMTL-G': conflict.imtl_g_weights,
    'ConFIG': conflict.config_weights,
    'Aligned-MTL': conflict.aligned_mtl_weights,
    'Nash-MTL': conflict.nash_mtl_weights,
  },
  'fork': {'fork with UPGrad': lambda losses, known: losses.sum()},
}


@functools.partial(jax.jit, static_argnames=('task', 'kind'))
def train(problems, which, rates, weights, *, task, kind):
  """Scores of all rates, each with its weights, (rates, problems, scores).

  Which method of its kind it is may vary without another compilation.
  """
  methods = tuple(METHODS[kind].values())
  loss_fn = task.losses
  if kind == 'fork':
    loss_fn = functools.partial(loss_fn, fork=conflict.fork)

  def run(rate, weights, problem):
    def losses_fn(params, batch):
      return weights * loss_fn(params, problem, batch)

    first = losses_fn(problem.params, problem.batches[0])
    zeros = jnp.zeros_like(first)
    steps = problem.batches.shape[0]
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    of_logits = optax.chain(optax.add_decayed_weights(1e-3), optax.adam(0.025))

    def reconciled(carry, batch):
      params, state = carry
      _, grads, _ = conflict.reconciled_value_and_grad(
        losses_fn, functools.partial(jax.lax.switch, which, methods)
      )(params, batch)
      updates, state = tx.update(grads, state)
      return (optax.apply_updates(params, updates), state), None

    def summed(carry, batch):
      learned, state, logits, logits_state = carry

      def loss(learned):
        params, log_variances = learned
        losses = losses_fn(params, batch)
        known = Known(log_variances, logits, first)
        return jax.lax.switch(which, methods, losses, known), losses

      grads, before = jax.grad(loss, has_aux=True)(learned)
      updates, state = tx.update(grads, state)
      learned: Any = optax.apply_updates(learned, updates)
      # Only FAMO reads the logits.
      grads = conflict.famo_logits_gradient(
        logits, before, losses_fn(learned[0], batch)
      )
      updates, logits_state = of_logits.update(grads, logits_state, logits)
      moved = optax.apply_updates(logits, updates)
      return (learned, state, moved, logits_state), None

    if kind == 'reconciled':
      start = problem.params, tx.init(problem.params)
      (params, _), _ = jax.lax.scan(reconciled, start, problem.batches)
    else:
      learned = problem.params, zeros  # uncertainty weights are learned, too
      start = learned, tx.init(learned), zeros, of_logits.init(zeros)
      (learned, *_), _ = jax.lax.scan(summed, start, problem.batches)
      params = learned[0]
    return task.scores(params, problem)

  over_problems = jax.vmap(run, (None, None, 0))
  return jax.vmap(over_problems, (0, 0, None))(rates, weights, problems)


def stack(task, part, seeds):
  """The problems of all seeds."""
  problems = [task.make(part, seed) for seed in seeds]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *problems)


def run_method(scenario, name, problems, rates, weights):
  """Scores, (rates, problems, scores)."""
  task, scale = SCENARIOS[scenario]
  kind = next(kind for kind, names in METHODS.items() if name in names)
  which = list(METHODS[kind]).index(name)
  weights = np.multiply(
    np.broadcast_to(weights, (len(rates), len(scale))), scale
  )
  rates, weights = np.float32(rates), np.float32(weights)
  return np.asarray(
    train(problems, which, rates, weights, task=task, kind=kind)
  )


def names_of(scenario):
  """The methods; only a network with heads can be forked."""
  names = [name for names in METHODS.values() for name in names]
  return names if SCENARIOS[scenario][0] is DIGITS else names[:-1]


def tune(scenario, name):
  """The rate, and for the weighted sum the weights, that are best."""
  task, scale = SCENARIOS[scenario]
  grid = task.grid if name == BASELINE else ((1.0,) * len(scale),)
  problems = stack(task, 'validation', TUNING_SEEDS)
  _, at, weights = max(
    (*best_rate(scenario, name, problems, RATES, weights), weights)
    for weights in grid
  )
  return refine(scenario, name, RATES[at], weights)


def refine(scenario, name, rate, weights):
  """The best of a rate and its neighbors, on more seeds."""
  task, _ = SCENARIOS[scenario]
  if task.refining_seeds:
    at = RATES.index(rate)
    near = RATES[max(at - 1, 0) : at + 2]
    problems = stack(task, 'validation', task.refining_seeds)
    rate = near[best_rate(scenario, name, problems, near, weights)[1]]
  return {'rate': rate, 'weights': weights}


def best_rate(scenario, name, problems, rates, weights):
  """The score of the best rate, and which it is."""
  task, _ = SCENARIOS[scenario]
  scores = run_method(scenario, name, problems, rates, weights)
  scores = task.sign * center(task, scores)[:, task.main]
  scores = np.nan_to_num(scores, nan=-np.inf)
  return scores.max(), int(scores.argmax())


def mean_and_error(values, sign=''):
  error = values.std(ddof=1) / np.sqrt(len(values))
  return f'{values.mean():{sign}.1f} ± {error:.1f}'


def against(baseline, values, sign):
  """The gain over the baseline, paired over seeds; for errors, their ratio."""
  if sign > 0:
    return mean_and_error(values - baseline, '+')
  logs = np.log(values / baseline)
  error = logs.std(ddof=1) / np.sqrt(len(logs))
  ratio, low, high = np.exp(logs.mean() + error * np.array([0, -1, 1]))
  return f'{ratio:.1f} ({low:.1f} to {high:.1f})'


def center(task, scores):
  """The mean of scores over the seeds, the geometric one of errors."""
  if task.sign > 0:
    return scores.mean(-2)
  return np.exp(np.log(scores).mean(-2))


def print_table(console, scenario, rows):
  task, _ = SCENARIOS[scenario]
  table = Table(
    box=box.SIMPLE_HEAD,
    padding=0,
    title=f'{scenario}, {len(rows[PLAIN])} seeds: mean ± standard error, %',
    caption='last column: paired over seeds',
  )
  last = ('−' if task.sign > 0 else '÷') + ' tuned sum'
  for column in ('', *task.columns, last):
    table.add_column(
      column, justify='right' if column else 'left', no_wrap=True
    )
  for name, scores in rows.items():
    cells = [mean_and_error(column) for column in scores.T]
    if name != BASELINE:
      baseline = rows[BASELINE][:, task.main]
      cells.append(against(baseline, scores[:, task.main], task.sign))
    table.add_row(name, *cells)
  console.print(table)


def style(i):
  """A color and a marker for every method."""
  return {
    'color': plt.get_cmap('tab20')(i % 20),
    'marker': 'osD^vPX*<>hpd8Hx'[i],
  }


def plot(results, sweeps, at_rates, path):
  """Where every method lands, and what weighted sums can reach."""
  columns = 3 if at_rates else 2
  figure, (left, middle, *others) = plt.subplots(
    1, columns, figsize=(5 * columns + 2, 4.6), layout='constrained'
  )
  near = left.inset_axes((0.12, 0.12, 0.62, 0.62), xlim=(82, 88), ylim=(85, 90))
  left.indicate_inset_zoom(near)
  for axis, scenario, x, y in (
    (left, SCALED, 0, 1),
    (near, SCALED, 0, 1),
    (middle, LAST, 1, 2),
  ):
    task, _ = SCENARIOS[scenario]
    curve = center(task, sweeps[scenario])
    axis.plot(*curve[:, [x, y]].T, '.-', color='0.7', label='weighted sums')
    for i, (name, scores) in enumerate(results[scenario].items()):
      at = center(task, scores)
      axis.plot(at[x], at[y], ls='none', ms=8, label=name, **style(i))
  left.set(title=SCALED, xlabel='left accuracy, %', ylabel='right accuracy, %')
  middle.set(title=LAST, xscale='log', yscale='log')
  middle.set(
    xlabel='residual, % of the load', ylabel='misfit to measurements, %'
  )
  for axis in others:
    for i, scores in enumerate(at_rates.values()):
      axis.plot(RATES, center(STRING, scores)[:, 0], lw=0.8, **style(i))
    axis.set(title=f'{LAST}, at every rate', xscale='log', yscale='log')
    axis.set(xlabel='learning rate', ylabel='error, %')
  handles, labels = left.get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside right upper', frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=80)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--full', action='store_true', help='the long version')
  parser.add_argument('--seeds', type=int, help='10 or, in short, 3')
  parser.add_argument('--tune', action='store_true', help='tune all again')
  output = HERE / 'output' / 'many_losses.png'
  parser.add_argument('--output', type=pathlib.Path, default=output)
  args = parser.parse_args()
  full = args.full or args.tune
  seeds = range(args.seeds or (10 if full else 3))
  console, start = Console(), time.monotonic()
  tuned = {} if args.tune else json.loads(TUNED.read_text())
  scenarios = SCENARIOS if full else (SCALED, LAST)
  jobs = [(s, name) for s in scenarios for name in names_of(s)]
  if args.tune:
    for scenario, name in track(jobs, 'tuning', console=console):
      tuned.setdefault(scenario, {})[name] = tune(scenario, name)
    TUNED.write_text(json.dumps(tuned, indent=1) + '\n')
  results, at_rates = {s: {} for s in scenarios}, {}
  problems = {t: stack(t, 'test', seeds) for t, _ in SCENARIOS.values()}
  for scenario, name in track(jobs, 'training', console=console):
    rate, weights = tuned[scenario][name].values()
    rates = RATES if full and scenario == LAST else (rate,)
    of_task = problems[SCENARIOS[scenario][0]]
    scores = run_method(scenario, name, of_task, rates, weights)
    if len(rates) > 1:
      at_rates[name] = scores
    results[scenario][name] = scores[rates.index(rate)]
  for scenario, rows in results.items():
    print_table(console, scenario, rows)
  sweeps = {}
  for scenario in (SCALED, LAST):
    task, scale = SCENARIOS[scenario]
    weights = np.divide(task.sweep, scale)
    rates = [tuned[scenario][BASELINE]['rate']] * len(weights)
    sweeps[scenario] = run_method(
      scenario, BASELINE, problems[task], rates, weights
    )
  plot(results, sweeps, at_rates, args.output)
  console.print(f'picture: {args.output}')
  console.print(f'{time.monotonic() - start:.0f} s')


if __name__ == '__main__':
  main()
