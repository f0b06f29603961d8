"""Unmodified Linen models, tapped: against the whole cotangents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

from optax_ghm.linen import Tapped
from tests.support.direct import (
  assert_bit_for_bit,
  assert_statistics,
  at,
  inexact_leaves,
  wavy,
)

BATCH, WIDTH, DEPTH = 5, 4, 3
RNGS = {'dropout': jax.random.key(1)}


@pytest.fixture
def x(rng):
  return jnp.asarray(rng.normal(size=(BATCH, WIDTH)), jnp.float32)


# ---- The whole cotangents of models without lifted transformations.


def calls_of(apply, variables):
  """Path and output's shape of every call, in the order of returns."""
  calls = []

  def note(next_fun, args, kwargs, context):
    output = next_fun(*args, **kwargs)
    if context.method_name == '__call__' and inexact_leaves(output):
      shapes = jax.tree.map(jnp.zeros_like, inexact_leaves(output))
      calls.append(
        ('/'.join(context.module.path), [(u.shape, u.dtype) for u in shapes])
      )
    return output

  with nn.intercept_methods(note):
    jax.eval_shape(apply, variables)
  return calls


def add_noise(apply, variables, noise):
  """With noise[i] added to the output of the i-th call."""
  unused = list(noise)

  def add(next_fun, args, kwargs, context):
    output = next_fun(*args, **kwargs)
    if context.method_name != '__call__' or not inexact_leaves(output):
      return output
    leaves, structure = jax.tree.flatten(output)
    own = iter(unused.pop(0))
    return structure.unflatten(
      u + next(own) if inexact_leaves(u) else u for u in leaves
    )

  with nn.intercept_methods(add):
    return apply(variables)


def whole_cotangents(apply, variables):
  """A list of the cotangents of all calls of every module, by name."""
  calls = calls_of(apply, variables)
  noise = [[jnp.zeros(*u) for u in shapes] for _, shapes in calls]
  found = jax.jit(
    jax.grad(lambda noise: wavy(add_noise(apply, variables, noise)))
  )(noise)
  by_name = {}
  for (name, _), whole in zip(calls, found, strict=True):
    by_name.setdefault(name, []).append(whole)
  return by_name


def run_both(model, variables, *args, tapped=None, **kwargs):
  """(output, gradients), untapped and tapped, and the statistics."""
  tapped = tapped or Tapped(model)
  empty_taps = tapped.init(variables, *args, **kwargs)

  def plain(variables):
    output = model.apply(variables, *args, **kwargs)
    return wavy(output), output

  def with_taps(variables, taps):
    output = tapped.apply(variables, *args, taps=taps, **kwargs)
    return wavy(output), output

  (_, output), grads = jax.jit(
    jax.value_and_grad(plain, has_aux=True, allow_int=True)
  )(variables)
  (_, same), (found, taps) = jax.jit(
    jax.value_and_grad(with_taps, argnums=(0, 1), has_aux=True, allow_int=True)
  )(variables, empty_taps)
  assert list(taps) == list(empty_taps) and taps.layers == empty_taps.layers
  return (output, grads), (same, found), taps


def check(
  model, variables, *args, tapped=None, rtol=1e-4, same_rtol=0, **kwargs
):
  """All laws at once, for models without lifted transformations."""
  before, after, taps = run_both(
    model, variables, *args, tapped=tapped, **kwargs
  )
  assert_bit_for_bit(after, before, rtol=same_rtol)
  expected = whole_cotangents(
    lambda v: model.apply(v, *args, **kwargs), variables
  )
  assert list(taps) == list(expected)
  for name, calls in expected.items():
    assert_statistics(taps[name], *calls, rtol=rtol, atol=1e-6)
  return taps


class Mlp(nn.Module):
  width: int = WIDTH
  kwargs: tuple = ()

  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = nn.tanh(nn.Dense(self.width, **dict(self.kwargs))(x))
    return nn.Dense(2, name='head', **dict(self.kwargs))(x)


