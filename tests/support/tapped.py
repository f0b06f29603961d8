"""What the tapped models of Linen and of NNX have in common.

A face builds a model by name, with numbers that depend on their paths alone,
so that both faces have the same. Its ``state`` is what is differentiated; its
calls return the output and the state afterwards.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.oracles_flow import (
  assert_bit_for_bit,
  assert_statistics,
  at,
  inexact_leaves,
  wavy,
)

BATCH, WIDTH, DEPTH = 5, 4, 3


def batch(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


X = batch(BATCH, WIDTH)


def weights(shapes):
  """Arrays in the place of shapes."""

  def fill(path, shape):
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    name = '/'.join(str(getattr(k, 'key', k)).strip('.') for k in path)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if not jnp.issubdtype(shape.dtype, jnp.inexact):
      return np.zeros(shape.shape, shape.dtype)
    matrix = len(shape.shape) > 1
    x = rng.normal(0, 0.6, shape.shape) if matrix else rng.random(shape.shape)
    return x.astype(shape.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def zeros_like(leaves):
  return [jnp.zeros(u.shape, u.dtype) for u in leaves]


def cotangents(face, state, *args, method=None):
  """The cotangents of all calls of every module, by name, in their order."""
  calls = []

  def note(name, output):
    calls.append((name, inexact_leaves(output)))
    return output

  def noted(state):
    calls.clear()
    note('', face.observed(note, state, *args, method=method))
    if method is None:  # the model itself was called
      calls.pop()

  jax.eval_shape(noted, state)

  def loss(noise):
    unused = list(noise)

    def add(_, output):
      leaves, structure = jax.tree.flatten(output)
      own = iter(unused.pop(0))
      return structure.unflatten(
        u + next(own) if inexact_leaves(u) else u for u in leaves
      )

    output = face.observed(add, state, *args, method=method)
    return wavy(add('', output) if unused else output)

  by_name = {}
  noise = [zeros_like(shapes) for _, shapes in calls]
  for (name, _), whole in zip(calls, jax.grad(loss)(noise), strict=True):
    by_name.setdefault(name, []).append(whole)
  return by_name


def without_and_with_taps(face, state, *args, method=None, **options):
  """((output, state after), gradients) without and with taps, and the taps."""

  def measured(output, after):
    return wavy(output), (output, after)

  def tapped(state, taps):
    return measured(*face.tapped(state, taps, *args, method=method, **options))

  value_and_grad = functools.partial(
    jax.value_and_grad, has_aux=True, allow_int=True
  )
  empty = face.empty(state, *args, method=method, **options)
  (_, plain), grads = value_and_grad(
    lambda state: measured(*face.call(state, *args, method=method))
  )(state)
  (_, same), (found, taps) = value_and_grad(tapped, (0, 1))(state, empty)
  return (plain, face.pure(grads)), (same, face.pure(found)), taps


def check(
  face, *args, by=cotangents, rtol=1e-4, same=0.0, one_line=False, **options
):
  """The laws of a tapped model, in one program; returns the taps.

  Outputs and gradients are those of the model, or within ``same`` of them. The
  statistics are those of the cotangents ``by`` an oracle, which may know the
  layers of a stack by (name, index). All is the same ``one_line``.
  """
  keys = []

  @jax.jit
  def program(state, args):
    before, after, taps = without_and_with_taps(face, state, *args, **options)
    again = face.in_one_line(state, *args, **options) if one_line else None
    expected = by(face, state, *args)
    keys.extend(expected)
    return before, after, taps, again, list(expected.values())

  before, after, taps, again, expected = program(face.state, args)
  assert_bit_for_bit(after, before, same)
  taps = jax.device_get(taps)
  if one_line:
    *again, found = again
    assert_bit_for_bit(tuple(again), before, same)
    assert found.layers == taps.layers
    for name in taps:
      np.testing.assert_allclose(
        found[name].numbers, taps[name].numbers, 1e-6, 1e-6, err_msg=name
      )
  called = [name for name in taps if taps[name].calls.any()]
  names = [key if isinstance(key, str) else key[0] for key in keys]
  assert set(called) == set(names)
  if by is cotangents:
    assert called == names
  for key, calls in zip(keys, expected, strict=True):
    stats = taps[key] if isinstance(key, str) else at(taps[key[0]], *key[1:])
    assert_statistics(stats, *calls, rtol=rtol, atol=1e-6)
  return taps


def unrolled(f):
  """An oracle: the cotangents of a model whose method is written out as f."""
  return functools.partial(cotangents, method=f)


def stack_by_hand(face, state, x, depth=DEPTH, shared=False):
  """An oracle: of blocks of which the parameters are stacked, then a head."""
  params = face.flat(state)
  noise = {
    'blocks/dense': jnp.zeros((depth, *x.shape)),
    'blocks': jnp.zeros((depth, *x.shape)),
    'head': jnp.zeros((len(x), 2)),
  }

  def loss(noise):
    y = x
    for i in range(depth):
      kernel, bias = (params[f'blocks/dense/{k}'] for k in ('kernel', 'bias'))
      if not shared:
        kernel, bias = kernel[i], bias[i]
      h = y @ kernel + bias[None] + noise['blocks/dense'][i]
      y = y + jnp.tanh(h) + noise['blocks'][i]
    y = y @ params['head/kernel'] + params['head/bias'][None]
    return wavy(y + noise['head'])

  whole = jax.grad(loss)(noise)
  found = {'head': [whole['head']], '': [whole['head']]}
  for name in ('blocks/dense', 'blocks'):
    for i in range(depth):
      key = name if shared else (name, i)
      found.setdefault(key, []).append(whole[name][i])
  return found
