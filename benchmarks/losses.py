"""Forward and backward of the GHM losses against what one would use instead.

Every row is a ratio of median times, measured in one process: all programs are
compiled and warmed first, then run in turn, round after round, each blocked
until ready. The spread is the interquartile range of the ratios within rounds.

  python benchmarks/losses.py [--quick] [--only NAME]
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import optax_ghm

RESULTS = pathlib.Path(__file__).parent / 'results'


@jax.custom_vjp
def one_exp_cross_entropy(logits, labels):
  """The floor: cross-entropy and its gradient from one exponential."""
  return _one_exp_fwd(logits, labels)[0]


def _one_exp_fwd(logits, labels):
  e = jnp.exp(-jnp.abs(logits))
  p = jnp.where(logits >= 0, 1.0, e) / (1 + e)
  loss = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(e)
  return loss, p - labels


one_exp_cross_entropy.defvjp(_one_exp_fwd, lambda r, ct: (ct * r, None))


def sigmoid_ghm(density):
  def loss(logits, labels):
    return optax_ghm.sigmoid_ghm_loss(logits, labels, density=density)[0]

  return loss


def softmax_ghm(logits, labels):
  return optax_ghm.softmax_ghm_loss_with_integer_labels(logits, labels)[0]


def harmonized_cross_entropy(logits, labels):
  logits = optax_ghm.harmonize(logits, axis=())
  return optax.sigmoid_binary_cross_entropy(logits, labels)


SIGMOID = {
  'optax.sigmoid_binary_cross_entropy': optax.sigmoid_binary_cross_entropy,
  'floor: one-exp cross-entropy': one_exp_cross_entropy,
  'optax.losses.sigmoid_focal_loss': functools.partial(
    optax.losses.sigmoid_focal_loss, gamma=2.0
  ),
  'sigmoid_ghm_loss, windowed': sigmoid_ghm(optax_ghm.WindowedDensity()),
  'sigmoid_ghm_loss, 10 bins': sigmoid_ghm(optax_ghm.BinnedDensity(bins=10)),
  'sigmoid_ghm_loss, 30 bins': sigmoid_ghm(optax_ghm.BinnedDensity(bins=30)),
  'sigmoid_ghm_loss, 1000 bins': sigmoid_ghm(
    optax_ghm.BinnedDensity(bins=1000)
  ),
  'harmonize before optax cross-entropy': harmonized_cross_entropy,
}
SOFTMAX = {
  'optax.softmax_cross_entropy_with_integer_labels': (
    optax.softmax_cross_entropy_with_integer_labels
  ),
  'softmax_ghm_loss_with_integer_labels': softmax_ghm,
}


def sigmoid_data(size):
  """Logits of a detector: nearly all easy negatives."""
  one, two = jax.random.split(jax.random.key(0))
  labels = jax.random.uniform(one, (size,)) < 0.02
  logits = 2 * jax.random.normal(two, (size,)) + jnp.where(labels, 1.0, -4.0)
  return logits, labels.astype(jnp.float32)


def softmax_data(size, classes):
  one, two = jax.random.split(jax.random.key(0))
  labels = jax.random.randint(one, (size,), 0, classes)
  logits = jax.random.normal(two, (size, classes))
  return logits + 4 * jax.nn.one_hot(labels, classes), labels


def measure(losses, data, rounds):
  """Seconds per round (programs × rounds), and temporary bytes."""
  programs, temporary = [], []
  for loss in losses.values():
    step = jax.jit(
      jax.value_and_grad(lambda x, y, loss=loss: loss(x, y).mean())
    )
    compiled = step.lower(*data).compile()
    memory = compiled.memory_analysis()
    temporary.append(memory.temp_size_in_bytes if memory else float('nan'))
    programs.append(compiled)
    for _ in range(3):
      jax.block_until_ready(compiled(*data))
  seconds = np.empty((len(programs), rounds))
  for r in range(rounds):
    for i, program in enumerate(programs):
      start = time.perf_counter()
      jax.block_until_ready(program(*data))
      seconds[i, r] = time.perf_counter() - start
  return seconds, temporary


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quick', action='store_true', help='fewer rounds')
  parser.add_argument('--only', default='', help='cases whose name has this')
  args = parser.parse_args()
  rounds = 15 if args.quick else 41
  cases = {
    f'sigmoid N={n:.0e}': (SIGMOID, functools.partial(sigmoid_data, n))
    for n in (10**5, 10**6, 10**7)
  } | {
    f'softmax N={n:.0e} C={c}': (SOFTMAX, functools.partial(softmax_data, n, c))
    for n, c in ((10**5, 10), (10**4, 1000))
  }
  console, report = Console(), {}
  for case, (losses, make) in cases.items():
    if args.only not in case:
      continue
    data = jax.block_until_ready(make())
    fewer = max(rounds // 3, 5) if data[0].size >= 10**7 else rounds
    seconds, temporary = measure(losses, data, fewer)
    table = Table(title=f'{case}, median of {fewer} rounds')
    for column in ('loss', 'ms', '× first', 'spread', '× floor', 'temp B/elem'):
      table.add_column(column, justify='left' if column == 'loss' else 'right')
    report[case] = {}
    for i, name in enumerate(losses):
      ratio = seconds[i] / seconds[0]
      low, high = np.quantile(ratio, [0.25, 0.75])
      row = {
        'ms': 1e3 * np.median(seconds[i]),
        'ratio': np.median(ratio),
        'spread': [low, high],
        'temporary_bytes_per_element': temporary[i] / data[0].size,
      }
      if losses is SIGMOID:
        row['ratio_to_floor'] = np.median(seconds[i] / seconds[1])
      report[case][name] = row
      table.add_row(
        name,
        f'{row["ms"]:.2f}',
        f'{row["ratio"]:.2f}',
        f'{low:.2f}-{high:.2f}',
        f'{row["ratio_to_floor"]:.2f}' if losses is SIGMOID else '',
        f'{row["temporary_bytes_per_element"]:.1f}',
      )
    console.print(table)
  RESULTS.mkdir(exist_ok=True)
  context = {
    'jax': jax.__version__,
    'backend': jax.default_backend(),
    'processor': platform.processor() or platform.machine(),
    'cores': os.cpu_count(),
  }
  path = RESULTS / 'losses.json'
  path.write_text(
    json.dumps({'context': context, 'cases': report}, indent=1) + '\n'
  )
  console.print(f'written: {path}')


if __name__ == '__main__':
  main()
