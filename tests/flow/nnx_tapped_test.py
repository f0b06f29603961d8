"""What is of NNX alone in tapped models."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx

from optax_ghm.nnx import Tapped, value_and_grad
from tests.support.nnx_mode import graph_mode
from tests.support.oracles_flow import (
  assert_bit_for_bit,
  assert_statistics,
  wavy,
)
from tests.support.tapped import (
  BATCH,
  DEPTH,
  WIDTH,
  X,
  check,
  cotangents,
  stack_by_hand,
  without_and_with_taps,
)
from tests.support.tapped_nnx import Mlp, Nnx, about, linear, scan, stacked


@pytest.fixture
def model():
  return Nnx('mlp', X).build()


class Count(nnx.Module):
  def __call__(self, x):
    return jnp.arange(len(x))


class Nested(nnx.Module):
  def __init__(self, rngs):
    self.layers = nnx.List(linear(rngs) for _ in range(2))
    self.decoder = nnx.Sequential(
      linear(rngs, 2), nnx.tanh, nnx.Linear(2, 2, rngs=rngs)
    )
    self.count = Count()

  def __call__(self, x):
    self.count(x)
    for layer in self.layers:
      x = nnx.tanh(layer(x))
    return self.decoder(x)


def test_names_are_the_paths_of_nnx_in_the_order_of_returns():
  taps = check(Nnx(Nested), X, one_line=True)
  assert [layer[:3] for layer in taps.layers] == [
    ('layers/0', 'Linear', True),
    ('layers/1', 'Linear', True),
    ('decoder/layers/0', 'Linear', True),
    ('decoder/layers/2', 'Linear', True),
    ('decoder', 'Sequential', False),
    ('', 'Nested', False),
    ('count', 'Count', False),  # which returns nothing that has a gradient
  ]
  assert taps['count'].calls == 0


@pytest.mark.parametrize(
  'model', ['mlp', pytest.param('normed', marks=graph_mode), 'scan']
)
def test_the_gradient_of_nnx_under_its_jit(model):
  face, tapped = Nnx(model), Tapped()
  one, other, third = (face.build() for _ in range(3))
  empty = tapped.init(third, X)

  @nnx.jit
  def step(one, other, taps):
    def loss(model, taps):
      return wavy(tapped.apply(model, X, taps=taps))

    plain = nnx.value_and_grad(loss, argnums=0)(one, None)
    value, (grads, taps) = nnx.value_and_grad(loss, argnums=(0, 1))(other, taps)
    return plain, (value, grads), taps

  plain, same, taps = step(one, other, empty)
  assert_bit_for_bit(
    *(nnx.to_pure_dict(nnx.state(grads)) for _, grads in (same, plain))
  )
  assert same[0] == plain[0]
  assert_bit_for_bit(*map(jax.jit(face.after), (other, one)))
  assert about(other) == about(third)
  by = stack_by_hand if model == 'scan' else cotangents
  expected = jax.jit(lambda s: (by(face, s, X)['head'], by(face, s, X)['']))
  for name, calls in zip(('head', ''), expected(face.state), strict=True):
    assert_statistics(taps[name], *calls, rtol=1e-4, atol=1e-6)


# The model afterwards.


def test_neither_init_nor_apply_changes_the_model():
  face, tapped = Nnx('normed'), Tapped()
  one, other = face.build(), face.build()
  empty = tapped.init(other, X)
  assert about(other) == about(one)
  assert not (other.norm.mean[...] != one.norm.mean[...]).any()

  @nnx.jit
  def both(one, other, taps):
    return one(X), tapped.apply(other, X, taps=taps)

  for _ in range(2):  # its statistics and random streams move on
    y, same = both(one, other, empty)
    np.testing.assert_array_equal(y, same)
    assert about(other) == about(one)
  np.testing.assert_array_equal(one.norm.mean[...], other.norm.mean[...])
  assert one.drop.rngs.count[...] == other.drop.rngs.count[...] == 2


@pytest.mark.parametrize('where', ['init', 'apply'])
def test_the_model_is_as_before_also_when_the_call_raised(model, where):
  before, tapped = about(model), Tapped()
  taps = {'taps': tapped.init(model, X)} if where == 'apply' else {}

  def broken(model, x):
    model.first(x)
    raise RuntimeError('midway')

  with pytest.raises(TypeError):
    getattr(tapped, where)(model, np.ones((BATCH, WIDTH + 1)), **taps)
  assert about(model) == before
  with pytest.raises(RuntimeError, match='midway'):
    getattr(tapped, where)(model, X, method=broken, **taps)
  assert about(model) == before


@graph_mode
def test_another_axis_leaves_the_model_as_before():
  model = Nnx('scan along axis 1').build()
  before = about(model)
  with pytest.raises(ValueError, match='stacked along leading axes'):
    Tapped().init(model, X)
  assert about(model) == before


def test_a_model_from_outside_of_a_gradient_is_as_before(model):
  before, tapped = about(model), Tapped()
  empty = tapped.init(model, X)
  with contextlib.suppress(errors.TraceContextError):
    jax.grad(lambda s: wavy(tapped.apply(model, X, taps=s)))(empty)
  assert about(model) == before


def test_while_it_runs_only_the_modules_of_the_model_are_tapped(model):
  """And these are still of their class."""
  face, call = Nnx('mlp'), Mlp.__call__

  def method(model, x):
    assert isinstance(model, Mlp) and isinstance(model.first, nnx.Linear)
    assert type(model).__name__ == 'Mlp' and Mlp.__call__ is call
    return model(x) + face.build()(x)

  @jax.jit
  def program(state):
    return without_and_with_taps(face, state, X, method=method)

  before, after, taps = program(face.state)
  assert_bit_for_bit(after, before)
  assert {int(stats.calls) for stats in taps.values()} == {1}
  assert Mlp.__call__ is call


# Transformations.


class Sine(nnx.Module):
  def __call__(self, x):
    return jnp.sin(x)


class Deep(nnx.Module):
  def __init__(self, rngs):
    def make(rngs):
      return nnx.Sequential(
        linear(rngs),
        nnx.LayerNorm(WIDTH, rngs=rngs),
        Sine(),
      )

    self.blocks = stacked(make, rngs)

  def __call__(self, x):
    return scan(0, x, self.blocks)


def test_modules_in_a_scan():
  """A stack of vectors is no kernel; others follow their surroundings."""
  face = Nnx(Deep)

  @jax.jit
  def program(state):
    return without_and_with_taps(face, state, X)

  before, after, taps = program(face.state)
  assert_bit_for_bit(after, before)
  assert [layer[:3] for layer in taps.layers] == [
    ('blocks/layers/0', 'Linear', True),
    ('blocks/layers/1', 'LayerNorm', False),
    ('blocks/layers/2', 'Sine', False),
    ('blocks', 'Sequential', False),
    ('', 'Deep', False),
  ]
  *inside, outside = (stats.calls.tolist() for stats in taps.values())
  assert inside == [[1] * DEPTH] * 4 and outside == 1


def test_a_jitted_function_is_traced_once_for_all_tapped_calls(model):
  traces = []

  @nnx.jit
  def jitted(model, x):
    traces.append(type(model))
    return wavy(model(x))

  tapped = Tapped()
  plain = jitted(model, X)
  empty = tapped.init(model, X, method=jitted)
  np.testing.assert_array_equal(jitted(model, X), plain)

  @nnx.grad(argnums=(0, 1))
  def grad(model, taps):
    return tapped.apply(model, X, taps=taps, method=jitted)

  counts = []
  for _ in range(3):
    _, taps = grad(model, empty)
    assert {int(stats.calls) for stats in taps.values()} == {1}
    np.testing.assert_array_equal(jitted(model, X), plain)
    counts.append(len(traces))
  assert counts[0] == counts[2]


# In one line.


def test_what_is_differentiated_is_chosen_as_without_taps():
  face = Nnx('mlp')
  of_head = {'wrt': nnx.All(nnx.Param, nnx.PathContains('head'))}

  def loss_fn(model, x, scale=1.0):
    return wavy(scale * model(x))

  @jax.jit
  def program(state, x):
    plain, in_one_line = (
      f(loss_fn, argnums=(0, 1), **of_head)(face.build(state), x, scale=2.0)
      for f in (value_and_grad, Tapped().value_and_grad)
    )
    (_, plain), (_, grads, taps) = plain, in_one_line
    return face.pure(plain), face.pure(grads), taps

  plain, grads, taps = program(face.state, X)
  assert_bit_for_bit(grads, plain)
  assert {int(stats.calls) for stats in taps.values()} == {1}
  with pytest.raises(TypeError, match='must not be keyword-only.*scale'):
    Tapped().value_and_grad(lambda m, *, scale: wavy(scale * m(X)))(
      face.build(), scale=2.0
    )


def test_a_compiled_step_is_traced_once(model):
  traces = []

  def loss_fn(model, x, rngs):
    traces.append(x)
    return wavy(model(x + rngs.normal(x.shape)))

  step = nnx.jit(Tapped().value_and_grad(loss_fn))
  rngs = nnx.Rngs(1)
  for i in range(3):
    step(model, i + X, rngs)
    assert rngs.default.count[...] == i + 1
  assert len(traces) == 2  # to find the layers, and to differentiate


def test_the_shapes_of_a_step_cost_no_step():
  model = Nnx('normed').build()
  before = np.asarray(model.norm.mean[...])
  step = Tapped().value_and_grad(lambda model, x: wavy(model(x)))
  value, grads, taps = nnx.eval_shape(step, model, X)
  assert value.shape == () and grads['head']['kernel'].shape == (WIDTH, 2)
  assert list(taps) == ['dense', 'norm', 'drop', 'head', '']
  np.testing.assert_array_equal(model.norm.mean[...], before)


@pytest.mark.parametrize('where', [nnx.Sequential(), 'first'])
def test_a_model_or_a_name_is_no_function_of_modules(where):
  with pytest.raises(TypeError, match=r'Tapped\(\)\.value_and_grad'):
    Tapped(where)
