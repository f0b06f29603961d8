"""How good the suggestions of the learning rate range test are.

Pairs of a small task and an optimizer are trained for 400 steps at each of 25
constant learning rates in five decades, from 3 seeds, and at the rate that each
rule suggests, which sees the first 100 batches. A loss is the mean of the last
40 steps; a loss that is not finite or above that at the start counts as that at
the start. Where there is no suggestion, the test is made again with twice as
many steps, as it asks for. Of each pair and rule,

  ratio     is the median loss of the seeds over that at the best of the rates
  gap       their difference over that of the start and the best
  held out  the ratio of losses on other data, mean of five in the last 40 steps
  steps     what the rule costs, in gradients

The rules were developed on 20 pairs. ``--held-back`` measures 10 others, of
other tasks and other optimizers, which were fixed before.

  python benchmarks/range_test.py [--held-back] [--only NAME] [--save NAME]
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_tasks
from rich.console import Console
from rich.table import Table

import optax_ghm as ghm

STEPS, TAIL, PARTS, SEEDS, BATCHES = 400, 40, 5, 3, 100
RESULTS = pathlib.Path(__file__).parent / 'results'

momentum = functools.partial(optax.sgd, momentum=0.9)
nesterov = functools.partial(optax.sgd, momentum=0.95, nesterov=True)
OPTIMIZERS = {  # the lowest of the learning rates, and one that is common
  'sgd': (optax.sgd, 1e-4, 0.1),
  'momentum': (momentum, 1e-4, 0.01),
  'adam': (optax.adam, 1e-5, 1e-3),
  'lion': (optax.lion, 1e-6, 1e-4),
  'nesterov': (nesterov, 1e-5, 0.01),
  'adagrad': (optax.adagrad, 1e-4, 0.01),
  'rmsprop': (optax.rmsprop, 1e-5, 1e-3),
  'adafactor': (optax.adafactor, 1e-4, 0.01),
  'muon': (optax.contrib.muon, 1e-5, 0.02),
}
UNNORMALIZED = {'sgd', 'momentum', 'nesterov'}
DEVELOPMENT = [
  (task, optimizer)
  for task in ('digits', 'friedman', 'characters', 'autoencoder', 'rare')
  for optimizer in ('sgd', 'momentum', 'adam', 'lion')
]
HELD_BACK = [
  ('deep', 'muon'),
  ('deep', 'rmsprop'),
  ('ratings', 'adagrad'),
  ('ratings', 'adafactor'),
  ('waves', 'rmsprop'),
  ('waves', 'adafactor'),
  ('mixer', 'muon'),
  ('mixer', 'nesterov'),
  ('softmax', 'nesterov'),
  ('softmax', 'adagrad'),
]


def params_at(state, params):
  del state
  return params


RATELESS = {  # and where the losses that count are taken
  'prodigy': (optax.contrib.prodigy, params_at),
  'dadapt_adamw': (optax.contrib.dadapt_adamw, params_at),
  'schedule_free_adamw': (
    optax.contrib.schedule_free_adamw,
    optax.contrib.schedule_free_eval_params,
  ),
}


def starts(task):
  """Parameters, and the examples in all batches, of every seed."""
  rngs = [np.random.default_rng([seed, 7]) for seed in range(SEEDS)]
  params = [task.init(rng) for rng in rngs]
  shape = STEPS, task.batch
  chosen = [rng.integers(len(task.train[0]), size=shape) for rng in rngs]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *params)
  return stacked, np.stack(chosen)


def trained(task, optimizer, rates, at=params_at):
  """Losses at learning rates (SEEDS, k): at the end, held out, at the start."""
  train, held_out = jax.tree.map(jnp.asarray, (task.train, task.held_out))

  def run(params, chosen, rate):
    tx = optax.with_extra_args_support(optimizer(rate))

    def step(carry, chosen):
      params, state = carry
      batch = jax.tree.map(lambda a: a[chosen], train)
      value, grads = jax.value_and_grad(task.loss)(params, batch)
      updates, new = tx.update(grads, state, params, value=value)
      loss = task.loss(at(state, params), batch)
      return (optax.apply_updates(params, updates), new), loss

    def part(carry, chosen):
      (params, state), losses = jax.lax.scan(step, carry, chosen)
      other = task.loss(at(state, params), held_out)
      return (params, state), (losses.mean(), other)

    carry, first = jax.lax.scan(step, (params, tx.init(params)), chosen[:-TAIL])
    parts = chosen[-TAIL:].reshape(PARTS, -1, task.batch)
    _, ends = jax.lax.scan(part, carry, parts)
    start, ends = first[0], [end.mean() for end in ends]
    return *[jnp.where(end < start, end, start) for end in ends], start

  at_rates = jax.vmap(run, (None, None, 0))
  of_seeds = jax.jit(jax.vmap(at_rates))
  return map(np.asarray, of_seeds(*starts(task), np.float32(rates)))


def range_test(*args, probe_steps):
  """The test, with more steps if there is no suggestion; gradients it takes."""
  cost = 0
  for steps in (200, 400, 800):
    test = ghm.learning_rate_range_test(
      *args, steps=steps, probe_steps=probe_steps
    )
    cost += steps + probe_steps * len(test.probe_rates)
    if test.suggestion is not None:
      break
  return test, cost


def suggested(task, optimizer):
  """For every rule: a learning rate per seed, and gradients that it takes."""
  params, chosen = starts(task)
  found = {}
  for seed in range(SEEDS):
    batches = jax.tree.map(lambda a: a[chosen[seed, :BATCHES]], task.train)  # noqa: B023
    start = jax.tree.map(lambda a: a[seed], params)  # noqa: B023
    for probe_steps in (0, 100, 200, 400):
      test, cost = range_test(
        task.loss, start, batches, optimizer, probe_steps=probe_steps
      )
      name = f'probes of {probe_steps}' if probe_steps else 'no probes'
      found.setdefault(name, []).append((test.suggestion, cost))
  return {name: tuple(np.array(rows, float).T) for name, rows in found.items()}


def measure(name, optimizer):
  """Of a pair: its best loss, and of every rule the columns above."""
  task = getattr(small_tasks, name)()
  tx, low, common = OPTIMIZERS[optimizer]
  rates = np.geomspace(low, 1e5 * low, 25)
  losses, other, start = trained(task, tx, np.tile(rates, (SEEDS, 1)))
  rules = suggested(task, tx)
  for probe_steps in (100, 200):
    found, cost = rules[f'probes of {probe_steps}']
    if optimizer not in UNNORMALIZED:
      found = found * np.sqrt(probe_steps / STEPS)
    rules[f'probes of {probe_steps}, scaled'] = found, cost
  rules['a common rate'] = np.full(SEEDS, common), np.zeros(SEEDS)
  at = np.stack([found for found, _ in rules.values()], 1)
  ends, others, _ = trained(task, tx, np.nan_to_num(at))
  start, curve, held_out = (
    np.median(a, 0) for a in (start[:, 0], losses, other)
  )
  best = curve.min()
  return {
    'start': float(start),
    'rates': rates.tolist(),
    'losses': curve.tolist(),
    'held out': held_out.tolist(),
    'rules': {
      rule: {
        'rates': found.tolist(),
        'ratio': float(end / best),
        'gap': float((end - best) / (start - best)),
        'held out': float(other / held_out.min()),
        'steps': float(cost.mean()),
      }
      for (rule, (found, cost)), end, other in zip(
        rules.items(), np.median(ends, 0), np.median(others, 0), strict=True
      )
    },
  }


def rateless(name):
  """Of what has no learning rate to choose: ratios to the best of Adam's."""
  task = getattr(small_tasks, name)()
  tx, low, _ = OPTIMIZERS['adam']
  rates = np.tile(np.geomspace(low, 1e5 * low, 25), (SEEDS, 1))
  losses, _, _ = trained(task, tx, rates)
  best, ratios = np.median(losses, 0).min(), {}
  for rule, (make, at) in RATELESS.items():
    ends, _, _ = trained(task, lambda _: make(), np.ones((SEEDS, 1)), at)  # noqa: B023
    ratios[rule] = float(np.median(ends) / best)
  return ratios


