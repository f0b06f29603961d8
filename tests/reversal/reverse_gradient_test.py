"""Gradient reversal: its law in every mode of JAX."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax.test_util import check_grads

import optax_ghm
from tests.support.strategies_trees import (
  STRUCTURES,
  is_inexact,
  trees,
  types,
)

PROGRAMS = 68
X = np.float32([[0.5, -1.0, 2.0], [1.5, 0.25, -3.0]])
SCALES = {
  'number': 0.5,
  'integer': 2,
  'zero': 0.0,
  'array': np.float32(0.7),
  'per example': np.float32([0.5, 2.0]),
  'mask': np.array([True, False]),
  'per element': np.float32([[0.5, 2.0, 1.0], [0.0, 1.0, 3.0]]),
}
reverse = optax_ghm.reverse_gradient


def curved(x):
  """With all derivatives, none of them constant."""
  return jnp.sum(jnp.sin(x) * jnp.square(x)) + jnp.prod(x)


def columns(scale, x=X):
  """The scale as an array that multiplies x."""
  scale = np.asarray(scale).astype(x.dtype)
  return np.expand_dims(scale, tuple(range(scale.ndim, x.ndim)))


def reversed_loss(x, scale):
  return curved(reverse(x, scale))


def test_law_in_every_mode_of_differentiation():
  """No gradient reaches the scale."""

  def f(x):
    return jnp.sin(x) * x

  @jax.jit
  def derivatives(x, direction):
    found = {'plain': (jax.grad(curved)(x), jax.jacrev(f)(x))}
    for name, scale in SCALES.items():

      def reversed_(x, scale=scale):
        return f(reverse(x, scale))

      def of_scale(s, x=x):
        return reversed_loss(x * jnp.sum(s), s)

      number = jnp.asarray(scale).astype(jnp.float32)
      found[name] = {
        'grad': jax.grad(reversed_loss)(x, scale),
        'jacobians': (jax.jacrev(reversed_)(x), jax.jacfwd(reversed_)(x)),
        'tangents': (
          jax.jvp(reversed_, (x,), (direction,))[1],
          jax.linearize(reversed_, x)[1](direction),
        ),
        'of the scale': (
          jax.grad(of_scale)(number),
          jax.grad(lambda s, n=number: reversed_loss(x * jnp.sum(s), n))(
            number
          ),
          jax.jvp(lambda s: reverse(x, s), (number,), (number + 1,))[1],
        ),
      }
    return found

  direction = np.cos(X)
  found = jax.device_get(derivatives(X, direction))
  grad, jacobian = found.pop('plain')
  for name, of_scale in found.items():
    factor = -columns(SCALES[name])
    np.testing.assert_allclose(of_scale['grad'], factor * grad, rtol=1e-6)
    expected = jacobian * np.broadcast_to(factor, X.shape)
    for actual in of_scale['jacobians']:
      np.testing.assert_allclose(actual, expected, rtol=1e-6)
    expected = np.einsum('ijkl,kl->ij', expected, direction)
    for actual in of_scale['tangents']:
      np.testing.assert_allclose(actual, expected, rtol=1e-6)
    actual, expected, tangent = of_scale['of the scale']
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    np.testing.assert_array_equal(tangent, np.zeros_like(X))


def test_second_derivatives():
  @jax.jit
  def derivatives(x, scale):
    def reversed_(x):
      return reversed_loss(x, scale)

    def penalty(f):  # of the gradient's norm, as WGAN-GP has it
      return jax.grad(lambda x: jnp.sum(jnp.square(jax.grad(f)(x))))(x)

    hessians = jax.hessian(reversed_)(x), jax.jacrev(jax.jacrev(reversed_))(x)
    return (
      (hessians, jax.hessian(curved)(x)),
      (penalty(reversed_), penalty(curved)),
    )

  for scale in (1.0, 0.5):
    of_second, (penalty, plain) = derivatives(X, np.float32(scale))
    for hessian in of_second[0]:
      np.testing.assert_allclose(
        hessian, scale**2 * np.asarray(of_second[1]), rtol=1e-5
      )
    # grad of |-s f'(r(x))|^2 is -s * s^2 times that of |f'|^2
    np.testing.assert_allclose(
      penalty, -(scale**3) * np.asarray(plain), rtol=1e-5
    )


def test_a_reversed_reversal_has_the_derivatives_of_the_identity():
  twice = jax.jit(lambda x: jnp.sin(reverse(reverse(x))))
  check_grads(twice, (jnp.asarray(X),), order=2, atol=2e-2, rtol=2e-2)


@jax.jit
def pulled(floats, cotangents, scale):
  """The input again, and the cotangent behind the reversal."""
  y, pull = jax.vjp(lambda x: reverse(x, scale), floats)
  return y, pull(cotangents)[0]


@pytest.mark.device
@given(
  tree=st.sampled_from(['nested', 'mixed']).flatmap(
    lambda name: trees(STRUCTURES[name], bad=True)
  ),
  scale=st.sampled_from([0.0, -0.0, 0.5, -2.0, 2.0**10]),
)
def test_cotangents_are_multiplied_by_minus_the_scale(tree, scale):
  """Exactly, by powers of two, but for what is flushed, part by part."""
  floats = jax.tree.map(lambda x: x if is_inexact(x) else None, tree)

  def expected(x):
    factor = np.asarray(-scale, jnp.finfo(x.dtype).dtype)
    with np.errstate(all='ignore'):
      if np.iscomplexobj(x):
        parts = [(part * factor) for part in (x.real, x.imag)]
        return np.stack(parts, -1).view(x.dtype)[..., 0]
      return x * factor

  _, actual = pulled(floats, floats, np.float32(scale))
  assert types(actual) == types(floats)
  expect = jax.tree.map(expected, floats)
  for x, y in zip(*map(jax.tree.leaves, (actual, expect)), strict=True):
    np.testing.assert_allclose(
      np.asarray(x, np.complex128),
      np.asarray(y, np.complex128),
      rtol=0,
      atol=float(jnp.finfo(x.dtype).tiny),
    )


@given(
  bits=hnp.arrays(np.uint32, (3, 2)),
  scale=st.floats(-8, 8, width=16),
)
def test_forward_is_bit_for_bit_the_input(bits, scale):
  """A cotangent of ones is multiplied by any scale, to the last bit."""
  one = np.ones((3, 2), np.float32)
  y, found = pulled(bits.view(np.float32), one, np.float32(scale))
  np.testing.assert_array_equal(np.asarray(y).view(np.uint32), bits)
  np.testing.assert_array_equal(found, -np.float32(scale) * one)


@jax.jit
def of_examples(scales):
  """Gradients of a sum, by a scale over some of the leading axes."""
  x = jnp.ones((3, 2, 2))
  return [jax.grad(lambda x, s=s: jnp.sum(reverse(x, s)))(x) for s in scales]


@pytest.mark.device
@given(hnp.arrays(np.float32, 3, elements=st.sampled_from([0, 1, -0.5])))
def test_a_scale_per_example(scale):
  shapes = (), (3,), (3, 2), (3, 1)
  scales = [np.resize(scale, shape).astype(np.float32) for shape in shapes]
  for own, found in zip(scales, of_examples(scales), strict=True):
    expected = -np.expand_dims(own, tuple(range(own.ndim, 3)))
    np.testing.assert_array_equal(found, np.broadcast_to(expected, (3, 2, 2)))


@pytest.mark.device
def test_every_dtype_is_kept():
  """Also by a scale of another dtype; an infinite complex number stays."""
  dtypes = jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64
  scales = 0.5, np.float32(0.5), np.full(2, 0.5, np.float32)
  inputs = [np.ones((2, 3)).astype(dtype) for dtype in dtypes]

  @jax.jit
  def all_of_them(inputs, infinite):
    by_half = [pulled(x, 3 * x, scale) for x in inputs for scale in scales]
    return by_half, pulled(jnp.zeros_like(infinite), infinite, 1.0)[1]

  infinite = np.array([np.inf + 0j, 2 + 1j], np.complex64)
  by_half, reversed_ = all_of_them(inputs, infinite)
  for i, (y, cotangent) in enumerate(by_half):
    assert y.dtype == cotangent.dtype == dtypes[i // 3]
    np.testing.assert_array_equal(
      np.asarray(cotangent, np.complex64), np.full((2, 3), -1.5)
    )
  np.testing.assert_array_equal(reversed_, -infinite)


def test_leaves_of_every_kind():
  tree = {
    'float0': np.zeros((2,), jax.dtypes.float0),
    'integer': np.arange(3),
    'key': jax.random.key(0),
    'nothing': None,
    'bool': np.array(True),
    'number': 1.5,
    'empty': np.zeros((0, 2), np.float32),
    'float64 of NumPy': np.ones(2),
    'scalar': np.float32(2.0),
  }
  same = reverse(tree, 0.5)
  assert jax.tree.structure(same) == jax.tree.structure(tree)
  for name in ('float0', 'integer', 'key', 'bool', 'number'):
    assert same[name] is tree[name]

  @jax.jit
  @jax.grad
  def grad(scalar):
    x = reverse({**tree, 'scalar': scalar}, 0.5)
    key_bits = jax.random.bits(x['key']).astype(jnp.float32)
    return x['scalar'] * x['integer'][1].astype(jnp.float32) + 0 * key_bits

  assert float(grad(np.float32(2.0))) == -0.5


def test_a_scale_that_does_not_fit_is_named():
  for shape in [(3,), (2, 2), (2, 3, 1), (1, 4)]:
    with pytest.raises(ValueError, match=r'scale.*\(2, 3\)'):
      reverse(X, np.ones(shape, np.float32))
  with pytest.raises(TypeError, match='scale must be real'):
    reverse(X, 1j)


# Under the transformations of JAX.


def scanned(x, scale):
  def body(total, row):
    return total + reversed_loss(row, scale), None

  return jax.lax.scan(body, jnp.zeros(()), x)[0]


WHOLE = {
  'jit': jax.jit(reversed_loss),
  'remat': jax.checkpoint(reversed_loss),
  'cond': lambda x, s: jax.lax.cond(
    s > 0, lambda: reversed_loss(x, s), lambda: curved(x)
  ),
  'custom_vjp inside': lambda x, s: curved(
    optax_ghm.in_backward(optax.identity())(reverse(x, s))
  ),
  'while in the schedule': lambda x, s: reversed_loss(
    x, jax.lax.fori_loop(0, 3, lambda _, v: v, s)
  ),
  'optax.scale': lambda x, s: curved(optax_ghm.in_backward(optax.scale(-s))(x)),
}


@pytest.mark.device
def test_under_the_transformations_of_jax():
  @jax.jit
  def transformed(x, half):
    plain, by_row = jax.grad(curved), jax.vmap(jax.grad(curved))
    scales = jnp.array([0.5, 3.0])
    mapped = jax.vmap(jax.grad(reversed_loss), (0, None))
    expected = -0.5 * plain(x), -0.5 * by_row(x)
    whole = [(jax.grad(f)(x, half), expected[0]) for f in WHOLE.values()]
    return [
      *whole,
      (jax.grad(scanned)(x, half), expected[1]),
      (mapped(x, half), expected[1]),
      (
        jax.vmap(jax.grad(reversed_loss))(x, scales),
        -scales[:, None] * by_row(x),
      ),
    ]

  for actual, expected in transformed(X, np.float32(0.5)):
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_export():
  pytest.importorskip('flatbuffers')
  args = X, np.float32(0.5)
  exported = export.export(jax.jit(reversed_loss))(*args)
  again = export.deserialize(exported.serialize(vjp_order=1))

  @jax.jit
  def both(x, scale):
    return jax.grad(again.call)(x, scale), -0.5 * jax.grad(curved)(x)

  np.testing.assert_allclose(*both(*args), rtol=1e-6)


def sharded_loss(x, scale):
  return jnp.sum(jnp.square(reverse(x, scale)) * jnp.sin(x))


@pytest.fixture(params=[False, True], ids=['one scale', 'per example'])
def rows(request):
  """Sixteen rows, a scale for all or for each, and the gradient to expect."""
  x = np.arange(48, dtype=np.float32).reshape(16, 3) / 10
  per_example = np.linspace(0, 2, 16, dtype=np.float32)
  scale = per_example if request.param else np.float32(0.5)
  expected = -2 * columns(scale, x) * x * np.sin(x) + x**2 * np.cos(x)
  return x, scale, expected


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_jit(kind, rows):
  x, scale, expected = rows
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(kind,))
  spec = NamedSharding(mesh, P('batch'))
  with jax.set_mesh(mesh):
    x = jax.device_put(x, spec)
    scale = jax.device_put(scale, spec if scale.ndim else None)
    compiled = jax.jit(jax.grad(sharded_loss)).lower(x, scale).compile()
    actual = compiled(x, scale)
  assert not re.search(r'all-(gather|reduce|to-all)', compiled.as_text())
  assert actual.sharding.is_equivalent_to(spec, 2)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_shard_map(rows):
  x, scale, expected = rows
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))
  mapped = jax.shard_map(
    lambda x, scale: jax.lax.psum(sharded_loss(x, scale), 'batch'),
    mesh=mesh,
    in_specs=(P('batch'), P('batch') if scale.ndim else P()),
    out_specs=P(),
  )
  actual = jax.jit(jax.grad(mapped))(x, scale)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def opcodes(compiled):
  """Of the optimized program."""
  text = compiled.as_text()
  text = re.sub(r', metadata=\{[^}]*\}|^HloModule.*$', '', text, flags=re.M)
  text = re.split(r'\n\s*(?=FileNames|FunctionNames)', text)[0]
  return sorted(re.findall(r'= \S+ ([\w-]+)\(', text))


@pytest.mark.parametrize('scale', [None, np.float32(0.5), np.ones(8, 'f')])
def test_costs_the_multiplication_and_nothing_else(scale):
  """The optimized programs have the same operations, one by one."""
  x, w = np.ones((8, 4), np.float32), np.ones((4, 4), np.float32)

  def features(w, x):
    return jnp.tanh(x @ w)

  def reversed_(w, x, scale=0.5):
    def loss(w):
      return jnp.sum(jnp.square(reverse(features(w, x), scale)))

    return jax.value_and_grad(loss)(w)

  def by_hand(w, x, scale=0.5):
    h, pull = jax.vjp(lambda w: features(w, x), w)
    loss, cotangent = jax.value_and_grad(lambda h: jnp.sum(jnp.square(h)))(h)
    factor = jnp.asarray(scale, h.dtype)
    factor = jnp.expand_dims(factor, range(factor.ndim, 2))
    return loss, *pull(cotangent * -factor)

  args = (w, x) if scale is None else (w, x, scale)
  one, two = (jax.jit(f).lower(*args).compile() for f in (reversed_, by_hand))
  for actual, expected in zip(one(*args), two(*args), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
  assert opcodes(one) == opcodes(two)