class SetUp(nn.Module):
  def setup(self):
    self.encoder = nn.Dense(WIDTH)
    self.layers = [nn.Dense(WIDTH) for _ in range(2)]
    self.decoder = Mlp()

  def encode(self, x):
    return nn.tanh(self.encoder(x))

  def __call__(self, x):
    x = self.encode(x)
    for layer in self.layers:
      x = nn.tanh(layer(x))
    return self.decoder(x)


class Shared(nn.Module):
  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(WIDTH)
    return dense(nn.tanh(dense(x)))


class Several(nn.Module):
  @nn.compact
  def __call__(self, x):
    x, aux = Pair()(x)
    return {'logits': nn.Dense(2)(x), 'aux': aux, 'count': jnp.arange(3)}


class Pair(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.tanh(nn.Dense(WIDTH)(x)), (jnp.sum(x, 1), jnp.arange(2))


class Normed(nn.Module):
  train: bool = True

  @nn.compact
  def __call__(self, x):
    x = nn.BatchNorm(use_running_average=not self.train)(nn.Dense(WIDTH)(x))
    return nn.Dense(2)(nn.Dropout(0.5, deterministic=not self.train)(x))


class Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm()(nn.Embed(5, 4)(x))
    x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x)
    return nn.Dense(2)(x)


class Boxed(nn.Module):
  @nn.compact
  def __call__(self, x):
    kernel_init = nn.with_partitioning(
      nn.linear.default_kernel_init, (None,) * 2
    )
    return nn.Dense(2, kernel_init=kernel_init)(nn.tanh(nn.Dense(WIDTH)(x)))


@pytest.mark.parametrize(
  'model', [Mlp(), SetUp(), Shared(), Several(), Boxed()], ids=repr
)
def test_unmodified_models(model, x):
  check(model, model.init(jax.random.key(0), x), x)


def test_the_statistics_of_an_mlp_by_hand(x):
  model = Mlp()
  variables = model.init(jax.random.key(0), x)

  def by_hand(noise):
    params, h = variables['params'], x
    for i, name in enumerate(('Dense_0', 'Dense_1', 'head')):
      h = h @ params[name]['kernel'] + params[name]['bias'][None] + noise[i]
      h = jnp.tanh(h) if name != 'head' else h
    return wavy(h)

  noise = [jnp.zeros((BATCH, n)) for n in (WIDTH, WIDTH, 2)]
  expected = jax.grad(by_hand)(noise)
  tapped = Tapped(model, histogram=True, examples=BATCH)
  taps = run_both(model, variables, x, tapped=tapped)[2]
  assert list(taps) == ['Dense_0', 'Dense_1', 'head', '']
  for stats, whole in zip(
    taps.values(), [*expected, expected[-1]], strict=True
  ):
    assert stats.histogram is not None and stats.example_squares is not None
    assert_statistics(stats, whole)


def test_names_kinds_and_kernels_in_the_order_of_returns(x):
  model = SetUp()
  taps = Tapped(model).init(model.init(jax.random.key(0), x), x)
  assert [layer[:3] for layer in taps.layers] == [
    ('encoder', 'Dense', True),
    ('layers_0', 'Dense', True),
    ('layers_1', 'Dense', True),
    ('decoder/Dense_0', 'Dense', True),
    ('decoder/Dense_1', 'Dense', True),
    ('decoder/head', 'Dense', True),
    ('decoder', 'Mlp', False),
    ('', 'SetUp', False),
  ]
  assert list(taps) == [layer.name for layer in taps.layers]


def test_only_a_matrix_makes_a_kernel(x):
  model = Normed()
  variables = model.init({'params': jax.random.key(0), **RNGS}, x)
  taps = Tapped(model).init(
    variables,
    x,
    rngs=RNGS,
    mutable=['batch_stats'],
  )
  assert [(layer.name, layer.has_kernel) for layer in taps.layers] == [
    ('Dense_0', True),
    ('BatchNorm_0', False),
    ('Dropout_0', False),
    ('Dense_1', True),
    ('', False),
  ]


def test_a_boxed_matrix_is_a_kernel_too(x):
  boxed = Boxed()
  taps = Tapped(boxed).init(boxed.init(jax.random.key(0), x), x)
  assert [layer.has_kernel for layer in taps.layers] == [True, True, False]


