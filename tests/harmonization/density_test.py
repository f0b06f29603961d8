import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm import harmonization

BINNED = optax_ghm.BinnedDensity(bins=10)
WINDOWED = optax_ghm.WindowedDensity(width=0.1)
EXACT = harmonization.ExactDensity(width=0.1)
MMDETECTION = harmonization.MMDetectionDensity(bins=10)
LOG_BINNED = optax_ghm.BinnedDensity(bins=8, low=1e-4, high=1e4, log=True)
LOG_WINDOWED = optax_ghm.WindowedDensity(
  width=1.0, low=1e-4, high=1e4, log=True
)
ALL = [BINNED, WINDOWED, EXACT, MMDETECTION, LOG_BINNED, LOG_WINDOWED]
HISTOGRAMS = [BINNED, WINDOWED, MMDETECTION, LOG_BINNED, LOG_WINDOWED]

# Any float32 at all, in few shapes (each is compiled once), and whole,
# fractional and no weights.
ANY_NORMS = hnp.arrays(
  np.float32,
  st.sampled_from([(0,), (1,), (7,), (2, 5)]),
  elements=st.floats(width=32).map(abs),
)
WEIGHTS = st.sampled_from([0.0, 0.25, 1.0])

weigh = jax.jit(
  optax_ghm.harmony_weights,
  static_argnames=('density', 'axis_name', 'train'),
)


def density_of(density, norms, amounts=None):
  norms = jnp.asarray(norms, jnp.float32)
  regions, _ = density.update(norms, density.init(), amounts)
  return regions.at_examples(regions.density)


def window_density(g, width, low=0.0, high=1.0):
  """The definition, O(N²), in float64."""
  g = np.clip(np.asarray(g, np.float64), low, high)
  inside = (g >= g[:, None] - width / 2) & (g < g[:, None] + width / 2)
  length = np.minimum(g + width / 2, high) - np.maximum(g - width / 2, low)
  return inside.sum(1) / length


def test_binned_density_counts_by_hand():
  g = [0.05, 0.05, 0.15, 0.95, 1.0, 1.7]
  expected = [20, 20, 10, 30, 30, 30]
  np.testing.assert_allclose(density_of(BINNED, g), expected)


def test_log_bins_are_decades():
  g = [0.0, 1e-9, 2e-3, 5e-3, 5.0, 1e9]
  np.testing.assert_allclose(density_of(LOG_BINNED, g), [2, 2, 2, 2, 1, 1])


def test_exact_density_is_the_definition(rng):
  g = rng.uniform(size=500).astype(np.float32)
  np.testing.assert_allclose(
    density_of(EXACT, g), window_density(g, 0.1), rtol=2e-2
  )
  close = np.isclose(density_of(EXACT, g), window_density(g, 0.1), rtol=1e-4)
  assert close.mean() > 0.99  # the rest: a norm on the rim, by rounding


@pytest.mark.parametrize('width', [1 / 30, 0.1, 0.5])
def test_windowed_density_approaches_the_exact_one(rng, width):
  g = rng.beta(0.4, 1.0, size=200_000).astype(np.float32)
  exact = density_of(harmonization.ExactDensity(width=width), g)
  windowed = density_of(optax_ghm.WindowedDensity(width=width), g)
  error = np.abs(windowed / exact - 1)
  assert np.quantile(error, 0.99) < 0.01
  assert np.mean(error) < 0.004


def test_windows_wider_than_all_count_everybody():
  g = jnp.array([0.1, 0.5, 0.8])
  density = optax_ghm.WindowedDensity(width=1.0)
  # A window of 1 around 0.5 sees all; around 0.1, up to 0.6; length 0.6.
  np.testing.assert_allclose(
    density_of(density, g), [2 / 0.6, 3 / 1.0, 2 / 0.7], rtol=1e-3
  )


def test_a_window_narrower_than_a_cell_is_a_cell():
  density = optax_ghm.WindowedDensity(width=1e-6, cells=10)
  np.testing.assert_allclose(
    density_of(density, [0.01, 0.02, 0.93]), [20, 20, 10], rtol=1e-6
  )


def test_sparse_regions_stay_exact_beside_a_crowd():
  """A prefix sum over the whole range would lose the lone example."""
  g = np.r_[np.zeros(3_000_000, np.float32), np.float32(0.9)]
  np.testing.assert_allclose(density_of(WINDOWED, g)[-1], 10.0, rtol=1e-3)


