"""What every transformation owes whatever gradients come."""

import functools
import operator

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm import harmonization
from tests.support import trial
from tests.support.oracles_harmonization import published
from tests.support.registry import ENTRIES
from tests.support.strategies_trees import (
  BEYOND,
  FLOAT64,
  MIXED,
  STRUCTURES,
  batched,
  is_inexact,
  trees,
  types,
  wide,
)

PROGRAMS = 200

PASS_BAD_NUMBERS = {
  'reference_trace',
  'qk_clip',
  'standardize',
  'centralize',
  'watch',
}
"""Their docstrings say that bad numbers pass."""

DISTINCT = {
  'clip_by_norm_of_groups',
  'noise_scale_aggregate',
  'normalize_by_norm_of_units',
  'skip_spikes',
  'standardize',
  'watch',
}
"""Together these have all the code that looks at leaves and their numbers."""
UNJITTED = {
  'normalize_by_norm_of_units',
  'standardize',
  'watch',
}
"""A few, since every operation is compiled by itself."""

parametrize = functools.partial(
  pytest.mark.parametrize, ids=operator.attrgetter('name')
)
every = parametrize('entry', ENTRIES[1:])  # the first is Optax's own
EXAMPLES = hypothesis.settings().max_examples
distinct = parametrize('entry', [e for e in ENTRIES if e.name in DISTINCT])
few = hypothesis.settings(max_examples=max(EXAMPLES // 5, 3))
fewest = hypothesis.settings(max_examples=max(EXAMPLES // 25, 2))


@st.composite
def runs(draw, entry, structure, exponents=BEYOND, bad=False, steps=3):
  """Parameters, and the gradients of a few steps."""
  of_gradients = batched(structure) if entry.per_example else structure
  gradients = [
    draw(trees(of_gradients, exponents, bad=bad)) for _ in range(steps)
  ]
  return draw(trees(structure, exponents)), gradients


def run(entry, params, gradients):
  """The updates of every step, and the state at the end."""
  return jax.device_get(trial.run(entry.tx, gradients, params))


def assert_finite(tree):
  for leaf in jax.tree.leaves(tree):
    if is_inexact(leaf):
      assert np.isfinite(np.asarray(leaf, np.complex128)).all(), tree


def assert_no_nan(tree):
  """Infinite is what is not known yet, and what float32 does not hold."""
  for leaf in jax.tree.leaves(tree):
    assert not np.isnan(np.asarray(leaf, np.complex128)).any(), tree


def assert_same_types(entry, params, gradients, updates, state):
  """Those of the parameters; what has no gradient passes as it came."""
  expected = jax.tree.map(
    lambda p, g: p if is_inexact(p) else g, params, gradients
  )
  assert types(updates) == types(expected)
  init = jax.eval_shape(entry.tx.init, params)
  assert [x.dtype for x in jax.tree.leaves(state)] == [
    x.dtype for x in jax.tree.leaves(init)
  ]


@every
def test_finite_gradients(entry):
  @few
  @given(runs(entry, MIXED))
  def law(of_run):
    params, gradients = of_run
    updates, state = run(entry, params, gradients)
    assert_finite(updates)
    assert_no_nan(state)
    assert_same_types(entry, params, gradients[-1], updates[-1], state)

  law()


@parametrize('entry', [e for e in ENTRIES if e.name not in PASS_BAD_NUMBERS])
def test_bad_numbers(entry):
  @few
  @given(runs(entry, MIXED, bad=True))
  def law(of_run):
    updates, state = run(entry, *of_run)
    assert_finite(updates)
    assert_no_nan(state)

  law()


@parametrize('entry', [e for e in ENTRIES if e.name in UNJITTED])
def test_numpy_arrays_without_jit(entry):
  params, gradients = trial.make_params(), trial.make_gradients(entry)
  actual = entry.tx.update(gradients, entry.tx.init(params), params)
  expected = trial.run(entry.tx, [gradients], params)
  trial.assert_close(actual, (expected[0][0], expected[1]))


@distinct
def test_float64(entry):
  @few
  @given(runs(entry, FLOAT64))
  def law(of_run):
    params, gradients = of_run
    with jax.enable_x64(True):
      updates, state = run(entry, params, gradients)
      assert_finite(updates)
      assert_no_nan(state)
      assert_same_types(entry, params, gradients[-1], updates[-1], state)

  law()


# Averages of examples.

PER_EXAMPLE = batched(STRUCTURES['nested'], 4)


@functools.cache
def aggregated():
  """The updates, and the weights that harmony gives to norms."""
  density = harmonization.PARAMETER_DENSITY
  tx = optax_ghm.harmonized_aggregate(published())

  @jax.jit
  def run(tree, norms, mask):
    weights, _ = optax_ghm.harmony_weights(
      norms, density.init(), weighting=published(density), mask=mask
    )
    return tx.update(tree, tx.init(None), None, mask=mask)[0], weights

  return run


def squares_of_examples(tree):
  """Of the norm of every example."""
  return sum(
    np.sum(np.abs(x) ** 2, tuple(range(1, x.ndim))) for x in wide(tree)
  )


@given(
  tree=trees(PER_EXAMPLE, (0, 0.1, -0.1), bad=True), mask=hnp.arrays(bool, 4)
)
def test_harmonized_aggregate(tree, mask):
  """The mean of the examples, each times the harmony of its norm."""
  norms = np.sqrt(squares_of_examples(tree)).astype(np.float32)
  updates, weights = jax.device_get(aggregated()(tree, norms, mask))
  good = mask & np.isfinite(norms)
  for u, x in zip(wide(updates), wide(tree), strict=True):
    each = np.where(good, np.float64(weights), 0).reshape(
      -1, *[1] * (x.ndim - 1)
    )
    x = np.where(each > 0, x, 0)  # noqa: PLW2901
    expected = (each * x).sum(0) / max(good.sum(), 1)
    size = np.abs(each * x).max(initial=0)
    np.testing.assert_allclose(u, expected, rtol=1e-4, atol=1e-5 * size)
