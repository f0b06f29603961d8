"""After a clipped step, the logits are what they would be times γ."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from optax_ghm.calibration import QKClipState, qk_clip
from tests.support import sharded

WIDTH, HEADS, FEATURES, THRESHOLD = 5, 4, 6, 10.0
OWN = 4  # features of a head's own, of the latent attention's six


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_params(kv_heads=HEADS, seed=0):
  def projection(heads, seed):
    return {
      'kernel': normal(WIDTH, heads, FEATURES, seed=seed),
      'bias': normal(heads, FEATURES, seed=seed + 1),
    }

  return {
    'attention': {
      'query': projection(HEADS, seed),
      'key': projection(kv_heads, seed + 2),
      'value': projection(kv_heads, seed + 4),
    },
    'head': {'kernel': normal(WIDTH, 3, seed=seed + 6)},
  }


def logits(params, x):
  """(heads, queries, keys) in float64."""
  layer = jax.tree.map(np.float64, params['attention'])
  query, key = (
    np.einsum('ni,ihd->nhd', x, layer[name]['kernel']) + layer[name]['bias']
    for name in ('query', 'key')
  )
  key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
  return np.einsum('qhd,khd->hqk', query, key)


def gammas(max_logits, threshold=THRESHOLD):
  above = np.isfinite(max_logits) & (max_logits > threshold)
  return np.where(above, threshold / np.where(above, max_logits, 1), 1)


@functools.cache
def jitted(tx):
  @jax.jit
  def first_step(updates, params, max_logits):
    state = tx.init(params)
    return tx.update(updates, state, params, max_logits=max_logits)

  return lambda *args: jax.device_get(first_step(*args))


TX = qk_clip(THRESHOLD)
X = normal(7, WIDTH, seed=9)


BAD = st.sampled_from([np.nan, np.inf, -np.inf])


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
def test_logits_are_those_of_the_step_times_gamma(kv_heads):
  """Heads that need no clip have the updates that came, bit for bit."""
  params, steps = make_params(kv_heads), make_params(kv_heads, seed=20)
  expected = logits(jax.tree.map(np.add, params, steps), X)

  @hypothesis.given(
    st.lists(st.floats(-50, 1e4) | BAD, min_size=HEADS, max_size=HEADS)
  )
  @hypothesis.example([1e4, 10.0, np.nan, np.inf])
  @hypothesis.example([20.0, 40.0, 10.0, -1e9])
  def law(max_logits):
    max_logits = np.float32(max_logits)
    updates, state = jitted(TX)(
      steps, params, {'attention': {'max_logits': max_logits}}
    )
    gamma = gammas(np.float64(max_logits))
    np.testing.assert_allclose(
      logits(jax.tree.map(np.add, params, updates), X),
      gamma[:, None, None] * expected,
      rtol=1e-3,
      atol=1e-4,
    )
    least = gamma.reshape(kv_heads, -1).min(1)
    for name, heads in (('key', kv_heads), ('query', HEADS)):
      calm = np.repeat(least, heads // kv_heads) == 1
      one, other = (
        [x[..., calm, :] for x in jax.tree.leaves(tree['attention'][name])]
        for tree in (updates, steps)
      )
      chex.assert_trees_all_equal(one, other)
    old, step, new = (
      tree['attention']['key']['bias'] for tree in (params, steps, updates)
    )
    np.testing.assert_allclose(
      old + new, np.sqrt(least)[:, None] * (old + step), rtol=1e-3, atol=1e-5
    )
    others = [updates.pop('head'), updates['attention']['value']]
    chex.assert_trees_all_equal(
      others, [steps['head'], steps['attention']['value']]
    )
    assert state.heads_clipped == np.sum(gamma < 1)
    finite = max_logits[np.isfinite(max_logits)]
    assert state.max_logit == (finite.max() if finite.size else 0)

  law()


def test_latent_attention_leaves_the_shared_key():
  """q_own √γ · k_own √γ + q_rotary γ · k_rotary = γ (q · k)."""

  def powers(path, leaf):
    own = np.arange(leaf.shape[-1]) < OWN
    match [key.key for key in path]:
      case ['attention', 'wq_b']:
        return np.where(own, 0.5, 1.0)
      case ['attention', 'wkv_b']:
        return np.where(own, 0.5, 0.0)

  params = {
    'attention': {
      'wq_b': normal(WIDTH, HEADS, FEATURES),
      'wkv_b': normal(WIDTH, HEADS, OWN + 3, seed=1),  # values behind
      'wk_rotary': normal(WIDTH, FEATURES - OWN, seed=2),
    }
  }

  def logits(params):
    layer = jax.tree.map(np.float64, params['attention'])
    query = np.einsum('ni,ihd->nhd', X, layer['wq_b'])
    own = np.einsum('ni,ihd->nhd', X, layer['wkv_b'])[..., :OWN]
    return np.einsum('qhd,khd->hqk', query[..., :OWN], own) + np.einsum(
      'qhd,kd->hqk', query[..., OWN:], X @ layer['wk_rotary']
    )

  max_logits = np.float32([20.0, 1000.0, 5.0, 11.0])
  tx = qk_clip(THRESHOLD, powers=powers)
  zeros = jax.tree.map(np.zeros_like, params)
  updates, _ = jitted(tx)(zeros, params, {'attention': max_logits})
  gamma = gammas(max_logits)[:, None, None]
  after = jax.tree.map(np.add, params, updates)
  np.testing.assert_allclose(
    logits(after), gamma * logits(params), rtol=1e-4, atol=1e-5
  )
  assert not np.any(updates['attention']['wk_rotary'])
  assert not np.any(updates['attention']['wkv_b'][..., OWN:])


def test_stacked_layers_are_clipped_one_by_one():
  """As ``nn.scan`` stacks them; the weights of one are (8, 4, 6)."""
  layers = [make_params(2, seed=seed) for seed in (0, 10, 20)]
  logits = np.float32([[5, 20, 40, 9], [1, 2, 3, 4], [np.nan, 0, 11, 30]])
  stack = functools.partial(jax.tree.map, lambda *x: np.stack(x))
  updates, state = jitted(TX)(
    stack(*layers), stack(*layers[::-1]), {'attention': logits}
  )
  expected = [
    jitted(TX)(layer, params, {'attention': own})[0]
    for layer, params, own in zip(layers, layers[::-1], logits, strict=True)
  ]
  chex.assert_trees_all_close(updates, stack(*expected), rtol=1e-6)
  assert state.heads_clipped == 4 and state.max_logit == 40


def test_bfloat16_parameters_are_clipped_to_rounding():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
  zeros = jax.tree.map(np.zeros_like, params)
  max_logits = np.float32([40.0, 5.0, 1000.0, 11.0])
  updates, _ = jitted(TX)(zeros, params, {'attention': max_logits})
  root = np.sqrt(gammas(max_logits))[:, None]
  for name in ('query', 'key'):
    old = params['attention'][name]['kernel']
    new = np.float32(old + np.asarray(updates['attention'][name]['kernel']))
    error = np.abs(new - root * np.float32(old))
    np.testing.assert_array_less(error, 2**-7 * np.abs(np.float32(old)))


# In the wrappers of Optax.


def labels(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: 'attention' if path[0].key == 'attention' else 'head',
    params,
  )


MAX_LOGITS = {'attention': {'max_logits': np.float32([40.0, 5.0, 1e3, 11.0])}}


@pytest.mark.parametrize(
  'wrapped',
  [
    lambda clip: optax.chain(optax.sgd(0.5), clip),
    lambda clip: optax.chain(
      optax.sgd(0.5),
      optax.masked(clip, {'attention': True, 'head': False}),
    ),
    lambda clip: optax.partition(
      {'attention': optax.chain(optax.sgd(0.5), clip), 'head': optax.sgd(0.5)},
      labels,
    ),
    lambda clip: optax.MultiSteps(optax.chain(optax.sgd(0.5), clip), 1),
    lambda clip: optax.inject_hyperparams(
      lambda threshold: optax.chain(optax.sgd(0.5), qk_clip(threshold))
    )(threshold=THRESHOLD),
  ],
  ids=['chain', 'masked', 'partition', 'MultiSteps', 'inject_hyperparams'],
)
def test_wrapped(wrapped):
  params, grads = make_params(2), make_params(2, seed=20)
  steps = jax.tree.map(lambda g: np.float32(-0.5) * g, grads)
  expected, _ = jitted(TX)(steps, params, MAX_LOGITS)
  with jax.numpy_dtype_promotion('standard'):  # for MultiSteps
    updates, _ = jitted(wrapped(TX))(grads, params, MAX_LOGITS)
  chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


# What is given wrongly.

SMALL = {'attention': {'query': {'kernel': np.ones((2, 4, 3), np.float32)}}}


def update(updates, max_logits, params=SMALL):
  return jax.eval_shape(
    lambda: TX.update(updates, TX.init(params), params, max_logits=max_logits)
  )


@pytest.mark.parametrize(
  ('message', 'call'),
  [
    ('max_logits must be given.*sow_weights=True', lambda: update(SMALL, None)),
    ('params must be given', lambda: update(SMALL, MAX_LOGITS, None)),
    (
      r"none at or above attention/query/kernel; its paths are \['other'\]",
      lambda: update(SMALL, {'other': np.ones(4, np.float32)}),
    ),
    (
      r'got \(3,\) and \(2, 4, 3\) at attention/query/kernel',
      lambda: update(SMALL, {'attention': np.ones(3, np.float32)}),
    ),
    (
      r'got \(3, 4\) and \(2, 4, 3\)',
      lambda: update(SMALL, {'attention': np.ones((3, 4), np.float32)}),
    ),
    (
      r"no leaf .* is a query or a key: \['q_proj'\]. Give powers",
      lambda: update({'q_proj': np.ones((2, 4, 3), np.float32)}, MAX_LOGITS),
    ),
    ('threshold must be from 0', lambda: qk_clip(-1.0)),
  ],
)
def test_mistakes_are_named(message, call):
  with pytest.raises(ValueError, match=message):
    call()


def test_other_intermediates_do_not_matter():
  sown = {'attention': {**MAX_LOGITS['attention'], 'weights': (np.ones(2),)}}
  zeros = jax.tree.map(np.zeros_like, SMALL)
  chex.assert_trees_all_equal(
    jitted(TX)(zeros, SMALL, sown), jitted(TX)(zeros, SMALL, MAX_LOGITS)
  )


# Over devices.


def clipped(params, updates, max_logits, axis_name=None):
  # Whole leaves are clipped alike on all devices, split heads each on one.
  tx = qk_clip(THRESHOLD, axis_name=axis_name and 'model')
  return tx.update(updates, tx.init(params), params, max_logits=max_logits)


KERNELS = {
  'query': {'kernel': P(None, 'model'), 'bias': P('model')},
  'key': {'kernel': P(None, 'model'), 'bias': P('model')},
}
WIDE = {
  name: {'kernel': normal(8, 16, 4, seed=seed), 'bias': normal(16, 4)}
  for seed, name in enumerate(KERNELS)
}
CASES = {
  'heads': sharded.Case(
    clipped,
    (WIDE, WIDE, 5 + 10 * np.abs(normal(16))),
    (KERNELS, KERNELS, P('model')),
    (KERNELS, QKClipState(P(), P())),
    sent=1,
    shape=(2, 4),
  ),
  'features': sharded.Case(
    clipped,
    (WIDE, WIDE, 5 + 10 * np.abs(normal(16))),
    ({n: {'kernel': P('d', None, 'model'), 'bias': P()} for n in WIDE},) * 2
    + (P(),),
    (
      {n: {'kernel': P('d', None, 'model'), 'bias': P()} for n in WIDE},
      QKClipState(P(), P()),
    ),
    sent=0,
    shape=(2, 4),
    modes=('auto', 'explicit'),
  ),
}


@sharded.parametrize(CASES)
def test_split_kernels(case, mode):
  sharded.check(case, mode)