def test_a_shared_module_called_twice_adds_up(x):
  model = Shared()
  taps = check(model, model.init(jax.random.key(0), x), x)
  assert list(taps) == ['Dense_0', '']
  assert taps['Dense_0'].calls == 2


def test_batch_norm_and_dropout(x):
  model = Normed()
  variables = model.init({'params': jax.random.key(0), **RNGS}, x)
  check(model, variables, x, rngs=RNGS, mutable=['batch_stats'])
  still = Normed(train=False)
  check(still, variables, x)


@pytest.mark.parametrize('mutable', [True, ['params'], nn.DenyList('params')])
def test_whatever_is_mutable_no_tap_leaks(x, mutable):
  model, rngs = Normed(), RNGS
  variables = model.init({'params': jax.random.key(0), **RNGS}, x)
  if mutable == ['params']:
    model, rngs = Normed(train=False), None
  tapped = Tapped(model)
  empty_taps = tapped.init(variables, x, rngs=rngs, mutable=mutable)
  plain = model.apply(variables, x, rngs=rngs, mutable=mutable)
  same = tapped.apply(variables, x, taps=empty_taps, rngs=rngs, mutable=mutable)
  assert_bit_for_bit(same, plain)


def test_attention():
  model, tokens = Attention(), jnp.array([[0, 1, 2], [3, 4, 0]])
  # On some processors XLA adds up the gradient of attention in another order.
  variables = model.init(jax.random.key(0), tokens)
  taps = check(model, variables, tokens, same_rtol=1e-6)
  name = 'MultiHeadDotProductAttention_0'
  assert {f'{name}/{part}' for part in ('query', 'key', 'value', 'out')} < set(
    taps
  )


def test_half_precision(x):
  model = Mlp(kwargs=(('param_dtype', jnp.bfloat16),))
  x = x.astype(jnp.bfloat16)
  check(model, model.init(jax.random.key(0), x), x, rtol=1e-2)


def test_half_precision_of_what_is_computed_only(x):
  model = Mlp(kwargs=(('dtype', jnp.bfloat16),))
  variables = model.init(jax.random.key(0), x)
  before, after, taps = run_both(model, variables, x)
  assert_bit_for_bit(after, before)
  assert taps[''].elements == BATCH * 2


def test_frozen_variables(x):
  model = Mlp()
  variables = freeze(model.init(jax.random.key(0), x))
  check(model, variables, x)


def test_a_model_without_parameters(x):
  class Scale(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dropout(0.5, deterministic=True)(2 * x)

  taps = check(Scale(), {}, x)
  assert taps[''].calls == 1


def test_other_methods(x):
  model = SetUp()
  variables = model.init(jax.random.key(0), x)
  for method in ('encode', SetUp.encode, lambda m, x: m.decoder(m.encode(x))):
    taps = check(model, variables, x, method=method)
    assert 'encoder' in taps and 'layers_0' not in taps


def test_where_takes_only_some(x):
  model = SetUp()
  variables = model.init(jax.random.key(0), x)
  every = run_both(model, variables, x)[2]
  seen = []

  def where(name, module):
    seen.append((name, type(module)))
    return isinstance(module, nn.Dense) and name.startswith('decoder')

  tapped = Tapped(model, where=where)
  before, after, some = run_both(model, variables, x, tapped=tapped)
  assert_bit_for_bit(after, before)
  assert list(some) == [f'decoder/{n}' for n in ('Dense_0', 'Dense_1', 'head')]
  for name, stats in some.items():
    np.testing.assert_allclose(stats.numbers, every[name].numbers, rtol=1e-6)
  assert ('', SetUp) in seen and ('decoder', Mlp) in seen


def test_where_that_takes_none_is_an_error(x):
  model = Mlp()
  variables = model.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match='no module'):
    Tapped(model, where=lambda *_: False).init(variables, x)


def test_empty_taps_need_only_shapes(x):
  model = Mlp()
  variables = model.init(jax.random.key(0), x)
  shapes = jax.eval_shape(lambda v: v, (variables, x))
  taps = Tapped(model).init(*shapes)
  assert_bit_for_bit(taps, Tapped(model).init(variables, x))


