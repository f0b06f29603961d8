"""Laws of the densities and their harmony weights, of all of them at once."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm import harmonization
from tests.support.oracles_harmonization import published

pytestmark = pytest.mark.device

BINNED = optax_ghm.BinnedDensity(bins=10)
WINDOWED = optax_ghm.WindowedDensity(width=0.1)
EXACT = harmonization.ExactDensity(width=0.1)
LOG = {'low': 1e-4, 'high': 1e4, 'log': True}
ALL = {
  'binned': BINNED,
  'windowed': WINDOWED,
  'exact': EXACT,
  'mmdetection': harmonization.MMDetectionDensity(bins=10),
  'log binned': optax_ghm.BinnedDensity(bins=8, **LOG),
  'log windowed': optax_ghm.WindowedDensity(width=1.0, **LOG),
}
REMEMBERING = {
  name: dataclasses.replace(density, momentum=0.9)
  for name, density in ALL.items()
  if name != 'exact'
}


@functools.partial(jax.jit, static_argnames='train')
def _weigh_all(norms, states, train=True, **options):
  densities = ALL if train else REMEMBERING
  return {
    name: optax_ghm.harmony_weights(
      norms[name] if isinstance(norms, dict) else norms,
      density.init() if states is None else states[name],
      weighting=published(density, normalize=True),
      train=train,
      **options,
    )
    for name, density in densities.items()
  }


def weigh_all(norms, states=None, **options):
  """Weights and states by all densities; those that remember, in evaluation."""
  found = jax.device_get(_weigh_all(norms, states, **options))
  weights, states = ({k: v[i] for k, v in found.items()} for i in (0, 1))
  return weights, states


WEIGHTS = hnp.arrays(np.float32, 7, elements=st.sampled_from([0.0, 0.25, 1.0]))


@given(
  g=hnp.arrays(np.float32, 7, elements=st.floats(width=32).map(abs)),
  weights=WEIGHTS,
)
@example(np.full(7, 0.37, np.float32), np.ones(7, np.float32))
@example(np.full(7, 0.37, np.float32), np.eye(7, dtype=np.float32)[2])
def test_weights_average_to_one_in_any_order_and_bad_norms_harm_none(
  g, weights
):
  valid = np.isfinite(g) & (weights > 0)
  found, states = weigh_all(g, weights=weights)
  turned, _ = weigh_all(g[::-1], weights=weights[::-1])
  without, _ = weigh_all(g, weights=np.where(valid, weights, 0))
  for name, factors in found.items():
    assert np.isfinite(factors).all() and (factors >= 0).all()
    assert ((factors > 0) == valid).all()
    counts = (weights > 0).astype('f') if name == 'mmdetection' else weights
    assert float(states[name].non_finite) == counts[~np.isfinite(g)].sum()
    np.testing.assert_allclose(factors[::-1], turned[name], rtol=1e-5)
    np.testing.assert_allclose(factors, without[name], rtol=1e-6)
    if valid.any():
      beta, counts = factors[valid] / weights[valid], counts[valid]
      np.testing.assert_allclose(
        np.average(beta, weights=counts), 1.0, rtol=1e-4
      )
      if len(set(g[valid])) == 1:
        np.testing.assert_allclose(beta, 1, rtol=1e-6)


def test_mask_and_weights_together_say_who_counts_and_how_much():
  g = np.float32([0.25, 0.25, 0.75, np.nan])
  found, states = weigh_all(
    g,
    mask=np.array([True, True, True, False]),
    weights=np.float32([0.5, 0.5, 1.0, 2.0]),
  )
  np.testing.assert_allclose(found['binned'], [0.5, 0.5, 1, 0], rtol=1e-6)
  state = states['binned']
  assert state.non_finite == 0 and state.histogram.sum() == 2
  # There, every positive weight counts as one.
  np.testing.assert_allclose(
    found['mmdetection'], [0.375, 0.375, 1.5, 0], rtol=1e-6
  )


def test_windows_approach_the_exact_density_and_lose_nobody(rng):
  """A prefix sum over the whole range would lose an example beside a crowd."""
  crowded = np.zeros(3_000_000, np.float32)
  crowded[-1] = 0.9
  spread = rng.beta(0.4, 1.0, size=200_000).astype(np.float32)

  @jax.jit
  def densities(crowded, spread):
    return [
      regions.at_examples(regions.density)
      for density, g in (
        (WINDOWED, crowded),
        (WINDOWED, spread),
        (EXACT, spread),
      )
      for regions, _ in [density.update(g, density.init())]
    ]

  of_crowd, windowed, exact = jax.device_get(densities(crowded, spread))
  np.testing.assert_allclose(of_crowd[-1], 10.0, rtol=1e-3)
  error = np.abs(windowed / exact - 1)
  assert np.quantile(error, 0.99) < 0.01
  assert np.mean(error) < 0.004


def test_one_example_over_an_edge_halves_all_others_only_in_bins(rng):
  g = rng.uniform(0, 0.0999, size=1001).astype(np.float32)
  before, after = (
    weigh_all(np.append(g[1:], np.float32(last)))[0]
    for last in (0.0999, 0.1001)
  )
  assert after['binned'][0] < 0.51 * before['binned'][0]
  for name in ('windowed', 'exact'):
    np.testing.assert_allclose(after[name][0], before[name][0], rtol=0.01)


def test_the_first_step_is_not_inflated(rng):
  """The reference inflates it by 1 / (1 - momentum)."""
  momenta = (0.75, 0.99)
  families = (optax_ghm.BinnedDensity, optax_ghm.WindowedDensity)

  @jax.jit
  def first(g):
    def weights(family, **settings):
      return optax_ghm.harmony_weights(
        g, weighting=published(family(**settings), normalize=False)
      )[0]

    of_families = [
      [weights(u, momentum=m) for m in (0, *momenta)] for u in families
    ]
    reference = [
      weights(harmonization.MMDetectionDensity, momentum=m) for m in momenta
    ]
    return of_families, reference

  of_families, reference = jax.device_get(
    first(rng.uniform(size=256).astype(np.float32))
  )
  for plain, *running in of_families:
    for weights in running:
      np.testing.assert_allclose(weights, plain, rtol=1e-5)
  for weights, momentum in zip(reference, momenta, strict=True):
    np.testing.assert_allclose(np.mean(weights), 1 / (1 - momentum), rtol=1e-3)


def test_a_batch_without_examples_changes_nothing():
  g = np.float32([0.3, 0.6, 0.2, 0.4, 0.5, 0.3, 0.9])
  _, states = weigh_all(g, weights=np.ones(7, np.float32))
  for norms, options in (
    (np.zeros((0, 3), np.float32), {}),
    (g, {'mask': np.zeros(7, bool)}),
    (g, {'weights': np.zeros(7, np.float32)}),
    (np.full(7, np.nan, np.float32), {'weights': np.ones(7, np.float32)}),
  ):
    found, after = weigh_all(norms, states, **options)
    for name, weights in found.items():
      np.testing.assert_array_equal(weights, np.zeros(norms.shape))
      same = after[name]._replace(non_finite=states[name].non_finite)
      chex.assert_trees_all_close(same, states[name])


def test_evaluation_leaves_the_state_and_ignores_the_batch(rng):
  @jax.jit
  def learned(g):
    return {
      name: optax_ghm.harmony_weights(g, weighting=published(density))[1]
      for name, density in REMEMBERING.items()
    }

  g = rng.uniform(size=7).astype(np.float32)
  states = jax.device_get(learned(g))
  together, after = weigh_all(g, states, train=False)
  chex.assert_trees_all_equal(after, states)
  alone, _ = weigh_all(np.append(g[:6], np.float32(1e3)), states, train=False)
  for name, weights in together.items():
    np.testing.assert_allclose(alone[name][:6], weights[:6], rtol=1e-6)
    np.testing.assert_allclose(np.mean(weights), 1.0, rtol=1e-4)
    assert np.isfinite(alone[name]).all() and (alone[name] > 0).all()
  # Before training, and after a batch of nobody, all weigh alike.
  nobody = jax.device_get(learned(np.full(7, np.nan, np.float32)))
  unseen = jax.tree.map(np.zeros_like, states)
  for states in (nobody, unseen):
    for weights in weigh_all(g, states, train=False)[0].values():
      np.testing.assert_allclose(weights, np.ones(7), rtol=1e-6)


@pytest.mark.parametrize('density', ALL.values(), ids=ALL)
def test_the_state_is_fixed_from_init(density):
  state = jax.eval_shape(density.init)
  one = jax.ShapeDtypeStruct((3,), jnp.float32)
  _, after = jax.eval_shape(density.update, one, state, one)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
  for leaf in jax.tree.leaves((state, after)):
    assert leaf.dtype == jnp.float32 and not leaf.weak_type


def test_summed_states_are_their_mean_and_scaled_ones_read_the_same(rng):
  """Loss scaling divides all gradients, those of states among them."""
  for density in (
    optax_ghm.BinnedDensity(bins=4, momentum=0.5),
    optax_ghm.WindowedDensity(cells=64, width=0.2, momentum=0.9),
  ):

    @jax.jit
    def updates(g, a, b, density=density):
      _, state = density.update(g, density.init())
      states = [density.update(u, state)[1] for u in (a, b)]
      both = jax.tree.map(jnp.add, *states)
      mean = jax.tree.map(lambda x, y: (x + y) / 2, *states)
      small = jax.tree.map(lambda x: x / 1024, both)
      return [density.update(g, s) for s in (mean, both, small)]

    mean, *others = updates(*rng.uniform(size=(3, 8)).astype(np.float32))
    for other in others:
      chex.assert_trees_all_close(other, mean, rtol=1e-6)


@pytest.mark.parametrize('bins', [30, 41])
def test_edges_decide_about_bins_not_the_floor_of_a_product(bins):
  """The product is too large for some edges of 30, too small for some of 41."""
  edges = np.arange(bins + 1, dtype=np.float32) / np.float32(bins)
  below = np.nextafter(edges, np.float32(-1))

  @jax.jit
  def histograms(*norms):
    density = optax_ghm.BinnedDensity(bins=bins)
    return [density.update(g, density.init())[1].histogram for g in norms]

  for histogram in histograms(edges[:-1], below[1:]):
    np.testing.assert_array_equal(histogram, np.ones(bins))


def test_norms_above_the_range_are_counted_and_weigh_like_the_largest():
  high = {name: density.high for name, density in ALL.items()}
  shares = np.array([1 / 2, 1, 1e2, 1e3, 1 + 1e-6])  # the last is rounding
  beyond = {name: np.float32(shares * h) for name, h in high.items()}
  inside = {name: np.minimum(u, high[name]) for name, u in beyond.items()}
  found, states = weigh_all(beyond)
  expected, none = weigh_all(inside)
  for name, weights in found.items():
    np.testing.assert_allclose(weights, expected[name], rtol=1e-6)
    assert states[name].above_range == 2 and none[name].above_range == 0


def test_weights_are_constants_to_differentiation():
  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1, 2))
  def grads(g, state, weights):
    return optax_ghm.harmony_weights(g, state, weights=weights)[0].sum()

  state = jax.tree.map(
    lambda leaf: np.ones(leaf.shape, leaf.dtype),
    jax.eval_shape(optax_ghm.WindowedDensity().init),
  )
  found = grads(np.float32([0.1, 0.2, 0.9]), state, np.float32([0.5, 1.0, 0.7]))
  for leaf in jax.tree.leaves(found):
    np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@pytest.mark.parametrize(
  ('family', 'settings', 'name'),
  [
    (optax_ghm.BinnedDensity, {'bins': 0}, 'bins'),
    (optax_ghm.BinnedDensity, {'bins': 2.5}, 'bins'),
    (optax_ghm.BinnedDensity, {'momentum': 1.0}, 'momentum'),
    (optax_ghm.BinnedDensity, {'low': 1.0, 'high': 1.0}, 'low'),
    (optax_ghm.BinnedDensity, {'log': True}, 'low'),
    (optax_ghm.WindowedDensity, {'width': 0.0}, 'width'),
    (optax_ghm.WindowedDensity, {'width': 1.5}, 'width'),
    (optax_ghm.WindowedDensity, {'cells': 0}, 'cells'),
    (harmonization.ExactDensity, {'width': -1.0}, 'width'),
  ],
)
def test_bad_settings_are_named(family, settings, name):
  with pytest.raises(ValueError, match=name):
    family(**settings)
  with pytest.raises(TypeError):
    family(0.2)


@pytest.mark.parametrize('name', ['exponent', 'robustness', 'focus'])
@pytest.mark.parametrize('value', [-0.1, np.inf, np.nan])
def test_bad_exponents_are_named(name, value):
  with pytest.raises(ValueError, match=name):
    optax_ghm.HarmonyWeighting(**{name: value})


def test_a_weighting_of_no_density_is_named():
  with pytest.raises(TypeError, match='density must .*got <class.*Call'):
    published(type(EXACT), normalize=True)


def test_bad_arguments_are_named():
  g, state = np.ones(3, np.float32), jax.eval_shape(BINNED.init)
  for error, match, norms, options in (
    (TypeError, 'norms', np.ones(3, np.int32), {}),
    (ValueError, r'mask of shape \(2,\).*\(3,\)', g, {'mask': g[:2] > 0}),
    (TypeError, 'mask must be bool.*as weights', g, {'mask': g}),
    (
      TypeError,
      'weights must be real.*complex64',
      g,
      {'weights': np.ones(3, np.complex64)},
    ),
    (
      ValueError,
      'state',
      g,
      {'state': state, 'weighting': published(WINDOWED)},
    ),
    (
      ValueError,
      'axis_name',
      g,
      {'weighting': published(EXACT), 'axis_name': 'batch'},
    ),
    (TypeError, 'weighting must be a Harm.*got Exact', g, {'weighting': EXACT}),
  ):
    with pytest.raises(error, match=match):
      jax.eval_shape(
        lambda norms=norms, options=options: optax_ghm.harmony_weights(
          norms, **options
        )
      )
