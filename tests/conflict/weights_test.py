"""Every method: its laws, exact solutions, golden numbers, bad numbers."""

import functools
import pathlib

import chex
import jax
import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from optax_ghm import conflict
from tests.support import oracles_conflict as oracles

PROGRAMS = 80

METHODS = {
  'mean': conflict.mean_weights,
  'upgrad': conflict.upgrad_weights,
  'dualproj': conflict.dualproj_weights,
  'mgda': conflict.mgda_weights,
  'cagrad': conflict.cagrad_weights,
  'pcgrad': conflict.pcgrad_weights,
  'imtl_g': conflict.imtl_g_weights,
  'config': conflict.config_weights,
  'aligned_mtl': conflict.aligned_mtl_weights,
  'nash_mtl': conflict.nash_mtl_weights,
}
OF_TWO = {
  'gh': conflict.gh_weights,
  'gh++': conflict.gh_plus_plus_weights,
}
SIZES = (2, 8)
WIDTH = 12


@jax.jit
def every(gramian):
  """The weights by every method that is defined for so many losses."""
  methods = METHODS | OF_TWO if len(gramian) == len(OF_TWO) else METHODS
  return {name: method(gramian) for name, method in methods.items()}


@jax.jit
def gramian(rows):
  return conflict.gramian(rows)


of_units = jax.jit(conflict.of_unit_gradients(conflict.upgrad_weights))


def directions(rows):
  """The direction of every method, in float64."""
  weights = every(gramian(rows))
  return {name: np.float64(w) @ np.float64(rows) for name, w in weights.items()}


def sampled(kind, m, seed):
  """Rows of a known kind, float32."""
  rng = np.random.default_rng(seed)
  rows = rng.normal(size=(m, WIDTH))
  if kind == 'agreeing':
    rows = abs(rows)
  elif kind == 'conflicting':
    signs = np.where(np.arange(m) % 2, 1, -1)[:, None]
    rows += rng.uniform(0.3, 1.5) * signs * rng.normal(size=WIDTH)
  elif kind == 'nearly opposite':
    rows[1] = 0.05 * rows[1] - rows[0]
  elif kind == 'of any scale':
    rows *= 10 ** rng.uniform(-3, 3, size=(m, 1))
  elif kind == 'stationary':  # a mean with positive weights is 0
    rows[-1] = -rng.uniform(0.5, 2, m - 1) @ rows[:-1]
  return np.float32(rows)


KINDS = (
  'agreeing',
  'random',
  'conflicting',
  'nearly opposite',
  'of any scale',
  'stationary',
)
SAMPLES = st.builds(
  sampled,
  st.sampled_from(KINDS),
  st.sampled_from(SIZES),
  st.integers(0, 999),
)


def error(found, expected, rows):
  """Relative to the direction or, where it vanishes, to the shortest row."""
  shortest = np.linalg.norm(rows, axis=1).min()
  size = max(np.linalg.norm(expected), 1e-1 * shortest)
  return np.linalg.norm(found - expected) / size


def hurt(d, rows):
  """How much the direction raises a loss, relative to all that it adds up."""
  lengths = np.linalg.norm(rows, axis=1)
  return max(0, -np.min(rows @ d / lengths)) / lengths.sum()


# The laws: each a function of float64 rows and the directions of all methods.


def assert_non_conflicting(rows, found):
  always, of_two = ['upgrad', 'dualproj', 'mgda'], ['gh', 'pcgrad']
  for name in always + of_two * ('gh' in found):
    assert hurt(found[name], rows) < 1e-5, name


def assert_exact(rows, found):
  for name in ('upgrad', 'dualproj', 'mgda', 'gh'):
    if name in found:
      expected = getattr(oracles, name)(rows)
      assert error(found[name], expected, rows) < 3e-4, name
  np.testing.assert_allclose(found['mean'], rows.mean(0))
  if 'gh' in found:
    assert error(found['pcgrad'], found['gh'], rows) < 1e-4
    assert error(2 * found['upgrad'], found['gh'], rows) < 1e-4


