"""Unmodified models of Linen and NNX, tapped: against whole cotangents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.nnx_mode import graph_mode
from tests.support.oracles_flow import (
  assert_bit_for_bit,
  assert_statistics,
  at,
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
  stack_by_hand,
  unrolled,
  without_and_with_taps,
)
from tests.support.tapped_linen import Linen
from tests.support.tapped_nnx import Nnx

PROGRAMS = 86
shared_by_hand = functools.partial(stack_by_hand, shared=True)
both = pytest.mark.parametrize('face', [Linen, Nnx])


@both
@pytest.mark.parametrize('model', ['mlp', 'several', 'partitioned'])
def test_unmodified_models(face, model):
  options = {'histogram': True, 'examples': BATCH}
  taps = check(face(model, X), X, one_line=True, **options)
  for layer in taps.layers:
    assert layer.has_kernel == (layer.kind == face.layer)
    twice = model == 'several' and layer.has_kernel
    assert taps[layer.name].calls == 1 + twice


@both
def test_attention(face):
  tokens = np.array([[0, 1, 2], [3, 4, 0]])
  # On some processors XLA adds up the gradient of attention in another order.
  taps = check(face('attention', tokens), tokens, same=1e-6)
  parts = {f'attention/{part}' for part in ('query', 'key', 'value', 'out')}
  assert parts < set(taps)


@both
@pytest.mark.parametrize('model', ['normed', 'evaluated'])
def test_batch_norm_and_dropout(face, model):
  taps = check(face(model, X), X, one_line=model == 'normed')
  assert [layer[:3] for layer in taps.layers] == [
    ('dense', face.layer, True),
    ('norm', 'BatchNorm', False),
    ('drop', 'Dropout', False),
    ('head', face.layer, True),
    ('', 'Normed', False),
  ]
  assert list(taps) == [layer.name for layer in taps.layers]


@both
@pytest.mark.parametrize('model', ['bfloat16', 'computed in bfloat16'])
def test_half_precision(face, model):
  x = X.astype(jnp.bfloat16) if model == 'bfloat16' else X
  check(face(model, x), x, rtol=1e-2)


# Transformations.


@pytest.mark.parametrize(
  ('face', 'model'),
  [
    (Linen, 'scan'),
    (Linen, 'scan of remat'),
    (Linen, 'remat of scan'),
    (Linen, 'scan of jit'),
    (Nnx, 'scan'),
    (Nnx, 'scan of remat'),
    pytest.param(Nnx, 'scan of the axes of states', marks=graph_mode),
  ],
)
def test_scanned_layers_have_taps_of_their_own(face, model):
  options = {'histogram': True, 'examples': BATCH}
  one_line = model == 'scan of remat'
  taps = check(
    face(model, X), X, by=stack_by_hand, one_line=one_line, **options
  )
  assert list(taps) == ['blocks/dense', 'blocks', 'head', '']
  kernels = [layer.has_kernel for layer in taps.layers]
  assert kernels == [True, False, True, False]
  assert [layer.loop for layer in taps.layers] == ['blocks', 'blocks', '', '']
  assert taps['blocks'].calls.tolist() == [1] * DEPTH


@both
@pytest.mark.parametrize('model', ['shared scan', 'shared scan of remat'])
def test_steps_that_share_their_parameters_add_up(face, model):
  taps = check(face(model, X), X, by=shared_by_hand)
  assert taps['blocks'].calls == DEPTH


@both
@pytest.mark.parametrize('model', ['remat', 'jit'])
def test_a_rematted_or_jitted_module_is_tapped_once(face, model):
  by = functools.partial(stack_by_hand, depth=1, shared=True)
  taps = check(face(model, X), X, by=by)
  assert list(taps) == ['blocks/dense', 'blocks', 'head', '']


@both
def test_the_steps_of_an_lstm_add_up(face):
  xs = batch(BATCH, 2, 2)

  def steps(model, xs):
    carry, outputs = (jnp.zeros((BATCH, WIDTH)),) * 2, []
    for t in range(xs.shape[1]):
      carry, y = model.cell(carry, xs[:, t])
      outputs.append(y)
    return jnp.stack(outputs, 1)

  taps = check(face('lstm', xs), xs, by=unrolled(steps))
  assert [name for name in taps if name][-1].startswith('cell')
  assert all(stats.calls == 2 for name, stats in taps.items() if name)


@both
@pytest.mark.parametrize('shared', [False, True])
def test_vmapped_modules(face, shared):
  xs = batch(DEPTH, BATCH, WIDTH)

  def by_hand(face, state, xs):
    params = face.flat(state)
    kernel, bias = (params[f'many/{name}'] for name in ('kernel', 'bias'))

    def loss(noise):
      rows = []
      for i in range(DEPTH):
        at = Ellipsis if shared else i
        h = jnp.tanh(xs[i] @ kernel[at] + bias[at][None] + noise[0][i])
        rows.append(h @ params['head/kernel'] + params['head/bias'][None])
      return wavy(jnp.stack(rows) + noise[1])

    many, head = jax.grad(loss)(
      (jnp.zeros_like(xs), jnp.zeros((DEPTH, BATCH, 2)))
    )
    each = {('many', i): [many[i]] for i in range(DEPTH)}
    many = {'many': list(many)} if shared else each
    return many | {'head': [head], '': [head]}

  model = 'shared vmap' if shared else 'vmap'
  check(face(model, xs), xs, by=by_hand, same=1e-6 if shared else 0)


@pytest.mark.parametrize('choice', [0, 1])
@pytest.mark.parametrize(
  ('face', 'model'), [(Linen, 'cond'), (Linen, 'switch'), (Nnx, 'cond')]
)
def test_the_branch_not_taken_has_no_calls(face, model, choice):
  def chosen(model, x, _):
    return model.head((model.apply_other if choice else model.apply_one)(x))

  args = X, np.int32(choice)
  taps = check(face(model, *args), *args, by=unrolled(chosen))
  assert set(taps) == {'one', 'other', 'head', ''}
  assert_statistics(taps['one' if choice else 'other'])


@pytest.mark.parametrize(
  ('face', 'axis'),
  [(Linen, 1), (Linen, -1), pytest.param(Nnx, 1, marks=graph_mode)],
)
def test_layers_stacked_along_another_axis_are_an_error_or_left_out(face, axis):
  model = face(f'scan along axis {axis}', X)
  with pytest.raises(ValueError, match='stacked along leading axes'):
    model.empty(model.state, X)

  @jax.jit
  def program(state, x):
    heads = lambda name, _: name in ('head', '')  # noqa: E731
    return without_and_with_taps(model, state, x, where=heads)

  before, after, taps = program(model.state, X)  # which are left out
  assert_bit_for_bit(after, before)
  assert list(taps) == ['head', '']


@both
def test_taps_under_vmap_of_the_gradient(face):
  model = face('mlp', X)

  @jax.jit
  def program(state, x):
    empty = model.empty(state, x)

    def loss(taps, x):
      return wavy(model.tapped(state, taps, x[None])[0])

    each = jax.vmap(jax.grad(loss), (None, 0))(empty, x)
    return each, cotangents(model, state, x)

  each, expected = program(model.state, X)
  for name, ((whole,),) in expected.items():
    for i in range(BATCH):
      assert_statistics(at(each[name], i), whole[i], rtol=1e-4, atol=1e-6)


# What is tapped.


@both
def test_where_takes_only_some(face):
  model, seen = face('mlp', X), []

  def where(name, module):
    seen.append((name, type(module).__name__))
    return name in ('first', 'head')

  @jax.jit
  def program(state, x):
    *same, some = without_and_with_taps(model, state, x, where=where)
    return same, some, without_and_with_taps(model, state, x)[2]

  (before, after), some, every = program(model.state, X)
  assert_bit_for_bit(after, before)
  assert list(some) == ['first', 'head']
  for name, stats in some.items():
    np.testing.assert_allclose(stats.numbers, every[name].numbers, rtol=1e-6)
  assert {('', 'Mlp'), ('second', face.layer)} <= set(seen)
  with pytest.raises(ValueError, match='no module'):
    model.empty(model.state, X, where=lambda *_: False)


@both
def test_a_method_or_a_function_of_the_model_may_be_called(face):
  model = face('mlp', X)

  def by_function(m, x):
    return m.encode(x)

  @jax.jit
  def program(state, x):
    found = [
      without_and_with_taps(model, state, x, method=method)
      for method in ('encode', face.encode, by_function)
    ]
    return found, cotangents(model, state, x, method=by_function)

  found, expected = program(model.state, X)
  for before, after, taps in found:
    assert_bit_for_bit(after, before)
    called = [name for name in taps if taps[name].calls]
    assert called == list(taps)[:2] == ['first', 'second']
    assert not set(taps) - {'first', 'second', 'head', ''}
    for name in called:
      assert_statistics(taps[name], *expected[name], rtol=1e-4)


@both
def test_empty_taps_need_only_shapes_and_have_the_options(face):
  model = face('mlp', X)
  shapes = jax.eval_shape(lambda *u: u, model.state, X)
  for options in ({}, {'histogram': True, 'examples': 7}):
    taps = model.empty(model.state, X, **options)
    assert_bit_for_bit(model.empty(*shapes, **options), taps)
    for stats in taps.values():
      assert (stats.histogram is not None) == bool(options)
      assert (stats.example_squares is not None) == bool(options)
  with pytest.raises(ValueError, match='7 examples'):
    model.tapped(model.state, taps, X, examples=7)


@both
def test_empty_taps_may_be_made_outside_of_the_axes_that_a_model_names(face):
  model = face('mlp', X)

  def mapped(m, x):
    return jax.lax.pmean(jax.lax.psum(m(x), 'i'), 'j')

  def empty(state, method=mapped):
    return model.empty(state, X, method=method)

  taps = jax.eval_shape(empty, model.state)
  assert list(taps) == ['first', 'second', 'head', '']
  assert {stats.numbers.shape for stats in taps.values()} == {(9,)}
  with pytest.raises(NameError, match='nothing'):  # has that name
    empty(model.state, lambda m, x: nothing)  # noqa: F821


@both
def test_without_taps_the_program_is_that_of_the_model(face):
  model = face('mlp', X)

  def text(call):
    lowered = jax.jit(jax.grad(lambda s: wavy(call(s, X)[0]))).lower
    return lowered(model.state).as_text()

  untapped = text(lambda state, x: model.tapped(state, None, x))
  assert untapped == text(model.call)