def test_options_reach_every_tap(x):
  model = Mlp()
  variables = model.init(jax.random.key(0), x)
  taps = Tapped(model, histogram=True, examples=7).init(variables, x)
  for stats in taps.values():
    assert stats.histogram.shape == (64,)
    assert stats.example_norms.shape == (7,)
  plain = Tapped(model).init(variables, x)['head']
  assert plain.histogram is None and plain.example_squares is None


def test_the_wrong_number_of_examples_is_an_error(x):
  model = Mlp()
  variables = model.init(jax.random.key(0), x)
  tapped = Tapped(model, examples=7)
  with pytest.raises(ValueError, match='7 examples'):
    tapped.apply(variables, x, taps=tapped.init(variables, x))


def test_without_taps_the_program_is_that_of_the_model(x):
  model = SetUp()
  variables = model.init(jax.random.key(0), x)
  texts = []
  for apply in (model.apply, Tapped(model).apply):

    def loss(variables, apply=apply):
      return wavy(apply(variables, x))

    texts.append(jax.jit(jax.grad(loss)).lower(variables).as_text())
  assert texts[0] == texts[1]


def test_a_call_leaves_the_variables_alone(x):
  model = SetUp()
  variables = model.init(jax.random.key(0), x)
  structure = jax.tree.structure(variables)
  tapped = Tapped(model)
  tapped.apply(variables, x, taps=tapped.init(variables, x))
  assert jax.tree.structure(variables) == structure
  with pytest.raises(ValueError, match='examples'):
    wrong = Tapped(model, examples=99)
    wrong.apply(variables, x, taps=wrong.init(variables, x))
  assert jax.tree.structure(variables) == structure
  model.apply(variables, x)


def test_a_module_that_another_call_does_not_reach_has_no_calls(x):
  model = SetUp()
  variables = model.init(jax.random.key(0), x)
  tapped = Tapped(model)
  taps = jax.grad(
    lambda s: wavy(tapped.apply(variables, x, taps=s, method='encode'))
  )(tapped.init(variables, x))
  assert {name for name in taps if taps[name].calls} == {'encoder'}


# ---- Stacks of layers, unrolled by hand.


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    return x + nn.tanh(nn.Dense(WIDTH)(x)), None


class Stack(nn.Module):
  """Any lifted block, then a head."""

  lift: tuple

  @nn.compact
  def __call__(self, x):
    block = Block
    for lift in self.lift:
      block = lift(block)
    x, _ = block(name='stack')(x, None)
    return nn.Dense(2, name='head')(x)


def scanned(axes=0, **kwargs):
  return functools.partial(
    nn.scan,
    variable_axes={'params': axes},
    split_rngs={'params': True},
    length=DEPTH,
    **kwargs,
  )


shared_scan = functools.partial(
  nn.scan,
  variable_broadcast='params',
  split_rngs={'params': False},
  length=DEPTH,
)


def stack_by_hand(params, x, noise, shared):
  for i in range(DEPTH):
    dense = params['stack']['Dense_0']
    if not shared:
      dense = jax.tree.map(lambda u, i=i: u[i], dense)
    h = x @ dense['kernel'] + dense['bias'][None] + noise['inner'][i]
    x = x + jnp.tanh(h) + noise['outer'][i]
  head = params['head']
  return wavy(x @ head['kernel'] + head['bias'][None] + noise['head'])


def stack_cotangents(params, x, shared):
  noise = {
    'inner': [jnp.zeros_like(x)] * DEPTH,
    'outer': [jnp.zeros_like(x)] * DEPTH,
    'head': jnp.zeros((BATCH, 2)),
  }
  return jax.jit(jax.grad(stack_by_hand, argnums=2), static_argnums=3)(
    params, x, noise, shared
  )


SCANS = {
  'scan': (scanned(),),
  'scan of remat': (nn.remat, scanned()),
  'remat of scan': (scanned(), nn.remat),
  'scan of jit': (nn.jit, scanned()),
}


