"""The models that are tapped, in Linen."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn, traverse_util

from optax_ghm.linen import Tapped
from tests.support.oracles_flow import inexact_leaves, wavy
from tests.support.tapped import DEPTH, WIDTH, weights


class Mlp(nn.Module):
  kwargs: tuple = ()

  def setup(self):
    kwargs = dict(self.kwargs)
    self.first = nn.Dense(WIDTH, **kwargs)
    self.second = nn.Dense(WIDTH, **kwargs)
    self.head = nn.Dense(2, **kwargs)

  def encode(self, x):
    return nn.tanh(self.second(nn.tanh(self.first(x))))

  def __call__(self, x):
    return self.head(self.encode(x))


class Pair(nn.Module):
  """A layer that is called twice, and several outputs."""

  @nn.compact
  def __call__(self, x):
    dense = nn.Dense(WIDTH, name='dense')
    return dense(nn.tanh(dense(x))), (jnp.sum(x, 1), jnp.arange(2))


class Several(nn.Module):
  @nn.compact
  def __call__(self, x):
    y, aux = Pair(name='inner')(x)
    return {'logits': y, 'aux': aux, 'count': jnp.arange(3)}


class Normed(nn.Module):
  train: bool = True

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(WIDTH, name='dense')(x)
    x = nn.BatchNorm(not self.train, name='norm')(x)
    x = nn.Dropout(0.5, deterministic=not self.train, name='drop')(x)
    return nn.Dense(2, name='head')(x)


class Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm(name='norm')(nn.Embed(5, 4, name='embed')(x))
    x = x + nn.MultiHeadDotProductAttention(2, name='attention')(x)
    return nn.Dense(2, name='head')(x)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    return x + nn.tanh(nn.Dense(WIDTH, name='dense')(x)), None


class Stack(nn.Module):
  """Any lifted block, then a head."""

  lift: tuple

  def setup(self):
    block = Block
    for lift in self.lift:
      block = lift(block)
    self.blocks = block()
    self.head = nn.Dense(2)

  def __call__(self, x):
    return self.head(self.blocks(x, None)[0])


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


class Branches(nn.Module):
  """One of two layers, by a traced choice."""

  kind: str

  def setup(self):
    self.one, self.other = nn.Dense(WIDTH), nn.Dense(WIDTH)
    self.head = nn.Dense(2)

  def __call__(self, x, choice):
    branches = [lambda m, x: m.apply_one(x), lambda m, x: m.apply_other(x)]
    if self.is_initializing():
      x = [branch(self, x) for branch in branches][0]
    elif self.kind == 'cond':
      x = nn.cond(choice == 0, *branches, self, x)
    else:
      x = nn.switch(choice, branches, self, x)
    return self.head(x)

  def apply_one(self, x):
    return nn.tanh(self.one(x))

  def apply_other(self, x):
    return nn.tanh(self.other(x))


class Vmapped(nn.Module):
  shared: bool

  @nn.compact
  def __call__(self, x):
    many = nn.vmap(
      nn.Dense,
      variable_axes={'params': None if self.shared else 0},
      split_rngs={'params': not self.shared},
    )(WIDTH, name='many')
    return nn.Dense(2, name='head')(nn.tanh(many(x)))


partitioned = nn.with_partitioning(nn.linear.default_kernel_init, (None,) * 2)
MODELS = {
  'mlp': Mlp(),
  'bfloat16': Mlp((('param_dtype', jnp.bfloat16),)),
  'computed in bfloat16': Mlp((('dtype', jnp.bfloat16),)),
  'partitioned': Mlp((('kernel_init', partitioned),)),
  'several': Several(),
  'normed': Normed(),
  'evaluated': Normed(train=False),
  'attention': Attention(),
  'remat': Stack((nn.remat,)),
  'jit': Stack((nn.jit,)),
  'scan': Stack((scanned(),)),
  'scan of remat': Stack((nn.remat, scanned())),
  'remat of scan': Stack((scanned(), nn.remat)),
  'scan of jit': Stack((nn.jit, scanned())),
  'shared scan': Stack((shared_scan,)),
  'shared scan of remat': Stack((nn.remat, shared_scan)),
  'scan along axis 1': Stack((scanned(1),)),
  'scan along axis -1': Stack((scanned(-1),)),
  'lstm': nn.RNN(nn.LSTMCell(WIDTH)),
  'cond': Branches('cond'),
  'switch': Branches('switch'),
  'vmap': Vmapped(False),
  'shared vmap': Vmapped(True),
}
CALLS = {
  'normed': {
    'rngs': {'dropout': jax.random.key(1)},
    'mutable': ['batch_stats'],
  }
}


def observing(f):
  """Makes f(name, output) the output of all modules."""

  def intercept(next_fun, args, kwargs, context):
    output = next_fun(*args, **kwargs)
    if context.method_name != '__call__' or not inexact_leaves(output):
      return output
    return f('/'.join(context.module.path), output)

  return nn.intercept_methods(intercept)


class Linen:
  """A model; its state are its variables."""

  layer, encode = 'Dense', Mlp.encode

  def __init__(self, model, *args, **kwargs):
    self.model = MODELS[model] if isinstance(model, str) else model
    self.kwargs = kwargs or CALLS.get(model, {})
    shapes = jax.eval_shape(
      self.model.init,
      {'params': jax.random.key(0), **self.kwargs.get('rngs', {})},
      *args,
    )
    self.state = weights(shapes)

  def call(self, state, *args, method=None):
    return self.model.apply(state, *args, method=method, **self.kwargs), None

  def observed(self, f, state, *args, method=None):
    with observing(f):
      return self.call(state, *args, method=method)[0]

  def empty(self, state, *args, method=None, **options):
    call = self.call_of(method)
    return Tapped(self.model, **options).init(state, *args, **call)

  def call_of(self, method):
    return {**self.kwargs, **({'method': method} if method else {})}

  def tapped(self, state, taps, *args, method=None, **options):
    tapped, call = Tapped(self.model, **options), self.call_of(method)
    return tapped.apply(state, *args, taps=taps, **call), None

  def in_one_line(self, state, *args, **options):
    def loss_fn(state):
      output = self.model.apply(state, *args, **self.kwargs)
      return wavy(output), (output, None)

    step = Tapped(self.model, **options).value_and_grad(loss_fn, has_aux=True)
    (_, aux), grads, taps = step(state)
    return aux, grads, taps

  def flat(self, state):
    params = nn.meta.unbox(state['params'])
    return traverse_util.flatten_dict(params, sep='/')

  def pure(self, tree):
    return tree
