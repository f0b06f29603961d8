"""The weights of two gradients that point against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, PartitionSpec as P

from optax_ghm import conflict
from tests.support import oracles_conflict as oracles
from tests.support.oracles_conflict import RULES
from tests.support.strategies_trees import STRUCTURES, is_inexact, trees

PROGRAMS = 20


def weights_of(first, second, **kwargs):
  """The weights by both rules."""
  return {
    rule: conflict.conflict_weights(first, second, rule=rule, **kwargs)
    for rule in RULES
  }


compiled = jax.jit(weights_of, static_argnames='axis_name')


@pytest.mark.device
@given(
  pair=st.tuples(
    st.sampled_from(['nested', 'mixed', 'nothing']), st.booleans()
  ).flatmap(
    lambda case: st.tuples(*[trees(STRUCTURES[case[0]], bad=case[1])] * 2)
  ),
  opposed=st.booleans(),
)
@example(  # the product of complex gradients is that of their real parts
  pair=(np.complex64([1, 1j]), np.complex64([1j, -1])), opposed=False
)
def test_conflict_weights_are_their_formulas(pair, opposed):
  first, second = pair
  if opposed:  # chance alone makes a clear conflict too seldom
    with np.errstate(invalid='ignore'):
      second = jax.tree.map(
        lambda x, y: x / 2 - y if is_inexact(x) else y, first, second
      )
  g1, g2 = oracles.flat(first), oracles.flat(second)
  lengths = np.linalg.norm(g1), np.linalg.norm(g2)
  if np.isfinite(lengths).all():
    cosine = (g1 / (lengths[0] or 1)) @ (g2 / (lengths[1] or 1))
    assume(abs(cosine) > 1e-5 or cosine == 0)
  found = compiled(first, second, harmonic_range=0.25)
  largest = float(np.finfo(np.float32).max)
  for rule, weights in found.items():
    assert all(w.dtype == np.float32 for w in weights)
    expected = oracles.weights(first, second, rule, 0.25)
    # The angle of opposite gradients is known to the root of rounding.
    np.testing.assert_allclose(
      weights, np.minimum(expected, largest), rtol=1e-3, atol=1e-3
    )


ANY = hnp.arrays(np.float32, (5,), elements=st.floats(width=32))


@pytest.mark.device
@given(first=ANY, second=ANY)
@example(
  first=1e25 * np.float32([1.0, 1.3, 0.7, 0.0, 0.0]),
  second=-1e-25 * np.float32([1.0, 1.3, 0.7, 0.0, 0.0]),
)
@example(
  first=np.float32([1e38, 0, 0, 0, 0]),
  second=np.float32([-1e38, 1e38, 0, 0, 0]),
)
@example(first=np.float32([1, -np.inf, 0, 0, 0]), second=-np.ones(5, 'f'))
@example(first=np.zeros(5, np.float32), second=-np.ones(5, np.float32))
def test_weights_of_any_gradients_are_numbers(first, second):
  found = jax.device_get(compiled(first, second))
  assert np.isfinite(list(found.values())).all()
  assert min(found['gh']) >= 1
  one, two = found['gh++']
  assert 1 <= one < 1.8 and 0.2 < two <= 1
  is_zero = not (first.any() and second.any())
  if is_zero or not np.isfinite([first, second]).all():
    assert found == dict.fromkeys(RULES, (1, 1))


@jax.jit
def over_angles(excess, harmonic_range):
  """The weights for every excess over a right angle and every range."""

  def weights(excess, harmonic_range):
    first = 7 * jnp.array([1.0, 0.0])
    second = 7 * jnp.stack([-jnp.sin(excess), jnp.cos(excess)])
    return weights_of(first, second, harmonic_range=harmonic_range)

  by_range = jax.vmap(weights, (None, 0))
  return jax.vmap(by_range, (0, None))(excess, harmonic_range)


@pytest.mark.device
def test_gh_plus_plus_over_angles_and_both_rules_at_a_right_angle():
  degrees = np.array([-90, -45, -1, 1, 10, 30, 60, 85, 90])
  shares = np.float32([0.0, 0.25, 0.5, 1.0])
  excess = np.deg2rad(degrees)[:, None]
  found = over_angles(np.float32(excess[:, 0]), shares)
  expected = (
    1 + 2 * np.sin(shares * np.maximum(excess, 0) / 2),
    1 - 2 * np.sin((1 - shares) * np.maximum(excess, 0) / 2),
  )
  # Near 180 degrees the angle has half of the digits of its cosine.
  np.testing.assert_allclose(found['gh++'], expected, atol=5e-4)

  excess = np.float32([-1e-3, 0.0, 1e-5, 1e-3, *[0.0] * 5])
  found = over_angles(excess, shares)
  for weights in found.values():
    distance = np.abs(np.array(weights)[..., 2] - 1)
    assert (distance <= 1.01 * np.maximum(excess, 0)).all()
    assert ((distance > 0) == (excess > 0)).all()


def test_wrong_arguments_are_named():
  x = np.ones(3, np.float32)
  with pytest.raises(ValueError, match="rule.*'gh'.*'GH'"):
    conflict.conflict_weights(x, x, rule='GH')
  for first, second in [
    (x, np.ones(4)),
    ([x], [x, x]),
    ([x, x[:2]], [x[:2], x]),
    ({'a': x}, {'b': x}),
    ((x, None), (None, x)),
    ((x, x), [x, x]),
  ]:
    with pytest.raises(ValueError, match='the same structure'):
      conflict.conflict_weights(first, second)


@functools.partial(jax.jit, static_argnames='axis_name')
def mapped(first, second, axis_name):
  each = functools.partial(weights_of, axis_name=axis_name)
  return jax.vmap(each, axis_name='i')(first, second)


def conflicting(rng, shape):
  first, second = rng.normal(size=(2, *shape)).astype(np.float32)
  return first, second - first


@pytest.mark.device
def test_a_named_vmap_is_one_gradient(rng):
  for scale in np.float32([1.0, 1e25, 1e-25]):
    pair = [scale * x for x in conflicting(rng, (8, 3))]
    whole, alone = mapped(*pair, 'i'), mapped(*pair, None)
    for rule in RULES:
      expected = np.outer(oracles.weights(*pair, rule), np.ones(8))
      np.testing.assert_allclose(whole[rule], expected, rtol=1e-5)
      assert np.abs(alone[rule] - expected).max() > 0.1


@pytest.mark.parametrize(
  'axes', [{'batch': 8}, {'a': 4, 'b': 2}], ids=['one axis', 'two axes']
)
def test_in_shard_map(axes, rng):
  kinds = (AxisType.Auto,) * len(axes)
  split = jax.jit(
    jax.shard_map(
      functools.partial(weights_of, axis_name=tuple(axes)),
      mesh=jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds),
      in_specs=P(tuple(axes)),
      out_specs=P(),
    )
  )
  pair = conflicting(rng, (16, 3))
  for rule, found in split(*pair).items():
    expected = oracles.weights(*pair, rule)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
