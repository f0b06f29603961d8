"""Clips with a given limit equal their formulas in float64, for any tree."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from tests.support import oracles_calibration as by_hand
from tests.support.oracles_calibration import SCOPES, counted_with_path
from tests.support.strategies_trees import STRUCTURES, ones, trees, wide

pytestmark = pytest.mark.device

TINY = float(np.finfo(np.float32).tiny)
MODERATE = (0, 0.1, -0.1)  # exponents for which few factors are 0
every_scope = pytest.mark.parametrize('scope', SCOPES)


def assert_leaves_close(actual, expected, tree, rtol=1e-5):
  """Compares to the rounding of each dtype; small numbers are flushed."""
  numbers = [u for _, u in counted_with_path(actual)]
  of_tree = [u for _, u in counted_with_path(tree)]
  for u, x, g in zip(numbers, expected, of_tree, strict=True):
    assert u.dtype == g.dtype and u.shape == g.shape
    info = jnp.finfo(u.dtype)
    error = np.abs(wide([u])[0] - x)
    bound = max(rtol, 2 * float(info.eps)) * np.abs(x) + 2 * float(info.tiny)
    assert (error <= bound).all(), (u, x)


@functools.cache
def first_step(make, scope):
  """With numbers that are traced, so that all examples share a program."""

  @jax.jit
  def update(tree, params, *numbers):
    tx = make(*numbers, SCOPES[scope])
    return tx.update(tree, tx.init(tree), params)

  return lambda *args: jax.device_get(update(*args))


def by_norm(max_norm, scope):
  return optax_ghm.clip_by_norm(max_norm, scope=scope)


def by_parameter_norm(ratio, eps, scope):
  return optax_ghm.clip_by_parameter_norm(ratio, eps=eps, scope=scope)


def by_rms(max_rms, scope):
  return optax_ghm.clip_by_rms(max_rms, scope=scope)


LIMITS = st.sampled_from([2.0**-100, 1e-3, 1.0, 7.0, 2.0**100])


@every_scope
@given(tree=trees(STRUCTURES['mixed']), max_norm=LIMITS)
def test_clip_by_norm(scope, tree, max_norm):
  update = first_step(by_norm, scope)
  updates, state = update(tree, None, np.float32(max_norm))
  norms = by_hand.norms(scope, tree)
  factors = [np.minimum(1, max_norm / np.maximum(n, 1e-45)) for n in norms]
  assume(all((np.abs(f / (1.01 * TINY) - 1) > 0.1).all() for f in factors))
  factors = [np.where(f > TINY, f, 0) for f in factors]  # as documented
  expected = [x * f for x, f in zip(wide(tree), factors, strict=True)]
  assert_leaves_close(updates, expected, tree)
  assert (np.asarray(state.factor) <= 1).all()


@given(tree=trees(STRUCTURES['many']), max_norm=LIMITS)
def test_clip_by_norm_of_many_leaves(tree, max_norm):
  """The norm of a clipped g is min(c, |g|)."""
  updates, _ = first_step(by_norm, 'global')(tree, None, np.float32(max_norm))
  norm, actual = (by_hand.norms('global', t)[0] for t in (tree, updates))
  assume(norm < 2.0**25 * max_norm)
  np.testing.assert_allclose(actual, min(max_norm, norm), rtol=1e-5)


def pairs(name):
  return st.tuples(*[trees(STRUCTURES[name], MODERATE) for _ in range(2)])


@every_scope
@given(
  pair=pairs('mixed'),
  ratio=st.sampled_from([1e-3, 1.0, 8.0]),
  eps=st.sampled_from([1e-6, 1e-3, 1.0]),
)
def test_clip_by_parameter_norm(scope, pair, ratio, eps):
  numbers = np.float32([ratio, eps])
  updates, _ = first_step(by_parameter_norm, scope)(*pair, *numbers)
  tree, params = pair
  norms = by_hand.norms(scope, tree), by_hand.norms(scope, params)
  expected = [
    x * np.minimum(1, ratio * np.maximum(w, eps) / np.maximum(g, 1e-45))
    for x, g, w in zip(wide(tree), *norms, strict=True)
  ]
  assert_leaves_close(updates, expected, tree)


@every_scope
@given(
  tree=trees(STRUCTURES['mixed'], MODERATE),
  max_rms=st.sampled_from([1e-3, 1.0, 8.0]),
)
def test_clip_by_rms(scope, tree, max_rms):
  updates, _ = first_step(by_rms, scope)(tree, None, np.float32(max_rms))
  roots = by_hand.norms(scope, ones(STRUCTURES['mixed']))  # of the sizes
  expected = [
    x / np.maximum(1, n / root / max_rms)
    for x, n, root in zip(
      wide(tree), by_hand.norms(scope, tree), roots, strict=True
    )
  ]
  assert_leaves_close(updates, expected, tree)


@pytest.mark.parametrize('make', [by_parameter_norm, by_rms])
@every_scope
@given(pair=pairs('nested'), power=st.sampled_from([-100, 80]))
def test_the_scale_of_all_numbers_is_no_matter(make, scope, pair, power):
  """For powers of two, bit for bit."""

  def update(power):
    of_pair = jax.tree.map(lambda x: np.ldexp(x, power), pair)
    numbers = np.float32([0.02, 0.5] if make == by_parameter_norm else [0.05])
    numbers[-1] = np.ldexp(numbers[-1], power)
    return first_step(make, scope)(*of_pair, *numbers)

  (expected, plain), (actual, state) = update(0), update(power)
  chex.assert_trees_all_close(
    actual,
    jax.tree.map(lambda x: np.ldexp(x, power), expected),
    rtol=1e-6,
    atol=2 * TINY,
  )
  np.testing.assert_array_equal(state.clipped, plain.clipped)


# Units, which are clipped as columns by themselves.

CLIPS = {
  'norm': functools.partial(optax_ghm.clip_by_norm, 1.0),
  'percentile': functools.partial(optax_ghm.clip_by_percentile, 50.0),
  'zscore': functools.partial(optax_ghm.clip_by_zscore, 0.5, warmup_steps=2),
  'norm_ema': functools.partial(
    optax_ghm.clip_by_norm_ema, 0.9, max_norm=1e9, warmup_steps=2
  ),
  'parameter_norm': optax_ghm.clip_by_parameter_norm,
}


@pytest.mark.parametrize('name', CLIPS)
def test_units_are_clipped_as_columns_by_themselves(name, rng):
  steps = rng.lognormal(size=(6, 1, 4)) * rng.normal(size=(6, 3, 4))
  steps[3, 1, 2] = np.nan  # a bad step of one column
  params = rng.normal(size=(3, 4)).astype(np.float32)

  def run(scope, steps, params):
    tx = CLIPS[name](scope=scope)

    def step(state, grads):
      return tx.update(grads, state, params)[::-1]

    return jax.lax.scan(step, tx.init(params), steps)

  @jax.jit
  def both(*args):
    alone = functools.partial(run, 'global')
    return run('unit', *args), jax.vmap(alone, (2, 1), (0, 2))(*args)

  actual, expected = jax.device_get(both(np.float32(steps), params))
  chex.assert_trees_all_close(actual, expected, rtol=1e-5)
  np.testing.assert_array_equal(actual[0].skipped, [0, 0, 1, 0])
  assert actual[0].clipped.sum() > 0


# Against Optax.


def test_equals_adaptive_grad_clip_where_the_layouts_agree(rng):
  shapes = [(6, 4), (2, 3, 4, 5), (5,), ()]
  params = [{'kernel': rng.normal(size=shape)} for shape in shapes]
  grads = jax.tree.map(
    lambda x: rng.normal(size=x.shape) * 10 ** rng.uniform(-4, 1, x.shape[-1:]),
    params,
  )
  params, grads = jax.tree.map(np.float32, (params, grads))
  ours = optax_ghm.clip_by_parameter_norm(1e-3, eps=1e-3)
  theirs = optax.adaptive_grad_clip(1e-3, eps=1e-3)

  @jax.jit
  def both(grads, params):
    return [tx.update(grads, tx.init(params), params) for tx in (ours, theirs)]

  (updates, state), (expected, _) = both(grads, params)
  chex.assert_trees_all_close(updates, expected, rtol=1e-5)
  assert 0 < state.clipped.sum()


@jax.jit
def both_by_rms(tree, max_rms):
  tx, theirs = optax_ghm.clip_by_rms(max_rms), optax.clip_by_block_rms(max_rms)
  expected, _ = theirs.update(tree, optax.EmptyState())
  return tx.update(tree, tx.init(tree)), expected


ORDINARY = st.floats(0.125, 100, width=32) | st.floats(-100, -0.125, width=32)


@given(
  hnp.arrays(np.float32, (2, 3), elements=ORDINARY | st.just(0.0)),
  hnp.arrays(np.float32, (), elements=ORDINARY),
  st.sampled_from([0.0625, 1.0, 30.0]),
)
def test_clip_by_rms_equals_optax(matrix, scalar, max_rms):
  tree = {'a': matrix, 'b': scalar}
  (updates, state), expected = jax.device_get(
    both_by_rms(tree, np.float32(max_rms))
  )
  chex.assert_trees_all_close(updates, expected, rtol=1e-5)
  for rms, leaf in zip(
    state.norm / state.threshold * max_rms, tree.values(), strict=True
  ):
    expected = np.sqrt(np.mean(np.square(leaf, dtype=np.float64)))
    if expected > 0:  # a step of zeros is skipped
      np.testing.assert_allclose(rms, expected, rtol=1e-5)


# Corners.


def test_parameters_at_zero_can_move_by_epsilon():
  params = {'kernel': np.zeros((4, 3), np.float32)}
  grads = {'kernel': np.float32([[3.0, 0, 1e-6]] * 4)}
  updates, state = first_step(by_parameter_norm, 'unit')(
    grads, params, *np.float32([0.5, 0.1])
  )
  np.testing.assert_allclose(
    np.linalg.norm(updates['kernel'], axis=0), [0.05, 0, 2e-6], rtol=1e-5
  )
  np.testing.assert_array_equal(state.clipped, [1, 0, 0])
  np.testing.assert_array_equal(state.skipped, [0, 1, 0])


@pytest.mark.parametrize('size', [1e30, 1e35, 3e38])
@pytest.mark.parametrize(
  'make, numbers',
  [(by_parameter_norm, (0.01, 1e-3)), (by_norm, (1.0,)), (by_rms, (1e-3,))],
)
def test_what_is_finite_is_clipped_or_counted(make, numbers, size):
  """A step is not clipped if float32 does not hold its factor."""
  grads = np.float32([0.6, -0.8]) * np.float32(size)
  updates, state = first_step(make, 'leaf')(
    grads, np.zeros(2, np.float32), *np.float32(numbers)
  )
  if np.all(state.skipped):
    assert size > 1e30 and np.all(state.clipped == 0)
    np.testing.assert_array_equal(updates, [0, 0])
  else:
    expected = np.array([0.6, -0.8]) * float(np.squeeze(state.threshold))
    np.testing.assert_allclose(updates, expected, rtol=1e-5)
    assert np.all(state.clipped == 1)


def test_norms_are_those_of_the_scope():
  """In the order of the leaves, or of the labels."""
  tree = {
    'a': np.float32([3.0, 4.0]),
    'b': {'c': np.float32([6.0, 8.0]), 'd': None},
  }
  limits = {
    'global': (1.0, 'global', [125**0.5]),
    'leaf': (1.0, 'leaf', [5, 10]),
    'labels': (1.0, optax_ghm.Groups({'a': 'x', 'b': 'w'}), [10, 5]),
    'a limit for every leaf': (np.float32([1.0, 5.0]), 'leaf', [5, 10]),
  }

  @jax.jit
  def each(tree):
    clips = {k: by_norm(*given) for k, (*given, _) in limits.items()}
    return {k: tx.update(tree, tx.init(tree)) for k, tx in clips.items()}

  for name, (updates, state) in each(tree).items():
    _, _, norms = limits[name]
    np.testing.assert_allclose(state.norm, np.reshape(norms, state.norm.shape))
    kept = {'global': 5 / 125**0.5}.get(name, 1.0)
    np.testing.assert_allclose(
      updates['a'], np.float32([0.6, 0.8]) * kept, rtol=1e-6
    )
    kept = {'global': 10 / 125**0.5, 'a limit for every leaf': 5}.get(name, 1.0)
    np.testing.assert_allclose(
      updates['b']['c'], np.float32([0.6, 0.8]) * kept, rtol=1e-6
    )


# Errors.


@pytest.mark.parametrize('scope', ['unit', 'leaf', 'global', 'groups'])
def test_params_must_be_given(scope):
  grads = {'kernel': jax.ShapeDtypeStruct((3, 2), jnp.float32)}
  tx = optax_ghm.clip_by_parameter_norm(scope=SCOPES[scope])
  state = jax.eval_shape(tx.init, grads)
  for update in (tx.update, jax.jit(tx.update)):
    with pytest.raises(ValueError, match='params'):
      jax.eval_shape(update, grads, state)


@pytest.mark.parametrize(
  'make',
  [
    optax_ghm.clip_by_parameter_norm,
    optax_ghm.clip_by_rms,
    optax_ghm.normalize_by_norm,
  ],
)
@pytest.mark.parametrize('scope', ['units', 'layer', None, 3])
def test_unknown_scopes_are_named(make, scope):
  with pytest.raises(ValueError, match='scope') as error:
    make(scope=scope).init({'a': np.ones(2, np.float32)})
  assert repr(scope) in str(error.value)
