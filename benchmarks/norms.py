"""How long the norm of many small leaves takes to run, trace and compile.

The leaves have seven shapes, as in the trees that optimizers see. In the worst
case, every leaf has another shape.
"""

import functools
import math

import harness
import jax.numpy as jnp
import numpy as np
import optax

from optax_ghm._core import norms


def shapes(count, kinds):
  rng = np.random.default_rng(0)
  every = [
    tuple(rng.integers(1, 128, 2)) if i % 2 else (int(rng.integers(1, 1000)),)
    for i in range(kinds)
  ]
  return [every[i % kinds] for i in range(count)]


def leaves(shapes):
  rng = np.random.default_rng(0)
  return ([jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes],)


def norms_of_leaves(tree):
  return norms.group_norms(tree, np.arange(len(tree)), len(tree))


PROGRAMS = {
  'optax.tree.norm': optax.tree.norm,
  'global_norm': norms.global_norm,
}


def case(count, kinds, programs, quick=False):
  return harness.Case(
    programs,
    functools.partial(leaves, shapes(count, kinds)),
    sum(math.prod(shape) for shape in shapes(count, kinds)),
    quick=quick,
  )


CASES = {
  'leaves of 7 shapes': harness.Growth(
    'leaves',
    {
      count: case(
        count,
        7,
        PROGRAMS | {'norms of the leaves': norms_of_leaves},
        quick=count <= 400,
      )
      for count in (100, 400, 1600)
    },
  ),
  'leaves of as many shapes': harness.Growth(
    'leaves', {count: case(count, count, PROGRAMS) for count in (100, 400)}
  ),
}