@pytest.mark.parametrize('density', ALL, ids=repr)
@given(g=ANY_NORMS, data=st.data())
def test_weights_average_to_one_and_are_finite(density, g, data):
  weights = data.draw(hnp.arrays(np.float32, g.shape, elements=WEIGHTS))
  factors, state = weigh(g, density=density, weights=weights)
  factors = np.asarray(factors)
  assert np.isfinite(factors).all() and (factors >= 0).all()
  valid = np.isfinite(g) & (weights > 0)
  assert ((factors > 0) == valid).all()
  counts = weights > 0 if density is MMDETECTION else weights
  if valid.any():
    beta = factors[valid] / weights[valid]
    np.testing.assert_allclose(
      np.average(beta, weights=counts[valid]), 1.0, rtol=1e-4
    )
  assert float(state.non_finite) == counts[~np.isfinite(g)].sum()


@pytest.mark.parametrize('density', ALL, ids=repr)
def test_weights_do_not_depend_on_order_or_layout(density, rng):
  g = rng.uniform(size=24).astype(np.float32)
  order = rng.permutation(24)
  weights, state = weigh(g, density=density)
  permuted, permuted_state = weigh(g[order], density=density)
  np.testing.assert_allclose(weights[order], permuted, rtol=1e-5)
  chex.assert_trees_all_close(state, permuted_state)
  folded, _ = weigh(g.reshape(2, 3, 4), density=density)
  np.testing.assert_allclose(folded.reshape(-1), weights, rtol=1e-5)


@pytest.mark.parametrize('density', [BINNED, WINDOWED, EXACT], ids=repr)
def test_harmony_does_not_depend_on_the_scale_of_the_weights(density, rng):
  g = rng.uniform(size=24).astype(np.float32)
  weights = rng.uniform(0.1, 1, size=24).astype(np.float32)
  one, _ = weigh(g, density=density, weights=weights)
  scaled, _ = weigh(g, density=density, weights=weights * 64)
  np.testing.assert_allclose(64 * one, scaled, rtol=1e-5)


@pytest.mark.parametrize('density', [BINNED, WINDOWED, EXACT], ids=repr)
def test_fractions_of_examples_count_as_fractions(density):
  g = jnp.array([0.25, 0.25, 0.75])
  twice_half = density_of(density, g, jnp.array([0.5, 0.5, 1.0]))
  np.testing.assert_allclose(twice_half, [10.0] * 3, rtol=1e-2)


def test_mmdetection_counts_every_positive_weight_as_one():
  g, weights = jnp.array([0.25, 0.25, 0.75]), jnp.array([0.1, 0.5, 2.0])
  factors, _ = weigh(g, density=MMDETECTION, weights=weights)
  np.testing.assert_allclose(factors / weights, [0.75, 0.75, 1.5], rtol=1e-6)


def test_raw_weights_are_the_papers():
  g = jnp.array([0.05, 0.05, 0.05, 0.95])
  raw = optax_ghm.BinnedDensity(bins=10, normalize=False)
  weights, _ = weigh(g, density=raw)
  np.testing.assert_allclose(weights, [4 / 30] * 3 + [4 / 10], rtol=1e-6)


def test_one_example_over_an_edge_halves_all_others_only_in_bins(rng):
  g = rng.uniform(0, 0.0999, size=1000).astype(np.float32)
  before, after = np.r_[g, 0.0999], np.r_[g, 0.1001]

  def others(density):
    return (
      weigh(after.astype(np.float32), density=density)[0][0]
      / weigh(before.astype(np.float32), density=density)[0][0]
    )

  assert others(BINNED) < 0.51
  assert abs(others(WINDOWED) - 1) < 0.01
  assert abs(others(EXACT) - 1) < 0.01


@pytest.mark.parametrize('momentum', [0.0, 0.75, 0.99])
@pytest.mark.parametrize(
  'family', [optax_ghm.BinnedDensity, optax_ghm.WindowedDensity]
)
def test_first_step_is_not_inflated(family, momentum, rng):
  g = rng.uniform(size=256).astype(np.float32)
  density = family(momentum=momentum, normalize=False)
  memoryless = family(normalize=False)
  weights, _ = weigh(g, density=density)
  expected, _ = weigh(g, density=memoryless)
  np.testing.assert_allclose(weights, expected, rtol=1e-5)
  # The reference inflates by 1 / (1 - momentum).
  reference = harmonization.MMDetectionDensity(bins=30, momentum=momentum)
  inflated, _ = weigh(g, density=reference)
  np.testing.assert_allclose(np.mean(inflated), 1 / (1 - momentum), rtol=1e-3)


def test_moving_average_is_the_weighted_mean_of_the_batches(rng):
  density = optax_ghm.BinnedDensity(bins=5, momentum=0.8)
  state = density.init()
  batches = [rng.uniform(size=40).astype(np.float32) for _ in range(6)]
  histograms = [np.histogram(b, bins=5, range=(0, 1))[0] for b in batches]
  for g in batches:
    _, state = density.update(jnp.asarray(g), state)
  powers = 0.8 ** np.arange(5, -1, -1)
  np.testing.assert_allclose(
    state.histogram / state.evidence,
    np.average(histograms, axis=0, weights=powers),
    rtol=1e-5,
  )


