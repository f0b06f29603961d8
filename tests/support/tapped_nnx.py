"""The models that are tapped, in NNX."""

import contextlib
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from optax_ghm.nnx import Tapped
from tests.support.nnx_mode import TREE
from tests.support.oracles_flow import inexact_leaves, wavy
from tests.support.tapped import DEPTH, WIDTH, weights


def linear(rngs, width=WIDTH, **kwargs):
  return nnx.Linear(WIDTH, width, rngs=rngs, **kwargs)


class Mlp(nnx.Module):
  def __init__(self, rngs, **kwargs):
    self.first, self.second = linear(rngs, **kwargs), linear(rngs, **kwargs)
    self.head = linear(rngs, 2, **kwargs)

  def encode(self, x):
    return nnx.tanh(self.second(nnx.tanh(self.first(x))))

  def __call__(self, x):
    return self.head(self.encode(x))


class Pair(nnx.Module):
  """A layer that is called twice, and several outputs."""

  def __init__(self, rngs):
    self.dense = linear(rngs)
    if not TREE:
      self.same = self.dense

  def __call__(self, x):
    same = self.dense if TREE else self.same
    y = same(nnx.tanh(self.dense(x)))
    return y, (jnp.sum(x, 1), jnp.arange(2))


class Several(nnx.Module):
  def __init__(self, rngs):
    self.inner = Pair(rngs)

  def __call__(self, x):
    y, aux = self.inner(x)
    return {'logits': y, 'aux': aux, 'count': jnp.arange(3)}


class Normed(nnx.Module):
  def __init__(self, rngs, *, train=True):
    self.dense = linear(rngs)
    self.norm = nnx.BatchNorm(WIDTH, use_running_average=not train, rngs=rngs)
    self.drop = nnx.Dropout(0.5, deterministic=not train, rngs=rngs)
    self.head = linear(rngs, 2)

  def __call__(self, x):
    return self.head(self.drop(self.norm(self.dense(x))))