def assert_shortest(rows, found):
  d = found['mgda']
  slack = rows @ d - d @ d
  assert np.min(slack / np.linalg.norm(rows, axis=1)) > -1e-5 * abs(rows).max()


def assert_best_for_the_worst_off(rows, found):
  """The primal and the dual of CAGrad agree."""
  mean = rows.mean(0)
  distance = np.linalg.norm(found['cagrad'] - mean) / np.linalg.norm(mean)
  assert abs(distance - 0.5) < 1e-3
  towards = found['cagrad'] - mean
  dual, _ = np.linalg.lstsq(rows.T, towards, rcond=None)[:2]
  dual = np.maximum(dual, 0) / np.maximum(dual, 0).sum()
  shortest = dual @ rows
  bound = shortest @ mean + 0.5 * np.linalg.norm(mean) * np.linalg.norm(
    shortest
  )
  worst = np.min(rows @ found['cagrad'])
  scale = np.linalg.norm(mean) * np.linalg.norm(rows, axis=1).max()
  assert bound - worst < 1e-5 * scale


def assert_equal_components(rows, found):
  lengths = np.linalg.norm(rows, axis=1)
  for name in ('imtl_g', 'config'):
    along = rows @ found[name] / lengths
    np.testing.assert_allclose(along, along.mean(), rtol=1e-2)
  along = rows @ found['config']
  length = np.linalg.norm(found['config'])
  np.testing.assert_allclose(length**2, along.sum(), rtol=1e-2)


def assert_bargained(rows, found):
  weights = np.float64(every(gramian(np.float32(rows)))['nash_mtl'])
  np.testing.assert_allclose(weights * (rows @ found['nash_mtl']), 1, rtol=1e-2)


@pytest.mark.device
@given(rows=SAMPLES)
@example(rows=sampled('of any scale', 8, 5))
def test_directions_are_what_they_are_defined_to_be(rows):
  found, wide = directions(rows), np.float64(rows)
  condition = np.linalg.cond(wide / np.linalg.norm(wide, axis=1, keepdims=True))
  assert_non_conflicting(wide, found)
  assert_exact(wide, found)
  assert_shortest(wide, found)
  if condition < 30:  # else rounding is magnified, or there is no solution
    assert_best_for_the_worst_off(wide, found)
    assert_equal_components(wide, found)
    assert_bargained(wide, found)


@pytest.mark.device
@given(m=st.sampled_from(SIZES), seed=st.integers(0, 999))
@example(m=8, seed=3)
def test_cagrad_is_the_best_of_all_directions_in_the_plane(m, seed):
  """More losses than parameters, some of them nearly opposite."""
  rows = sampled('nearly opposite', m, seed) * (np.arange(WIDTH) < 2)[None]
  rows = rows.astype(np.float32)
  wide = np.float64(rows)
  mean, found = wide.mean(0), directions(rows)['cagrad']
  radius = np.linalg.norm(mean) / 2
  longest = np.linalg.norm(wide, axis=1).max()
  assert np.linalg.norm(found - mean) < radius + 1e-4 * longest
  angles = np.linspace(0, 2 * np.pi, 4001)
  circle = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
  best = np.min((circle + mean[None, :2]) @ wide[:, :2].T, axis=1).max()
  worst = np.min(wide @ found)
  assert worst > best - 1e-3 * np.linalg.norm(mean) * longest


@pytest.mark.device
@given(m=st.sampled_from(SIZES), seed=st.integers(0, 999))
def test_without_conflict_it_is_the_mean_or_the_sum(m, seed):
  weights = every(gramian(sampled('agreeing', m, seed)))
  for name in ('mean', 'upgrad', 'dualproj'):
    np.testing.assert_array_equal(weights[name], np.float32(1 / m))
  for name in {'pcgrad', 'gh', 'gh++'} & weights.keys():
    np.testing.assert_array_equal(weights[name], 1)