def test_every_bin_decays():
  density = optax_ghm.BinnedDensity(bins=2, momentum=0.5)
  _, state = density.update(jnp.array([0.9]), density.init())
  before = state.histogram[1]
  _, state = density.update(jnp.array([0.1]), state)
  assert state.histogram[1] == before / 2


@pytest.mark.parametrize('density', ALL, ids=repr)
@pytest.mark.parametrize(
  ('g', 'options'),
  [
    (np.zeros((0,)), {}),
    (np.zeros((0, 3)), {}),
    (np.array([0.2, 0.4]), {'mask': np.array([False, False])}),
    (np.array([0.2, 0.4]), {'weights': np.zeros(2, np.float32)}),
    (np.array([np.nan, np.inf]), {}),
  ],
)
def test_a_batch_without_examples_changes_nothing(density, g, options):
  _, state = weigh(jnp.array([0.3, 0.6], jnp.float32), density=density)
  weights, after = weigh(
    g.astype(np.float32), state, density=density, **options
  )
  np.testing.assert_array_equal(weights, np.zeros(g.shape))
  chex.assert_trees_all_close(
    after._replace(non_finite=state.non_finite), state
  )


@pytest.mark.parametrize('density', ALL, ids=repr)
def test_one_example_and_equal_norms_weigh_one(density):
  for n in (1, 7):
    weights, _ = weigh(jnp.full((n,), 0.37), density=density)
    np.testing.assert_allclose(weights, np.ones(n), rtol=1e-6)


@pytest.mark.parametrize('density', ALL, ids=repr)
def test_bad_norms_are_counted_and_harm_no_other(density):
  g = jnp.array([0.1, jnp.nan, 0.1, jnp.inf, 0.8])
  good = jnp.isfinite(g)
  weights, state = weigh(g, density=density)
  expected, _ = weigh(g[np.asarray(good)], density=density)
  np.testing.assert_allclose(weights[np.asarray(good)], expected, rtol=1e-6)
  np.testing.assert_array_equal(weights[~np.asarray(good)], [0, 0])
  assert state.non_finite == 2


@pytest.mark.parametrize('density', HISTOGRAMS, ids=repr)
def test_evaluation_leaves_the_state_and_ignores_the_batch(density, rng):
  density = type(density)(
    **{**density.__dict__, 'momentum': 0.9, 'normalize': True}
  )
  g = rng.uniform(size=64).astype(np.float32)
  _, state = weigh(g, density=density)
  together, after = weigh(g, state, density=density, train=False)
  chex.assert_trees_all_equal(after, state)
  alone, _ = weigh(g[:1], state, density=density, train=False)
  np.testing.assert_allclose(alone[0], together[0], rtol=1e-6)
  np.testing.assert_allclose(np.mean(together), 1.0, rtol=1e-4)
  unseen, _ = weigh(jnp.array([1e3]), state, density=density, train=False)
  assert np.isfinite(unseen).all() and (unseen > 0).all()


@pytest.mark.parametrize('density', HISTOGRAMS, ids=repr)
def test_evaluation_before_training_weighs_all_alike(density, rng):
  g = rng.uniform(size=9).astype(np.float32)
  weights, _ = weigh(g, density=density, train=False)
  np.testing.assert_allclose(weights, np.ones(9), rtol=1e-6)


@pytest.mark.parametrize('density', ALL, ids=repr)
def test_state_is_fixed_from_init(density):
  state = density.init()
  _, after = jax.eval_shape(
    lambda s: density.update(jnp.ones(3), s, jnp.ones(3)), state
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state))
  assert not any(x.weak_type for x in jax.tree.leaves((state, after)))


def test_summed_states_are_the_mean_of_the_updates(rng):
  density = optax_ghm.BinnedDensity(bins=4, momentum=0.5)
  _, state = density.update(
    jnp.asarray(rng.uniform(size=8), jnp.float32), density.init()
  )
  a, b = (jnp.asarray(rng.uniform(size=8), jnp.float32) for _ in range(2))
  (_, after_a), (_, after_b) = (
    density.update(a, state),
    density.update(b, state),
  )
  total = jax.tree.map(jnp.add, after_a, after_b)
  _, one = density.update(a, total)
  mean = jax.tree.map(lambda x, y: (x + y) / 2, after_a, after_b)
  _, other = density.update(a, mean)
  chex.assert_trees_all_close(one, other, rtol=1e-6)


def test_bin_edges_decide_not_the_floor_of_a_product():
  bins = 30
  edges = np.arange(bins + 1, dtype=np.float32) / np.float32(bins)
  below = np.nextafter(edges, np.float32(-1))
  density = optax_ghm.BinnedDensity(bins=bins)
  for g, expected in ((edges[:-1], 1), (below[1:], 1)):
    _, state = density.update(jnp.asarray(g), density.init())
    np.testing.assert_array_equal(state.histogram, np.full(bins, expected))


