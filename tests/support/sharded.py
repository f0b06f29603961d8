"""The law that devices do together what one does, and what they may send."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

KINDS = {'auto': AxisType.Auto, 'explicit': AxisType.Explicit}


@functools.cache
def mesh_of(kind, shape=(8,)):
  names = ('d', 'model')[: len(shape)]
  return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(shape))


class Case(NamedTuple):
  """Several primitives at work on what is split over devices.

  Attributes:
    f: function of ``args`` and an ``axis_name`` to a dictionary.
    args: arrays of NumPy.
    specs: how these are split.
    out: how the results are split.
    sent: the largest size that devices add up; or exact sizes of the sums that
      count, each as often as it is there.
    scales: of the floats, at each of which the law holds.
    shape: of the mesh.
    modes: in which it is run.
    also: kinds of what is sent besides sums.
  """

  f: Callable[..., Any]
  args: tuple
  specs: tuple
  out: Any = P('d')
  sent: list | int = 64
  scales: tuple = (1.0,)
  shape: tuple = (8,)
  modes: tuple = ('auto', 'explicit', 'shard_map')
  also: tuple = ()


def parametrize(cases):
  return pytest.mark.parametrize(
    ('case', 'mode'),
    [
      pytest.param(case, mode, id=f'{name}-{mode}')
      for name, case in cases.items()
      for mode in case.modes
    ],
  )


def collectives(compiled):
  """The sizes of all that is sent; of sums alone, but for small vectors."""
  pattern = (
    r' = (.*?) '
    r'(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)'
    r'(?:-start)?\('
  )
  kinds, sizes = set(), []
  for shapes, kind in re.findall(pattern, compiled.as_text()):
    kinds.add(kind)
    for shape in re.findall(r'\[([\d,]*)\]', shapes):
      sizes.append(int(np.prod([int(n) for n in shape.split(',') if n])))
  return kinds, sizes


@functools.cache
def unsharded(f):
  return jax.jit(f)


def scaled(args, scale):
  return jax.tree.map(
    lambda x: x * np.float32(scale) if x.dtype == np.float32 else x, args
  )


def assert_same(actual, expected):
  actual, expected = jax.device_get((actual, expected))
  paths = jax.tree_util.tree_leaves_with_path(actual)
  for (path, u), v in zip(paths, jax.tree.leaves(expected), strict=True):
    size = np.max(np.abs(v), initial=0, where=np.isfinite(v))
    np.testing.assert_allclose(
      u, v, 1e-5, 2e-6 * size, err_msg=jax.tree_util.keystr(path)
    )


def check(case, mode):
  """Devices do together what one does."""
  mesh = mesh_of('auto' if mode == 'shard_map' else mode, case.shape)
  if mode == 'shard_map':
    f = jax.shard_map(
      functools.partial(case.f, axis_name=mesh.axis_names),
      mesh=mesh,
      in_specs=case.specs,
      out_specs=case.out,
    )
  else:
    f = case.f
  specs = case.specs
  if isinstance(specs, P):
    specs = (specs,) * len(case.args)
  shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
  with jax.set_mesh(mesh):
    args = jax.device_put(case.args, shardings)
    compiled = jax.jit(f).lower(*args).compile()
    for scale in case.scales:
      args = scaled(case.args, scale)
      actual = compiled(*jax.device_put(args, shardings))
      assert_same(actual, unsharded(case.f)(*args))
  kinds, sizes = collectives(compiled)
  assert kinds <= {'all-reduce', *case.also}
  if isinstance(case.sent, list):
    counts = [sizes.count(size) for size in set(case.sent)]
    expected = [case.sent.count(size) for size in set(case.sent)]
    assert mode == 'shard_map' or counts == expected
    assert max(sizes) == max(case.sent)
  else:
    assert max(sizes, default=0) <= case.sent
  _assert_split(mesh, case.out, actual)


def _assert_split(mesh, specs, results):
  """Where the specs say that something is."""
  for spec, leaf in zip(
    jax.tree.leaves(jax.tree.broadcast(specs, results)),
    jax.tree.leaves(results),
    strict=True,
  ):
    expected = NamedSharding(mesh, spec)
    assert spec == P() or leaf.sharding.is_equivalent_to(expected, leaf.ndim)