def summary(pairs, alternatives):
  """Over all pairs: median, upper quartile and maximum."""
  table = Table(title=f'{len(pairs)} pairs: median, upper quartile, maximum')
  for column in ('', 'ratio', 'gap', 'held out', 'steps'):
    table.add_column(column)

  def quartiles(values, digits=2):
    return ', '.join(
      f'{v:.{digits}f}' for v in np.percentile(values, [50, 75, 100])
    )

  for rule in next(iter(pairs.values()))['rules']:
    rows = [pair['rules'][rule] for pair in pairs.values()]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    table.add_row(
      rule,
      quartiles(columns['ratio']),
      quartiles(columns['gap'], 3),
      quartiles(columns['held out']),
      f'{np.mean(columns["steps"]):.0f}',
    )
  for rule in RATELESS:
    ratios = [found[rule] for found in alternatives.values()]
    table.add_row(f'{rule}, to Adam', quartiles(ratios), '', '', '0')
  return table


def rounded(tree):
  """Four digits of every number."""
  return jax.tree.map(lambda x: float(f'{x:.4g}'), tree)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--held-back', action='store_true')
  parser.add_argument(
    '--only', default='', help='pairs with this in their name'
  )
  parser.add_argument('--save', default='', help='a name under results')
  args = parser.parse_args()
  console, began = Console(width=100), time.perf_counter()
  chosen = HELD_BACK if args.held_back else DEVELOPMENT
  chosen = [pair for pair in chosen if args.only in ', '.join(pair)]
  pairs = {}
  for pair in chosen:
    found = pairs[', '.join(pair)] = measure(*pair)
    ratios = {rule: row['ratio'] for rule, row in found['rules'].items()}
    console.print(
      ', '.join(pair),
      f'best {min(found["losses"]):.4f}',
      *[f'{rule}: {ratio:.2f};' for rule, ratio in ratios.items()],
    )
  alternatives = {task: rateless(task) for task in dict(chosen)}
  console.print(summary(pairs, alternatives))
  console.print(alternatives)
  if args.save:
    report = rounded({'pairs': pairs, 'rateless': alternatives})
    path = RESULTS / f'{args.save}.json'
    path.write_text(json.dumps(report) + '\n')
    console.print(f'written: {path}')
  console.print(f'{(time.perf_counter() - began) / 60:.1f} minutes')


if __name__ == '__main__':
  main()
