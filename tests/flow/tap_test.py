"""What a tap measures, against the whole cotangent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from optax_ghm import flow
from optax_ghm.flow import _taps
from tests.support.direct import (
  assert_bit_for_bit,
  assert_statistics,
  cells,
  wavy,
)

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]


@functools.partial(jax.jit, static_argnames=('histogram', 'examples'))
def measured(cotangent, **options):
  """The statistics of a given cotangent."""
  zeros = jax.tree.map(jnp.zeros_like, cotangent)
  _, pull = jax.vjp(lambda s: flow.tap(zeros, s), flow.empty_tap(**options))
  return pull(cotangent)[0]


def random(rng, shape, dtype=jnp.float32, scale=1.0):
  x = rng.normal(size=shape) * scale
  if dtype == jnp.complex64:
    x = x + 1j * rng.normal(size=shape) * scale
  return jnp.asarray(x, dtype)


@pytest.mark.parametrize('shape', [(), (1,), (6,), (6, 5), (6, 2, 3), (6, 0)])
@pytest.mark.parametrize('dtype', DTYPES)
def test_every_statistic_is_that_of_the_whole_cotangent(rng, dtype, shape):
  x = random(rng, shape, dtype)
  x = jnp.where(jnp.abs(x) < 0.3, 0, x)
  examples = shape[0] if shape else None
  stats = measured(x, histogram=True, examples=examples)
  assert_statistics(stats, x)
  assert all(u.dtype == jnp.float32 for u in jax.tree.leaves(stats))


def test_a_single_call_counts_as_one_and_a_scalar_as_one_element():
  stats = measured(jnp.float32(-3))
  assert stats.calls == 1 and stats.elements == 1
  assert stats.sum == -3 and stats.norm == 3 and stats.largest == 3
  assert stats.rms == 3 and stats.zeros == 0 and stats.non_finite == 0


@pytest.mark.parametrize('shape', [(0,), (0, 3), (3, 0)])
def test_an_empty_array_is_a_call_without_elements(shape):
  stats = measured(jnp.zeros(shape), histogram=True, examples=shape[0])
  assert_statistics(stats, np.zeros(shape))
  assert stats.calls == 1 and stats.rms == 0


def test_a_complex_number_is_two():
  stats = measured(jnp.array([3 + 4j, 0 + 2j, 0j]), examples=3)
  assert stats.elements == 6 and stats.zeros == 3 and stats.largest == 4
  assert stats.sum == 9
  np.testing.assert_allclose(stats.example_norms, [5, 2, 0], rtol=1e-6)


def test_the_leaves_of_a_tree_are_one_call(rng):
  tree = {
    'a': random(rng, (4, 3)),
    'b': (random(rng, (4,), jnp.bfloat16), random(rng, (4, 0))),
    'c': random(rng, (4, 2), jnp.complex64, 100),
  }
  stats = measured(tree, histogram=True, examples=4)
  assert stats.calls == 1
  assert_statistics(stats, tree)


def test_the_largest_of_a_tree_is_that_of_its_largest_leaf():
  for tree in ([1.0, 2.0, 0.5], [2.0, 0.5, 1.0], [0.5, 1.0, 2.0]):
    stats = measured([jnp.full(3, x) for x in tree])
    assert stats.largest == 2


@pytest.mark.parametrize('shape', [(7,), (7, 6)])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_counted_and_shows_in_sum_and_norm(
  rng, bad, shape
):
  x = rng.normal(size=shape).astype(np.float32)
  x[2], x[4] = bad, 0
  stats = measured(jnp.asarray(x), histogram=True, examples=7)
  assert (stats.non_finite, stats.zeros) == (x[2].size, x[4].size)
  assert_statistics(stats, x)
  assert np.isfinite(np.delete(stats.example_norms, 2)).all()


def test_nan_and_infinities_together_are_nan():
  stats = measured(jnp.array([np.nan, np.inf, -np.inf, 1, 0]), histogram=True)
  assert stats.non_finite == 3 and stats.zeros == 1
  assert jnp.isnan(stats.norm) and jnp.isnan(stats.sum)
  assert stats.histogram.sum() == 1 and stats.histogram[48] == 1


def test_an_infinite_part_makes_a_complex_number_one_that_is_not_finite():
  stats = measured(jnp.array([complex(np.inf, 1), complex(0, np.nan)]))
  assert stats.non_finite == 2 and stats.zeros == 1


@pytest.mark.parametrize(
  'exponent', [-37, -36, -30, -20, -12, -5, 0, 5, 12, 20, 30, 36, 37]
)
def test_norms_are_right_over_the_whole_range_of_float32(rng, exponent):
  x = rng.uniform(0.1, 1, size=(5, 4)) * 10.0**exponent
  x = np.maximum(x, 2e-38).astype(np.float32)
  stats = measured(jnp.asarray(x), histogram=True, examples=5)
  assert np.isfinite(stats.norm) and stats.norm > 0
  assert_statistics(stats, x)


@pytest.mark.parametrize('exponent', [-126, -96, -80, -40, 0, 40, 96, 124])
def test_norms_are_right_where_the_unit_of_the_squares_changes(exponent):
  x = np.float32(2.0) ** np.float32(exponent)
  for y in (x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(1))):
    if y >= np.finfo(np.float32).tiny:
      row = np.full((2, 3), y, np.float32)
      assert_statistics(
        measured(jnp.asarray(row), histogram=True, examples=2), row
      )


def test_sizes_may_differ_wildly_from_example_to_example(rng):
  scale = np.float32(10) ** np.array([[-37], [-20], [0], [15], [36]])
  x = (rng.normal(size=(5, 8)) * scale).astype(np.float32)
  x = np.where(np.abs(x) < 1.2e-38, 0, x)
  assert_statistics(measured(jnp.asarray(x), examples=5), x)


def test_sizes_may_differ_wildly_within_an_example(rng):
  scale = np.float32(10) ** rng.uniform(-30, 30, size=(6, 50))
  x = (rng.normal(size=(6, 50)) * scale).astype(np.float32)
  assert_statistics(measured(jnp.asarray(x), histogram=True, examples=6), x)


def test_cells_are_quarters_of_magnitude_and_the_outer_two_are_open():
  edges = 4.0 ** np.arange(-62, 63)
  x = np.concatenate([edges, 2 * edges, np.nextafter(edges, 0)])
  x = np.concatenate([x, -x, [0, np.nan, np.inf]]).astype(np.float32)
  histogram = measured(jnp.asarray(x), histogram=True).histogram
  np.testing.assert_array_equal(histogram, cells(x))
  one = measured(jnp.array([4.0**-5]), histogram=True).histogram
  assert one[43] == 1 and one.sum() == 1
  below = measured(
    jnp.array([np.nextafter(np.float32(4.0**-5), np.float32(0))]),
    histogram=True,
  )
  assert below.histogram[42] == 1
  for number, cell in ((1e-37, 0), (1e37, 63), (1.0, 48), (3.99, 48)):
    assert measured(jnp.array([number]), histogram=True).histogram[cell] == 1


def numbers(width):
  finite = st.floats(allow_nan=False, allow_infinity=False, width=width)
  tiny = float(np.finfo(f'float{width}').tiny)
  return finite.filter(lambda x: x == 0 or tiny <= abs(x))


@given(
  hnp.arrays(
    np.float32,
    st.sampled_from([(1,), (3,), (2, 3), (3, 2, 2)]),
    elements=numbers(32).filter(lambda x: abs(x) < 1e37),
  )
)
def test_any_shape_of_any_numbers(x):
  stats = measured(jnp.asarray(x), histogram=True, examples=len(x))
  assert_statistics(stats, x)


@given(
  hnp.arrays(
    np.float16,
    st.sampled_from([(), (4,), (3, 2)]),
    elements=numbers(16),
  )
)
def test_any_numbers_of_half_precision(x):
  stats = measured(jnp.asarray(x), histogram=True)
  assert_statistics(stats, x)


@given(
  hnp.arrays(
    np.float32, (3, 2), elements=st.sampled_from([0, 1, -2, np.nan, np.inf])
  )
)
def test_any_mixture_with_what_is_not_finite(x):
  stats = measured(jnp.asarray(x), histogram=True, examples=3)
  assert_statistics(stats, x)


def test_the_norm_over_several_examples_does_not_lose_small_ones():
  x = np.full((4096, 1), 1e-30, np.float32)
  assert_statistics(measured(jnp.asarray(x)), x)


def test_squares_are_in_three_units():
  x = jnp.array([[2.0**-60], [3.0], [2.0**100]])
  squares = measured(x, examples=3).example_squares
  np.testing.assert_array_equal(squares, np.diag([2.0**40, 9, 2.0**8]))


def test_no_gradient_arrives_through_stop_gradient():
  def loss(x, empty_tap):
    return jnp.sum(x) + jnp.sum(jax.lax.stop_gradient(flow.tap(x, empty_tap)))

  stats = jax.grad(loss, argnums=1)(
    jnp.ones(3), flow.empty_tap(histogram=True, examples=3)
  )
  assert all(not u.any() for u in jax.tree.leaves(stats))
  assert stats.calls == 0 and stats.norm == 0 and stats.rms == 0
  assert stats.largest == 0 and not stats.example_norms.any()


def test_a_gradient_of_zero_that_does_arrive_is_a_call():
  stats = jax.grad(lambda s: jnp.sum(0 * flow.tap(jnp.ones(3), s)))(
    flow.empty_tap()
  )
  assert stats.calls == 1 and stats.zeros == 3


def test_a_tap_has_only_what_was_asked_for():
  plain = measured(jnp.ones((4, 2)))
  assert plain.histogram is None and plain.example_squares is None
  with pytest.raises(ValueError, match='without examples'):
    _ = plain.example_norms
  assert measured(jnp.ones((4, 2)), histogram=True).example_squares is None
  assert measured(jnp.ones((4, 2)), examples=4).histogram is None
  assert len(jax.tree.leaves(plain)) == 1


def test_a_new_tap_is_all_zero_and_its_stack_leads():
  empty_tap = flow.empty_tap(histogram=True, examples=5, stack=(2, 3))
  assert empty_tap.calls.shape == (2, 3)
  assert empty_tap.histogram.shape == (2, 3, 64)
  assert empty_tap.example_norms.shape == (2, 3, 5)
  assert all(u.dtype == jnp.float32 for u in empty_tap if u is not None)
  for name in ('calls', 'elements', 'sum', 'norm', 'rms', 'largest', 'zeros'):
    column = getattr(empty_tap, name)
    assert column.shape == (2, 3) and not column.any()


def test_statistics_of_a_stack_are_those_of_its_layers(rng):
  rows = [random(rng, (4, 3), scale=10.0 ** (4 * i)) for i in range(3)]
  each = [measured(x, examples=4) for x in rows]
  stacked = jax.tree.map(lambda *u: jnp.stack(u), *each)
  for name in ('norm', 'rms', 'largest', 'sum', 'calls', 'example_norms'):
    np.testing.assert_allclose(
      getattr(stacked, name), [getattr(s, name) for s in each], rtol=1e-6
    )


@pytest.mark.parametrize('shape', [(), (3,), (5, 4), (1, 4)])
def test_another_number_of_examples_is_an_error(shape):
  with pytest.raises(ValueError, match='4 examples along the first axis'):
    flow.tap(jnp.ones(shape), flow.empty_tap(examples=4))


def test_every_leaf_must_have_the_examples():
  tree = {'a': jnp.ones(4), 'b': jnp.ones(3)}
  with pytest.raises(ValueError, match=r'4 examples .* \(3,\)'):
    flow.tap(tree, flow.empty_tap(examples=4))
  flow.tap({'a': jnp.ones(4), 'b': jnp.arange(3)}, flow.empty_tap(examples=4))


def test_what_passes_is_what_came(rng):
  tree = {
    'float': random(rng, (3,)),
    'half': random(rng, (3,), jnp.bfloat16),
    'complex': random(rng, (2,), jnp.complex64),
    'count': jnp.arange(3),
    'flag': jnp.array([True]),
    'key': jax.random.key(0),
    'nothing': None,
    'text': ('name', 7),
  }
  passed = flow.tap(tree, flow.empty_tap())
  assert passed['count'] is tree['count'] and passed['key'] is tree['key']
  assert passed['text'] == ('name', 7) and passed['nothing'] is None
  for name in ('float', 'half', 'complex'):
    assert_bit_for_bit(passed[name], tree[name])


def test_what_has_no_gradient_passes_untapped():
  integers = {'a': jnp.arange(3), 'b': None}
  assert flow.tap(integers, flow.empty_tap()) is integers
  stats = jax.grad(
    lambda s: flow.tap({'x': jnp.ones(2), 'n': jnp.arange(3)}, s)['x'].sum()
  )(flow.empty_tap())
  assert stats.elements == 2


def test_numpy_arrays_can_be_tapped():
  stats = jax.grad(lambda s: 2 * flow.tap(np.ones(3, np.float32), s).sum())(
    flow.empty_tap()
  )
  assert stats.sum == 6


def network(params, x, empty_taps=None):
  for i, (w, b) in enumerate(params):
    x = jnp.tanh(x @ w + b[None])
    if empty_taps is not None:
      x = flow.tap(x, empty_taps[i])
  return wavy(x)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_other_gradient_is_bit_for_bit_the_same(rng, dtype):
  params = [(random(rng, (7, 7), dtype), random(rng, 7, dtype))] * 3
  x = random(rng, (5, 7), dtype)
  empty_taps = [flow.empty_tap(histogram=True, examples=5) for _ in params]
  plain = jax.jit(jax.value_and_grad(network, argnums=(0, 1)))(params, x)
  value, grads = jax.jit(jax.value_and_grad(network, argnums=(0, 1, 2)))(
    params, x, empty_taps
  )
  assert_bit_for_bit((value, grads[:2]), plain)


def test_nan_passes_bit_for_bit():
  x = jnp.array([np.nan, -np.nan, np.inf, -0.0], jnp.float32)
  _, pull = jax.vjp(flow.tap, jnp.zeros(4), flow.empty_tap())
  passed, _ = pull(x)
  np.testing.assert_array_equal(passed.view(jnp.int32), x.view(jnp.int32))


@pytest.mark.parametrize('value', [7.0, np.nan, np.inf])
@pytest.mark.parametrize('leaves', [1, 2])
def test_what_is_in_the_tap_has_no_influence(rng, value, leaves):
  x = random(rng, (4, 3))
  tree = [x, 2 * x][:leaves]

  def loss(tree, empty_tap):
    return wavy(flow.tap(tree, empty_tap))

  empty_tap = flow.empty_tap(histogram=True, examples=4)
  filled = jax.tree.map(lambda u: jnp.full_like(u, value), empty_tap)
  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  assert_bit_for_bit(run(tree, filled), run(tree, empty_tap))


def test_forward_mode_is_an_error():
  def f(x):
    return jnp.sum(jnp.square(flow.tap(x, flow.empty_tap())))

  with pytest.raises(TypeError, match='custom_vjp'):
    jax.jvp(f, (jnp.ones(3),), (jnp.ones(3),))
  with pytest.raises(TypeError, match='custom_vjp'):
    jax.hessian(f)(jnp.ones(3))


def test_a_gradient_of_a_gradient_is_tapped_too(rng):
  x, w = random(rng, 4), random(rng, (4, 4))

  def inner(x, empty_tap=None, noise=None):
    y = jnp.tanh(w @ x)
    y = flow.tap(y, empty_tap) if empty_tap is not None else y + noise
    return jnp.sum(jnp.sin(w @ y))

  def penalty(x, *args):
    return jnp.sum(jnp.square(jax.grad(inner)(x, *args)))

  penalized, stats = jax.grad(penalty, argnums=(0, 1))(x, flow.empty_tap())
  expected, cotangent = jax.grad(
    lambda x, noise: penalty(x, None, noise), argnums=(0, 1)
  )(x, jnp.zeros(4))
  np.testing.assert_allclose(penalized, expected, rtol=1e-6)
  assert stats.calls > 0 and stats.norm > 0
  assert_statistics(stats, cotangent, rtol=1e-5)


def test_second_order_gradients_of_the_rest_are_the_same(rng):
  x = random(rng, 4)

  def f(x, tapped):
    y = jnp.sin(x)
    return jnp.sum((flow.tap(y, flow.empty_tap()) if tapped else y) ** 3)

  for tapped in (True, False):
    second = jax.grad(lambda x, t=tapped: jnp.sum(jax.grad(f)(x, t) ** 2))(x)
    if tapped:
      first = second
  np.testing.assert_allclose(first, second, rtol=1e-6)


def test_taps_are_a_mapping_in_the_order_of_the_forward_pass():
  taps = flow.Taps.empty(['z', 'a', 'm/1'], histogram=True, examples=3)
  assert list(taps) == ['z', 'a', 'm/1'] == list(taps.keys())
  assert len(taps) == 3 and 'a' in taps and 'b' not in taps
  assert [layer.name for layer in taps.layers] == list(taps)
  assert taps['a'].histogram.shape == (64,)
  assert taps['a'].example_norms.shape == (3,)
  with pytest.raises(KeyError):
    taps['b']
  doubled = jax.tree.map(lambda u: u + 1, taps)
  assert isinstance(doubled, flow.Taps)
  assert list(doubled) == list(taps) and doubled.layers == taps.layers
  assert doubled['z'].calls == 1
  leaves, structure = jax.tree.flatten(taps)
  assert len(leaves) == 9
  hash(structure)
  assert list(structure.unflatten(leaves)) == list(taps)


def test_taps_with_other_layers_are_another_tree():
  one, other = flow.Taps.empty(['a', 'b']), flow.Taps.empty(['b', 'a'])
  assert jax.tree.structure(one) != jax.tree.structure(other)


def test_leading_axes_are_those_that_were_lost():
  inside = {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}

  def stack(*axes):
    return jax.tree.map(lambda u: jnp.ones(axes + u.shape), inside)

  assert _taps.leading_axes(inside, inside) == ()
  assert _taps.leading_axes(inside, stack(5)) == (5,)
  assert _taps.leading_axes(inside, stack(5, 4)) == (5, 4)
  assert _taps.leading_axes({}, {}) == ()
  mixed = {**stack(5), 'bias': inside['bias']}
  assert _taps.leading_axes(inside, mixed) == ()


def test_other_axes_than_the_leading_ones_are_an_error():
  with pytest.raises(ValueError, match=r'\(2, 5, 3\) is \(2, 3\)'):
    _taps.leading_axes([jnp.ones((2, 3))], [jnp.ones((2, 5, 3))])


def test_an_output_that_is_not_used_changes_no_gradient():
  """Zeros in its place would be NaN behind the root at 0."""

  @jax.jit
  def loss(x, empty_tap):
    used, _ = flow.tap((x, jnp.sqrt(x)), empty_tap)
    return jnp.sum(used)

  x_grad, stats = jax.grad(loss, argnums=(0, 1))(jnp.zeros(2), flow.empty_tap())
  np.testing.assert_array_equal(x_grad, jnp.ones(2))
  assert stats.elements == 2
