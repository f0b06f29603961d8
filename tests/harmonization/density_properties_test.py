import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm import harmonization
from optax_ghm._core import masks
from tests.harmonization.losses_properties_test import Smooth, crowd_of
from tests.support import strategies_arrays as arrays_of

CASES = [  # few: each is compiled
  (jnp.float16, (5,)),
  (jnp.bfloat16, ()),
  (jnp.float32, (1, 2, 1, 3, 1, 1)),
  (jnp.float32, (3, 0, 2)),
  (jnp.float64, (3, 2)),
]
CELLS = 16
WEIGHTS = st.sampled_from([0.0, 0.25, 1.0, 3.0, -1.0, np.nan])


def binned(density):
  return np.eye(CELLS), np.full(CELLS, length_of(density) / CELLS)


def windowed(density):
  """What part of every cell the window of every cell covers, its length."""
  cell = length_of(density) / CELLS
  half = max(density.width / cell, 1) / 2
  center, edge = np.arange(CELLS)[:, None] + 0.5, np.arange(CELLS)
  over = np.minimum(center + half, edge + 1) - np.maximum(center - half, edge)
  over = np.clip(over, 0, 1)
  return over, over.sum(1) * cell


def length_of(density):
  low, high = density.low, density.high
  return np.log10(high / low) if density.log else high - low


LOG = {'low': 1e-8, 'high': 1e8, 'log': True}
HISTOGRAMS = {
  'binned': (optax_ghm.BinnedDensity(bins=CELLS), binned),
  'raw': (optax_ghm.BinnedDensity(bins=CELLS, normalize=False), binned),
  'far': (optax_ghm.BinnedDensity(bins=CELLS, low=2.0, high=1e30), binned),
  'log bins': (optax_ghm.BinnedDensity(bins=CELLS, **LOG), binned),
  **{
    f'windows of {width}': (
      optax_ghm.WindowedDensity(cells=CELLS, width=width),
      windowed,
    )
    for width in (1e-9, 0.05, 0.1875, 0.3, 1.0)
  },
  'log windows': (
    optax_ghm.WindowedDensity(cells=CELLS, width=2.5, **LOG),
    windowed,
  ),
}

weigh = jax.jit(
  optax_ghm.harmony_weights, static_argnames=('density', 'axis_name', 'train')
)


@jax.jit(static_argnames='density')
def density_and_factors(norms, state, weights, density):
  amounts = masks.broadcast_weights(weights, norms.shape)
  regions, _ = density.update(norms.astype(jnp.float32), state, amounts)
  return (
    regions.at_examples(regions.density),
    *optax_ghm.harmony_weights(norms, state, density=density, weights=weights),
  )


def norms_in(cells, density):
  """Norms in the middle of their cells; beyond the range at its ends."""
  middle = (cells + 0.5) / CELLS * length_of(density)
  if density.log:
    return density.low * 10**middle
  return density.low + middle


def harmony(gd, mass, normalize):
  beta = np.where(gd > 0, mass.sum() / np.where(gd > 0, gd, 1), 0)
  if not normalize:
    return beta
  return beta * mass.sum() / max((mass * beta).sum(), 1e-30)


@pytest.mark.parametrize('name', HISTOGRAMS)
@given(
  case=st.sampled_from(CASES),
  layout=st.sampled_from(arrays_of.LAYOUTS),
  data=st.data(),
)
def test_histograms_are_their_definition(name, case, layout, data):
  density, table = HISTOGRAMS[name]
  dtype, shape = case
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
      density.init(),
      arrays_of.laid_out(amount, layout),
      density,
    )
  counts = amount > 0
  valid = counts & np.isfinite(norms)
  mass = np.where(valid, amount, 0).astype(float)
  histogram = np.bincount(at.ravel(), mass.ravel(), CELLS)
  part, length = table(density)
  expected = np.where(valid, (part @ histogram / length)[at], 0)
  np.testing.assert_allclose(gd, expected, rtol=1e-5)
  expected = harmony(expected, mass, density.normalize)
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
    at = np.clip(middle * (CELLS / length_of(density)), 0, CELLS - 1)
  return np.nan_to_num(at).astype(int)


GRID = 64


@given(
  case=st.sampled_from(
    [
      (jnp.float16, (5,), 1 / GRID),
      (jnp.bfloat16, (), 7 / GRID),
      (jnp.float32, (3, 0, 2), 63 / GRID),
      (jnp.float32, (1, 2, 1, 3, 1, 1), 1.0),
      (jnp.float64, (3, 2), 1e-9),
    ]
  ),
  data=st.data(),
)
@example(case=(jnp.float32, (3,), 1e-9), data=None)
def test_the_exact_density_is_the_definition(case, data):
  """Norms are on a grid whose middles the rims of windows meet."""
  dtype, shape, width = case
  density = harmonization.ExactDensity(width=width)
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
    gd, factors, state = density_and_factors(
      norms, density.init(), amount, density
    )
  counts = amount > 0
  valid = counts & np.isfinite(norms)
  mass = np.where(valid, amount, 0).astype(float).ravel()
  g = np.clip(np.where(valid, norms, 2.0).astype(float), 0, 1).ravel()
  inside = g >= g[:, None] - width / 2
  inside &= (g < g[:, None] + width / 2) | (g == g[:, None])
  length = np.minimum(width / 2, 1 - g) + np.minimum(width / 2, g)
  expected = np.where(mass > 0, inside @ mass / length, 0)
  np.testing.assert_allclose(gd.ravel(), expected, rtol=1e-5)
  expected = harmony(expected, mass, True)
  np.testing.assert_allclose(factors.ravel(), expected * mass, rtol=1e-5)
  assert float(state.non_finite) == amount[counts & ~valid].sum()


