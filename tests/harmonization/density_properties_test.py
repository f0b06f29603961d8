"""Densities and their harmony weights, by definition, on drawn numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm import harmonization
from optax_ghm._core import masks
from tests.support import (
  oracles_harmonization as oracles,
  strategies_arrays as arrays_of,
)
from tests.support.oracles_harmonization import published

pytestmark = pytest.mark.device
PROGRAMS = 62

CASES = [  # few: each is compiled
  (jnp.float32, (3, 2)),
  (jnp.float16, (5,)),
  (jnp.bfloat16, ()),
  (jnp.float32, (1, 2, 1, 3, 1, 1)),
  (jnp.float32, (3, 0, 2)),
  (jnp.float64, (3, 2)),
]
CELLS = 16
WEIGHTS = st.sampled_from([0.0, 0.25, 1.0, 3.0, -1.0, np.nan])


LOG = {'low': 1e-8, 'high': 1e8, 'log': True}
BINNED, WINDOWED = optax_ghm.BinnedDensity, optax_ghm.WindowedDensity
HISTOGRAMS = {
  'binned': BINNED(bins=CELLS),
  'far': BINNED(bins=CELLS, low=2.0, high=1e30),
  'log bins': BINNED(bins=CELLS, **LOG),
  'log windows': WINDOWED(cells=CELLS, width=2.5, **LOG),
  **{
    f'windows of {width}': WINDOWED(cells=CELLS, width=width)
    for width in (1e-9, 0.05, 0.1875, 0.3, 1.0)
  },
}
OF_ALL_CASES = ('binned', 'log windows')

_weigh = jax.jit(optax_ghm.harmony_weights, static_argnames='weighting')


def weigh(*args, **kwargs):
  return jax.device_get(_weigh(*args, **kwargs))


@jax.jit(static_argnames='density')
def density_and_factors(norms, weights, density):
  state = density.init()
  amounts = masks.broadcast_weights(weights, norms.shape)
  regions, _ = density.update(norms.astype(jnp.float32), state, amounts)
  return (
    regions.at_examples(regions.density),
    *optax_ghm.harmony_weights(
      norms, state, weighting=published(density), weights=weights
    ),
  )


def norms_in(cells, density):
  """Norms in the middle of their cells; beyond the range at its ends."""
  middle = (cells + 0.5) / CELLS * oracles.length_of(density)
  if density.log:
    return density.low * 10**middle
  return density.low + middle


@pytest.mark.parametrize('name', HISTOGRAMS)
@given(layout=st.sampled_from(arrays_of.LAYOUTS), data=st.data())
def test_histograms_are_their_definition(name, layout, data):
  density = HISTOGRAMS[name]
  cases = CASES if name in OF_ALL_CASES else CASES[:1]
  dtype, shape = data.draw(st.sampled_from(cases))
  at = data.draw(hnp.arrays(int, shape, elements=st.integers(0, CELLS - 1)))
  amount = data.draw(arrays_of.arrays(np.float32, shape, WEIGHTS))
  norms = arrays_of.cast(norms_in(at, density), dtype)
  beyond = data.draw(
    hnp.arrays(
      float,
      shape,
      elements=st.sampled_from([-2, -1, 1, 1, 1, 1, 1, np.nan, np.inf]),
    )
  )
  huge = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))
  norms = np.where(beyond == -1, 0, np.where(beyond == -2, huge, norms))
  norms = np.where(np.isfinite(beyond), norms, beyond).astype(dtype)
  at = np.where(beyond == -1, 0, np.where(beyond == -2, CELLS - 1, at))
  if dtype in (jnp.float16, jnp.bfloat16):  # which move a norm off its cell
    at = cells_of(norms, density)
  with arrays_of.x64(dtype):
    gd, factors, state = density_and_factors(
      arrays_of.laid_out(norms, layout),
      arrays_of.laid_out(amount, layout),
      density,
    )
  counts = amount > 0
  valid = counts & np.isfinite(norms)
  mass = np.where(valid, amount, 0).astype(float)
  histogram = np.bincount(at.ravel(), mass.ravel(), CELLS)
  table = oracles.binned if isinstance(density, BINNED) else oracles.windowed
  part, length = table(density, CELLS)
  expected = np.where(valid, (part @ histogram / length)[at], 0)
  np.testing.assert_allclose(gd, expected, rtol=1e-5)
  expected = oracles.harmony(expected, mass)
  np.testing.assert_allclose(
    factors, expected * np.where(counts, amount, 0), rtol=1e-5
  )
  np.testing.assert_allclose(state.histogram, histogram)
  assert float(state.non_finite) == amount[counts & ~valid].sum()
  assert {u.dtype for u in (gd, factors, *state)} == {jnp.dtype('float32')}


def cells_of(norms, density):
  """Of norms that 16 bits have rounded."""
  with np.errstate(divide='ignore', invalid='ignore'):
    norms = np.asarray(norms, np.float64)
    middle = (
      np.log10(norms / density.low) if density.log else (norms - density.low)
    )
    at = np.clip(middle * (CELLS / oracles.length_of(density)), 0, CELLS - 1)
  return np.nan_to_num(at).astype(int)


GRID = 64


@given(
  case=st.sampled_from(
    [
      (jnp.float16, (5,), 1 / GRID, 0.25),
      (jnp.bfloat16, (), 7 / GRID, 0.0),
      (jnp.float32, (3, 0, 2), 63 / GRID, 0.0),
      (jnp.float32, (1, 2, 1, 3, 1, 1), 1.0, 0.0),
      (jnp.float64, (3, 2), 1e-9, 0.0),
    ]
  ),
  data=st.data(),
)
@example(case=(jnp.float32, (3,), 1e-9, 0.0), data=None)
def test_the_exact_density_is_the_definition(case, data):
  """Norms are on a grid whose middles the rims of windows meet."""
  dtype, shape, width, low = case
  density = harmonization.ExactDensity(width=width, low=low)
  if data is None:
    norms, amount = np.float32([0.5, 0.5, 0.75]), np.ones(3, np.float32)
  else:
    on_grid = st.integers(0, GRID + 1).map(lambda k: k / GRID)
    norms = data.draw(
      arrays_of.arrays(
        dtype, shape, on_grid | st.sampled_from([np.nan, np.inf])
      )
    )
    amount = data.draw(arrays_of.arrays(np.float32, shape, WEIGHTS))
  with arrays_of.x64(dtype):
    found = density_and_factors(norms, amount, density)
  gd, factors, state = jax.device_get(found)
  counts = amount > 0
  valid = counts & np.isfinite(norms)
  mass = np.where(valid, amount, 0).astype(float).ravel()
  g = np.clip(np.where(valid, norms, 2.0).astype(float), low, 1).ravel()
  expected = oracles.exact(g, mass, width, low)
  np.testing.assert_allclose(gd.ravel(), expected, rtol=1e-5)
  expected = oracles.harmony(expected, mass)
  np.testing.assert_allclose(factors.ravel(), expected * mass, rtol=1e-5)
  assert float(state.non_finite) == amount[counts & ~valid].sum()


@jax.jit
def weighed_by_each(norms):
  densities = WINDOWED(), harmonization.ExactDensity()
  return [
    optax_ghm.harmony_weights(norms, weighting=published(u)) for u in densities
  ]


@given(norm=st.floats(0, 3e38), dtype=st.sampled_from([np.float32, np.float64]))
def test_every_norm_that_float32_holds_has_a_weight(norm, dtype):
  with arrays_of.x64(dtype):
    found = jax.device_get(weighed_by_each(np.array([norm, 0.5], dtype)))
    for weights, state in found:
      assert (weights > 0).all() and state.non_finite == 0.0


@pytest.mark.parametrize(
  'density',
  [
    BINNED(bins=4, momentum=0.75),
    WINDOWED(cells=4, width=0.25, momentum=0.75),
    harmonization.MMDetectionDensity(bins=4, momentum=0.75),
  ],
  ids=lambda u: type(u).__name__,
)
@given(data=st.data())
def test_running_histograms_are_the_decayed_sums(density, data):
  state, histogram, evidence = None, np.zeros(4), 0.0
  reference = isinstance(density, harmonization.MMDetectionDensity)
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(hnp.arrays(int, 5, elements=st.integers(0, 3)))
    weights = data.draw(
      arrays_of.arrays(np.float32, 5, st.sampled_from([0.0, 0.25, 1.0]))
    )
    norms = ((at + 0.5) / 4).astype(np.float32)
    factors, state = weigh(
      norms, state, weighting=published(density), weights=weights
    )
    assert np.isfinite(factors).all() and ((factors > 0) == (weights > 0)).all()
    amount = weights > 0 if reference else weights
    mass = np.bincount(at, amount.astype(float), 4)
    if not mass.any():
      continue
    decayed = 0.75 * histogram + 0.25 * mass
    histogram = np.where(mass > 0, decayed, histogram) if reference else decayed
    evidence = 1.0 if reference else 0.75 * evidence + 0.25
  np.testing.assert_allclose(state.histogram, histogram, rtol=1e-6)
  np.testing.assert_allclose(state.evidence, evidence, rtol=1e-6)


ESTIMATORS = {
  'binned': BINNED(bins=4),
  'windowed': WINDOWED(cells=8, width=0.25),
  'mmdetection': harmonization.MMDetectionDensity(bins=4),
  'exact': harmonization.ExactDensity(width=0.25),
}


@pytest.mark.parametrize('name', ESTIMATORS)
@given(
  norms=arrays_of.arrays(
    np.float32, 6, arrays_of.numbers(np.float32, 0, 1).map(abs)
  ),
  weights=arrays_of.arrays(np.float32, 6, WEIGHTS),
)
def test_what_weighs_nothing_has_no_part_in_any_weight(name, norms, weights):
  density = ESTIMATORS[name]
  found = weigh(norms, weighting=published(density), weights=weights)
  other = np.where(weights > 0, norms, np.float32(0.375))
  expected = weigh(other, weighting=published(density), weights=weights)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert (found[0][~(weights > 0)] == 0).all()