@pytest.mark.parametrize('lift', SCANS.values(), ids=SCANS)
def test_scanned_layers_have_taps_of_their_own(x, lift):
  model = Stack(lift)
  variables = model.init(jax.random.key(0), x)
  tapped = Tapped(model, histogram=True, examples=BATCH)
  before, after, taps = run_both(model, variables, x, tapped=tapped)
  assert_bit_for_bit(after, before)
  expected = stack_cotangents(variables['params'], x, False)
  assert list(taps) == ['stack/Dense_0', 'stack', 'head', '']
  assert taps['stack'].calls.tolist() == [1] * DEPTH
  for i in range(DEPTH):
    assert_statistics(
      at(taps['stack/Dense_0'], i), expected['inner'][i], rtol=1e-4
    )
    assert_statistics(at(taps['stack'], i), expected['outer'][i], rtol=1e-4)
  assert_statistics(taps['head'], expected['head'], rtol=1e-4)


@pytest.mark.parametrize(
  'lift',
  [(shared_scan,), (nn.remat, shared_scan)],
  ids=['scan', 'scan of remat'],
)
def test_steps_that_share_their_parameters_add_up(x, lift):
  model = Stack(lift)
  variables = model.init(jax.random.key(0), x)
  before, after, taps = run_both(model, variables, x)
  assert_bit_for_bit(after, before)
  expected = stack_cotangents(variables['params'], x, True)
  assert_statistics(taps['stack/Dense_0'], *expected['inner'], rtol=1e-4)
  assert_statistics(taps['stack'], *expected['outer'], rtol=1e-4)
  assert_statistics(taps['head'], expected['head'], rtol=1e-4)


@pytest.mark.parametrize('lift', [(nn.remat,), (nn.jit,)])
def test_a_rematted_or_jitted_module_is_tapped_once(x, lift):
  model = Stack(lift)
  variables = model.init(jax.random.key(0), x)
  before, after, taps = run_both(model, variables, x)
  assert_bit_for_bit(after, before)
  expected = whole_cotangents(lambda v: Stack(()).apply(v, x), variables)
  assert list(taps) == list(expected)
  for name, calls in expected.items():
    assert_statistics(taps[name], *calls, rtol=1e-4)


def test_a_scan_that_is_the_model(x):
  model = scanned()(Block)()
  variables = model.init(jax.random.key(0), x, None)
  _, _, taps = run_both(model, variables, x, None)
  assert taps['Dense_0'].calls.tolist() == [1] * DEPTH
  assert taps[''].calls.tolist() == [1] * DEPTH


def test_scans_in_scans_have_two_leading_axes(x):
  inner = functools.partial(
    nn.scan, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
  )
  model = Stack((inner, scanned()))
  variables = model.init(jax.random.key(0), x)
  before, after, taps = run_both(model, variables, x)
  assert_bit_for_bit(after, before)
  assert taps['stack/Dense_0'].calls.tolist() == [[1, 1]] * DEPTH
  assert taps['head'].calls == 1


def test_modules_without_parameters_in_a_scan_follow_their_surroundings(x):
  class Silent(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      x = nn.Dense(WIDTH)(x)
      return nn.Dropout(0.5, deterministic=True)(nn.tanh(x)), None

  model = scanned()(Silent)(name=None)
  variables = model.init(jax.random.key(0), x, None)
  before, after, taps = run_both(model, variables, x, None)
  assert_bit_for_bit(after, before)
  assert taps['Dropout_0'].calls.tolist() == [1] * DEPTH


def test_scanned_boxes(x):
  class BoxedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
      return nn.tanh(nn.Dense(WIDTH, kernel_init=init)(x)), None

  metadata = {nn.PARTITION_NAME: 'layers'}
  model = scanned(metadata_params=metadata)(BoxedBlock)()
  variables = model.init(jax.random.key(0), x, None)
  before, after, taps = run_both(model, variables, x, None)
  assert_bit_for_bit(after, before)
  assert taps['Dense_0'].calls.tolist() == [1] * DEPTH


@pytest.mark.parametrize('axis', [1, -1])
def test_layers_stacked_along_another_axis_are_an_error(x, axis):
  model = Stack((scanned(axis),))
  variables = model.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match='stacked along leading axes'):
    Tapped(model).init(variables, x)


