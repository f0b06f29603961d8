"""Unmodified NNX models, tapped: against the whole cotangents."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx

from optax_ghm.nnx import Tapped
from tests.support.direct import (
  assert_bit_for_bit,
  assert_statistics,
  at,
  inexact_leaves,
  wavy,
)

BATCH, WIDTH, DEPTH = 5, 4, 3


@pytest.fixture
def x(rng):
  return jnp.asarray(rng.normal(size=(BATCH, WIDTH)), jnp.float32)


# ---- The whole cotangents of models without lifted transformations.


@contextlib.contextmanager
def every_call(model, f):
  """Makes f(name, output) the output of all modules; patches their classes."""
  names = {id(m): '/'.join(map(str, p)) for p, m in nnx.iter_modules(model)}
  kinds = {type(m) for _, m in nnx.iter_modules(model) if callable(m)}
  kept = {kind: kind.__dict__.get('__call__') for kind in kinds}

  def patched(kind, call):
    def __call__(self, *args, **kwargs):
      output = call(self, *args, **kwargs)
      if type(self) is not kind or not inexact_leaves(output):
        return output
      return f(names[id(self)], output)

    return __call__

  calls = {kind: patched(kind, kind.__call__) for kind in kinds}
  try:
    for kind, call in calls.items():
      kind.__call__ = call
    yield
  finally:
    for kind, call in kept.items():
      if call is None:
        del kind.__call__
      else:
        kind.__call__ = call


def fresh(state):
  """Variables of this trace."""
  return jax.tree.map(lambda u: u, state)


def whole_cotangents(model, *args, method=lambda m, *args: m(*args), **kwargs):
  """A list of the cotangents of all calls of every module, by name."""
  graph, state = nnx.split(model)
  calls = []

  def run(f, state):
    copy = nnx.merge(graph, fresh(state))
    with every_call(copy, f):
      return method(copy, *args, **kwargs)

  def note(name, output):
    shapes = [(u.shape, u.dtype) for u in inexact_leaves(output)]
    calls.append((name, shapes))
    return output

  jax.eval_shape(lambda state: run(note, state), state)

  def loss(noise, state):
    unused = list(noise)

    def add(_, output):
      leaves, structure = jax.tree.flatten(output)
      own = iter(unused.pop(0))
      return structure.unflatten(
        u + next(own) if inexact_leaves(u) else u for u in leaves
      )

    return wavy(run(add, state))

  noise = [[jnp.zeros(*u) for u in shapes] for _, shapes in calls]
  by_name = {}
  for (name, _), whole in zip(
    calls, jax.jit(jax.grad(loss))(noise, state), strict=True
  ):
    by_name.setdefault(name, []).append(whole)
  return by_name


def kinds(model):
  return [(path, type(m)) for path, m in nnx.iter_modules(model)]


def attributes(model):
  return [
    (path, sorted(vars(m)), sorted(m._pytree__nodes))
    for path, m in nnx.iter_modules(model)
  ]


def run_nnx(model, tapped, *args, **kwargs):
  """(output, gradients, state after), untapped and tapped; statistics.

  Under ``nnx.jit`` and ``nnx.grad``.
  """
  one, other = nnx.clone(model), nnx.clone(model)
  empty_taps = tapped.init(model, *args, **kwargs)

  @nnx.jit
  def plain(model):
    def loss(model):
      output = tapped.apply(model, *args, **kwargs)
      return wavy(output), output

    return nnx.value_and_grad(loss, has_aux=True)(model)

  @nnx.jit
  def with_taps(model, taps):
    def loss(model, taps):
      output = tapped.apply(model, *args, taps=taps, **kwargs)
      return wavy(output), output

    return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, taps)

  (_, output), grads = plain(one)
  (_, same), (found, taps) = with_taps(other, empty_taps)
  assert nnx.graphdef(other) == nnx.graphdef(one)
  assert kinds(other) == kinds(model)
  assert attributes(other) == attributes(model)
  before, after = ((output, grads, one), (same, found, other))
  return *(
    (out, nnx.to_pure_dict(g), nnx.to_pure_dict(nnx.state(m, not_random)))
    for out, g, m in (before, after)
  ), taps


def not_random(path, value):
  """All but keys of random numbers, which NumPy does not compare."""
  return not issubclass(getattr(value, 'type', type(value)), nnx.RngState)


def run_jax(model, tapped, *args, **kwargs):
  """The same under ``jax.jit`` and ``jax.grad``."""
  graph, params, other = nnx.split(model, nnx.Param, ...)
  empty_taps = tapped.init(model, *args, **kwargs)

  def loss(params, taps, other):
    copy = nnx.merge(graph, params, fresh(other))
    output = tapped.apply(copy, *args, taps=taps, **kwargs)
    assert kinds(copy) == kinds(model)
    assert attributes(copy) == attributes(model)
    return wavy(output), (output, nnx.state(copy, not_random))

  (_, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    params, None, other
  )
  (_, same), (found, taps) = jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  )(params, empty_taps, other)
  return (aux, grads), (same, found), taps


RUNS = [run_nnx, run_jax]


def check(
  model, *args, tapped=None, by=None, rtol=1e-4, runs=(run_nnx,), **kwargs
):
  """All laws at once; ``by`` is an unrolled model that does the same."""
  tapped = tapped or Tapped()
  method = kwargs.get('method', lambda m, *args: m(*args))
  if isinstance(method, str):
    name, method = method, lambda m, *args: getattr(m, name)(*args)
  expected = whole_cotangents(by or model, *args, method=method)
  found = []
  for run in runs:
    before, after, taps = run(model, tapped, *args, **kwargs)
    assert_bit_for_bit(after, before)
    called = [name for name in taps if taps[name].calls.any()]
    assert called == list(expected)
    for name, calls in expected.items():
      assert_statistics(taps[name], *calls, rtol=rtol, atol=1e-6)
    found.append(taps)
  assert all(taps.layers == found[0].layers for taps in found)
  return found[0]


class Mlp(nnx.Module):
  def __init__(self, rngs, **kwargs):
    self.layers = nnx.List(
      nnx.Linear(WIDTH, WIDTH, rngs=rngs, **kwargs) for _ in range(2)
    )
    self.head = nnx.Linear(WIDTH, 2, rngs=rngs, **kwargs)

  def encode(self, x):
    for layer in self.layers:
      x = nnx.tanh(layer(x))
    return x

  def __call__(self, x):
    return self.head(self.encode(x))


class Shared(nnx.Module):
  def __init__(self, rngs):
    self.one = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    self.again = self.one

  def __call__(self, x):
    return self.again(nnx.tanh(self.one(x)))


class Several(nnx.Module):
  def __init__(self, rngs):
    self.inner = Pair(rngs)

  def __call__(self, x):
    y, aux = self.inner(x)
    return {'logits': y, 'aux': aux, 'count': jnp.arange(3)}


class Pair(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):
    return nnx.tanh(self.dense(x)), (jnp.sum(x, 1), jnp.arange(2))


class Normed(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(self.drop(self.norm(self.dense(x))))


class Attention(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(5, 4, rngs=rngs)
    self.norm = nnx.LayerNorm(4, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      num_heads=2, in_features=4, decode=False, rngs=rngs
    )

  def __call__(self, x):
    x = self.norm(self.embed(x))
    return x + self.attention(x)


def sequential(rngs):
  return nnx.Sequential(
    nnx.Linear(WIDTH, WIDTH, rngs=rngs),
    nnx.tanh,
    nnx.Linear(WIDTH, 2, rngs=rngs),
  )


@pytest.mark.parametrize('build', [Mlp, Shared, Several, sequential])
def test_unmodified_models(build, x):
  check(build(nnx.Rngs(0)), x, runs=RUNS)


def test_the_statistics_of_an_mlp_by_hand(x):
  model = Mlp(nnx.Rngs(0))

  def by_hand(noise):
    h = x
    for i, layer in enumerate([*model.layers, model.head]):
      h = h @ layer.kernel[...] + layer.bias[...][None] + noise[i]
      h = jnp.tanh(h) if i < 2 else h
    return wavy(h)

  expected = jax.grad(by_hand)(
    [jnp.zeros((BATCH, n)) for n in (WIDTH, WIDTH, 2)]
  )
  taps = run_nnx(model, Tapped(histogram=True, examples=BATCH), x)[2]
  assert list(taps) == ['layers/0', 'layers/1', 'head', '']
  for stats, whole in zip(
    taps.values(), [*expected, expected[-1]], strict=True
  ):
    assert stats.histogram is not None and stats.example_squares is not None
    assert_statistics(stats, whole)


def test_names_kinds_and_kernels_in_the_order_of_returns(x):
  taps = Tapped().init(Normed(nnx.Rngs(0)), x)
  assert [layer[:3] for layer in taps.layers] == [
    ('dense', 'Linear', True),
    ('norm', 'BatchNorm', False),
    ('drop', 'Dropout', False),
    ('head', 'Linear', True),
    ('', 'Normed', False),
  ]
  assert list(taps) == [layer.name for layer in taps.layers]


def test_a_shared_module_called_twice_adds_up(x):
  taps = check(Shared(nnx.Rngs(0)), x)
  assert [int(s.calls) for s in taps.values()] == [2, 1]


def test_batch_norm_and_dropout(x):
  model = Normed(nnx.Rngs(0))
  check(model, x, runs=RUNS)
  mean = model.norm.mean[...]
  np.testing.assert_array_equal(mean, 0)  # by init, nothing has changed
  still = nnx.view(model, deterministic=True, use_running_average=True)
  check(still, x)


def test_statistics_and_random_streams_move_on_as_without_taps(x):
  one, other = Normed(nnx.Rngs(0)), Normed(nnx.Rngs(0))
  tapped = Tapped()
  empty_taps = tapped.init(other, x)
  for _ in range(2):
    np.testing.assert_array_equal(
      one(x), tapped.apply(other, x, taps=empty_taps)
    )
  assert one.drop.rngs.count[...] == other.drop.rngs.count[...] > 0
  np.testing.assert_array_equal(one.norm.mean[...], other.norm.mean[...])
  assert one.norm.mean[...].any()


def test_attention():
  tokens = jnp.array([[0, 1, 2], [3, 4, 0]])
  taps = check(Attention(nnx.Rngs(0)), tokens)
  parts = {f'attention/{part}' for part in ('query', 'key', 'value', 'out')}
  assert parts < set(taps)


def test_half_precision(x):
  model = Mlp(nnx.Rngs(0), param_dtype=jnp.bfloat16)
  check(model, x.astype(jnp.bfloat16), rtol=1e-2)


def test_partitioned_parameters(x):
  with nnx.use_eager_sharding(False):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, 'm'))
    model = Mlp(nnx.Rngs(0), kernel_init=init)
    assert model.head.kernel.get_metadata('out_sharding') == (None, 'm')
    check(model, x)


def test_other_methods(x):
  model = Mlp(nnx.Rngs(0))
  for method in ('encode', Mlp.encode):
    taps = check(model, x, method=method)
    assert list(taps)[:2] == ['layers/0', 'layers/1']
    assert set(list(taps)[2:]) == {'', 'head'}


def test_a_module_never_called_has_no_calls_and_comes_last(x):
  model = Mlp(nnx.Rngs(0))
  taps = run_nnx(model, Tapped(), x, method='encode')[2]
  assert list(taps)[:2] == ['layers/0', 'layers/1']
  assert set(taps) == {'layers/0', 'layers/1', 'head', ''}
  assert_statistics(taps['head'])
  assert_statistics(taps[''])


def test_where_takes_only_some(x):
  model = Mlp(nnx.Rngs(0))
  every = run_jax(model, Tapped(), x)[2]

  def where(name, module):
    return isinstance(module, nnx.Linear) and name.startswith('layers')

  before, after, some = run_nnx(model, Tapped(where=where), x)
  assert_bit_for_bit(after, before)
  assert list(some) == ['layers/0', 'layers/1']
  for name, stats in some.items():
    np.testing.assert_allclose(stats.numbers, every[name].numbers, rtol=1e-6)


def test_where_that_takes_none_is_an_error(x):
  with pytest.raises(ValueError, match='no module'):
    Tapped(where=lambda *_: False).init(Mlp(nnx.Rngs(0)), x)


def test_empty_taps_need_only_shapes(x):
  model = Mlp(nnx.Rngs(0))
  shapes = jax.eval_shape(lambda x: x, x)
  assert_bit_for_bit(Tapped().init(model, shapes), Tapped().init(model, x))
  abstract = nnx.eval_shape(lambda: Mlp(nnx.Rngs(0)))
  assert_bit_for_bit(Tapped().init(abstract, x), Tapped().init(model, x))


def test_without_taps_the_program_is_that_of_the_model(x):
  graph, state = nnx.split(Mlp(nnx.Rngs(0)))
  texts = []
  for apply in (lambda m, x: m(x), Tapped().apply):

    def loss(state, apply=apply):
      return wavy(apply(nnx.merge(graph, state), x))

    texts.append(jax.jit(jax.grad(loss)).lower(state).as_text())
  assert texts[0] == texts[1]


def assert_untouched(model, before):
  graph, structure, own = before
  assert nnx.graphdef(model) == graph
  assert kinds(model) == structure
  assert attributes(model) == own


def about(model):
  return nnx.graphdef(model), kinds(model), attributes(model)


def test_the_model_afterwards_is_as_before(x):
  model = Normed(nnx.Rngs(0))
  before = about(model)
  tapped = Tapped()
  empty_taps = tapped.init(model, x)
  assert_untouched(model, before)
  tapped.apply(model, x, taps=empty_taps)
  assert_untouched(model, before)


@pytest.mark.parametrize('where', ['init', 'apply'])
def test_the_model_is_as_before_also_when_the_call_raised(x, where):
  model = Mlp(nnx.Rngs(0))
  before = about(model)
  tapped = Tapped()
  empty_taps = tapped.init(model, x)
  wrong = jnp.ones((BATCH, WIDTH + 1))
  with pytest.raises(TypeError):
    if where == 'init':
      tapped.init(model, wrong)
    else:
      tapped.apply(model, wrong, taps=empty_taps)
  assert_untouched(model, before)
  model(x)

  def broken(model, x):
    model.layers[0](x)
    raise RuntimeError('midway')

  with pytest.raises(RuntimeError, match='midway'):
    if where == 'init':
      tapped.init(model, x, method=broken)
    else:
      tapped.apply(model, x, taps=empty_taps, method=broken)
  assert_untouched(model, before)


def test_while_it_runs_modules_are_still_of_their_class(x):
  model = Mlp(nnx.Rngs(0))

  def method(model, x):
    assert isinstance(model, Mlp)
    assert all(isinstance(m, nnx.Linear) for m in model.layers)
    assert type(model).__name__ == 'Mlp'
    return model(x)

  check(model, x, method=method)


def test_other_instances_stay_untapped(x):
  model, other = Mlp(nnx.Rngs(0)), Mlp(nnx.Rngs(1))
  tapped = Tapped()
  empty_taps = tapped.init(model, x)
  call = Mlp.__call__

  def method(model, x):
    assert Mlp.__call__ is call
    return model(x) + other(x) + Mlp(nnx.Rngs(2))(x)

  @nnx.grad(argnums=(0, 1))
  def grad(model, taps):
    return wavy(tapped.apply(model, x, taps=taps, method=method))

  _, taps = grad(model, empty_taps)
  assert {int(s.calls) for s in taps.values()} == {1}
  assert Mlp.__call__ is call


def test_a_model_from_outside_of_a_gradient_is_as_before(x):
  model = Mlp(nnx.Rngs(0))
  before = about(model)
  tapped = Tapped()
  empty_taps = tapped.init(model, x)
  with contextlib.suppress(errors.TraceContextError):
    jax.grad(lambda s: wavy(tapped.apply(model, x, taps=s)))(empty_taps)
  assert_untouched(model, before)
  model(x)


# ---- Transformations, against the same layers unrolled.


class Block(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):
    return x + nnx.tanh(self.dense(x))


class Stack(nnx.Module):
  """Blocks of which the parameters are stacked, then a head."""

  def __init__(self, rngs, *, remat=False):
    @nnx.split_rngs(splits=DEPTH)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
      return Block(rngs)

    self.blocks = make(rngs)
    self.head = nnx.Linear(WIDTH, 2, rngs=rngs)
    self.remat = remat

  def __call__(self, x):
    def step(x, block):
      return block(x)

    scan = nnx.scan(
      nnx.remat(step) if self.remat else step,
      in_axes=(nnx.Carry, 0),
      out_axes=nnx.Carry,
    )
    return self.head(scan(x, self.blocks))


class Unrolled(nnx.Module):
  def __init__(self, stack):
    graph, state = nnx.split(stack.blocks)
    self.blocks = nnx.List(
      nnx.merge(graph, jax.tree.map(lambda u, i=i: u[i], state))
      for i in range(DEPTH)
    )
    self.head = stack.head

  def __call__(self, x):
    for block in self.blocks:
      x = block(x)
    return self.head(x)


@pytest.mark.parametrize(
  ('run', 'kwargs'),
  [(run_nnx, {}), (run_jax, {}), (run_nnx, {'remat': True})],
  ids=['nnx', 'jax', 'remat'],
)
def test_scanned_layers_have_taps_of_their_own(x, run, kwargs):
  model = Stack(nnx.Rngs(0), **kwargs)
  before, after, taps = run(model, Tapped(histogram=True, examples=BATCH), x)
  assert_bit_for_bit(after, before)
  assert list(taps) == ['blocks/dense', 'blocks', 'head', '']
  assert [layer.has_kernel for layer in taps.layers] == [
    True,
    False,
    True,
    False,
  ]
  expected = whole_cotangents(Unrolled(model), x)
  assert taps['blocks'].calls.tolist() == [1] * DEPTH
  for i in range(DEPTH):
    for name, own in (('blocks', ''), ('blocks/dense', '/dense')):
      assert_statistics(
        at(taps[name], i), *expected[f'blocks/{i}{own}'], rtol=1e-4
      )
  for name in ('head', ''):
    assert_statistics(taps[name], *expected[name], rtol=1e-4)


def test_a_stack_of_vectors_is_no_kernel(x):
  class Norms(nnx.Module):
    def __init__(self, rngs):
      @nnx.split_rngs(splits=DEPTH)
      @nnx.vmap(in_axes=0, out_axes=0)
      def make(rngs):
        return nnx.LayerNorm(WIDTH, rngs=rngs)

      self.norms = make(rngs)

    def __call__(self, x):
      scan = nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
      return scan(self.norms, x)

  taps = Tapped().init(Norms(nnx.Rngs(0)), x)
  assert taps.layers[0][:3] == ('norms', 'LayerNorm', False)
  assert taps['norms'].calls.shape == (DEPTH,)


def test_empty_taps_go_where_parameters_go(x):
  model = Stack(nnx.Rngs(0))

  def method(model, x):
    scan = nnx.scan(
      lambda x, block: block(x),
      in_axes=(nnx.Carry, nnx.StateAxes({nnx.Param: 0, ...: None})),
      out_axes=nnx.Carry,
      length=DEPTH,
    )
    return model.head(scan(x, model.blocks))

  before, after, taps = run_nnx(model, Tapped(), x, method=method)
  assert_bit_for_bit(after, before)
  expected = whole_cotangents(Unrolled(model), x)
  for i in range(DEPTH):
    assert_statistics(
      at(taps['blocks'], i), *expected[f'blocks/{i}'], rtol=1e-4
    )


class Repeated(nnx.Module):
  """One block in every step."""

  def __init__(self, rngs):
    self.block = Block(rngs)

  def __call__(self, x):
    @nnx.scan(in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=DEPTH)
    def scan(x, block):
      return block(x)

    return scan(x, self.block)

  def unrolled(self, x):
    for _ in range(DEPTH):
      x = self.block(x)
    return x


@pytest.mark.parametrize('run', RUNS)
def test_steps_that_share_their_parameters_add_up(x, run):
  model = Repeated(nnx.Rngs(0))
  before, after, taps = run(model, Tapped(), x)
  assert_bit_for_bit(after, before)
  expected = whole_cotangents(model, x, method=Repeated.unrolled)
  assert taps['block'].calls == DEPTH
  for name, calls in expected.items():
    assert_statistics(taps[name], *calls, rtol=1e-4)


@pytest.mark.parametrize('run', RUNS)
def test_the_steps_of_an_lstm_add_up(rng, run):
  xs = jnp.asarray(rng.normal(size=(BATCH, 3, 2)), jnp.float32)
  model = nnx.RNN(nnx.LSTMCell(2, WIDTH, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
  before, after, taps = run(model, Tapped(), xs)
  assert_bit_for_bit(after, before)

  def unrolled(model, xs):
    carry = (jnp.zeros((BATCH, WIDTH)), jnp.zeros((BATCH, WIDTH)))
    outputs = []
    for t in range(xs.shape[1]):
      carry, y = model.cell(carry, xs[:, t])
      outputs.append(y)
    return jnp.stack(outputs, axis=1)

  expected = whole_cotangents(model, xs, method=unrolled)
  assert taps['cell'].calls == 3 and 'cell/hi' in expected
  for name, calls in expected.items():
    assert_statistics(taps[name], *calls, rtol=1e-4, atol=1e-6)


class Lifted(nnx.Module):
  """A block under one transformation."""

  def __init__(self, rngs, lift=lambda f: f):
    self.block = Block(rngs)
    self.lift = lift

  def __call__(self, x):
    return self.lift(call)(self.block, x)


def call(block, x):
  return block(x)


@pytest.mark.parametrize('lift', [nnx.remat, nnx.jit], ids=['remat', 'jit'])
def test_a_rematted_or_jitted_module_is_tapped_once(x, lift):
  model = Lifted(nnx.Rngs(0), lift)
  check(model, x, by=Lifted(nnx.Rngs(0)))


@nnx.jit
def jitted(model, x):
  return model(x)


def test_a_function_jitted_untapped_is_traced_anew(x):
  model = Mlp(nnx.Rngs(0))
  plain = jitted(model, x)
  tapped = Tapped()
  empty_taps = tapped.init(model, x, method=jitted)
  np.testing.assert_array_equal(jitted(model, x), plain)

  @nnx.grad(argnums=(0, 1))
  def grad(model, taps):
    return wavy(tapped.apply(model, x, taps=taps, method=jitted))

  expected = whole_cotangents(model, x)
  for _ in range(2):
    _, taps = grad(model, empty_taps)
    for name, calls in expected.items():
      assert_statistics(taps[name], *calls, rtol=1e-4)
    np.testing.assert_array_equal(jitted(model, x), plain)
  assert kinds(model) == kinds(Mlp(nnx.Rngs(0)))


def test_a_jitted_function_is_traced_once_for_all_tapped_calls(x):
  traces = []

  @nnx.jit
  def counted(model, x):
    traces.append(type(model))
    return model(x)

  model = Mlp(nnx.Rngs(0))
  tapped = Tapped()
  empty_taps = tapped.init(model, x, method=counted)
  counts = []
  for _ in range(3):
    tapped.apply(model, x, taps=empty_taps, method=counted)
    counts.append(len(traces))
  assert counts[0] == counts[2]


class Branches(nnx.Module):
  def __init__(self, rngs):
    self.one = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    self.other = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

  def __call__(self, x, first):
    x = nnx.cond(
      first,
      lambda m, x: nnx.tanh(m.one(x)),
      lambda m, x: nnx.tanh(m.other(x)),
      self,
      x,
    )
    return self.head(x)

  def chosen(self, x, first):
    return self.head(nnx.tanh((self.one if first else self.other)(x)))


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('run', RUNS)
def test_the_branch_not_taken_has_no_calls(x, run, first):
  model = Branches(nnx.Rngs(0))
  before, after, taps = run(model, Tapped(), x, jnp.array(first))
  assert_bit_for_bit(after, before)
  expected = whole_cotangents(model, x, method=lambda m, x: m.chosen(x, first))
  assert set(taps) == {'one', 'other', 'head', ''}
  for name in ('one', 'other', 'head'):
    assert_statistics(taps[name], *expected.get(name, []), rtol=1e-4)


@pytest.mark.parametrize('run', [run_nnx])
def test_vmapped_modules_with_parameters_each(rng, run):
  x = jnp.asarray(rng.normal(size=(DEPTH, BATCH, WIDTH)), jnp.float32)
  model = Stack(nnx.Rngs(0))

  def method(model, x):
    many = nnx.vmap(call, in_axes=(0, 0), out_axes=0)
    return model.head(many(model.blocks, x))

  before, after, taps = run(model, Tapped(), x, method=method)
  assert_bit_for_bit(after, before)
  expected = whole_cotangents(
    Unrolled(model),
    x,
    method=lambda m, x: m.head(
      jnp.stack([block(u) for block, u in zip(m.blocks, x, strict=True)])
    ),
  )
  for i in range(DEPTH):
    for name, own in (('blocks', ''), ('blocks/dense', '/dense')):
      assert_statistics(
        at(taps[name], i), *expected[f'blocks/{i}{own}'], rtol=1e-4
      )


@pytest.mark.parametrize('run', [run_jax])
def test_vmapped_modules_that_share_their_parameters_add_up(rng, run):
  x = jnp.asarray(rng.normal(size=(DEPTH, BATCH, WIDTH)), jnp.float32)
  model = Block(nnx.Rngs(0))

  def method(model, x):
    return nnx.vmap(call, in_axes=(None, 0), out_axes=0)(model, x)

  before, after, taps = run(model, Tapped(), x, method=method)
  assert_bit_for_bit(after, before, rtol=1e-6)
  expected = whole_cotangents(
    model, x, method=lambda m, x: jnp.stack([m(u) for u in x])
  )
  for name, calls in expected.items():
    assert_statistics(taps[name], *calls, rtol=1e-4)


def test_layers_stacked_along_another_axis_are_an_error(x):
  model = Stack(nnx.Rngs(0))
  graph, state = nnx.split(model.blocks)
  state = jax.tree.map(lambda u: jnp.moveaxis(u, 0, 1), state)
  model.blocks = nnx.merge(graph, state)

  def method(model, x):
    scan = nnx.scan(
      lambda x, block: block(x),
      in_axes=(nnx.Carry, nnx.StateAxes({...: 1})),
      out_axes=nnx.Carry,
    )
    return model.head(scan(x, model.blocks))

  before = about(model)
  with pytest.raises(ValueError, match='stacked along leading axes'):
    Tapped().init(model, x, method=method)
  assert_untouched(model, before)


def test_modules_without_variables_in_a_scan_follow_their_surroundings(x):
  class Sine(nnx.Module):
    def __call__(self, x):
      return jnp.sin(x)

  class Deep(nnx.Module):
    def __init__(self, rngs):
      @nnx.split_rngs(splits=DEPTH)
      @nnx.vmap(in_axes=0, out_axes=0)
      def make(rngs):
        return nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=rngs), Sine())

      self.blocks = make(rngs)

    def __call__(self, x):
      @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
      def scan(x, block):
        return block(x)

      return scan(x, self.blocks)

  before, after, taps = run_jax(Deep(nnx.Rngs(0)), Tapped(), x)
  assert_bit_for_bit(after, before)
  assert taps['blocks/layers/1'].calls.tolist() == [1] * DEPTH
  assert taps['blocks/layers/0'].calls.tolist() == [1] * DEPTH
  assert taps[''].calls == 1


def test_gradients_of_the_model_hold_no_tap(x):
  model = Mlp(nnx.Rngs(0))
  tapped = Tapped()
  empty_taps = tapped.init(model, x)

  @nnx.grad(argnums=(0, 1))
  def grad(model, taps):
    return wavy(tapped.apply(model, x, taps=taps))

  grads, _ = grad(model, empty_taps)
  assert jax.tree.structure(grads) == jax.tree.structure(
    nnx.state(model, nnx.Param)
  )


# ---- In one line.


@pytest.mark.parametrize('build', [Mlp, Shared, Several, Normed, Stack])
def test_a_loss_needs_no_change(build, x):
  model = build(nnx.Rngs(0))
  (_, _, after), _, taps = run_nnx(model, Tapped(), x)

  def loss_fn(model, x):
    output = model(x)
    return wavy(output), output

  one, other = nnx.clone(model), nnx.clone(model)
  expected = nnx.jit(nnx.value_and_grad(loss_fn, has_aux=True))(one, x)
  in_one_line = nnx.jit(Tapped().value_and_grad(loss_fn, has_aux=True))
  value, grads, found = in_one_line(other, x)
  assert_bit_for_bit(
    (value, nnx.to_pure_dict(grads)),
    (expected[0], nnx.to_pure_dict(expected[1])),
  )
  state = nnx.to_pure_dict(nnx.state(other, not_random))
  assert_bit_for_bit(state, after)
  assert_untouched(other, about(model))
  assert found.layers == taps.layers
  for name, stats in taps.items():
    np.testing.assert_allclose(
      found[name].numbers, stats.numbers, rtol=1e-6, atol=1e-6
    )


def test_what_is_differentiated_is_chosen_as_in_nnx(x):
  model = Mlp(nnx.Rngs(0))
  argnums = (nnx.DiffState(0, nnx.All(nnx.Param, nnx.PathContains('head'))), 1)

  def loss_fn(model, x, scale=1.0):
    return wavy(scale * model(x))

  expected = nnx.grad(loss_fn, argnums=argnums)(model, x, scale=2.0)
  _, grads, taps = Tapped().value_and_grad(loss_fn, argnums)(
    model, x, scale=2.0
  )
  assert_bit_for_bit(
    (nnx.to_pure_dict(grads[0]), grads[1]),
    (nnx.to_pure_dict(expected[0]), expected[1]),
  )
  assert {float(stats.calls) for stats in taps.values()} == {1}
  with pytest.raises(TypeError, match='keyword-only.*scale'):
    Tapped().value_and_grad(lambda m, *, scale: wavy(scale * m(x)))(
      model, scale=2.0
    )


def test_a_compiled_step_is_traced_once(x):
  model, traces = Mlp(nnx.Rngs(0)), []

  def loss_fn(model, x, rngs):
    traces.append(x)
    return wavy(model(x + rngs.normal(x.shape)))

  step = nnx.jit(Tapped().value_and_grad(loss_fn))
  rngs = nnx.Rngs(1)
  for i in range(3):
    step(model, i + x, rngs)
    assert rngs.default.count[...] == i + 1
  assert len(traces) == 2  # to find the layers, and to differentiate