@pytest.mark.device
@given(rows=SAMPLES, decades=st.integers(-15, 15), seed=st.integers(0, 99))
@example(rows=sampled('conflicting', 8, 0), decades=15, seed=0)
@example(rows=sampled('conflicting', 8, 0), decades=-15, seed=0)
def test_order_and_scale_do_not_matter(rows, decades, seed):
  kept = np.linalg.norm(rows, axis=1).max() * 10.0**decades
  decades -= int(np.sign(decades)) * (3 if not 1e-14 < kept < 1e14 else 0)
  order = np.random.default_rng(seed).permutation(len(rows))
  found = directions(rows)
  permuted = directions(rows[order])
  scaled = directions(rows * np.float32(10.0**decades))
  lengths = np.linalg.norm(np.float64(rows), axis=1)
  for name, d in found.items():
    unit = 1 if name == 'nash_mtl' else 10.0**-decades
    stable = name not in ('imtl_g', 'config', 'aligned_mtl', 'nash_mtl')
    if not stable and np.linalg.cond(rows / lengths[:, None]) > 30:
      continue
    if not stable and lengths.max() / lengths.min() > 30:
      continue
    size = max(np.linalg.norm(d), 1e-2 * lengths.sum())
    assert np.linalg.norm(scaled[name] * unit - d) < 1e-3 * size, name
    if name not in ('pcgrad', 'gh++'):
      assert np.linalg.norm(permuted[name] - d) < 1e-3 * size, name


@pytest.mark.device
@given(rows=SAMPLES, seed=st.integers(0, 99))
def test_a_scaled_loss_scales_its_own_part(rows, seed):
  """UPGrad and PCGrad are linear in the scales of the losses."""
  one, two = np.random.default_rng(seed).uniform(0.1, 2, (2, len(rows), 1))
  found = [directions(np.float32(rows * c)) for c in (one, two, one + two)]
  lengths = np.linalg.norm(rows, axis=1)
  for name in ('mean', 'upgrad', 'pcgrad'):
    distance = found[0][name] + found[1][name] - found[2][name]
    assert np.linalg.norm(distance) < 1e-4 * lengths.max(), name


@pytest.mark.device
@given(rows=SAMPLES, seed=st.integers(0, 99))
def test_of_unit_gradients_no_scale_matters(rows, seed):
  scales = 10 ** np.random.default_rng(seed).uniform(-2, 2, (len(rows), 1))
  units = np.float64(rows / np.linalg.norm(rows, axis=1, keepdims=True))
  expected, size = directions(np.float32(units))['upgrad'], len(rows)
  for scaled in (rows, rows * np.float32(scales)):
    weights = of_units(gramian(scaled))
    found = np.float64(weights) @ np.float64(scaled)
    assert np.linalg.norm(found - expected) < 1e-3 * size


