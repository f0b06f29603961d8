"""What is of Linen alone in tapped models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

from optax_ghm.linen import Tapped
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
  batch,
  check,
  cotangents,
  without_and_with_taps,
)
from tests.support.tapped_linen import (
  Attention,
  Linen,
  Mlp,
  Normed,
  Stack,
  scanned,
)


class Nested(nn.Module):
  """A list, and modules without names in a module."""

  def setup(self):
    self.layers = [nn.Dense(WIDTH) for _ in range(2)]
    self.decoder = Decoder()

  def __call__(self, x):
    for layer in self.layers:
      x = nn.tanh(layer(x))
    return self.decoder(x)


class Decoder(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(WIDTH)(x))
    return nn.Dense(2)(x)


def test_names_are_those_of_linen_in_the_order_of_returns():
  taps = check(Linen(Nested(), X), X, one_line=True)
  assert [layer[:3] for layer in taps.layers] == [
    ('layers_0', 'Dense', True),
    ('layers_1', 'Dense', True),
    ('decoder/Dense_0', 'Dense', True),
    ('decoder/Dense_1', 'Dense', True),
    ('decoder', 'Decoder', False),
    ('', 'Nested', False),
  ]


class Scale(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dropout(0.5, deterministic=True)(2 * x)


def test_a_model_without_parameters_and_frozen_variables():
  taps = check(Linen(Scale(), X), X)
  assert taps[''].calls == 1
  model = Linen('mlp', X)
  model.state = freeze(model.state)
  check(model, X)


@pytest.mark.parametrize(
  ('mutable', 'train'),
  [(True, True), (nn.DenyList('params'), True), (['params'], False)],
  ids=['all', 'deny', 'params'],
)
def test_whatever_is_mutable_no_tap_leaks(mutable, train):
  rngs = {'rngs': {'dropout': jax.random.key(1)}} if train else {}
  model = Linen(Normed(train), X, mutable=mutable, **rngs)

  @jax.jit
  def program(state, x):
    plain, _ = model.call(state, x)
    return model.tapped(state, model.empty(state, x), x)[0], plain

  assert_bit_for_bit(*program(model.state, X))


# Lifted transformations.


def calls(model, *args):
  """How often every module was called."""

  @jax.jit
  def program(state):
    return without_and_with_taps(model, state, *args)

  before, after, taps = program(model.state)
  assert_bit_for_bit(after, before)
  return {name: stats.calls.tolist() for name, stats in taps.items()}


def boxed(key, shape, dtype=jnp.float32):
  init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
  return init(key, shape, dtype)


class Silent(nn.Module):
  """With a module without parameters, and a box."""

  @nn.compact
  def __call__(self, x, _):
    x = nn.Dense(WIDTH, kernel_init=boxed)(x)
    return nn.Dropout(0.5, deterministic=True)(nn.tanh(x)), None


def test_a_scan_that_is_the_model():
  """Modules without parameters follow their surroundings."""
  metadata = {nn.PARTITION_NAME: 'layers'}
  model = scanned(metadata_params=metadata)(Silent)()
  assert calls(Linen(model, X, None), X, None) == {
    'Dense_0': [1] * DEPTH,
    'Dropout_0': [1] * DEPTH,
    '': [1] * DEPTH,
  }


def test_scans_in_scans_have_two_leading_axes():
  def inner(block):
    return nn.scan(
      block, variable_axes={'params': 0}, split_rngs={'params': 1}, length=2
    )

  found = calls(Linen(Stack((inner, scanned())), X), X)
  assert found.pop('head') == found.pop('') == 1
  assert found == dict.fromkeys(('blocks/dense', 'blocks'), [[1, 1]] * DEPTH)


class Square(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.tanh(nn.Dense(DEPTH)(x)), None


def test_even_where_the_shapes_do_not_tell_another_axis_is_an_error():
  x = batch(BATCH, DEPTH)
  model = Linen(scanned(1)(Square)(), x, None)
  taps = model.empty(model.state, x, None)
  with pytest.raises(ValueError):  # noqa: PT011
    model.tapped(model.state, taps, x, None)


def test_a_module_jitted_untapped_is_traced_anew():
  model = Linen('jit', X)

  @jax.jit
  def program(state, x):
    def loss(taps):
      return wavy(model.tapped(state, taps, x)[0])

    outputs, taps = [model.call(state, x)[0]], []
    for _ in range(2):
      taps.append(jax.grad(loss)(model.empty(state, x)))
      outputs.append(model.call(state, x)[0])
    return outputs, taps

  outputs, found = program(model.state, X)
  assert_bit_for_bit(outputs[1:], outputs[:1] * 2)
  for taps in found:
    assert {int(stats.calls) for stats in taps.values()} == {1}


# In one line.


def test_params_alone_and_auxiliary_data():
  face = Linen('normed', X)
  tapped = Tapped(face.model)

  def loss_fn(params, moving, x):
    logits, updated = face.model.apply(
      {'params': params, 'batch_stats': moving}, x, **face.kwargs
    )
    # The sum of squares sees the parameters alone.
    squares = sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))
    aux = updated, len(jax.tree.leaves(params))
    return wavy((logits, updated)) + squares, aux

  @jax.jit
  def program(state, x):
    args = state['params'], state['batch_stats']
    options = {'argnums': (0, 2), 'has_aux': True}
    plain = jax.value_and_grad(loss_fn, **options)(*args, x)
    *same, found = tapped.value_and_grad(loss_fn, **options)(*args, x)
    return plain, tuple(same), found, cotangents(face, state, x)

  plain, same, taps, expected = program(face.state, X)
  assert_bit_for_bit(same, plain)
  assert set(taps) == set(expected)
  for name, whole in expected.items():
    assert_statistics(taps[name], *whole, rtol=1e-4, atol=1e-6)


def test_several_calls_add_up_and_other_models_are_left_alone():
  one, other = Linen('mlp', X), Linen(Mlp((('use_bias', False),)), X)

  @jax.jit
  @Tapped(one.model).value_and_grad
  def step(of_one, of_other, x):
    hidden = other.model.apply(of_other, x, method='encode')
    again = one.model.apply(of_one, hidden, method=lambda m, x: m(m.encode(x)))
    return wavy(one.model.apply(of_one, x)) + wavy(again)

  _, _, taps = step(one.state, other.state, X)
  counts = {name: int(stats.calls) for name, stats in taps.items()}
  assert counts == {'first': 3, 'second': 3, 'head': 2, '': 2}


def test_a_function_may_call_parts_of_the_model_in_turn():
  face = Linen('mlp', X)

  def parts(m, x):
    return m.head(nn.tanh(m.second(nn.tanh(m.first(x)))))

  @jax.jit
  @Tapped(face.model).value_and_grad
  def step(variables, x):
    return wavy(face.model.apply(variables, x, method=parts))

  _, _, taps = step(face.state, X)
  counts = {name: int(stats.calls) for name, stats in taps.items()}
  assert counts == {'first': 1, 'second': 1, 'head': 1}


def test_the_model_untapped_beside_itself_tapped_is_left_alone():
  model = Linen('mlp', X)

  @jax.jit
  def program(state, x):
    def loss(taps):
      inner, _ = model.tapped(state, taps, x)
      return wavy(inner) + wavy(model.model.apply(state, x))

    return jax.grad(loss)(model.empty(state, x))

  taps = program(model.state, X)
  assert {int(stats.calls) for stats in taps.values()} == {1}


def test_a_compiled_step_is_traced_once():
  face, traces = Linen('mlp', X), []

  def loss_fn(variables, x):
    traces.append(x)
    return wavy(face.model.apply(variables, x))

  step = jax.jit(Tapped(face.model).value_and_grad(loss_fn))
  for i in range(3):
    step(face.state, i + X)
  assert len(traces) == 2  # to find the layers, and to differentiate


@pytest.mark.parametrize('wrap', [jax.jit, jax.checkpoint])
def test_a_call_that_is_not_traced_again_is_an_error(wrap):
  face = Linen('mlp', X)
  forward = wrap(face.model.apply)
  step = Tapped(face.model).value_and_grad(lambda *args: wavy(forward(*args)))
  with pytest.raises(ValueError, match=r'jax\.jit and jax\.checkpoint'):
    jax.eval_shape(step, face.state, X)


def test_a_class_is_no_model():
  with pytest.raises(TypeError, match='model must be a linen.Module'):
    Tapped(Mlp)


def test_a_loss_without_the_model_is_an_error():
  face = Linen(Attention(), np.array([[0, 1]]))
  loss = Tapped(Mlp()).value_and_grad(
    lambda v: wavy(face.model.apply(v, np.array([[0, 1]])))
  )
  with pytest.raises(ValueError, match='no module was called'):
    jax.eval_shape(loss, face.state)
