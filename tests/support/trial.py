"""What the contract tests share: parameters, gradients, and the plain run.

Most of the time goes into compiling. A run is one program: what is compared
with that of a few steps finds it compiled already.
"""

import functools
import operator

import chex
import jax
import numpy as np
import pytest

from tests.support.registry import ENTRIES

BATCH = 6
STEPS = 3
LEARNING_RATE = 0.5  # a power of two: multiplying by it is exact


def _parametrize(entries):
  return pytest.mark.parametrize(
    'entry', entries, ids=operator.attrgetter('name')
  )


every = _parametrize(ENTRIES)
own = _parametrize([e for e in ENTRIES if e.own])
whole = _parametrize([e for e in ENTRIES if not e.per_example])
per_example = _parametrize([e for e in ENTRIES if e.per_example])
scheduled = _parametrize([e for e in ENTRIES if e.keywords])
typical = _parametrize([e for e in ENTRIES if e.typical])
typical_whole = _parametrize(
  [e for e in ENTRIES if e.typical and not e.per_example]
)
bad_number = pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])


def make_params(dtype=np.float32):
  """Those of a dense layer, in Linen and in nnx."""
  return {'bias': np.ones((2,), dtype), 'kernel': np.ones((3, 2), dtype)}


def make_gradients(entry, step=0, params=None):
  """Gradients for one step, with the dtypes of ``params``."""
  params = make_params() if params is None else params
  rng = np.random.default_rng(step)
  batch = (BATCH,) if entry.per_example else ()
  sizes = 10 ** rng.uniform(-1, 1, batch)

  def gradient(param):
    values = rng.normal(size=batch + param.shape)
    values *= sizes.reshape(batch + (1,) * param.ndim)
    return values.astype(param.dtype)

  return jax.tree.map(gradient, params)


def make_steps(entry, params=None):
  return [make_gradients(entry, step, params) for step in range(STEPS)]


@functools.cache
def jitted(tx):
  """``init`` and ``update``, each a program."""
  return jax.jit(tx.init), jax.jit(tx.update)


@functools.cache
def scanned(tx):
  """All steps, as one program."""

  @jax.jit
  def run(steps, params, extra_args):
    def step(state, gradients):
      return tx.update(gradients, state, params, **extra_args)[::-1]

    return jax.lax.scan(step, tx.init(params), steps)[::-1]

  return run


def run(tx, gradients, params=None, **extra_args):
  """The updates of every step, and the state at the end."""
  params = make_params() if params is None else params
  updates, state = scanned(tx)(stack(gradients), params, extra_args)
  updates = jax.tree.map(np.asarray, updates)
  return [at(updates, i) for i in range(len(gradients))], state


def stack(trees):
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def at(tree, i):
  return jax.tree.map(lambda leaf: leaf[i], tree)


def scale(tree, factor):
  return jax.tree.map(lambda x: np.asarray(factor * x, x.dtype), tree)


def types(tree):
  """Structure, shapes, dtypes and weak types, to compare with ``==``."""
  leaves, structure = jax.tree.flatten(tree)
  return structure, [jax.typeof(leaf) for leaf in leaves]


def assert_same(actual, expected):
  """Bit for bit, but for the sign of zero and the payload of NaN."""
  chex.assert_trees_all_equal(actual, expected, strict=True)


def assert_close(actual, expected, rtol=1e-5):
  """To rounding."""
  chex.assert_trees_all_close(
    actual, expected, rtol=rtol, atol=rtol / 1000, strict=True
  )