class Attention(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(5, 4, rngs=rngs)
    self.norm = nnx.LayerNorm(4, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

  def __call__(self, x):
    x = self.norm(self.embed(x))
    return x + self.attention(x)


class Block(nnx.Module):
  def __init__(self, rngs):
    self.dense = linear(rngs)

  def __call__(self, x):
    return x + nnx.tanh(self.dense(x))


def call(block, x):
  return block(x)


def stacked(make, rngs, axes=0):
  """Modules of which the variables are stacked."""
  split = nnx.split_rngs(splits=DEPTH)
  return split(nnx.vmap(make, in_axes=0, out_axes=axes))(rngs)


def scan(block_axes, x, blocks, step=call):
  scanned = nnx.scan(
    lambda x, block: step(block, x),
    in_axes=(nnx.Carry, block_axes),
    out_axes=nnx.Carry,
    length=DEPTH,
  )
  return scanned(x, blocks)


class Stack(nnx.Module):
  """Blocks, one or a stack, that a function calls; then a head."""

  def __init__(self, rngs, run, *, axes=None):
    alone = axes is None
    self.blocks = Block(rngs) if alone else stacked(Block, rngs, axes)
    self.head = linear(rngs, 2)
    self.run = run

  def __call__(self, x):
    return self.head(self.run(x, self.blocks))


def stack(scanned_axes, step=call, axes=0):
  run = partial(scan, scanned_axes, step=step)
  return partial(Stack, run=run, axes=axes)


class Branches(nnx.Module):
  def __init__(self, rngs):
    self.one, self.other = linear(rngs), linear(rngs)
    self.head = linear(rngs, 2)

  def __call__(self, x, choice):
    branches = [lambda m, x: m.apply_one(x), lambda m, x: m.apply_other(x)]
    return self.head(nnx.cond(choice == 0, *branches, self, x))

  def apply_one(self, x):
    return nnx.tanh(self.one(x))

  def apply_other(self, x):
    return nnx.tanh(self.other(x))


class Vmapped(nnx.Module):
  def __init__(self, rngs, *, shared):
    def make(rngs):
      return linear(rngs)

    self.many = make(rngs) if shared else stacked(make, rngs)
    self.head = linear(rngs, 2)
    self.axis = None if shared else 0

  def __call__(self, x):
    many = nnx.vmap(call, in_axes=(self.axis, 0), out_axes=0)
    return self.head(nnx.tanh(many(self.many, x)))


partitioned = nnx.with_partitioning(
  nnx.initializers.lecun_normal(), (None, 'm')
)
along_1 = nnx.StateAxes({...: 1})
MODELS = {
  'mlp': Mlp,
  'bfloat16': partial(Mlp, param_dtype=jnp.bfloat16),
  'computed in bfloat16': partial(Mlp, dtype=jnp.bfloat16),
  'partitioned': partial(Mlp, kernel_init=partitioned),
  'several': Several,
  'normed': Normed,
  'evaluated': partial(Normed, train=False),
  'attention': Attention,
  'remat': partial(Stack, run=lambda x, m: nnx.remat(call)(m, x)),
  'jit': partial(Stack, run=lambda x, m: nnx.jit(call)(m, x)),
  'scan': stack(0),
  'scan of remat': stack(0, nnx.remat(call)),
  'scan of the axes of states': stack(nnx.StateAxes({nnx.Param: 0, ...: None})),
  'scan along axis 1': stack(along_1, axes=along_1),
  'shared scan': stack(None, axes=None),
  'shared scan of remat': stack(None, nnx.remat(call), axes=None),
  'lstm': lambda rngs: nnx.RNN(nnx.LSTMCell(2, WIDTH, rngs=rngs), rngs=rngs),
  'cond': Branches,
  'vmap': partial(Vmapped, shared=False),
  'shared vmap': partial(Vmapped, shared=True),
}


@contextlib.contextmanager
def observing(model, f):
  """Makes f(name, output) the output of all modules; patches their classes."""
  names = {id(m): '/'.join(map(str, p)) for p, m in nnx.iter_modules(model)}
  kinds = {type(m) for _, m in nnx.iter_modules(model) if callable(m)}

  def patched(kind, call):
    def __call__(self, *args, **kwargs):
      output = call(self, *args, **kwargs)
      if type(self) is not kind or not inexact_leaves(output):
        return output
      return f(names[id(self)], output)

    return __call__

  with contextlib.ExitStack() as patches:
    for kind in kinds:
      patch = mock.patch.object(kind, '__call__', patched(kind, kind.__call__))
      patches.enter_context(patch)
    yield


def about(model):
  """What a call must leave as it was."""
  return nnx.graphdef(model), [
    (path, type(m), sorted(vars(m)), sorted(m._pytree__nodes))
    for path, m in nnx.iter_modules(model)
  ]


CALL = '__call__'


def bound(model, method):
  if callable(method):
    return partial(method, model)
  return getattr(model, method or CALL)


def is_key(u):
  return jnp.issubdtype(u.dtype, jax.dtypes.prng_key)


class Nnx:
  """A model; its state are its parameters."""

  layer, encode = 'Linear', Mlp.encode

  def __init__(self, model, *args):
    del args
    build = MODELS[model] if isinstance(model, str) else model
    with nnx.use_eager_sharding(False):
      shapes = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    self.graph, *states = nnx.split(shapes, nnx.Param, ...)
    self.state, self.rest = map(weights, states)

  def build(self, state=None):
    """A model of this trace."""
    states = self.state if state is None else state, self.rest
    of_this_trace = jax.tree.map(
      lambda u: u if isinstance(u, jax.ShapeDtypeStruct) else jnp.asarray(u),
      states,
    )
    return nnx.merge(self.graph, *of_this_trace)

  def call(self, state, *args, method=None):
    model = self.build(state)
    output = bound(model, method)(*args)
    return output, self.after(model)

  def after(self, model):
    """The state after a call, and that the model is what it was."""
    assert about(model) == about(self.build())
    return jax.tree.map(
      lambda u: jax.random.key_data(u) if is_key(u) else u,
      nnx.to_pure_dict(nnx.state(model)),
    )

  def observed(self, f, state, *args, method=None):
    model = self.build(state)
    with observing(model, f):
      return bound(model, method)(*args)

  def empty(self, state, *args, method=None, **options):
    model = self.build(state)
    empty = Tapped(**options).init(model, *args, method=method or CALL)
    self.after(model)
    return empty

  def tapped(self, state, taps, *args, method=None, **options):
    model, tapped = self.build(state), Tapped(**options)
    output = tapped.apply(model, *args, taps=taps, method=method or CALL)
    return output, self.after(model)

  def in_one_line(self, state, *args, **options):
    def loss_fn(model, *args):
      output = model(*args)
      return wavy(output), output

    model = self.build(state)
    step = Tapped(**options).value_and_grad(loss_fn, has_aux=True)
    (_, output), grads, taps = step(model, *args)
    return (output, self.after(model)), self.pure(grads), taps

  def flat(self, state):
    flat = nnx.to_flat_state(state)
    return {'/'.join(map(str, p)): v.get_value() for p, v in flat}

  def pure(self, grads):
    """Gradients with respect to the state, and perhaps to taps."""
    is_state = lambda u: isinstance(u, nnx.State)  # noqa: E731
    return jax.tree.map(
      lambda u: nnx.to_pure_dict(u) if is_state(u) else u,
      grads,
      is_leaf=is_state,
    )
