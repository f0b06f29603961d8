import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ghm
from optax_ghm import harmonization
from tests import golden

BINNED = optax_ghm.BinnedDensity(bins=10)
RUNNING = optax_ghm.WindowedDensity(width=0.1, momentum=0.9)
CLASSIFICATION = [case for case in golden.CASES if case.startswith('ghmc')]


@pytest.mark.parametrize('case', CLASSIFICATION)
def test_golden_numbers_before_a_plain_cross_entropy(case):
  data = golden.load(case)
  density = golden.density(data)
  state = density.init()

  @jax.jit
  def grads(x, state, y, weight):
    valid = weight > 0

    def loss(x, state):
      x = optax_ghm.harmonize(x, state, density=density, axis=(), mask=valid)
      losses = optax.sigmoid_binary_cross_entropy(x, y)
      return jnp.where(valid, losses, 0.0).sum() / jnp.maximum(
        valid.sum(dtype=jnp.float32), 1
      )

    return jax.grad(loss, argnums=(0, 1))(x, state)

  for step in range(len(data['loss'])):
    grad, gradient_of_state = grads(
      data['pred'][step],
      state,
      data['target'][step],
      data['label_weight'][step],
    )
    state = optax_ghm.overwrite_with_gradient(state, gradient_of_state)
    np.testing.assert_allclose(
      grad * float(data['loss_weight']),
      data['grad'][step],
      rtol=1e-5,
      # optax's own p - y, by log_sigmoid, is off by this much near 0 and 1
      atol=3e-7,
    )
    np.testing.assert_allclose(
      state.histogram, data['acc_sum'][step], rtol=1e-5
    )


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_law_gradient_equals_that_of_the_loss(reduction, rng):
  x = jnp.asarray(rng.normal(size=(50, 4)) * 2, jnp.float32)
  y = jnp.asarray(rng.uniform(size=(50, 4)), jnp.float32)
  reduce = getattr(jnp, reduction)

  def harmonized(x):
    x = optax_ghm.harmonize(x, density=BINNED, axis=(), reduction=reduction)
    return reduce(optax.sigmoid_binary_cross_entropy(x, y))

  def ghm(x):
    return reduce(optax_ghm.sigmoid_ghm_loss(x, y, density=BINNED))

  np.testing.assert_allclose(
    jax.grad(harmonized)(x), jax.grad(ghm)(x), rtol=1e-4, atol=1e-7
  )


def test_multi_class_examples_are_weighed_by_their_euclidean_norm(rng):
  x = jnp.asarray(rng.normal(size=(50, 4)) * 2, jnp.float32)
  y = jnp.asarray(rng.integers(0, 4, size=50))

  def loss(x):
    x = optax_ghm.harmonize(x, density=BINNED, reduction=50 / np.sqrt(2))
    return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

  error = jax.nn.softmax(x) - jax.nn.one_hot(y, 4)
  weights, _ = optax_ghm.harmony_weights(
    jnp.linalg.norm(error, axis=-1) / jnp.sqrt(2.0), density=BINNED
  )
  np.testing.assert_allclose(
    jax.grad(loss)(x), weights[:, None] * error / 50, rtol=1e-4, atol=1e-7
  )


def test_mean_and_sum_reduced_losses_agree(rng):
  x = jnp.asarray(rng.normal(size=(30,)), jnp.float32)
  y = jnp.zeros(30)
  mask = jnp.arange(30) < 20

  def grad(reduce, reduction):
    def loss(x):
      x = optax_ghm.harmonize(x, mask=mask, reduction=reduction)
      return reduce(
        jnp.where(mask, optax.sigmoid_binary_cross_entropy(x, y), 0.0)
      )

    return jax.grad(loss)(x)

  mean = grad(lambda v: jnp.sum(v) / 20, 'mean')
  np.testing.assert_allclose(20 * mean, grad(jnp.sum, 'sum'), rtol=1e-5)
  number = grad(lambda v: jnp.sum(v) / 7, jnp.float32(7))
  np.testing.assert_allclose(7 * number, 20 * mean, rtol=1e-5)