@given(norm=st.floats(0, 3e38), dtype=st.sampled_from([np.float32, np.float64]))
def test_every_norm_that_float32_holds_has_a_weight(norm, dtype):
  with arrays_of.x64(dtype):
    for density in (optax_ghm.WindowedDensity(), harmonization.ExactDensity()):
      weights, state = weigh(np.array([norm, 0.5], dtype), density=density)
      assert (weights > 0).all() and state.non_finite == 0.0


@pytest.mark.parametrize(
  'density',
  [
    optax_ghm.BinnedDensity(bins=4, momentum=0.75),
    optax_ghm.WindowedDensity(cells=4, width=0.25, momentum=0.75),
    harmonization.MMDetectionDensity(bins=4, momentum=0.75),
  ],
  ids=lambda u: type(u).__name__,
)
@given(data=st.data())
def test_running_histograms_are_the_decayed_sums(density, data):
  state, histogram, evidence = density.init(), np.zeros(4), 0.0
  reference = isinstance(density, harmonization.MMDetectionDensity)
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(hnp.arrays(int, 5, elements=st.integers(0, 3)))
    weights = data.draw(
      arrays_of.arrays(np.float32, 5, st.sampled_from([0.0, 0.25, 1.0]))
    )
    norms = ((at + 0.5) / 4).astype(np.float32)
    factors, state = weigh(norms, state, density=density, weights=weights)
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
  'binned': optax_ghm.BinnedDensity(bins=4),
  'windowed': optax_ghm.WindowedDensity(cells=8, width=0.25),
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
  found = weigh(norms, density=density, weights=weights)
  other = np.where(weights > 0, norms, np.float32(0.375))
  expected = weigh(other, density=density, weights=weights)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert (found[0][~(weights > 0)] == 0).all()


@jax.jit(static_argnames=('axis', 'reduction'))
def harmonized(x, dy, state, mask, axis, reduction):
  y, vjp = jax.vjp(
    lambda x, state: optax_ghm.harmonize(
      x,
      state,
      density=Smooth(high=1e30),
      axis=axis,
      reduction=reduction,
      mask=mask,
    ),
    x,
    state,
  )
  return y, *vjp(dy)


@given(
  case=st.sampled_from(
    [
      (jnp.float16, (3, 2), None, 'mean'),
      (jnp.bfloat16, (), (), 0.5),
      (jnp.float32, (2, 1, 3, 1, 2, 1), (0, -1), 'mean'),
      (jnp.complex64, (4, 2), 1, 2.0),
      (jnp.float32, (0, 3), None, 'mean'),
      (jnp.float64, (3, 2), (), 'mean'),
    ]
  ),
  data=st.data(),
)
def test_harmonized_cotangents_are_weighed_by_their_norms(case, data):
  dtype, shape, axis, reduction = case
  real = jnp.finfo(dtype).dtype
  axes = range(1, len(shape)) if axis is None else np.atleast_1d(axis)
  axes = tuple(int(a) % max(len(shape), 1) for a in axes)
  examples = tuple(n for a, n in enumerate(shape) if a not in axes)
  ordinary = st.integers(-64, 64).map(lambda n: n / 16)
  bad = st.sampled_from([np.nan, np.inf, 0.0])
  dy = data.draw(arrays_of.arrays(real, shape, ordinary | bad)).astype(dtype)
  if dtype == jnp.complex64:
    dy = dy * np.complex64(0.6 + 0.8j)
  mask = data.draw(hnp.arrays(bool, examples))
  with arrays_of.x64(real):
    x = np.ones(shape, dtype)
    y, dx, state = harmonized(x, dy, Smooth().init(), mask, axis, reduction)
  np.testing.assert_array_equal(y, x)
  assert dx.dtype == dtype
  wide = np.asarray(dy, np.complex128)
  with np.errstate(invalid='ignore'):
    norms = np.sqrt((np.abs(wide) ** 2).sum(axes))
  g = np.where(mask, norms, 0) * (
    mask.sum() if reduction == 'mean' else reduction
  )
  valid = mask & np.isfinite(g)
  beta = np.where(valid, 1 / crowd_of(np.where(valid, g, 0)), 0)
  weights = np.expand_dims(beta * valid.sum() / max(beta.sum(), 1e-30), axes)
  valid, mask = (np.expand_dims(u, axes) for u in (valid, mask))
  sound = np.broadcast_to(valid | ~mask, shape)
  expected = weights * np.where(valid, wide, 0)
  dx = np.asarray(dx, np.complex128)
  rtol = max(arrays_of.rounding(real), arrays_of.rounding(jnp.float32))
  np.testing.assert_allclose(dx[sound], expected[sound], rtol=rtol, atol=rtol)
  assert float(state.non_finite) == (mask & ~valid).sum()