@pytest.mark.device
@given(
  rows=SAMPLES,
  at=st.integers(0, 1),
  bad=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_a_loss_whose_gradient_is_not_finite_is_left_out(rows, at, bad):
  with_bad = np.insert(rows, at, rows[0], axis=0)
  with_bad[at, 3] = bad
  found, expected = every(gramian(with_bad)), directions(rows)
  lengths = np.linalg.norm(rows, axis=1)
  fragile = np.linalg.cond(rows / lengths[:, None]) > 30
  for name in METHODS:
    np.testing.assert_array_equal(found[name][at], 0)
    d = np.float64(np.delete(found[name], at)) @ rows
    assert np.isfinite(d).all()
    if not fragile and (name != 'aligned_mtl' or lengths.max() < 100):
      distance = np.linalg.norm(d - expected[name])
      assert distance < 1e-3 * np.linalg.norm(expected[name]), name


def unit(*at):
  return np.eye(WIDTH, dtype=np.float32)[list(at)]


EDGES = {
  'equal': np.concatenate([unit(0)] * 2),
  'opposite': np.concatenate([unit(0), -unit(0)]),
  'opposite of other lengths': np.concatenate([unit(0), -8 * unit(0)]),
  'at right angles': unit(0, 1),
  'a zero': np.concatenate([unit(0), 0 * unit(0)]),
  'zeros': 0 * unit(0, 1),
  'more losses than parameters': np.float32(
    np.random.default_rng(0).normal(size=(8, WIDTH)) * (np.arange(WIDTH) < 2)
  ),
  'six decades': np.concatenate([1e3 * unit(0), 1e-3 * (unit(1) - unit(0))]),
  'tiny': 1e-15 * (unit(0, 1) - unit(1, 2) / 2),
  'huge': np.float32([[1e15], [1e-15]]) * (unit(0, 1) - unit(1, 2) / 2),
}
SOLVED = {  # the direction in the first two coordinates, if it is defined
  'equal': dict.fromkeys(METHODS, (1, 0))
  | {'pcgrad': (2, 0), 'config': (2, 0), 'gh': (2, 0), 'gh++': (2, 0)}
  | {'cagrad': (1.5, 0), 'nash_mtl': (2**0.5, 0)},
  'opposite': dict.fromkeys([*METHODS, 'gh'], (0, 0)),
  'opposite of other lengths': dict.fromkeys(
    ['upgrad', 'dualproj', 'mgda', 'pcgrad', 'imtl_g', 'config', 'gh'], (0, 0)
  ),
  'at right angles': dict.fromkeys(METHODS, (0.5, 0.5))
  | {'pcgrad': (1, 1), 'config': (1, 1), 'gh': (1, 1), 'gh++': (1, 1)}
  | {'cagrad': (0.75, 0.75), 'nash_mtl': (1, 1)},
  'a zero': dict.fromkeys(METHODS, (0.5, 0))
  | {'mgda': (0, 0), 'cagrad': (0.75, 0), 'pcgrad': (1, 0), 'imtl_g': (1, 0)}
  | {'config': (1, 0), 'nash_mtl': (1, 0), 'gh': (1, 0), 'gh++': (1, 0)},
  'zeros': dict.fromkeys([*METHODS, *OF_TWO], (0, 0)),
}


@pytest.mark.device
@pytest.mark.parametrize('name', EDGES)
def test_edges_have_defined_answers(name):
  rows = EDGES[name]
  weights, found = every(gramian(rows)), directions(rows)
  chex.assert_tree_all_finite(weights)
  for method, expected in SOLVED.get(name, {}).items():
    # Nash-MTL's weights are not defined for opposite gradients.
    atol = 2e-3 if method == 'nash_mtl' else 1e-5
    np.testing.assert_allclose(
      found[method][:2], expected, rtol=1e-4, atol=atol, err_msg=method
    )
  if rows.any(1).all():
    wide = np.float64(rows)
    for method in ('upgrad', 'dualproj', 'mgda'):
      assert hurt(found[method], wide) < 1e-6


@pytest.mark.device
def test_one_loss_is_itself():
  weights = jax.jit(lambda g: [method(g) for method in METHODS.values()])(
    np.float32([[4.0]])
  )
  expected = {'cagrad': 1.5, 'nash_mtl': 0.5}
  for name, found in zip(METHODS, weights, strict=True):
    np.testing.assert_allclose(found, [expected.get(name, 1)], rtol=1e-5)


_FILE = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'conflict.npz')
GOLDEN = sorted({key.split('/')[0] for key in _FILE})


@pytest.mark.device
@pytest.mark.parametrize('case', GOLDEN)
def test_golden_numbers_of_exact_solutions(case):
  rows = _FILE[f'{case}/J']
  wide = np.float64(rows)
  found = directions(rows)
  if f'{case}/order' in _FILE:
    order = _FILE[f'{case}/order']
    weights = jax.jit(conflict.pcgrad_weights)(gramian(rows), order=order)
    found['pcgrad'] = np.float64(weights) @ wide
  seen = 0
  for name, d in found.items():
    weights, exact = f'{case}/exact_w/{name}', f'{case}/exact_d/{name}'
    if weights in _FILE:
      expected = _FILE[weights] @ wide
    elif exact in _FILE:
      expected = _FILE[exact]
    else:
      continue
    seen += 1
    if 'scaled' in case and name == 'aligned_mtl':
      continue  # rounding decides the rank
    if case.startswith('edge'):
      np.testing.assert_allclose(d, expected, atol=1e-5, err_msg=name)
    else:
      assert error(d, expected, wide) < 3e-5, name
  assert seen >= 3


