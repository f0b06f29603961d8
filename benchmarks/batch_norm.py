"""What batch normalization costs, forward and backward, against Flax's.

It is measured alone, in float32 and bfloat16, at three sizes: with results in
memory that the last call left (as the temporaries of a training step are) and
in "new memory", whose page faults all programs pay alike. Its kinds are
measured against the plain one, and a whole training step of a small network
shows what remains of the difference there.
"""

import functools

import harness
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import optax_ghm
from optax_ghm.linen import BatchNorm

LIMIT = 'limit: two reads, two writes'
SHAPES = ((256, 1024), (128, 32, 32, 64), (64, 56, 56, 64))


def array_data(shape, dtype):
  keys = jax.random.split(jax.random.key(0))
  x, cotangent = (jax.random.normal(k, shape).astype(dtype) for k in keys)
  return x, jnp.ones(shape[-1]), jnp.zeros(shape[-1]), cotangent


def forward_and_backward(normalize, x, scale, bias, cotangent):
  y, pull, moments = jax.vjp(normalize, x, scale, bias, has_aux=True)
  return y, pull(cotangent), moments


def by_flax(x, scale, bias, *, fast):
  norm = nn.BatchNorm(False, dtype=x.dtype, use_fast_variance=fast)
  stats = {'mean': jnp.zeros_like(scale), 'var': jnp.ones_like(scale)}
  return norm.apply(
    {'params': {'scale': scale, 'bias': bias}, 'batch_stats': stats},
    x,
    mutable=['batch_stats'],
  )


def by_ours(x, scale, bias):
  y, moments = optax_ghm.batch_norm(x, scale, bias)
  running = optax_ghm.RunningMoments.init(scale.shape)
  return y, running.update(moments)


def two_writes(x, scale, bias, cotangent):
  """The least that any program does: it reads two arrays and writes two."""
  y, dx = x * scale.astype(x.dtype), cotangent * x
  return y, (dx, scale, bias), (scale, bias)


def programs():
  normalize = {
    'flax.linen.BatchNorm': functools.partial(by_flax, fast=True),
    'flax.linen.BatchNorm, two passes': functools.partial(by_flax, fast=False),
    'optax_ghm.batch_norm': by_ours,
  }
  return {
    name: functools.partial(forward_and_backward, f)
    for name, f in normalize.items()
  } | {LIMIT: two_writes}


def kinds():
  running = optax_ghm.RunningMoments.init((64,))

  found = {
    'batch_norm': lambda domain, *args: optax_ghm.batch_norm(*args),
    'with a mask': lambda domain, *args: optax_ghm.batch_norm(
      *args, mask=(domain > 0)[:, None, None, None]
    ),
    'ghost_batch_norm, 16': lambda domain, *args: optax_ghm.ghost_batch_norm(
      *args, ghost_size=16
    ),
    'domain_batch_norm, 2': lambda domain, x, *args: (
      optax_ghm.domain_batch_norm(x, domain, *args, num_domains=2)
    ),
    'batch_renorm': lambda domain, x, *args: optax_ghm.batch_renorm(
      x, running, *args
    ),
  }
  return {name: functools.partial(of_kind, f) for name, f in found.items()} | {
    LIMIT: lambda *data: two_writes(*data[:-1])
  }


def of_kind(normalize, *data):
  *args, domain = data
  return forward_and_backward(functools.partial(normalize, domain), *args)


def with_domains(shape, count):
  """Data with domains, which also serve as a mask: domain 0 is masked out."""
  return *array_data(shape, jnp.dtype('float32')), jax.random.randint(
    jax.random.key(1), shape[:1], 0, count
  )


def alone(shape, dtype, reused, quick):
  timed = programs()
  if not reused:
    return harness.Case(
      timed,
      functools.partial(array_data, shape, dtype),
      elements=array_size(shape),
      limit=LIMIT,
      quick=quick,
    )

  def into(f, results, *data):
    del results
    return f(*data)

  def space(name, data):
    return jax.tree.map(
      lambda u: jnp.zeros(u.shape, u.dtype), jax.eval_shape(timed[name], *data)
    )

  return harness.Case(
    {name: functools.partial(into, f) for name, f in timed.items()},
    functools.partial(array_data, shape, dtype),
    elements=array_size(shape),
    limit=LIMIT,
    init=space,
    quick=quick,
  )


