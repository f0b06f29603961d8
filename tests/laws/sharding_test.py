"""Sharded equals unsharded: eight devices, as conftest.py forces them."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm
from optax_ghm import harmonization

N, CLASSES = 64, 6
BINNED = optax_ghm.BinnedDensity(bins=30, momentum=0.9)
WINDOWED = optax_ghm.WindowedDensity(width=0.1, cells=512, momentum=0.9)
MESHES = {
  (name, kind): jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
  for name, shape, names in (
    ('batch', (8,), ('batch',)),
    ('batch x model', (4, 2), ('batch', 'model')),
  )
  for kind in (AxisType.Auto, AxisType.Explicit)
}


def sigmoid_step(logits, labels, mask, state, density, axis_name=None):
  def loss(x, state):
    losses, state = optax_ghm.sigmoid_ghm_loss_with_state(
      x, labels, state, density=density, mask=mask, axis_name=axis_name
    )
    return losses.sum() / N, state

  (_, state), grad = jax.value_and_grad(loss, has_aux=True)(logits, state)
  return grad, state


def softmax_step(logits, labels, mask, state, density, axis_name=None):
  def loss(x, state):
    losses, state = optax_ghm.softmax_ghm_loss_with_integer_labels_with_state(
      x,
      labels[:, 0].astype(jnp.int32),
      state,
      density=density,
      mask=mask[:, 0],
      axis_name=axis_name,
    )
    return losses.sum() / N, state

  (_, state), grad = jax.value_and_grad(loss, has_aux=True)(logits, state)
  return grad, state


def harmonize_step(logits, labels, mask, state, density, axis_name=None):
  def loss(x, state):
    x = optax_ghm.harmonize(
      x,
      state,
      density=density,
      axis=(),
      mask=mask,
      reduction=float(N),
      axis_name=axis_name,
    )
    losses = optax.sigmoid_binary_cross_entropy(x, labels)
    return jnp.where(mask, losses, 0.0).sum() / N

  return jax.grad(loss, argnums=(0, 1))(logits, state)


def aggregate_step(logits, labels, mask, state, density, axis_name=None):
  tx = optax_ghm.harmonized_aggregate(density, axis_name=axis_name)
  state = harmonization.HarmonizedAggregateState(state)
  update, state = tx.update(logits * (1 + labels), state, mask=mask[:, 0])
  return update, state.density


STEPS = [sigmoid_step, softmax_step, harmonize_step, aggregate_step]


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(N, CLASSES)).astype(np.float32) * 3
  labels = (rng.uniform(size=(N, CLASSES)) < 0.3).astype(np.float32)
  mask = np.ones((N, CLASSES), bool)
  mask[:8] = False  # the whole first shard
  mask[9:14] = False
  return logits, labels, mask


@functools.cache
def unsharded(step, density):
  return jax.jit(functools.partial(step, density=density))


def collectives(compiled):
  """The (kind, number of elements) of every collective in the program."""
  pattern = (
    r'= \(?(\S+?)\[([\d,]*)\][^=]*? '
    r'(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)'
    r'(?:-start)?\('
  )
  return [
    (kind, int(np.prod([int(n) for n in shape.split(',') if n])))
    for _, shape, kind in re.findall(pattern, compiled.as_text())
  ]


@pytest.mark.parametrize('density', [BINNED, WINDOWED], ids=['bins', 'window'])
@pytest.mark.parametrize('step', STEPS)
@pytest.mark.parametrize('mesh', MESHES.values(), ids=str)
def test_jit_of_a_sharded_batch(mesh, step, density, batch):
  spec = P('batch', 'model') if 'model' in mesh.axis_names else P('batch')
  if step is softmax_step or step is aggregate_step:
    spec = P('batch')
  state = density.init()
  expected = unsharded(step, density)(*batch, state)
  with jax.set_mesh(mesh):
    sharded = jax.device_put(batch, NamedSharding(mesh, spec))
    compiled = (
      jax.jit(functools.partial(step, density=density))
      .lower(*sharded, state)
      .compile()
    )
    actual = compiled(*sharded, state)
  chex.assert_trees_all_close(
    jax.device_get(actual), jax.device_get(expected), rtol=1e-5, atol=1e-7
  )
  found = collectives(compiled)
  histogram = density.init().histogram.size + 4  # and four counts
  assert {kind for kind, _ in found} == {'all-reduce'}
  assert all(size <= max(histogram, CLASSES) for _, size in found)
  # One of the histogram (one per mesh axis, where the batch spans several).
  axes = 2 if 'model' in spec else 1
  assert [size for _, size in found].count(histogram) == axes
  assert actual[0].sharding.is_equivalent_to(
    NamedSharding(mesh, P() if step is aggregate_step else spec),
    actual[0].ndim,
  )


@pytest.mark.parametrize('density', [BINNED, WINDOWED], ids=['bins', 'window'])
@pytest.mark.parametrize('step', STEPS)
def test_shard_map_with_an_axis_name(step, density, batch):
  mesh = MESHES['batch', AxisType.Auto]
  state = density.init()
  out = P() if step is aggregate_step else P('batch')
  mapped = jax.jit(
    jax.shard_map(
      functools.partial(step, density=density, axis_name='batch'),
      mesh=mesh,
      in_specs=(P('batch'), P('batch'), P('batch'), P()),
      out_specs=(out, P()),
    )
  )
  compiled = mapped.lower(*batch, state).compile()
  actual = compiled(*batch, state)
  expected = unsharded(step, density)(*batch, state)
  chex.assert_trees_all_close(
    jax.device_get(actual), jax.device_get(expected), rtol=1e-5, atol=1e-7
  )
  found = collectives(compiled)
  histogram = density.init().histogram.size + 4  # and four counts
  assert {kind for kind, _ in found} == {'all-reduce'}
  assert [size for _, size in found].count(histogram) == 1
  assert all(size <= max(histogram, CLASSES) for _, size in found)


def test_sixteen_small_batches_differ_but_sixteen_shards_do_not(batch):
  """The reference weighs every shard by itself and is off by half."""
  rng = np.random.default_rng(1)
  logits = np.sort(rng.normal(size=256).astype(np.float32) * 3)
  labels = (rng.uniform(size=256) < 0.1).astype(np.float32)

  def grad(x, y, axis_name=None):
    def loss(x):
      return optax_ghm.sigmoid_ghm_loss(
        x, y, density=optax_ghm.BinnedDensity(bins=10), axis_name=axis_name
      ).sum()

    return jax.grad(loss)(x)

  whole = grad(logits, labels)
  shards = (logits.reshape(16, 16), labels.reshape(16, 16))
  alone = jax.vmap(grad)(*shards).reshape(-1)
  joined = jax.vmap(
    functools.partial(grad, axis_name='shard'), axis_name='shard'
  )(*shards).reshape(-1)
  np.testing.assert_allclose(joined, whole, rtol=1e-5)
  off = np.linalg.norm(alone - whole) / np.linalg.norm(whole)
  assert off > 0.5


def test_shards_that_mean_their_own_examples_say_so_by_the_reduction(batch):
  logits, labels, _ = batch

  def grad(x, y, reduction='mean', axis_name=None):
    def loss(x):
      x = optax_ghm.harmonize(
        x,
        BINNED.init(),
        density=BINNED,
        axis=(),
        reduction=reduction,
        axis_name=axis_name,
      )
      return optax.sigmoid_binary_cross_entropy(x, y).mean()

    return jax.grad(loss)(x)

  whole = grad(logits, labels)
  size = logits.size // 8
  parts = jax.vmap(
    functools.partial(grad, reduction=float(size), axis_name='i'), axis_name='i'
  )(logits.reshape(8, -1), labels.reshape(8, -1))
  np.testing.assert_allclose(
    parts.reshape(whole.shape) / 8, whole, rtol=1e-4, atol=1e-8
  )


def test_a_varying_state_inside_shard_map_sums_to_the_mean(batch):
  """Without axis_name every shard learns alone; the states add up."""
  mesh = MESHES['batch', AxisType.Auto]
  logits, labels, _ = batch

  def local(x, y, state):
    def loss(x, state):
      state = jax.lax.pcast(state, 'batch', to='varying')
      x = optax_ghm.harmonize(
        x, state, density=BINNED, axis=(), reduction=float(N)
      )
      losses = optax.sigmoid_binary_cross_entropy(x, y)
      return jax.lax.psum(losses.sum(), 'batch') / N

    return jax.grad(loss, argnums=1)(x, state)

  summed = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(P('batch'), P('batch'), P()),
      out_specs=P(),
    )
  )(logits, labels, BINNED.init())
  assert summed.calls == 8
  norms = jnp.abs(jax.nn.sigmoid(logits) - labels)
  _, expected = optax_ghm.harmony_weights(norms, density=BINNED)
  np.testing.assert_allclose(
    summed.histogram / summed.evidence,
    expected.histogram / expected.evidence / 8,
    rtol=1e-4,
    atol=0.2,  # norms on an edge, by rounding
  )
