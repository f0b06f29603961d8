"""What the norm of many small leaves takes to trace and to compile.

Processor seconds, on trees as optimizers see them (leaves of seven shapes) and
on the worst of them (every leaf of another shape).

  python benchmarks/compile_time.py
"""

import json
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from optax_ghm import norms


def make_tree(leaves, kinds):
  rng = np.random.default_rng(0)
  shapes = [
    tuple(rng.integers(1, 128, 2)) if i % 2 else (int(rng.integers(1, 1000)),)
    for i in range(kinds)
  ]
  return [
    jax.ShapeDtypeStruct(shapes[i % kinds], jnp.float32) for i in range(leaves)
  ]


def seconds(function, tree):
  start = time.process_time()
  lowered = jax.jit(function).lower(tree)
  traced = time.process_time()
  lowered.compile()
  return traced - start, time.process_time() - traced


def main():
  functions = {
    'optax.tree.norm': optax.tree.norm,
    'norms.global_norm': norms.global_norm,
    'norms.group_norms, of leaves': lambda leaves: norms.group_norms(
      leaves, np.arange(len(leaves)), len(leaves)
    ),
  }
  console = Console()
  table = Table(title='processor seconds')
  for column in ('', 'leaves', 'shapes', 'trace', 'compile'):
    table.add_column(column, justify='right' if column else 'left')
  report = []
  for name, function in functions.items():
    seconds(function, make_tree(40, 7))
    for kinds in (7, 4000):
      for leaves in (2000, 4000):
        if kinds > leaves and 'leaves' in name:
          continue  # half a minute, for trees that nobody has
        trace, compilation = seconds(function, make_tree(leaves, kinds))
        row = name, leaves, min(kinds, leaves), trace, compilation
        report.append(row)
        table.add_row(name, *map(str, row[1:3]), *(f'{x:.1f}' for x in row[3:]))
  console.print(table)
  path = harness.RESULTS / 'compile_time.json'
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
  main()
