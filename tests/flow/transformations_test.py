"""A tap under every transformation, against the whole cotangents."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_ghm import flow
from tests.support.oracles_flow import (
  assert_bit_for_bit,
  assert_statistics,
  at,
  wavy,
)

PROGRAMS = 64
STEPS, BATCH, WIDTH = 3, 8, 4
MESHES = {
  kind: jax.make_mesh((8,), ('batch',), axis_types=(kind,))
  for kind in (AxisType.Auto, AxisType.Explicit)
}
RNG = np.random.default_rng(0)
W = RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32)
X = RNG.normal(size=(BATCH, WIDTH)).astype(np.float32)
all_meshes = pytest.mark.parametrize('kind', MESHES, ids=lambda k: k.name)


def hidden(w, x, empty=None, noise=None):
  y = jnp.tanh(x @ w)
  return y + noise if empty is None else flow.tap(y, empty)


def loss(w, x, empty=None, noise=None):
  return wavy(hidden(w, x, empty, noise) @ w)


def deep(w, x, empty=None, noise=None, *, shared=None, wrap=lambda f: f):
  @wrap
  def step(x, of_step):
    empty, noise = of_step
    return hidden(w, x, empty if shared is None else shared, noise), None

  return wavy(jax.lax.scan(step, x, (empty, noise), length=STEPS)[0])


@jax.jit
def cotangents(w, x):
  """The whole cotangents of ``hidden`` in ``loss``, and of all in ``deep``."""
  return tuple(
    jax.grad(f, argnums=3)(w, x, None, jnp.zeros((*stack, BATCH, WIDTH)))
    for f, stack in ((loss, ()), (deep, (STEPS,)))
  )


def test_examples_of_vmap_share_a_tap_or_stay_apart():
  def of_grid(w, x, empty):
    return jax.vmap(jax.vmap(loss, (None, 0, None)), (None, 0, None))(
      w, x.reshape(2, 4, WIDTH), empty
    )

  def total(empty, f, axis):
    each = jax.vmap(loss, (None, 0, axis)) if f is None else f
    return jnp.sum(each(W, X, empty))

  @jax.jit
  def program():
    grad = functools.partial(jax.grad, argnums=2)
    each = jax.vmap(grad(loss), (None, 0, None))
    return {
      'shared': jax.grad(total)(flow.empty_tap(histogram=True), None, None),
      'nested': jax.grad(total)(flow.empty_tap(), of_grid, None),
      'own': jax.grad(total)(flow.empty_tap(stack=(BATCH,)), None, 0),
      'by example': each(W, X, flow.empty_tap()),
    }

  found, (whole, _) = program(), cotangents(W, X)
  for name in ('shared', 'nested'):
    assert found[name].calls == BATCH
    assert_statistics(found[name], *whole)
  for name in ('own', 'by example'):
    for i, row in enumerate(whole):
      assert_statistics(at(found[name], i), row)


def test_scanned_taps_have_the_statistics_of_their_step_shared_ones_of_all():
  options = {'histogram': True, 'examples': BATCH}

  @jax.jit
  def program(w, x):
    grad = jax.grad(deep, argnums=2)
    shared = jax.grad(lambda s: deep(w, x, shared=s))
    return grad(w, x, flow.empty_tap(stack=(STEPS,), **options)), shared(
      flow.empty_tap(**options)
    )

  (each, shared), (_, whole) = program(W, X), cotangents(W, X)
  assert each.calls.tolist() == [1] * STEPS
  for i in range(STEPS):
    assert_statistics(at(each, i), whole[i])
  assert_statistics(shared, *whole)


def test_a_checkpoint_taps_once():
  @jax.jit
  def program(w, x):
    empty = flow.empty_tap(stack=(STEPS,))
    policies = [None, jax.checkpoint_policies.everything_saveable]
    wrapped = [jax.checkpoint(loss, policy=policy) for policy in policies]
    grads = [jax.grad(f, argnums=2)(w, x, flow.empty_tap()) for f in wrapped]
    return jax.grad(lambda s: deep(w, x, s, wrap=jax.checkpoint))(empty), grads

  (each, alone), (one, whole) = program(W, X), cotangents(W, X)
  for stats in alone:
    assert_statistics(stats, one)
  for i in range(STEPS):
    assert_statistics(at(each, i), whole[i])


def test_the_branch_not_taken_has_no_calls():
  def branched(empty, flag, noise=None):
    first, second = (W, X, empty[0], noise), (2 * W, X, empty[1], noise)
    return wavy(
      jax.lax.cond(flag, lambda: hidden(*first), lambda: hidden(*second)) @ W
    )

  @jax.jit
  def program(flag):
    empty, noise = (flow.empty_tap(), flow.empty_tap()), jnp.zeros_like(X)
    whole = jax.grad(branched, argnums=2)((None, None), flag, noise)
    return jax.grad(branched)(empty, flag), whole

  for flag in (True, False):
    stats, whole = program(flag)
    assert_statistics(stats[0 if flag else 1], whole)
    assert_statistics(stats[1 if flag else 0])


def test_micro_batches_and_repeated_steps_add_up():
  run = jax.jit(jax.grad(loss, argnums=2), donate_argnums=2)
  parts = X.reshape(4, 2, -1)
  each = [
    jax.device_get(run(W, part, flow.empty_tap(histogram=True)))
    for part in parts
  ]
  total = jax.tree.map(lambda *u: sum(u), *each)
  assert_statistics(total, *cotangents(W, X)[0].reshape(parts.shape))
  first = run(W, parts[0], flow.empty_tap(histogram=True))
  again = run(W, parts[0], first)  # which is donated
  assert_bit_for_bit(jax.device_get(again), each[0])


def test_two_calls_of_one_tap_add_up():
  inner = jax.jit(hidden)

  def twice(empty=(None, None), noise=(None, None)):
    return wavy(inner(W, inner(W, X, empty[0], noise[0]), empty[1], noise[1]))

  @jax.jit
  def program():
    empty = flow.empty_tap(histogram=True, examples=BATCH)
    together = jax.grad(lambda s: twice((s, s)))(empty)
    noise = jax.grad(lambda noise: twice(noise=noise))([jnp.zeros_like(X)] * 2)
    return together, jax.grad(twice)([empty, empty]), noise

  together, apart, whole = program()
  assert_statistics(together, *whole)
  for stats, one in zip(apart, whole, strict=True):
    assert_statistics(stats, one)


def test_a_custom_gradient_around_a_tap_has_its_say():
  @jax.custom_vjp
  def halved(x):
    return x

  halved.defvjp(lambda x: (x, None), lambda _, g: (0.5 * g,))

  @jax.jit
  def program(empty):
    return jax.grad(lambda s: wavy(halved(hidden(W, X, s)) @ W))(empty)

  whole = np.asarray(cotangents(W, X)[0])
  assert_statistics(program(flow.empty_tap()), whole / 2)


# Over devices.


def test_shards_share_a_tap_or_stay_apart():
  def total(w, x, empty, vary):
    if vary:
      empty = jax.lax.pcast(empty, 'batch', to='varying')
    return jax.lax.psum(loss(w, x, empty), 'batch')

  def local(x, empty):
    empty = jax.tree.map(lambda u: u[0], empty)
    stats = jax.grad(lambda s: loss(W, x, s))(empty)
    return jax.tree.map(lambda u: u[None], stats)

  sharded = functools.partial(jax.shard_map, mesh=MESHES[AxisType.Auto])
  specs = (P(), P('batch'), P())
  grad = functools.partial(jax.grad, argnums=(0, 2))

  @jax.jit
  def program(w, x):
    shared, empty = [], flow.empty_tap(histogram=True)
    for vary in (True, False):
      f = functools.partial(total, vary=vary)
      outside = grad(sharded(f, in_specs=specs, out_specs=P()))
      inside = sharded(grad(f), in_specs=specs, out_specs=P())
      shared += [outside(w, x, empty), inside(w, x, empty)]
    apart = sharded(local, in_specs=P('batch'), out_specs=P('batch'))
    plain = jax.grad(loss)(w, x, None, jnp.zeros_like(x))
    return shared, apart(x, flow.empty_tap(stack=(8,))), plain

  (shared, apart, plain), (whole, _) = program(W, X), cotangents(W, X)
  for grads, stats in shared:
    assert stats.calls == 8
    assert_statistics(stats, *whole)
    np.testing.assert_allclose(grads, plain, rtol=1e-5, atol=1e-6)
  for i, row in enumerate(whole):
    assert_statistics(at(apart, i), row)


def laid_out(empty, axis):
  """With the squares of examples over the devices, as the examples are.

  On an explicit mesh a gradient is laid out as what it is the gradient of: of
  squares that are whole, it would have to be gathered.
  """
  squares = empty.example_squares
  if squares is None:
    return empty
  sharding = NamedSharding(jax.sharding.get_mesh(), P(axis))
  return empty._replace(example_squares=jax.device_put(squares, sharding))


def collectives(compiled):
  """(kind, sizes of the operands) of every collective in the program."""
  pattern = (
    r'= (.*?) '
    r'(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)'
    r'(?:-start)?\('
  )
  return [
    (
      kind,
      [
        int(np.prod([int(n) for n in shape.split(',') if n]))
        for shape in re.findall(r'\w\[([\d,]*)\]', result)
      ],
    )
    for result, kind in re.findall(pattern, compiled.as_text())
  ]


@pytest.mark.parametrize(
  'options',
  [{}, {'histogram': True, 'examples': BATCH}],
  ids=['plain', 'with all'],
)
@all_meshes
def test_a_sharded_batch_gives_the_same_for_a_little_all_reduce(kind, options):
  # Of odd width, so that no operand of the model is as large as a statistic.
  w = np.concatenate([W, 2 * W, 3 * W[:, :3]], axis=1)

  def untapped(w, x, noise):
    return wavy(jnp.tanh(x @ w) + noise)

  def tapped(w, x, empty):
    return wavy(flow.tap(jnp.tanh(x @ w), empty))

  empty = flow.empty_tap(**options)
  noise = np.zeros((BATCH, w.shape[1]), np.float32)
  whole = jax.jit(jax.grad(untapped, argnums=2))(w, X, noise)
  with jax.set_mesh(MESHES[kind]):
    sharded = jax.device_put(X, NamedSharding(MESHES[kind], P('batch')))
    plain = jax.jit(jax.grad(untapped)).lower(w, sharded, 0.0).compile()
    grads = jax.jit(jax.grad(tapped, argnums=(0, 2)))
    empty = laid_out(empty, 'batch')
    compiled = grads.lower(w, sharded, empty).compile()
    grad, stats = jax.device_get(compiled(w, sharded, empty))
    same = jax.device_get(plain(w, sharded, 0.0))
  assert_statistics(stats, whole)
  np.testing.assert_allclose(grad, same, rtol=1e-6)
  before, after = collectives(plain), collectives(compiled)
  assert {kind for kind, _ in before + after} == {'all-reduce'}
  assert len(after) <= len(before) + 2
  sizes = [sum((s for _, s in c), []) for c in (before, after)]
  assert sum(sizes[1]) - sum(sizes[0]) <= 20 + 64 * ('histogram' in options)


@all_meshes
def test_a_sharded_scan_of_taps_gives_the_same(kind):
  empty = flow.empty_tap(histogram=True, stack=(STEPS,))
  with jax.set_mesh(MESHES[kind]):
    sharded = jax.device_put(X, NamedSharding(MESHES[kind], P('batch')))
    run = jax.jit(jax.grad(deep, argnums=2)).lower(W, sharded, empty).compile()
    stats = jax.device_get(run(W, sharded, empty))
  assert 'all-gather' not in run.as_text()
  for i, whole in enumerate(cotangents(W, X)[1]):
    assert_statistics(at(stats, i), whole)


@pytest.mark.parametrize('spec', [P(None, 'batch'), P('batch', None), P()])
@all_meshes
def test_any_axis_of_an_activation_may_be_sharded(rng, kind, spec):
  x = rng.normal(size=(8, 16)).astype(np.float32)
  empty = flow.empty_tap(histogram=True, examples=8)
  with jax.set_mesh(MESHES[kind]):
    sharded = jax.device_put(x, NamedSharding(MESHES[kind], spec))
    run = jax.jit(jax.grad(lambda x, s: wavy(flow.tap(x, s)), argnums=(0, 1)))
    empty = laid_out(empty, spec[0] if spec else None)
    compiled = run.lower(sharded, empty).compile()
    grad, stats = jax.device_get(compiled(sharded, empty))
  assert 'all-gather' not in compiled.as_text()
  assert_statistics(stats, grad)