@pytest.mark.parametrize(
  ('make', 'name'),
  [
    (lambda: optax_ghm.BinnedDensity(bins=0), 'bins'),
    (lambda: optax_ghm.BinnedDensity(bins=2.5), 'bins'),
    (lambda: optax_ghm.BinnedDensity(momentum=1.0), 'momentum'),
    (lambda: optax_ghm.BinnedDensity(low=1.0, high=1.0), 'low'),
    (lambda: optax_ghm.BinnedDensity(log=True), 'low'),
    (lambda: optax_ghm.WindowedDensity(width=0.0), 'width'),
    (lambda: optax_ghm.WindowedDensity(width=1.5), 'width'),
    (lambda: optax_ghm.WindowedDensity(cells=0), 'cells'),
    (lambda: harmonization.ExactDensity(width=-1.0), 'width'),
  ],
)
def test_bad_settings_are_named(make, name):
  with pytest.raises(ValueError, match=name):
    make()


def test_bad_arguments_are_named():
  g = jnp.ones(3)
  with pytest.raises(TypeError, match='norms'):
    optax_ghm.harmony_weights(jnp.ones(3, jnp.int32))
  with pytest.raises(ValueError, match=r'mask of shape \(2,\).*\(3,\)'):
    optax_ghm.harmony_weights(g, mask=jnp.ones(2, bool))
  with pytest.raises(TypeError, match='mask must be bool.*as weights'):
    optax_ghm.harmony_weights(g, mask=jnp.ones(3))
  with pytest.raises(TypeError, match='weights must be real.*complex64'):
    optax_ghm.harmony_weights(g, weights=jnp.ones(3, jnp.complex64))
  with pytest.raises(ValueError, match='state'):
    optax_ghm.harmony_weights(g, BINNED.init(), density=WINDOWED)
  with pytest.raises(ValueError, match='axis_name'):
    optax_ghm.harmony_weights(g, density=EXACT, axis_name='batch')


def test_weights_are_constants_to_differentiation():
  def total(g, state, weights):
    return optax_ghm.harmony_weights(g, state, weights=weights)[0].sum()

  arguments = (
    jnp.array([0.1, 0.2, 0.9]),
    optax_ghm.WindowedDensity().init(),
    jnp.array([0.5, 1.0, 0.7]),
  )
  grads = jax.grad(total, argnums=(0, 1, 2))(*arguments)
  chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, arguments))


def test_a_scaled_state_reads_the_same(rng):
  """Loss scaling divides all gradients, those of states among them."""
  density = optax_ghm.WindowedDensity(cells=64, width=0.2, momentum=0.9)
  g = jnp.asarray(rng.uniform(size=20), jnp.float32)
  _, state = density.update(g, density.init())
  scaled = jax.tree.map(lambda s: s / 1024, state)
  chex.assert_trees_all_close(
    density.update(g, scaled), density.update(g, state), rtol=1e-6
  )


def test_an_empty_first_batch_is_no_evidence():
  for density in (
    BINNED,
    WINDOWED,
    harmonization.MMDetectionDensity(momentum=0.9),
  ):
    _, state = weigh(jnp.zeros(0), density=density)
    weights, _ = weigh(jnp.ones(2) / 2, state, density=density, train=False)
    np.testing.assert_allclose(weights, [1, 1])


def test_settings_are_named():
  for family in (
    optax_ghm.BinnedDensity,
    optax_ghm.WindowedDensity,
    harmonization.ExactDensity,
  ):
    with pytest.raises(TypeError):
      family(0.2)


@pytest.mark.parametrize('density', ALL, ids=repr)
def test_norms_above_the_range_are_counted_and_weigh_like_the_largest(density):
  high = density.high
  beyond = np.float32([high / 2, high, 1e2 * high, 1e3 * high])
  inside = np.minimum(beyond, np.float32(high))
  weights, state = weigh(beyond, density=density)
  expected, none = weigh(inside, density=density)
  np.testing.assert_allclose(weights, expected, rtol=1e-6)
  assert state.above_range == 2 and none.above_range == 0
  rounded = np.float32([high * (1 + 1e-6)])
  assert weigh(rounded, density=density)[1].above_range == 0


def test_mask_and_weights_together_say_who_counts_and_how_much():
  g = jnp.array([0.25, 0.25, 0.75, jnp.nan])
  mask = jnp.array([True, True, True, False])
  weights = jnp.array([0.5, 0.5, 1.0, 2.0])
  factors, state = weigh(g, density=BINNED, mask=mask, weights=weights)
  np.testing.assert_allclose(factors, [0.5, 0.5, 1.0, 0.0], rtol=1e-6)
  assert state.non_finite == 0 and state.histogram.sum() == 2