def test_even_where_the_shapes_do_not_tell_another_axis_is_an_error(rng):
  x = jnp.asarray(rng.normal(size=(BATCH, 3)), jnp.float32)

  class Square(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return nn.tanh(nn.Dense(3)(x)), None

  model = scanned(1)(Square)()
  variables = model.init(jax.random.key(0), x, None)
  tapped = Tapped(model)
  with pytest.raises(ValueError):  # noqa: PT011
    tapped.apply(variables, x, None, taps=tapped.init(variables, x, None))


def test_layers_stacked_along_another_axis_can_be_left_out(x):
  model = Stack((scanned(1),))
  variables = model.init(jax.random.key(0), x)
  tapped = Tapped(model, where=lambda name, _: name in ('head', ''))
  before, after, taps = run_both(model, variables, x, tapped=tapped)
  assert_bit_for_bit(after, before)
  assert list(taps) == ['head', '']


LSTM_GATES = [f'{a}{b}' for a in 'hi' for b in 'ifgo']


def lstm_by_hand(params, xs, noise):
  c = h = jnp.zeros((BATCH, WIDTH))
  outputs = []
  for t in range(xs.shape[1]):

    def gate(name, h=h, t=t):
      parts = [params[part + name] for part in 'ih']
      i = xs[:, t] @ parts[0]['kernel'] + noise[f'i{name}'][t]
      j = h @ parts[1]['kernel'] + parts[1]['bias'][None] + noise[f'h{name}'][t]
      return i + j

    i, f, o = (jax.nn.sigmoid(gate(name)) for name in 'ifo')
    g = jnp.tanh(gate('g'))
    c = f * c + i * g
    h = o * jnp.tanh(c)
    kept, out = h + noise['kept'][t], h + noise['out'][t]
    c, h = c + noise['c'][t], kept
    outputs.append(out)
  return wavy(jnp.stack(outputs, axis=1))


def test_the_steps_of_an_lstm_add_up(rng):
  xs = jnp.asarray(rng.normal(size=(BATCH, 3, 2)), jnp.float32)
  model = nn.RNN(nn.LSTMCell(WIDTH))
  variables = model.init(jax.random.key(0), xs)
  before, after, taps = run_both(model, variables, xs)
  assert_bit_for_bit(after, before)
  noise = {
    name: jnp.zeros((3, BATCH, WIDTH))
    for name in (*LSTM_GATES, 'kept', 'out', 'c')
  }
  (cell,) = variables['params']
  whole = jax.jit(jax.grad(lstm_by_hand, argnums=2))(
    variables['params'][cell], xs, noise
  )
  for name in LSTM_GATES:
    stats = taps[f'{cell}/{name}']
    assert_statistics(stats, *whole[name], rtol=1e-4, atol=1e-6)
  steps = [[whole[name][t] for name in ('c', 'kept', 'out')] for t in range(3)]
  assert_statistics(taps[cell], *steps, rtol=1e-4, atol=1e-6)


class Twin(nn.Module):
  shared: bool

  @nn.compact
  def __call__(self, x):
    axes = {} if self.shared else {'variable_axes': {'params': 0}}
    dense = nn.vmap(
      nn.Dense,
      in_axes=0,
      split_rngs={'params': not self.shared},
      **({'variable_axes': {'params': None}} if self.shared else axes),
    )(WIDTH, name='many')
    return nn.Dense(2, name='head')(nn.tanh(dense(x)))


@pytest.mark.parametrize('shared', [True, False])
def test_vmapped_modules(rng, shared):
  x = jnp.asarray(rng.normal(size=(DEPTH, BATCH, WIDTH)), jnp.float32)
  model = Twin(shared)
  variables = model.init(jax.random.key(0), x)
  before, after, taps = run_both(model, variables, x)
  assert_bit_for_bit(after, before, rtol=1e-6 if shared else 0)

  def by_hand(noise):
    many, head = (variables['params'][name] for name in ('many', 'head'))
    rows = []
    for i in range(DEPTH):
      own = many if shared else jax.tree.map(lambda u, i=i: u[i], many)
      h = jnp.tanh(x[i] @ own['kernel'] + own['bias'][None] + noise[i])
      rows.append(h @ head['kernel'] + head['bias'][None])
    return wavy(jnp.stack(rows))

  whole = jax.grad(by_hand)(jnp.zeros((DEPTH, BATCH, WIDTH)))
  if shared:
    assert_statistics(taps['many'], *whole, rtol=1e-4)
  else:
    for i in range(DEPTH):
      assert_statistics(at(taps['many'], i), whole[i], rtol=1e-4)


class Branches(nn.Module):
  """One of two layers, by a traced choice."""

  kind: str

  @nn.compact
  def __call__(self, x, choice):
    one, other = nn.Dense(WIDTH, name='one'), nn.Dense(WIDTH, name='other')

    def first(module, x):
      return nn.tanh(one(x))

    def second(module, x):
      return nn.tanh(other(x))

    if self.is_initializing():
      first(self, x)
      second(self, x)
    if self.kind == 'cond':
      x = nn.cond(choice == 0, first, second, self, x)
    else:
      x = nn.switch(choice, [first, second], self, x)
    return nn.Dense(2, name='head')(x)


@pytest.mark.parametrize('choice', [0, 1])
@pytest.mark.parametrize('kind', ['cond', 'switch'])
def test_the_branch_not_taken_has_no_calls(x, kind, choice):
  model = Branches(kind)
  variables = model.init(jax.random.key(0), x, jnp.int32(0))
  before, after, taps = run_both(model, variables, x, jnp.int32(choice))
  assert_bit_for_bit(after, before)
  names = ['one', 'other']
  taken, left = names[choice], names[1 - choice]
  params = variables['params']

  def by_hand(noise):
    own, head = params[taken], params['head']
    h = jnp.tanh(x @ own['kernel'] + own['bias'][None] + noise)
    return wavy(h @ head['kernel'] + head['bias'][None])

  whole = jax.grad(by_hand)(jnp.zeros_like(x))
  assert_statistics(taps[taken], whole, rtol=1e-4)
  assert_statistics(taps[left])


def test_a_module_jitted_untapped_is_traced_anew(x):
  model = Stack((nn.jit,))
  variables = model.init(jax.random.key(0), x)
  plain = model.apply(variables, x)
  tapped = Tapped(model)
  empty_taps = tapped.init(variables, x)

  def loss(taps):
    return wavy(tapped.apply(variables, x, taps=taps))

  for _ in range(2):
    taps = jax.grad(loss)(empty_taps)
    assert {int(s.calls) for s in taps.values()} == {1}
    np.testing.assert_array_equal(model.apply(variables, x), plain)
  expected = whole_cotangents(lambda v: Stack(()).apply(v, x), variables)
  for name, calls in expected.items():
    assert_statistics(taps[name], *calls, rtol=1e-4)


def test_taps_under_vmap_of_the_gradient(x):
  model = Mlp()
  variables = model.init(jax.random.key(0), x)
  tapped = Tapped(model)
  empty_taps = tapped.init(variables, x)

  def loss(taps, x):
    return wavy(tapped.apply(variables, x[None], taps=taps))

  each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(empty_taps, x)
  expected = whole_cotangents(lambda v: model.apply(v, x), variables)
  for name, ((whole,),) in expected.items():
    for i in range(BATCH):
      assert_statistics(at(each[name], i), whole[i], rtol=1e-4, atol=1e-6)


def test_two_models_of_the_same_class_do_not_meet(x):
  model = Mlp()
  variables = model.init(jax.random.key(0), x)
  tapped = Tapped(model)
  empty_taps = tapped.init(variables, x)

  def loss(taps):
    inner = tapped.apply(variables, x, taps=taps)
    return wavy(inner) + wavy(model.apply(variables, x))

  taps = jax.grad(loss)(empty_taps)
  assert {int(s.calls) for s in taps.values()} == {1}


# ---- In one line.


def check_in_one_line(model, variables, loss_fn, *args, **kwargs):
  """Against jax.value_and_grad, and taps that are found in two steps."""
  taps = kwargs.pop('taps')
  plain = jax.jit(jax.value_and_grad(loss_fn, **kwargs))
  in_one_line = jax.jit(Tapped(model).value_and_grad(loss_fn, **kwargs))
  value, grads, found = in_one_line(variables, *args)
  assert_bit_for_bit((value, grads), plain(variables, *args))
  assert found.layers == taps.layers
  for name, stats in taps.items():
    np.testing.assert_allclose(
      found[name].numbers, stats.numbers, rtol=1e-6, err_msg=name
    )


@pytest.mark.parametrize(
  'model',
  [Mlp(), SetUp(), Shared(), Several(), Boxed(), Stack((nn.remat, scanned()))],
  ids=lambda model: type(model).__name__,
)
def test_a_loss_needs_no_change(model, x):
  variables = model.init(jax.random.key(0), x)
  *_, taps = run_both(model, variables, x)

  def loss_fn(variables, x):
    return wavy(model.apply(variables, x))

  check_in_one_line(model, variables, loss_fn, x, taps=taps)


def test_params_alone_auxiliary_data_and_dropout(x):
  model = Normed()
  variables = model.init({'params': jax.random.key(0), **RNGS}, x)
  kwargs = {'rngs': RNGS, 'mutable': ['batch_stats']}
  *_, taps = run_both(model, variables, x, **kwargs)

  def loss_fn(params, moving, x):
    logits, updated = model.apply(
      {'params': params, 'batch_stats': moving}, x, **kwargs
    )
    # The sum of squares sees the parameters alone.
    squares = sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))
    aux = updated, len(jax.tree.leaves(params))
    return wavy((logits, updated)) + squares, aux

  params, moving = variables['params'], variables['batch_stats']
  check_in_one_line(
    model, params, loss_fn, moving, x, has_aux=True, argnums=(0, 2), taps=taps
  )


