"""What a tap measures, against the whole cotangent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from hypothesis.extra import numpy as hnp

from optax_ghm import flow
from optax_ghm.flow import _taps
from tests.support.oracles_flow import (
  assert_bit_for_bit,
  assert_statistics,
  cells,
  read,
  wavy,
)

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
SHAPES = [(), (1,), (6, 5), (6, 2, 3), (6, 0), (0, 3)]
FEW = (6, 2)  # the shape where the numbers matter
device = pytest.mark.device
PROGRAMS = 70


@functools.partial(jax.jit, static_argnames=('histogram', 'examples'))
def measured(cotangents, histogram=True, examples=None):
  """The statistics of every cotangent of a list, and what they tell."""
  found = []
  for cotangent in cotangents:
    zeros = jax.tree.map(jnp.zeros_like, cotangent)
    first = jax.tree.leaves(cotangent)[0].shape[:1]
    empty = flow.empty_tap(
      histogram=histogram, examples=first[0] if first and examples else None
    )
    _, pull = jax.vjp(functools.partial(flow.tap, zeros), empty)
    (stats,) = pull(cotangent)
    found.append((stats, read(stats)))
  return found


def assert_measured(*cotangents):
  """Asserts all statistics, read by JAX and by NumPy; returns the first."""
  found = measured(cotangents, examples=True)
  for (stats, by_jax), cotangent in zip(found, cotangents, strict=True):
    assert_statistics(by_jax, cotangent)
    assert_statistics(stats, cotangent)
    assert all(u.dtype == jnp.float32 for u in jax.tree.leaves(stats))
  return jax.device_get(found[0][0])


def random(rng, shape, dtype=jnp.float32, scale=1.0):
  x = rng.normal(size=shape) * scale
  if dtype == jnp.complex64:
    x = x + 1j * rng.normal(size=shape) * scale
  return np.asarray(x).astype(dtype)


@device
@pytest.mark.parametrize('dtype', DTYPES)
def test_every_statistic_is_that_of_the_whole_cotangent(rng, dtype):
  arrays = [random(rng, shape, dtype) for shape in SHAPES]
  assert_measured(
    *[np.where(np.abs(x) < 0.3, 0, x).astype(dtype) for x in arrays]
  )


@device
def test_a_complex_number_is_two_and_a_scalar_one_element():
  z = np.array([3 + 4j, 0 + 2j, 0j, complex(np.inf, 1), complex(0, np.nan)])
  found = assert_measured(
    z[:3].astype(np.complex64), np.float32(-3), z[3:].astype(np.complex64)
  )
  assert found.elements == 6 and found.zeros == 3 and found.largest == 4
  assert found.sum == 9 and found.example_norms.tolist() == [5, 2, 0]


@device
def test_the_leaves_of_a_tree_are_one_call(rng):
  tree = {
    'a': random(rng, (4, 3)),
    'b': (random(rng, (4,), jnp.bfloat16), random(rng, (4, 0))),
    'c': random(rng, (4, 2), jnp.complex64, 100),
  }
  ordered = [np.full(3, x, np.float32) for x in (0.5, 1, 2)]
  others = [ordered, ordered[::-1], [ordered[1], ordered[2], ordered[0]]]
  assert assert_measured(tree, *others).calls == 1


# Any numbers.


numbers = st.floats(
  -(2.0**123), 2.0**123, allow_subnormal=False, allow_nan=False, width=32
)
bad = st.sampled_from([0, 1, -2, np.nan, np.inf, -np.inf])


def filled(*values):
  """The first axis filled with so many values."""
  return np.broadcast_to(np.resize(values, 6)[:, None], FEW).astype(np.float32)


@device
@given(
  hnp.arrays(np.float32, FEW, elements=numbers)
  | hnp.arrays(np.float32, FEW, elements=bad)
)
@example(filled(1, 1, np.nan, 1, 0))
@example(filled(1, 1, -np.inf, 1, 0))
@example(filled(np.nan, np.inf, -np.inf, 1, 0))
@example(filled(1e-37, 1e-20, 1, 1e15, 1e36, 0))
@example(filled(1e-37, 0.7, 2e36).T.reshape(FEW))
def test_any_numbers_of_single_precision(x):
  stats = assert_measured(x)
  finite = np.isfinite(x).all(1)
  assert np.isfinite(stats.example_norms[finite]).all()


@device
@given(hnp.arrays(np.uint16, FEW))
def test_any_numbers_of_half_precision(bits):
  x = bits.view(np.float16)
  assert_measured(np.where(np.abs(x) < 6.2e-5, np.float16(0), x))


@device
def test_norms_are_right_over_the_whole_range_of_float32(rng):
  trials = [
    rng.uniform(0.1, 1, FEW) * 10.0**exponent
    for exponent in (-36, -30, -20, -12, -5, 0, 5, 12, 20, 30, 36, 37)
  ]
  trials += [  # of which the sizes differ wildly
    rng.normal(size=FEW) * 10 ** rng.uniform(-30, 30, FEW) for _ in range(20)
  ]
  for exponent in (-125, -96, -80, -40, 0, 40, 96, 123):
    x = np.float32(2.0**exponent)  # where the unit of the squares changes
    for y in (x, np.nextafter(x, np.float32(0)), np.nextafter(x, 2 * x)):
      trials.append(np.full(FEW, y))
  for trial in trials:
    stats = assert_measured(trial.astype(np.float32))
    assert np.isfinite(stats.norm) and stats.norm > 0


@device
def test_the_norm_over_several_examples_does_not_lose_small_ones():
  three = np.array([[2.0**-60], [3.0], [2.0**100]], np.float32)
  stats = assert_measured(three, np.full((4096, 1), 1e-30, np.float32))
  expected = np.diag([2.0**40, 9, 2.0**8])  # in three units
  np.testing.assert_array_equal(stats.example_squares, expected)


@device
def test_cells_are_quarters_of_magnitude_and_the_outer_two_are_open():
  edges = 4.0 ** np.arange(-62, 63)
  x = np.concatenate([edges, 2 * edges, np.nextafter(edges, 0)])
  x = np.concatenate([x, -x, [0, np.nan, np.inf]]).astype(np.float32)
  below = np.nextafter(np.float32(4.0**-5), np.float32(0))
  few = np.array([4.0**-5, below, 1e-37, 1e37, 1, 3.99], np.float32)
  (every, _), (some, _) = measured([x, few])
  np.testing.assert_array_equal(every.histogram, cells(x))
  found = {i: int(n) for i, n in enumerate(some.histogram) if n}
  assert found == {0: 1, 42: 1, 43: 1, 48: 2, 63: 1}


# Where no gradient arrives, and what a tap is made with.


@device
def test_no_gradient_arrives_through_stop_gradient():
  @jax.jit
  @functools.partial(jax.grad, argnums=1)
  def stats(x, empty):
    stopped, zero = (flow.tap(x, tap) for tap in empty)
    return jnp.sum(x) + jnp.sum(jax.lax.stop_gradient(stopped) + 0 * zero)

  empty = flow.empty_tap(histogram=True, examples=3), flow.empty_tap()
  stopped, zero = jax.device_get(stats(np.ones(3, np.float32), empty))
  assert all(not u.any() for u in jax.tree.leaves(stopped))
  assert stopped.norm == stopped.rms == stopped.largest == 0
  assert not stopped.example_norms.any()
  assert zero.calls == 1 and zero.zeros == 3  # a gradient of zero is a call


def test_a_new_tap_is_all_zero_has_what_was_asked_for_and_its_stack_leads():
  empty = jax.device_get(
    flow.empty_tap(histogram=True, examples=5, stack=(2, 3))
  )
  assert empty.calls.shape == (2, 3)
  assert empty.histogram.shape == (2, 3, 64)
  assert empty.example_norms.shape == (2, 3, 5)
  assert all(u.dtype == np.float32 and not u.any() for u in empty)
  for name in ('calls', 'elements', 'sum', 'norm', 'rms', 'largest', 'zeros'):
    column = getattr(empty, name)
    assert column.shape == (2, 3) and not column.any()
  for options in ({}, {'histogram': True}, {'examples': True}):
    ((stats, _),) = measured(
      [np.ones(FEW, np.float32)], **{'histogram': False, **options}
    )
    assert (stats.histogram is not None) == ('histogram' in options)
    assert (stats.example_squares is not None) == ('examples' in options)
    if 'examples' not in options:
      with pytest.raises(ValueError, match='without examples'):
        _ = stats.example_norms


def test_statistics_of_a_stack_are_those_of_its_layers(rng):
  rows = [random(rng, (4, 3), scale=10.0 ** (4 * i)) for i in range(3)]
  each, told = zip(*measured(rows, examples=True), strict=True)
  stacked = jax.tree.map(lambda *u: np.stack(u), *jax.device_get(each))
  for name, expected in read(stacked).items():
    np.testing.assert_allclose(expected, [t[name] for t in told], rtol=1e-6)


@pytest.mark.parametrize('shape', [(), (3,), (5, 4), (1, 4)])
def test_another_number_of_examples_is_an_error(shape):
  run = functools.partial(jax.eval_shape, flow.tap)
  empty = flow.empty_tap(examples=4)
  with pytest.raises(ValueError, match='4 examples along the first axis'):
    run(np.ones(shape), empty)
  with pytest.raises(ValueError, match=r'4 examples .* \(3,\)'):
    run({'a': np.ones(4), 'b': np.ones(3)}, empty)
  run({'a': np.ones(4), 'b': np.arange(3)}, empty)  # which has no gradient


# What passes.


def test_what_passes_is_what_came(rng):
  tree = {
    'float': random(rng, (3,)),
    'half': random(rng, (3,), jnp.bfloat16),
    'complex': random(rng, (2,), jnp.complex64),
    'count': np.arange(3),
    'flag': np.array([True]),
    'key': jax.random.key(0),
    'nothing': None,
    'text': ('name', 7),
  }
  passed = flow.tap(tree, flow.empty_tap())
  assert passed['count'] is tree['count'] and passed['key'] is tree['key']
  assert passed['text'] == ('name', 7) and passed['nothing'] is None
  for name in ('float', 'half', 'complex'):
    assert_bit_for_bit(passed[name], tree[name])
  integers = {'a': np.arange(3), 'b': None}
  assert flow.tap(integers, flow.empty_tap()) is integers
  mixed = {'x': np.ones(2, np.float32), 'n': np.arange(3)}
  stats = jax.jit(jax.grad(lambda s: 2 * flow.tap(mixed, s)['x'].sum()))(
    flow.empty_tap()
  )
  assert stats.elements == 2 and stats.sum == 4  # of arrays of NumPy as well


def network(params, x, empty=None):
  for i, (w, b) in enumerate(params):
    x = jnp.tanh(x @ w + b[None])
    if empty is not None:
      x = flow.tap(x, empty[i])
  return wavy(x)


@pytest.mark.parametrize('dtype', DTYPES[:3])
def test_every_other_gradient_is_bit_for_bit_the_same(rng, dtype):
  params = [(random(rng, (7, 7), dtype), random(rng, 7, dtype))] * 3
  empty = [flow.empty_tap(histogram=True, examples=5)] * 3
  plain = jax.jit(jax.value_and_grad(network, argnums=(0, 1)))
  tapped = jax.jit(jax.value_and_grad(network, argnums=(0, 1, 2)))
  x = random(rng, (5, 7), dtype)
  value, grads = tapped(params, x, empty)
  assert_bit_for_bit((value, grads[:2]), plain(params, x))


@device
def test_nan_passes_bit_for_bit():
  x = np.array([np.nan, -np.nan, np.inf, -0.0], np.float32)

  @jax.jit
  def pulled(x):
    return jax.vjp(flow.tap, jnp.zeros(4), flow.empty_tap())[1](x)[0]

  same = np.asarray(pulled(x)).view(np.int32)
  np.testing.assert_array_equal(same, x.view(np.int32))


def test_what_is_in_the_tap_has_no_influence(rng):
  x = random(rng, (4, 3))

  @jax.jit
  def run(value):
    empty = flow.empty_tap(histogram=True, examples=4)
    filled = jax.tree.map(lambda u: jnp.full_like(u, value), empty)
    loss = jax.value_and_grad(lambda *u: wavy(flow.tap(*u)), argnums=(0, 1))
    return loss([x], filled), loss([x, 2 * x], filled)

  for value in (7.0, np.nan, np.inf):
    assert_bit_for_bit(run(value), run(0.0))


def test_an_output_that_is_not_used_changes_no_gradient():
  """Zeros in its place would be NaN behind the root at 0."""

  @jax.jit
  def loss(x, empty):
    used, _ = flow.tap((x, jnp.sqrt(x)), empty)
    return jnp.sum(used)

  grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
  x_grad, stats = grad(np.zeros(2, np.float32), flow.empty_tap())
  np.testing.assert_array_equal(x_grad, np.ones(2))
  assert stats.elements == 2


# Derivatives of higher order.


def test_forward_mode_is_an_error():
  def f(x):
    return jnp.sum(jnp.square(flow.tap(x, flow.empty_tap())))

  x = np.ones(3, np.float32)
  for forward in (lambda x: jax.jvp(f, (x,), (x,)), jax.hessian(f)):
    with pytest.raises(TypeError, match='custom_vjp'):
      jax.jit(forward)(x)


def test_a_gradient_of_a_gradient_is_tapped_too(rng):
  x, w = random(rng, 4), random(rng, (4, 4))

  def inner(x, empty=None, noise=None):
    y = jnp.tanh(w @ x)
    y = y + noise if empty is None else flow.tap(y, empty)
    return jnp.sum(jnp.sin(w @ y))

  def penalty(x, *args):
    return jnp.sum(jnp.square(jax.grad(inner)(x, *args)))

  @jax.jit
  def program(x):
    tapped = jax.grad(penalty, argnums=(0, 1))(x, flow.empty_tap())
    noise = jax.grad(penalty, argnums=(0, 2))(x, None, jnp.zeros(4))
    return tapped, noise

  (penalized, stats), (expected, cotangent) = program(x)
  np.testing.assert_allclose(penalized, expected, rtol=1e-6)
  assert stats.calls > 0 and stats.norm > 0
  assert_statistics(stats, cotangent, rtol=1e-5)


# Taps by name.


def test_taps_are_a_mapping_in_the_order_of_the_forward_pass():
  taps = flow.Taps.empty(['z', 'a', 'm/1'], histogram=True, examples=3)
  assert list(taps) == ['z', 'a', 'm/1'] == list(taps.keys())
  assert len(taps) == 3 and 'a' in taps and 'b' not in taps
  assert [layer.name for layer in taps.layers] == list(taps)
  assert taps['a'].histogram.shape == (64,)
  assert taps['a'].example_squares.shape == (3, 3)
  with pytest.raises(KeyError):
    taps['b']
  filled = jax.tree.map(np.ones_like, taps)
  assert isinstance(filled, flow.Taps)
  assert list(filled) == list(taps) and filled.layers == taps.layers
  assert filled['z'].calls == 1
  leaves, structure = jax.tree.flatten(taps)
  assert len(leaves) == 9
  hash(structure)
  assert list(structure.unflatten(leaves)) == list(taps)
  other = flow.Taps.empty(['a', 'z', 'm/1'], histogram=True, examples=3)
  assert jax.tree.structure(other) != structure


def test_leading_axes_are_those_that_were_lost():
  inside = {'kernel': np.ones((2, 3)), 'bias': np.ones(3)}

  def stack(*axes):
    return jax.tree.map(lambda u: np.ones(axes + u.shape), inside)

  assert _taps.leading_axes(inside, inside) == ()
  assert _taps.leading_axes(inside, stack(5)) == (5,)
  assert _taps.leading_axes(inside, stack(5, 4)) == (5, 4)
  assert _taps.leading_axes({}, {}) == ()
  mixed = {**stack(5), 'bias': inside['bias']}
  assert _taps.leading_axes(inside, mixed) == ()
  with pytest.raises(ValueError, match=r'\(2, 5, 3\) is \(2, 3\)'):
    _taps.leading_axes([np.ones((2, 3))], [np.ones((2, 5, 3))])