def array_size(shape):
  return functools.reduce(lambda a, b: a * b, shape)


class Network(nn.Module):
  """Convolutions, each normalized; or dense layers, on flat inputs."""

  norm: type[nn.Module] | None
  dtype: jnp.dtype
  convolutions: bool

  @nn.compact
  def __call__(self, x):
    x = x.astype(self.dtype)
    for i in range(4 if self.convolutions else 8):
      if self.convolutions:
        x = nn.Conv(32, (3, 3), use_bias=False, dtype=self.dtype)(x)
      else:
        x = nn.Dense(512, use_bias=False, dtype=self.dtype)(x)
      if self.norm is not None:
        x = self.norm(False, dtype=self.dtype, name=f'norm_{i}')(x)
      x = nn.relu(x)
    return nn.Dense(10)(x.reshape(len(x), -1))


NETWORKS = {
  'flax.linen.BatchNorm': nn.BatchNorm,
  'optax_ghm.linen.BatchNorm': BatchNorm,
  'limit: no normalization': None,
}


def training(shape, dtype):
  tx = optax.sgd(0.01, momentum=0.9)
  convolutions = len(shape) > 2

  def data():
    keys = jax.random.split(jax.random.key(0))
    return (
      jax.random.normal(keys[0], shape),
      jax.random.randint(keys[1], shape[:1], 0, 10),
    )

  def start(name, data):
    variables = Network(NETWORKS[name], dtype, convolutions).init(
      jax.random.key(0), data[0]
    )
    return variables, tx.init(variables['params'])

  def step(norm, state, x, labels):
    variables, opt_state = state

    def loss(params):
      logits, updated = Network(norm, dtype, convolutions).apply(
        {**variables, 'params': params}, x, mutable=['batch_stats']
      )
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels
      ).mean(), updated

    grads, updated = jax.grad(loss, has_aux=True)(variables['params'])
    updates, opt_state = tx.update(grads, opt_state)
    params = optax.apply_updates(variables['params'], updates)
    return {**variables, **updated, 'params': params}, opt_state

  return harness.Case(
    {name: functools.partial(step, norm) for name, norm in NETWORKS.items()},
    data,
    elements=array_size(shape),
    limit='limit: no normalization',
    init=start,
  )


def domains(count):
  shape = 8192, 256
  programs = {
    'batch_norm': lambda domain, *args: optax_ghm.batch_norm(*args),
    'domain_batch_norm': lambda domain, x, *args: optax_ghm.domain_batch_norm(
      x, domain, *args, num_domains=count
    ),
  }
  return harness.Case(
    {name: functools.partial(of_kind, f) for name, f in programs.items()},
    functools.partial(with_domains, shape, count),
    elements=array_size(shape),
  )


CASES = {
  f'{dtype} {shape}{"" if reused else ", new memory"}': alone(
    shape,
    jnp.dtype(dtype),
    reused,
    quick=reused and shape == SHAPES[1],
  )
  for dtype in ('float32', 'bfloat16')
  for shape in SHAPES
  for reused in (True, False)
} | {
  'rows of 256, float32': harness.Growth(
    'rows',
    {
      rows: alone((rows, 256), jnp.dtype('float32'), True, rows <= 16384)
      for rows in (1024, 16384, 262144)
    },
  ),
  'kinds, float32 (128, 32, 32, 64)': harness.Case(
    kinds(),
    functools.partial(with_domains, SHAPES[1], 2),
    limit=LIMIT,
    elements=array_size(SHAPES[1]),
  ),
  'domains, (8192, 256)': harness.Growth(
    'domains', {count: domains(count) for count in (2, 8, 64)}
  ),
  'training step, 4 convolutions, float32': training(
    (64, 32, 32, 3), jnp.dtype('float32')
  ),
  'training step, 4 convolutions, bfloat16': training(
    (64, 32, 32, 3), jnp.dtype('bfloat16')
  ),
  'training step, 8 dense layers, float32': training(
    (256, 512), jnp.dtype('float32')
  ),
}