def test_several_calls_add_up_and_other_models_are_left_alone(x):
  one, other = Mlp(), SetUp()
  of_one, of_other = (m.init(jax.random.key(0), x) for m in (one, other))

  @jax.jit
  @Tapped(one).value_and_grad
  def step(of_one, x):
    hidden = other.apply(of_other, x, method='encode')
    return wavy(one.apply(of_one, x)) + wavy(one.apply(of_one, hidden))

  _, _, taps = step(of_one, x)
  assert set(taps) == {'Dense_0', 'Dense_1', 'head', ''}
  assert {float(stats.calls) for stats in taps.values()} == {2}


def test_methods_that_are_functions_are_tapped(x):
  model = SetUp()
  variables = model.init(jax.random.key(0), x)

  def loss_fn(variables):
    return wavy(
      model.apply(variables, x, method=lambda m, x: m.decoder(m.encode(x)))
    )

  _, _, taps = jax.jit(Tapped(model).value_and_grad(loss_fn))(variables)
  assert list(taps)[0] == 'encoder' and 'decoder/head' in taps
  assert {float(stats.calls) for stats in taps.values()} == {1}


def test_a_compiled_step_is_traced_once(x):
  model, traces = Mlp(), []
  variables = model.init(jax.random.key(0), x)

  def loss_fn(variables, x):
    traces.append(x)
    return wavy(model.apply(variables, x))

  step = jax.jit(Tapped(model).value_and_grad(loss_fn))
  for i in range(3):
    step(variables, i + x)
  assert len(traces) == 2  # to find the layers, and to differentiate


@pytest.mark.parametrize('wrap', [jax.jit, jax.checkpoint])
def test_a_call_that_is_not_traced_again_is_an_error(x, wrap):
  model = Mlp()
  variables = model.init(jax.random.key(0), x)

  @wrap
  def forward(variables, x):
    return model.apply(variables, x)

  step = Tapped(model).value_and_grad(lambda *args: wavy(forward(*args)))
  with pytest.raises(ValueError, match=r'jax\.jit and jax\.checkpoint'):
    step(variables, x)


def test_a_loss_without_the_model_is_an_error(x):
  other = SetUp()
  variables = other.init(jax.random.key(0), x)
  with pytest.raises(ValueError, match='no module was called'):
    Tapped(Mlp()).value_and_grad(lambda v: wavy(other.apply(v, x)))(variables)