def test_norms_beyond_one_at_a_hidden_layer(rng):
  hidden = jnp.asarray(rng.normal(size=(40, 3, 2)) * 100, jnp.float32)

  def cotangent(harmonized):
    def loss(h):
      h = optax_ghm.harmonize(
        h, density=harmonization.PARAMETER_DENSITY, enabled=harmonized
      )
      return jnp.mean(jnp.sum(h**2, axis=(1, 2)))

    return jax.grad(loss)(hidden)

  weights, _ = optax_ghm.harmony_weights(
    40 * jnp.linalg.norm(cotangent(False).reshape(40, -1), axis=-1),
    density=harmonization.PARAMETER_DENSITY,
  )
  np.testing.assert_allclose(
    cotangent(True), weights[:, None, None] * cotangent(False), rtol=1e-4
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_forward_is_bit_for_bit_the_input(dtype):
  x = jnp.array([-0.0, jnp.inf, -jnp.inf, jnp.nan, 1e-7, 3.0], dtype)
  y = jax.jit(optax_ghm.harmonize)(x)
  assert y.dtype == dtype
  assert np.asarray(y).tobytes() == np.asarray(x).tobytes()
  grad = jax.grad(lambda x: optax_ghm.harmonize(x, reduction='sum').sum())(x)
  assert grad.dtype == dtype


def step(x, state, y, *, axis_name=None):
  def loss(x, state):
    x = optax_ghm.harmonize(
      x, state, density=RUNNING, axis=(), axis_name=axis_name
    )
    return jnp.sum(optax.sigmoid_binary_cross_entropy(x, y)) / 24

  return jax.grad(loss, argnums=(0, 1))(x, state)


def test_works_under_jit_remat_scan_and_vmap(rng):
  x = jnp.asarray(rng.normal(size=(3, 24)), jnp.float32)
  y = jnp.asarray(rng.uniform(size=(3, 24)) < 0.3, jnp.float32)
  state = RUNNING.init()
  one_by_one = [step(x[0], state, y[0])]
  for i in (1, 2):
    one_by_one.append(step(x[i], one_by_one[-1][1], y[i]))

  jitted = jax.jit(step)(x[0], state, y[0])
  chex.assert_trees_all_close(jitted, one_by_one[0], rtol=1e-5, atol=1e-7)

  def scanned(state, batch):
    grad, state = step(batch[0], state, batch[1])
    return state, grad

  last, grads = jax.lax.scan(scanned, state, (x, y))
  chex.assert_trees_all_close(last, one_by_one[-1][1], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(grads[2], one_by_one[2][0], rtol=1e-4, atol=1e-7)

  mapped = jax.vmap(step, (0, None, 0))(x, state, y)
  np.testing.assert_allclose(
    mapped[0][0], one_by_one[0][0], rtol=1e-4, atol=1e-7
  )

  def rematted(x, state):
    layer = jax.checkpoint(
      lambda x, s: optax_ghm.harmonize(x, s, density=RUNNING, axis=())
    )
    losses = optax.sigmoid_binary_cross_entropy(layer(x, state), y[0])
    return jnp.mean(losses)

  chex.assert_trees_all_close(
    jax.grad(rematted, (0, 1))(x[0], state),
    one_by_one[0],
    rtol=1e-5,
    atol=1e-7,
  )


def test_a_named_vmap_is_one_batch(rng):
  x = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
  y = jnp.zeros((3, 8))
  whole, state = step(x.reshape(-1), RUNNING.init(), y.reshape(-1))
  parts, states = jax.vmap(
    lambda x, y: step(x, RUNNING.init(), y, axis_name='i'), axis_name='i'
  )(x, y)
  np.testing.assert_allclose(parts.reshape(-1), whole, rtol=1e-5)
  chex.assert_trees_all_close(
    jax.tree.map(lambda s: s[0], states), state, rtol=1e-5
  )


def test_a_gradient_of_a_gradient_keeps_the_rule():
  x = jnp.array([0.3, 0.3, 0.3, -2.0])

  def inner(x):
    return jnp.sum(optax_ghm.harmonize(x, axis=(), reduction='sum') ** 2 / 4)

  def outer(x):
    return jnp.sum(jax.grad(inner)(x) ** 2)

  assert not np.allclose(
    jax.grad(outer)(x), jax.grad(lambda x: jnp.sum((x / 2) ** 2))(x)
  )


def test_forward_mode_needs_it_disabled():
  x = jnp.ones(3)
  with pytest.raises(TypeError, match='forward-mode'):
    jax.jvp(optax_ghm.harmonize, (x,), (x,))
  jax.jvp(lambda x: optax_ghm.harmonize(x, enabled=False), (x,), (x,))


def test_a_state_used_twice_averages_and_one_unused_stays(rng):
  density = optax_ghm.BinnedDensity(bins=4, momentum=0.5)
  state = density.init()
  a, b = jnp.array([0.1, 0.1, 0.6]), jnp.array([0.9, 0.9, 0.9])

  def gradient(state, *cotangents):
    def loss(state):
      return sum(
        jnp.sum(
          c
          * optax_ghm.harmonize(
            jnp.ones(3), state, density=density, axis=(), reduction='sum'
          )
        )
        for c in cotangents
      ) + 0.0 * jnp.sum(state.calls)

    return jax.grad(loss)(state)

  both = gradient(state, a, b)
  assert both.calls == 2
  next_state = optax_ghm.overwrite_with_gradient(state, both)
  _, read = density.update(jnp.zeros(0), next_state)
  np.testing.assert_allclose(read.histogram / read.evidence, [1, 0, 0.5, 1.5])

  unused = gradient(next_state)
  assert unused.calls == 0
  chex.assert_trees_all_equal(
    optax_ghm.overwrite_with_gradient(next_state, unused), next_state
  )


def test_bad_cotangents_show_and_harm_no_other():
  c = jnp.array([0.1, 0.2, jnp.nan, 0.9])
  state = BINNED.init()

  def loss(x, state):
    x = optax_ghm.harmonize(x, state, density=BINNED, axis=(), reduction='sum')
    return jnp.sum(c * x)

  grad, state = jax.grad(loss, (0, 1))(jnp.ones(4), state)
  weights, _ = optax_ghm.harmony_weights(
    jnp.array([0.1, 0.2, 0.9]), density=BINNED
  )
  np.testing.assert_allclose(grad[np.array([0, 1, 3])], weights * c[c > 0])
  assert np.isnan(grad[2]) and state.non_finite == 1


def test_masked_examples_get_no_gradient():
  grad = jax.grad(
    lambda x: jnp.sum(
      optax_ghm.harmonize(x, mask=jnp.array([True, False])) * jnp.nan
    )
  )(jnp.ones((2, 3)))
  assert np.isnan(grad[0]).all() and (grad[1] == 0).all()


def test_wrong_arguments_are_named():
  with pytest.raises(TypeError, match='x must be floating.*int32'):
    optax_ghm.harmonize(jnp.ones(3, jnp.int32))
  with pytest.raises(ValueError, match=r'mask of shape \(3,\).*\(4,\)'):
    optax_ghm.harmonize(jnp.ones((4, 3)), mask=jnp.ones(3, bool))
  with pytest.raises(ValueError, match='axis'):
    optax_ghm.harmonize(jnp.ones((4, 3)), axis=2)
  with pytest.raises(ValueError, match="'mean', 'sum' or a number, got 'none'"):
    optax_ghm.harmonize(jnp.ones(3), reduction='none')
  with pytest.raises(ValueError, match='reduction must be above 0, got 0'):
    optax_ghm.harmonize(jnp.ones(3), reduction=0)
  with pytest.raises(ValueError, match='momentum=0.9.*state'):
    optax_ghm.harmonize(jnp.ones(3), density=RUNNING)
  with pytest.raises(ValueError, match='state'):
    jax.grad(lambda x: optax_ghm.harmonize(x, BINNED.init()).sum())(jnp.ones(3))


def softmax_errors(hard, harder):
  """Logits of two classes whose norms of p - y are 1.1 and 1.38."""
  margins = [1.25] * hard + [3.7] * harder
  return jnp.stack([jnp.zeros(len(margins)), jnp.array(margins)], -1)


def cross_entropies(x, labels):
  return optax.softmax_cross_entropy_with_integer_labels(x, labels)


def test_trap_norms_of_softmax_do_not_pile_up_at_the_end_of_the_range():
  """With norms in [0, 1] only, hard and harder would share the last region."""
  x, labels = softmax_errors(90, 10), jnp.zeros(100, jnp.int32)

  @jax.jit
  def cotangent(x, state):
    def loss(x, state):
      x = optax_ghm.harmonize(x, state)
      return cross_entropies(x, labels).mean()

    return jax.grad(loss, (0, 1))(x, state)

  error = jax.nn.softmax(x) - jax.nn.one_hot(labels, 2)
  grad, state = cotangent(x, optax_ghm.WindowedDensity().init())
  weights = 100 * grad[:, 0] / error[:, 0]
  assert weights[-1] > 5 * weights[0] and state.above_range == 0


def test_trap_a_summed_loss_that_is_taken_for_a_mean_shows():
  x, labels = softmax_errors(90, 10), jnp.zeros(100, jnp.int32)

  @functools.partial(jax.jit, static_argnames='reduction')
  def next_state(state, reduction):
    def loss(state):
      x_harmonized = optax_ghm.harmonize(x, state, reduction=reduction)
      return cross_entropies(x_harmonized, labels).sum()

    return jax.grad(loss)(state)

  start = optax_ghm.WindowedDensity().init()
  assert next_state(start, 'mean').above_range == 100
  assert next_state(start, 'sum').above_range == 0


def test_two_softmax_classes_are_harmonized_as_one_sigmoid(rng):
  x = jnp.asarray(rng.normal(size=50) * 3, jnp.float32)
  y = jnp.asarray(rng.integers(0, 2, size=50))

  @jax.jit
  def binary(x):
    x = optax_ghm.harmonize(x)
    return optax.sigmoid_binary_cross_entropy(x, y.astype(x.dtype)).mean()

  @jax.jit
  def multi(x):
    x = optax_ghm.harmonize(jnp.stack([jnp.zeros_like(x), x], -1))
    return cross_entropies(x, y).mean()

  np.testing.assert_allclose(
    jax.grad(multi)(x), jax.grad(binary)(x), rtol=1e-2, atol=1e-6
  )


def test_weights_multiply_the_cotangent_and_count_in_the_density(rng):
  x = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
  y = jnp.asarray(rng.integers(0, 3, size=6))
  weights = jnp.array([1.0, 2.0, 0.0, 1.0, 3.0, 0.5])

  @jax.jit
  def grads(x):
    def loss(x, weights):
      x = optax_ghm.harmonize(x, weights=weights)
      return cross_entropies(x, y).mean()

    return jax.grad(loss)(x, None), jax.grad(loss)(x, weights)

  plain, weighed = grads(x)
  error = jax.nn.softmax(x) - jax.nn.one_hot(y, 3)
  density = optax_ghm.WindowedDensity(high=2**0.5, width=0.1 * 2**0.5)
  for found, w in ((plain, None), (weighed, weights)):
    expected, _ = optax_ghm.harmony_weights(
      jnp.linalg.norm(error, axis=-1), density=density, weights=w
    )
    np.testing.assert_allclose(
      found, expected[:, None] * error / 6, rtol=1e-4, atol=1e-7
    )


# The optimizer-chain form.


def per_example(rng, n=12):
  return {
    'w': jnp.asarray(rng.normal(size=(n, 3, 2)), jnp.float32),
    'b': jnp.asarray(rng.normal(size=(n,)), jnp.bfloat16),
  }


def test_aggregate_is_the_weighted_mean(rng):
  grads = per_example(rng)
  tx = optax_ghm.harmonized_aggregate()
  updates, state = tx.update(grads, tx.init({}))
  norms = np.sqrt(
    np.square(grads['w']).sum((1, 2))
    + np.square(np.asarray(grads['b'], np.float32))
  )
  weights, expected_state = optax_ghm.harmony_weights(
    jnp.asarray(norms), density=harmonization.PARAMETER_DENSITY
  )
  weights = np.asarray(weights)
  np.testing.assert_allclose(
    updates['w'], np.einsum('b,bij->ij', weights, grads['w']) / 12, rtol=1e-5
  )
  assert updates['b'].dtype == jnp.bfloat16 and updates['b'].shape == ()
  np.testing.assert_allclose(
    np.float32(updates['b']),
    weights @ np.asarray(grads['b'], np.float32) / 12,
    rtol=1e-2,
  )
  chex.assert_trees_all_close(state.density, expected_state)


@pytest.mark.parametrize('factor', [1e-3, 1e3, 1e6])
def test_aggregate_does_not_depend_on_the_scale(factor, rng):
  grads = {'w': jnp.asarray(rng.normal(size=(64, 5)), jnp.float32)}
  tx = optax_ghm.harmonized_aggregate()
  one, _ = tx.update(grads, tx.init({}))
  scaled, _ = tx.update({'w': grads['w'] * factor}, tx.init({}))
  np.testing.assert_allclose(scaled['w'] / factor, one['w'], rtol=2e-2)


def test_aggregate_lifts_the_rare_and_mutes_the_outliers():
  easy = jnp.tile(jnp.array([[0.01, 0.0]]), (97, 1))
  rare = jnp.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
  tx = optax_ghm.harmonized_aggregate()
  updates, _ = tx.update(jnp.concatenate([easy, rare]), tx.init(()))
  np.testing.assert_allclose(
    updates[1], 0.5, rtol=1e-2
  )  # two crowds, half each


def test_aggregate_leaves_out_bad_examples_and_counts_them(rng):
  grads = per_example(rng)
  bad = {**grads, 'w': grads['w'].at[3, 0, 0].set(jnp.nan)}
  tx = optax_ghm.harmonized_aggregate()
  updates, state = tx.update(bad, tx.init({}))
  without, _ = tx.update(
    jax.tree.map(lambda g: jnp.delete(g, 3, 0), grads), tx.init({})
  )
  chex.assert_trees_all_close(updates, without, rtol=1e-5)
  assert state.density.non_finite == 1
  all_bad, _ = tx.update(
    jax.tree.map(lambda g: g * jnp.nan, grads), tx.init({})
  )
  chex.assert_trees_all_equal(
    all_bad, jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads)
  )


def test_aggregate_masks_and_weighs(rng):
  grads = per_example(rng)
  tx = optax_ghm.harmonized_aggregate()
  mask = jnp.arange(12) < 8
  masked, _ = tx.update(grads, tx.init({}), mask=mask)
  first, _ = tx.update(jax.tree.map(lambda g: g[:8], grads), tx.init({}))
  chex.assert_trees_all_close(masked, first, rtol=1e-5)
  halves = 0.5 * mask.astype(jnp.float32)
  halved, _ = tx.update(grads, tx.init({}), weights=halves)
  chex.assert_trees_all_close(halved, first, rtol=1e-5)
  twice = np.r_[np.arange(8), np.arange(4)]
  repeated, _ = tx.update(jax.tree.map(lambda g: g[twice], grads), tx.init({}))
  weights = jnp.repeat(jnp.array([2.0, 1.0, 3.0]), 4)
  weighed, _ = tx.update(grads, tx.init({}), mask=mask, weights=weights)
  chex.assert_trees_all_close(weighed, repeated, rtol=1e-2, atol=1e-5)


def test_aggregate_catches_gradients_that_are_averaged_already():
  params = {'w': jnp.ones((8, 2))}
  tx = optax_ghm.harmonized_aggregate()
  with pytest.raises(ValueError, match=r'per-example.*\(8, 2\) for \(8, 2\)'):
    tx.update(params, tx.init(params), params)


def test_aggregate_names_wrong_updates():
  tx = optax_ghm.harmonized_aggregate()
  with pytest.raises(ValueError, match=r'updates.*\(4, 2\).*\(3,\)'):
    tx.update({'a': jnp.ones((4, 2)), 'b': jnp.ones(3)}, tx.init({}))
  with pytest.raises(ValueError, match='updates'):
    tx.update({'a': jnp.ones(())}, tx.init({}))


def test_examples_that_share_a_state_under_vmap_carry_the_mean():
  density = optax_ghm.BinnedDensity(bins=4, momentum=0.5)
  rows = jnp.linspace(0.1, 2.0, 12).reshape(4, 3)

  def each(row, state):
    x = optax_ghm.harmonize(row, state, density=density, reduction='sum')
    return jnp.sum(jnp.square(x)) / 8

  def loop(rows, state):
    return sum(each(row, state) for row in rows)

  def mapped(rows, state):
    return jnp.sum(jax.vmap(each, (0, None))(rows, state))

  states = [density.init()] * 2
  for _ in range(3):
    states = [
      jax.grad(loss, argnums=1)(rows, state)
      for loss, state in zip((loop, mapped), states, strict=True)
    ]
    chex.assert_trees_all_close(*states, rtol=1e-6)