def test_derivatives_are_those_of_finite_differences():
  """With 64 bits, at two gradients that conflict, and not by accident."""
  rows = np.array([[1.0, 0.2, 0.0], [-0.6, 0.9, 0.4]])
  there = np.array([[0.3, -0.5, 0.2], [0.1, 0.7, -0.4]])

  def along(t):
    moved = rows + t * there
    return every(moved @ moved.T)

  with jax.enable_x64(True):
    slopes, *values = jax.jit(
      lambda: (jax.jacrev(along)(0.0), along(1e-3), along(-1e-3))
    )()
  values = jax.device_get(values)
  for name, slope in slopes.items():
    differences = (values[0][name] - values[1][name]) / 2e-3
    np.testing.assert_allclose(slope, differences, rtol=1e-3, atol=1e-3)


SMOOTH = {
  name: method
  for name, method in (METHODS | OF_TWO).items()
  if name not in ('imtl_g', 'config', 'aligned_mtl')  # equal eigenvalues
}


@pytest.mark.parametrize('name', ['equal', 'at right angles', 'a zero'])
def test_no_derivative_is_infinite(name):
  def slopes(rows):
    return {
      key: jax.grad(lambda rows, f=method: f(rows @ rows.T)[0])(rows)
      for key, method in SMOOTH.items()
    }

  chex.assert_tree_all_finite(jax.jit(slopes)(EDGES[name]))


def test_every_example_may_have_weights_of_its_own():
  rows = np.stack([sampled('conflicting', 2, seed) for seed in range(3)])
  gramians = np.einsum('bin,bjn->bij', rows, rows)
  found = jax.jit(jax.vmap(every))(gramians)
  for i, one in enumerate(gramians):
    for name, weights in every(one).items():
      np.testing.assert_allclose(found[name][i], weights, rtol=1e-4, atol=1e-5)


@pytest.mark.device
def test_gh_plus_plus_over_angles():
  degrees = np.array([1, 45, 89, 91, 100, 120, 150, 175])
  angles = np.deg2rad(degrees)
  rows = np.zeros((8, 2, 2))
  rows[:, 0, 0] = 7
  rows[:, 1] = np.stack([np.cos(angles), np.sin(angles)], -1)
  for share in (0.0, 0.25, 1.0):
    weigh = functools.partial(
      conflict.gh_plus_plus_weights, harmonic_range=share
    )
    found = jax.jit(jax.vmap(weigh))(np.float32(rows @ np.swapaxes(rows, 1, 2)))
    expected = [oracles.gh_plus_plus_weights(row, share) for row in rows]
    np.testing.assert_allclose(found, expected, atol=5e-4)


def test_wrong_arguments_are_named():
  for name, method in (METHODS | OF_TWO).items():
    with pytest.raises(ValueError, match=r'gramian must be.*\(2, 3\)'):
      method(np.ones((2, 3), np.float32))
    if name in OF_TWO:
      with pytest.raises(ValueError, match='two losses.*upgrad_weights'):
        method(np.eye(3, dtype=np.float32))
  square = np.eye(2, dtype=np.float32)
  with pytest.raises(ValueError, match='c must be from 0 to 1, got 2'):
    conflict.cagrad_weights(square, c=2)
  with pytest.raises(ValueError, match='harmonic_range must be'):
    conflict.gh_plus_plus_weights(square, harmonic_range=-1)
  with pytest.raises(ValueError, match=r'order must have.*\(2, 2\).*\(3,\)'):
    conflict.pcgrad_weights(square, order=np.arange(3))
