"""Batches split over devices, and the programs that XLA makes of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from tests.support import oracles_batch_norm as oracle
from tests.support.oracles_batch_norm import (
  Found,
  a_case,
  assert_close,
  assert_same,
  expected,
)

MASK = np.arange(32) % 5 > 1
MASK[:4] = False  # nothing on the first device
MASK[4:8] = [True, False, False, False]  # one number on the second
MASK[8:12] = True
DOMAIN = np.arange(32) * 7 % 5  # two of five are no domain
RUNNING = oracle.averages([4.0, 5.0, 7.5, 5.0], [2.0, 40.0, 0.1, 4.0])
LIMITS = {'r_max': 1.5, 'd_max': 0.3}
NORMS = {
  'batch_norm': (),
  'ghost_batch_norm': (('ghost_size', 2),),
  'domain_batch_norm': (('num_domains', 3),),
  'batch_renorm': (),
}


@functools.cache
def mesh(kind, shape=(8,), names=('d',)):
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def split():
  case = a_case((32, 4), mean=5.0)
  case.mask = MASK[:, None]
  return case


def differentiated(batch, scale, bias, second=False):
  """What every norm finds on one device, and one without parameters."""
  x, mask, dy, domain, u = batch
  found = {}
  for name, static in NORMS.items():
    traced = {'mask': mask, 'axis_name': 'd'}
    if name == 'domain_batch_norm':
      traced['domain'] = domain
    if name == 'batch_renorm':
      traced |= {'running': RUNNING, **LIMITS}
    norm = oracle.norm_of(name, traced, static)
    along = u if second and name == 'batch_norm' else None
    found[name] = oracle.differentiate(norm, x, scale, bias, dy, along)
  norm = oracle.norm_of('batch_norm', {'mask': mask, 'axis_name': 'd'})
  found['no parameters'] = oracle.differentiate(norm, x, None, None, dy)
  return found


def wanted(name, second=False):
  case = split()
  plain = expected(case)
  norms = {
    'batch_norm': oracle.definition,
    'ghost_batch_norm': oracle.by_slices(2),
    'domain_batch_norm': oracle.by_subsets(DOMAIN),
    'batch_renorm': functools.partial(
      oracle.definition,
      constants=oracle.renorm_constants(plain.moments, RUNNING, **LIMITS),
    ),
  }
  if name == 'no parameters':
    case.scale, case.bias = np.ones(4), np.zeros(4)
    found = expected(case)
    return found._replace(grads=found.grads[:1])
  second = second and name == 'batch_norm'
  return expected(case, second, norms[name])


def test_shards_of_unequal_masks_are_one_batch():
  """And so are the gradients of their gradients."""
  case = split()
  over = P('d'), (P('d'), P(), P())
  out = dict.fromkeys(NORMS, Found(over[0], P(), over[1]))
  out['batch_norm'] = out['batch_norm']._replace(second=(*over[1], P('d')))
  out['no parameters'] = Found(P('d'), P(), (P('d'), None, None))
  program = jax.shard_map(
    functools.partial(differentiated, second=True),
    mesh=mesh(AxisType.Auto),
    in_specs=((*[P('d')] * 4, over[1]), P(), P()),
    out_specs=out,
  )
  u = case.u[0], case.u[1] / 8, case.u[2] / 8  # every device adds theirs
  batch = case.x, case.mask, case.dy, DOMAIN, u
  found = jax.device_get(jax.jit(program)(batch, case.scale, case.bias))
  for name, actual in found.items():
    assert_same(actual, wanted(name, second=True), 1e-6, 1e-5)


def in_parts(u):
  return u.reshape(8, -1, *u.shape[1:])


def test_named_vmap_is_one_batch():
  case = split()
  batch = (*map(in_parts, (case.x, case.mask, case.dy, DOMAIN)), None)
  program = jax.vmap(differentiated, (0, None, None), axis_name='d')
  found = jax.device_get(jax.jit(program)(batch, case.scale, case.bias))
  for name, of_each in found.items():
    for u in of_each.moments:
      assert_close(u, np.broadcast_to(u[:1], u.shape), 0.0)
    y, dx = (u.reshape(case.x.shape) for u in (of_each.y, of_each.grads[0]))
    moments = jax.tree.map(lambda u: u[0], of_each.moments)
    sums = jax.tree.map(lambda u: u.sum(0), of_each.grads[1:])
    assert_same(Found(y, moments, (dx, *sums)), wanted(name), 1e-6)


def stepped(x, scale, bias, mask, dy, axis_name=None):
  """The results of a batch norm that a training step needs."""
  norm = oracle.norm_of('batch_norm', {'mask': mask, 'axis_name': axis_name})
  return oracle.differentiate(norm, x, scale, bias, dy)


def test_the_gradient_of_shards_from_outside():
  case = split()

  def loss(x, scale, bias):
    y = jax.shard_map(
      lambda *args: stepped(*args, axis_name='d').y,
      mesh=mesh(AxisType.Auto),
      in_specs=(P('d'), P(), P(), P('d'), P('d')),
      out_specs=P('d'),
    )(x, scale, bias, case.mask, case.dy)
    return jnp.sum(y * case.dy)

  program = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  found = program(case.x, case.scale, case.bias)
  for a, b in zip(found, wanted('batch_norm').grads, strict=True):
    assert_close(a, b, 1e-6)


@pytest.mark.parametrize(
  ('axes', 'kind'),
  [
    (('d',), AxisType.Auto),
    (('d',), AxisType.Explicit),
    (('d', 'm'), AxisType.Explicit),
  ],
  ids=str,
)
def test_jit_of_a_sharded_batch_is_one_batch(axes, kind):
  """No axis name is needed, even if the features are split as well."""
  case = split()
  devices = mesh(kind, (8,) if len(axes) == 1 else (4, 2), axes)
  with jax.set_mesh(devices):
    args = jax.device_put(
      (case.x, case.scale, case.bias, case.mask, case.dy),
      tuple(
        NamedSharding(devices, P(*a)) for a in (axes, (), (), ('d',), axes)
      ),
    )
    compiled = jax.jit(stepped).lower(*args).compile()
    found = compiled(*args)
  for u in (found.y, found.grads[0]):
    assert u.sharding.is_equivalent_to(args[0].sharding, 2)
  assert_same(jax.device_get(found), wanted('batch_norm'), 1e-6)
  # The gradient of a whole scale, where the features are split, is gathered.
  assert max(size for _, size in collectives(compiled)) <= 4 * 4


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
def test_jit_of_a_batch_split_by_domains(kind):
  """Few domains are compared one by one, and many are not."""
  case = split()
  with jax.set_mesh(devices := mesh(kind)):
    over = NamedSharding(devices, P('d'))
    x, domain, dy = jax.device_put((case.x, DOMAIN, case.dy), over)

    @jax.jit
    def program(x, domain, dy):
      affine = jnp.asarray(case.scale), jnp.asarray(case.bias)
      return {
        count: oracle.differentiate(
          oracle.norm_of(
            'domain_batch_norm', {'domain': domain, 'num_domains': count}
          ),
          *(x, *affine, dy),
        )
        for count in (3, 20)
      }

    found = jax.device_get(program(x, domain, dy))
  case.mask = None
  for count, actual in found.items():
    norm = oracle.by_subsets(DOMAIN, count=count)
    assert_same(actual, expected(case, norm=norm), 1e-5)


# What is compiled.


def collectives(compiled):
  """The (kind, number of elements) of every collective in the program."""
  found = re.findall(
    r' = (\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|collective-permute'
    r'|reduce-scatter)(?:-start)?\(',
    compiled.as_text(),
  )
  return [
    (
      kind,
      sum(
        int(np.prod([int(n) for n in dims.split(',') if n]))
        for dims in re.findall(r'\w+\[([\d,]*)\]', result)
      ),
    )
    for result, kind in found
  ]


def all_reduced(results):
  """The sizes of all sums over devices, and nothing else, in shard_map."""
  case = split()
  specs = Found(P('d'), P(), (P('d'), P(), P()))
  sharded = jax.shard_map(
    lambda *args: results(stepped(*args, axis_name='d')),
    mesh=mesh(AxisType.Auto),
    in_specs=(P('d'), P(), P(), P('d'), P('d')),
    out_specs=results(specs),
  )
  args = case.x, case.scale, case.bias, case.mask, case.dy
  found = collectives(jax.jit(sharded).lower(*args).compile())
  assert {kind for kind, _ in found} <= {'all-reduce'}
  return sorted(size for _, size in found)


def test_all_reduces_of_statistics_only():
  """Two forward, one more for the gradient of x, one of the parameters."""
  pair = 2 * 4  # two numbers per feature
  assert all_reduced(lambda found: found[:2]) == [pair] * 2
  of_x = all_reduced(lambda found: (*found[:2], found.grads[0]))
  assert of_x == [pair] * 3
  # XLA joins that of scale and bias with that of x: they are of one size.
  assert sum(all_reduced(lambda found: found[:3])) == pair * 4


@pytest.mark.parametrize(
  ('shape', 'dtype'),
  [((64, 8, 8, 32), jnp.float32), ((256, 128), jnp.bfloat16)],
  ids=str,
)
def test_writes_two_full_arrays(shape, dtype):
  """y and the gradient of x: nothing else of that size is kept."""

  def step(x, scale, bias, dy):
    return stepped(x, scale, bias, None, dy)

  x = jax.ShapeDtypeStruct(shape, dtype)
  u = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
  compiled = jax.jit(step).lower(x, u, u, x).compile()
  assert full_size_writes(compiled.as_text(), shape) == 2
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < np.prod(shape) * x.dtype.itemsize / 4


def full_size_writes(text, shape):
  """How many operations of the program have a result of that size."""
  entry = text[text.index('\nENTRY') :].split('\n}')[0]
  shape = [n for n in shape if n != 1]
  count = 0
  for result, kind in re.findall(r' = (\(.*?\)|\S+) ([\w-]+)\(', entry):
    if kind in ('parameter', 'tuple', 'get-tuple-element', 'bitcast'):
      continue
    for dims in re.findall(r'\w+\[([\d,]*)\]', result):
      count += [int(n) for n in dims.split(',') if n not in ('', '1')] == shape
  return count
