"""Every clip follows its paper's rule, also after bad steps."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm

DIRECTION = np.array([0.6, -0.8, 0.0], np.float32)
CLIPS = {
  'norm': optax_ghm.clip_by_norm(1.5),
  'percentile': optax_ghm.clip_by_percentile(
    90.0, estimator=optax_ghm.WindowPercentile(length=50)
  ),
  'quantile': optax_ghm.clip_by_percentile(
    90.0, estimator=optax_ghm.GeometricQuantile()
  ),
  'zscore': optax_ghm.clip_by_zscore(),
  'norm_ema': optax_ghm.clip_by_norm_ema(max_norm=9.0, warmup_steps=20),
}
every_clip = pytest.mark.parametrize('name', CLIPS)


@functools.cache
def scanned(name):
  """Compiles a scan over the steps of a stream of norms."""

  @jax.jit
  def run(norms, signs, state):
    def step(state, of_step):
      size, sign = of_step
      update, state = CLIPS[name].update(size * sign * DIRECTION, state)
      return state, (update, state)

    return jax.lax.scan(step, state, (norms, signs))[1]

  return run


def run(name, norms):
  norms = jnp.asarray(norms, jnp.float32)
  state = CLIPS[name].init(jnp.zeros(3))
  updates, states = scanned(name)(norms, jnp.ones_like(norms), state)
  states = jax.tree.map(np.asarray, states)
  if states.norm.ndim == 2:  # one leaf
    states = jax.tree.map(lambda leaf: leaf[:, 0], states)
  return np.linalg.norm(updates, axis=-1), states


def stream(spikes=(), steps=200):
  norms = np.random.default_rng(0).lognormal(0.0, 0.1, steps)
  for step, factor in spikes:
    norms[step] *= factor
  return norms


# The rules, one step at a time, in float64.


def norm_by_hand(norms):
  return [min(n, 1.5) for n in norms]


def percentile_by_hand(norms):
  return [
    min(n, np.percentile(norms[max(t - 49, 0) : t + 1], 90))
    for t, n in enumerate(norms)
  ]


def quantile_by_hand(norms):
  estimate, clipped = norms[0], []
  for n in norms:
    clipped.append(min(n, estimate))
    estimate *= np.exp(-0.2 * ((n <= estimate) - 0.9))
  return clipped


def zscore_by_hand(norms):
  mean, variance = np.mean(norms[:25]), np.var(norms[:25])
  clipped = list(norms[:25])
  for n in norms[25:]:
    deviation = np.sqrt(variance)
    z = (n - mean) / deviation
    clipped.append(mean + 2.5**2 / z * deviation if z > 2.5 else n)
    mean = 0.97 * mean + 0.03 * clipped[-1]
    variance = 0.97 * variance + 0.03 * (clipped[-1] - mean) ** 2
  return clipped


def norm_ema_by_hand(norms):
  clipped, average = [], np.inf
  for t, n in enumerate(norms):
    if t < 20:
      clipped.append(min(n, 9.0))
      average = min(average, clipped[-1])
    else:
      clipped.append(min(n, 1.05 * average))
      average = 0.98 * average + 0.02 * clipped[-1]
  return clipped


BY_HAND = {
  'norm': norm_by_hand,
  'percentile': percentile_by_hand,
  'quantile': quantile_by_hand,
  'zscore': zscore_by_hand,
  'norm_ema': norm_ema_by_hand,
}


@every_clip
@pytest.mark.parametrize('factor', [10, 100])
def test_spikes_are_clipped_as_the_paper_says(name, factor):
  norms = stream([(60, factor), (61, factor), (150, factor)])
  clipped, states = run(name, norms)
  expected = np.array(BY_HAND[name](norms))
  np.testing.assert_allclose(clipped, expected, rtol=2e-4)
  assert expected[60] < norms[60] / 2
  np.testing.assert_allclose(states.norm, norms, rtol=1e-6)
  happened = expected < norms * (1 - 1e-4)
  assert abs(int(states.clipped[-1]) - happened.sum()) <= 1
  assert states.skipped[-1] == 0


BAD = {'nan': np.nan, 'inf': np.inf, '1e30': 1e30, '3e38': 3e38, 'zero': 0.0}


@pytest.mark.parametrize(
  ('name', 'bad'),
  [
    (name, bad)
    for name in CLIPS
    for bad in BAD
    # a constant clip has no statistics, and so no reference norm
    if name != 'norm' or bad not in ('1e30', '3e38')
  ],
)
@pytest.mark.parametrize('at', [10, 100])
def test_a_bad_step_leaves_no_trace(name, bad, at):
  calm = stream()
  updates, states = run(name, np.insert(calm, at, BAD[bad]))
  expected, expected_states = run(name, calm)
  np.testing.assert_array_equal(np.delete(updates, at), expected)
  assert np.isfinite(updates).all()
  if bad in ('nan', 'inf', 'zero'):
    assert updates[at] == 0
  last, expected_last = (
    jax.tree.map(lambda leaf: leaf[-1], s) for s in (states, expected_states)
  )
  assert last.skipped == 1
  chex.assert_trees_all_equal(last._replace(skipped=0), expected_last)


@pytest.mark.parametrize('name', [name for name in CLIPS if name != 'quantile'])
def test_a_calm_stream_passes_bit_for_bit(name):
  """The geometric quantile is left out, since it never stops moving."""
  signs = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], 200))
  norms = jnp.full(200, 1.25, jnp.float32)
  updates, states = scanned(name)(
    norms, signs.astype(jnp.float32), CLIPS[name].init(jnp.zeros(3))
  )
  expected = norms[:, None] * signs[:, None] * DIRECTION[None]
  np.testing.assert_array_equal(updates, expected)
  assert states.clipped[-1] == 0
  assert (states.factor == 1).all()


def test_the_quantile_comes_to_rest_at_the_percentile():
  norms = np.random.default_rng(0).uniform(1.0, 2.0, 4000)
  tx = optax_ghm.clip_by_percentile(
    30.0, estimator=optax_ghm.GeometricQuantile(learning_rate=0.01)
  )
  state = tx.init(jnp.zeros(1))
  last, thresholds = jax.lax.scan(
    lambda s, n: (tx.update(n[None], s)[1],) * 2,
    state,
    jnp.asarray(norms, jnp.float32),
  )
  np.testing.assert_allclose(thresholds.threshold[2000:].mean(), 1.3, atol=0.02)


@pytest.mark.parametrize('name', [name for name in CLIPS if name != 'norm'])
def test_a_tiny_first_step_is_forgotten(name):
  """After twenty outliers in a row, the statistics are reset."""
  norms = np.concatenate([[1e-7], np.ones(79)])
  updates, states = run(name, norms)
  np.testing.assert_allclose(updates[-10:], 1, rtol=0.1)
  assert (states.outliers_in_a_row[-10:] == 0).all()


def test_a_clip_without_warm_up_starts_with_the_first_norm():
  tx = optax_ghm.clip_by_zscore(warmup_steps=0)
  update, state = tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))
  assert update == 1
  update, _ = tx.update(3 * jnp.ones(1), state)
  np.testing.assert_allclose(update, 1, rtol=1e-5)


@pytest.mark.parametrize(
  'make, word',
  [
    (lambda: optax_ghm.clip_by_percentile(150.0), 'percentile'),
    (lambda: optax_ghm.clip_by_norm(-1.0), 'max_norm'),
    (lambda: optax_ghm.clip_by_zscore(decay=1.5), 'decay'),
    (lambda: optax_ghm.clip_by_norm_ema(decay=-0.1), 'decay'),
  ],
)
def test_numbers_out_of_range_are_named(make, word):
  with pytest.raises(ValueError, match=word):
    make()


# Scopes.

TREE = {
  'a': jnp.array([3.0, 4.0]),
  'b': {'c': jnp.array([6.0, 8.0]), 'd': None},
}


@pytest.mark.parametrize(
  'scope, norms, factors',
  [
    ('global', 125**0.5, [1 / 125**0.5] * 2),
    ('leaf', [5, 10], [0.2, 0.1]),
    (optax_ghm.Groups({'a': 'x', 'b': 'w'}), [10, 5], [0.2, 0.1]),
    (
      optax_ghm.Groups(lambda t: jax.tree.map(lambda _: 'one', t)),
      [125**0.5],
      [1 / 125**0.5] * 2,
    ),
  ],
)
def test_scopes(scope, norms, factors):
  tx = optax_ghm.clip_by_norm(1.0, scope=scope)
  updates, state = jax.jit(tx.update)(TREE, tx.init(TREE))
  np.testing.assert_allclose(state.norm, norms, rtol=1e-6)
  np.testing.assert_allclose(updates['a'], factors[0] * TREE['a'], rtol=1e-6)
  np.testing.assert_allclose(
    updates['b']['c'], factors[1] * TREE['b']['c'], rtol=1e-6
  )
  assert state.norm.shape == np.shape(norms)


def test_a_bad_leaf_is_its_own_affair():
  tx = optax_ghm.clip_by_norm_ema(max_norm=1.0)
  bad = TREE | {'a': jnp.array([jnp.nan, 1.0])}
  updates, state = tx.update(bad, tx.init(bad))
  np.testing.assert_array_equal(updates['a'], [0, 0])
  np.testing.assert_allclose(updates['b']['c'], [0.6, 0.8], rtol=1e-6)
  np.testing.assert_array_equal(state.skipped, [1, 0])


def test_a_limit_for_every_leaf():
  tx = optax_ghm.clip_by_norm(jnp.array([1.0, 5.0]), scope='leaf')
  updates, _ = tx.update(TREE, tx.init(TREE))
  np.testing.assert_allclose(updates['a'], [0.6, 0.8], rtol=1e-6)
  np.testing.assert_allclose(updates['b']['c'], [3, 4], rtol=1e-6)


def test_unknown_scopes_and_lengths_are_named():
  with pytest.raises(ValueError, match='scope'):
    optax_ghm.clip_by_norm(1.0, scope='layer').init(TREE)
  with pytest.raises(ValueError, match='length'):
    optax_ghm.WindowPercentile(length=0)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_norms_are_taken_in_float32(dtype):
  grads = jnp.full((4,), 300, dtype)
  tx = optax_ghm.clip_by_norm(60.0)
  updates, state = tx.update(grads, tx.init(grads))
  assert state.norm == 600 and updates.dtype == dtype
  np.testing.assert_array_equal(
    updates, (300 * np.float32(0.1) * np.ones(4)).astype(dtype)
  )


def test_two_thousand_leaves():
  """The leaves have all sizes up to ten, and some are large."""
  rng = np.random.default_rng(0)
  tree = [
    jnp.asarray(
      rng.normal(size=(i % 10 + 1, 1 + 20_000 * (i % 500 == 0)))
    ).astype(jnp.float32)
    for i in range(2000)
  ]
  tx = optax_ghm.clip_by_norm(1.0)
  updates, state = jax.jit(tx.update)(tree, tx.init(tree))
  squares = sum(np.square(np.asarray(u, np.float64)).sum() for u in tree)
  np.testing.assert_allclose(state.norm, np.sqrt(squares), rtol=1e-6)
  np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-5)


# Devices.


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize('scope', ['global', 'leaf'])
def test_sharded_jit(kind, scope):
  mesh = jax.make_mesh((8,), ('model',), axis_types=(kind,))
  tree = {'w': jnp.arange(64.0).reshape(16, 4), 'b': jnp.arange(16.0)}
  tx = optax_ghm.clip_by_zscore(0.5, warmup_steps=1, scope=scope)

  @jax.jit
  def three_steps(tree):
    state = tx.init(tree)
    for size in (1.0, 1.5, 30.0):
      updates, state = tx.update(
        jax.tree.map(lambda u, size=size: size * u, tree), state
      )
    return updates, state

  expected = three_steps(tree)
  with jax.set_mesh(mesh):
    sharded = jax.device_put(tree, NamedSharding(mesh, P('model')))
    compiled = three_steps.lower(sharded).compile()
    actual = compiled(sharded)
  assert 'all-gather' not in compiled.as_text()
  chex.assert_trees_all_close(
    jax.device_get(actual), jax.device_get(expected), rtol=1e-5
  )


@pytest.mark.parametrize('scale', [1.0, 1e25, 1e-25])
def test_shard_map(scale):
  mesh = jax.make_mesh((8,), ('model',), axis_types=(AxisType.Auto,))
  tree = {'w': scale * jnp.arange(64.0).reshape(16, 4)}
  local = optax_ghm.clip_by_norm(scale, axis_name='model')
  whole = optax_ghm.clip_by_norm(scale)
  mapped = jax.jit(
    jax.shard_map(
      local.update,
      mesh=mesh,
      in_specs=(P('model'), P()),
      out_specs=(P('model'), P()),
    )
  )
  chex.assert_trees_all_close(
    mapped(tree, local.init(tree)),
    whole.update(tree, whole.init(tree)),
    rtol=1e-5,
  )


def test_every_clip_takes_counts_to_the_end_of_int32():
  top = jnp.iinfo(jnp.int32).max
  for tx in CLIPS.values():
    state = jax.tree.map(
      lambda leaf: (
        jnp.full_like(leaf, top) if leaf.dtype == jnp.int32 else leaf
      ),
      tx.init(jnp.zeros(3)),
    )
    state = state._replace(outliers_in_a_row=jnp.int32(0))  # the count is reset
    for size in itertools.repeat(1.0, 2):
      _, state = tx.update(size * jnp.ones(3), state)
    state = state._replace(outliers_in_a_row=jnp.int32(top))
    counts = [u for u in jax.tree.leaves(state) if u.dtype == jnp.int32]
    assert all((count == top).all() for count in counts)
