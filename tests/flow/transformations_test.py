"""A tap under every transformation, against the whole cotangents."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_ghm import flow
from tests.support.direct import assert_bit_for_bit, assert_statistics, at, wavy

STEPS, BATCH, WIDTH = 3, 8, 4
MESHES = {
  kind: jax.make_mesh((8,), ('batch',), axis_types=(kind,))
  for kind in (AxisType.Auto, AxisType.Explicit)
}


@pytest.fixture
def w(rng):
  return jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32)


@pytest.fixture
def x(rng):
  return jnp.asarray(rng.normal(size=(BATCH, WIDTH)), jnp.float32)


def hidden(w, x, empty_tap=None, noise=None):
  y = jnp.tanh(x @ w)
  return y + noise if empty_tap is None else flow.tap(y, empty_tap)


def loss(w, x, empty_tap=None, noise=None):
  return wavy(hidden(w, x, empty_tap, noise) @ w)


def cotangent(w, x):
  """The whole cotangent of ``hidden``."""
  return jax.grad(loss, argnums=3)(
    w, x, None, jnp.zeros((*x.shape[:-1], WIDTH))
  )


def test_jit_gives_the_same(w, x):
  grad = jax.grad(loss, argnums=2)
  for run in (grad, jax.jit(grad)):
    stats = run(w, x, flow.empty_tap(histogram=True, examples=BATCH))
    assert_statistics(stats, cotangent(w, x))


def test_examples_of_vmap_that_share_a_tap_add_up(w, x):
  def total(w, empty_tap):
    return jnp.sum(jax.vmap(loss, (None, 0, None))(w, x, empty_tap))

  stats = jax.jit(jax.grad(total, argnums=1))(w, flow.empty_tap(histogram=True))
  assert stats.calls == BATCH
  assert_statistics(stats, *cotangent(w, x))


def test_examples_of_vmap_with_a_tap_each_stay_apart(w, x):
  def total(empty_taps):
    return jnp.sum(jax.vmap(loss, (None, 0, 0))(w, x, empty_taps))

  stats = jax.jit(jax.grad(total))(
    flow.empty_tap(histogram=True, stack=(BATCH,))
  )
  for i, row in enumerate(cotangent(w, x)):
    assert_statistics(at(stats, i), row)


def test_gradients_by_example_carry_statistics_by_example(w, x):
  grad = jax.jit(jax.vmap(jax.grad(loss, argnums=2), (None, 0, None)))
  stats = grad(w, x, flow.empty_tap())
  assert stats.calls.shape == (BATCH,)
  for i, row in enumerate(cotangent(w, x)):
    assert_statistics(at(stats, i), row)


def test_vmap_of_vmap_adds_up_too(w, x):
  grid = x.reshape(2, 4, WIDTH)

  def total(empty_tap):
    each = jax.vmap(jax.vmap(loss, (None, 0, None)), (None, 0, None))
    return jnp.sum(each(w, grid, empty_tap))

  stats = jax.grad(total)(flow.empty_tap(histogram=True))
  assert_statistics(stats, *cotangent(w, x))


def deep(w, x, empty_taps=None, noise=None, *, shared=None, wrap=lambda f: f):
  @wrap
  def step(x, of_step):
    empty_tap, noise = of_step
    return hidden(w, x, empty_tap if shared is None else shared, noise), None

  return wavy(jax.lax.scan(step, x, (empty_taps, noise), length=STEPS)[0])


def deep_cotangents(w, x):
  zeros = jnp.zeros((STEPS, *x.shape))
  return jax.grad(deep, argnums=3)(w, x, None, zeros)


def test_scanned_taps_have_the_statistics_of_their_step(w, x):
  empty_taps = flow.empty_tap(histogram=True, examples=BATCH, stack=(STEPS,))
  stats = jax.jit(jax.grad(deep, argnums=2))(w, x, empty_taps)
  assert stats.calls.tolist() == [1] * STEPS
  for i, whole in enumerate(deep_cotangents(w, x)):
    assert_statistics(at(stats, i), whole)


def test_a_tap_that_the_steps_share_has_those_of_all(w, x):
  stats = jax.jit(jax.grad(lambda s: deep(w, x, shared=s)))(
    flow.empty_tap(histogram=True, examples=BATCH)
  )
  assert_statistics(stats, *deep_cotangents(w, x))


@pytest.mark.parametrize(
  'policy', [None, jax.checkpoint_policies.everything_saveable]
)
def test_a_checkpoint_taps_once(w, x, policy):
  wrapped = jax.checkpoint(loss, policy=policy)
  stats = jax.jit(jax.grad(wrapped, argnums=2))(w, x, flow.empty_tap())
  assert stats.calls == 1
  assert_statistics(stats, cotangent(w, x))
  empty_taps = flow.empty_tap(stack=(STEPS,))
  stats = jax.grad(lambda s: deep(w, x, s, wrap=jax.checkpoint))(empty_taps)
  for i, whole in enumerate(deep_cotangents(w, x)):
    assert_statistics(at(stats, i), whole)


@pytest.mark.parametrize('taken', [True, False])
def test_the_branch_not_taken_has_no_calls(w, x, taken):
  def branched(empty_taps, flag):
    y = jax.lax.cond(
      flag,
      lambda: hidden(w, x, empty_taps[0]),
      lambda: hidden(2 * w, x, empty_taps[1]),
    )
    return wavy(y @ w)

  stats = jax.jit(jax.grad(branched))(
    (flow.empty_tap(), flow.empty_tap()), taken
  )
  assert [int(s.calls) for s in stats] == [taken, not taken]
  noise = jnp.zeros_like(x)
  by = w if taken else 2 * w
  whole = jax.grad(lambda n: wavy(hidden(by, x, None, n) @ w))(noise)
  assert_statistics(stats[0 if taken else 1], whole)
  assert_statistics(stats[1 if taken else 0])


def test_micro_batches_add_up_to_the_batch(w, x):
  grad = jax.jit(jax.grad(loss, argnums=2))
  each = [
    grad(w, part, flow.empty_tap(histogram=True))
    for part in x.reshape(4, 2, -1)
  ]
  total = jax.tree.map(lambda *u: sum(u), *each)
  assert_statistics(total, *cotangent(w, x).reshape(4, 2, -1))


def test_two_calls_of_one_tap_add_up(w, x):
  def twice(empty_tap, noise):
    y = hidden(w, x, empty_tap, None if noise is None else noise[0])
    return wavy(hidden(w, y, empty_tap, None if noise is None else noise[1]))

  stats = jax.grad(twice)(flow.empty_tap(histogram=True, examples=BATCH), None)
  noise = jnp.zeros((2, *x.shape))
  assert_statistics(stats, *jax.grad(twice, argnums=1)(None, noise))


def test_a_custom_gradient_around_a_tap_has_its_say(w, x):
  @jax.custom_vjp
  def halved(x):
    return x

  halved.defvjp(lambda x: (x, None), lambda _, g: (0.5 * g,))
  full, half = (
    jax.grad(lambda s, f=f: wavy(f(hidden(w, x, s)) @ w))(flow.empty_tap())
    for f in (lambda y: y, halved)
  )
  np.testing.assert_allclose(half.norm, full.norm / 2, rtol=1e-6)


def in_shards(w, x, empty_tap, *, outside, vary=False):
  mesh = MESHES[AxisType.Auto]

  def total(w, x, empty_tap):
    if vary:
      empty_tap = jax.lax.pcast(empty_tap, 'batch', to='varying')
    return jax.lax.psum(loss(w, x, empty_tap), 'batch')

  def mapped(f, out):
    return jax.shard_map(
      f, mesh=mesh, in_specs=(P(), P('batch'), P()), out_specs=out
    )

  grad = functools.partial(jax.grad, argnums=(0, 2))
  run = grad(mapped(total, P())) if outside else mapped(grad(total), P())
  return jax.jit(run)(w, x, empty_tap)


@pytest.mark.parametrize('vary', [True, False])
@pytest.mark.parametrize('outside', [True, False])
def test_shards_that_share_a_tap_add_up(w, x, outside, vary):
  empty_tap = flow.empty_tap(histogram=True)
  grad, stats = in_shards(w, x, empty_tap, outside=outside, vary=vary)
  assert stats.calls == 8
  assert_statistics(stats, *cotangent(w, x))
  np.testing.assert_allclose(
    grad, jax.grad(lambda w: loss(w, x, empty_tap))(w), rtol=1e-5, atol=1e-6
  )


def test_shards_with_a_tap_each_stay_apart(w, x):
  def local(x, empty_tap):
    empty_tap = jax.tree.map(lambda u: u[0], empty_tap)
    stats = jax.grad(lambda s: loss(w, x, s))(empty_tap)
    return jax.tree.map(lambda u: u[None], stats)

  stats = jax.jit(
    jax.shard_map(
      local,
      mesh=MESHES[AxisType.Auto],
      in_specs=(P('batch'), P('batch')),
      out_specs=P('batch'),
    )
  )(x, flow.empty_tap(stack=(8,)))
  for i, row in enumerate(cotangent(w, x)):
    assert_statistics(at(stats, i), row)


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


OPTIONS = [
  {},
  {'histogram': True},
  {'examples': BATCH},
  {'histogram': True, 'examples': BATCH},
]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('kind', MESHES)
def test_a_sharded_batch_gives_the_same_for_a_little_all_reduce(
  w, x, kind, options
):
  mesh = MESHES[kind]
  # Of odd width, so that no operand of the model is as large as a statistic.
  w = jnp.concatenate([w, 2 * w, 3 * w[:, :3]], axis=1)

  def untapped(w, x):
    return wavy(jnp.tanh(x @ w))

  def tapped(w, x, empty_tap):
    return wavy(flow.tap(jnp.tanh(x @ w), empty_tap))

  empty_tap = flow.empty_tap(**options)
  expected = jax.jit(jax.grad(tapped, argnums=(0, 2)))(w, x, empty_tap)
  noise = jnp.zeros((BATCH, w.shape[1]))
  whole = jax.grad(lambda n: wavy(jnp.tanh(x @ w) + n))(noise)
  assert_statistics(expected[1], whole)
  with jax.set_mesh(mesh):
    sharded = jax.device_put(x, NamedSharding(mesh, P('batch')))
    plain = jax.jit(jax.grad(untapped)).lower(w, sharded).compile()
    compiled = (
      jax.jit(jax.grad(tapped, argnums=(0, 2)))
      .lower(w, sharded, empty_tap)
      .compile()
    )
    actual = jax.device_get(compiled(w, sharded, empty_tap))
    same = jax.device_get(plain(w, sharded))
  assert_statistics(jax.tree.map(jnp.asarray, actual[1]), whole)
  np.testing.assert_allclose(actual[0], same, rtol=1e-6)
  before, after = collectives(plain), collectives(compiled)
  assert {kind for kind, _ in before + after} == {'all-reduce'}
  assert len(after) <= len(before) + 2
  sizes = [sum((s for _, s in c), []) for c in (before, after)]
  assert sum(sizes[1]) - sum(sizes[0]) <= 20 + 64 * bool(
    options.get('histogram')
  )


@pytest.mark.parametrize('kind', MESHES)
def test_a_sharded_scan_of_taps_gives_the_same(w, x, kind):
  mesh = MESHES[kind]
  empty_taps = flow.empty_tap(histogram=True, stack=(STEPS,))
  expected = deep_cotangents(w, x)
  with jax.set_mesh(mesh):
    sharded = jax.device_put(x, NamedSharding(mesh, P('batch')))
    run = jax.jit(jax.grad(deep, argnums=2))
    compiled = run.lower(w, sharded, empty_taps).compile()
    stats = jax.device_get(compiled(w, sharded, empty_taps))
  assert 'all-gather' not in compiled.as_text()
  for i, whole in enumerate(expected):
    assert_statistics(jax.tree.map(jnp.asarray, at(stats, i)), whole)


@pytest.mark.parametrize('kind', MESHES)
@pytest.mark.parametrize('spec', [P(None, 'batch'), P('batch', None), P()])
def test_any_axis_of_an_activation_may_be_sharded(rng, kind, spec):
  x = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
  mesh = MESHES[kind]
  empty_tap = flow.empty_tap(histogram=True, examples=8)
  with jax.set_mesh(mesh):
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    run = jax.jit(jax.grad(lambda x, s: wavy(flow.tap(x, s)), argnums=(0, 1)))
    compiled = run.lower(sharded, empty_tap).compile()
    grad, stats = jax.device_get(compiled(sharded, empty_tap))
  assert 'all-gather' not in compiled.as_text()
  assert_statistics(jax.tree.map(jnp.asarray, stats), grad)


def test_a_tap_in_a_jitted_function_that_is_called_twice(w, x):
  inner = jax.jit(hidden)

  def twice(empty_taps):
    y = inner(w, x, empty_taps[0])
    return wavy(inner(w, y, empty_taps[1]))

  def plain(noise):
    y = inner(w, x, None, noise[0])
    return wavy(inner(w, y, None, noise[1]))

  stats = jax.grad(twice)([flow.empty_tap(), flow.empty_tap()])
  expected = jax.grad(plain)(jnp.zeros((2, *x.shape)))
  for one, whole in zip(stats, expected, strict=True):
    assert_statistics(one, whole)


def test_donated_taps_and_repeated_steps_give_the_same(w, x):
  run = jax.jit(jax.grad(loss, argnums=2), donate_argnums=2)
  first = run(w, x, flow.empty_tap())
  kept = jax.device_get(first)
  assert_bit_for_bit(jax.device_get(run(w, x, first)), kept)
