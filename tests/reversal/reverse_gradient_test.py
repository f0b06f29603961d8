"""Gradient reversal: its law in every mode of JAX."""

import functools
import re

import chex
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

X = jnp.array([[0.5, -1.0, 2.0], [1.5, 0.25, -3.0]])
SCALES = {
  'number': 0.5,
  'integer': 2,
  'zero': 0.0,
  'array': jnp.float32(0.7),
  'per example': jnp.array([0.5, 2.0]),
  'mask': jnp.array([True, False]),
  'per element': jnp.array([[0.5, 2.0, 1.0], [0.0, 1.0, 3.0]]),
}


def curved(x):
  """With all derivatives, none of them constant."""
  return jnp.sum(jnp.sin(x) * jnp.square(x)) + jnp.prod(x)


def columns(scale, x=X):
  """The scale as an array that multiplies x."""
  scale = jnp.asarray(scale).astype(x.dtype)
  return jnp.expand_dims(scale, tuple(range(scale.ndim, x.ndim)))


each_scale = pytest.mark.parametrize('scale', SCALES.values(), ids=SCALES)


@each_scale
def test_law_of_the_gradient(scale):
  actual = jax.grad(lambda x: curved(optax_ghm.reverse_gradient(x, scale)))(X)
  expected = -columns(scale) * jax.grad(curved)(X)
  np.testing.assert_array_equal(actual, expected)


@each_scale
def test_law_in_every_mode_of_differentiation(scale):
  def f(x):
    return jnp.sin(x) * x

  def reversed_(x):
    return f(optax_ghm.reverse_gradient(x, scale))

  factor = -columns(scale)
  jacobian = jax.jacrev(f)(X) * jnp.broadcast_to(factor, X.shape)[None, None]
  chex.assert_trees_all_close(jax.jacrev(reversed_)(X), jacobian, rtol=1e-6)
  chex.assert_trees_all_close(jax.jacfwd(reversed_)(X), jacobian, rtol=1e-6)
  direction = jnp.cos(X)
  _, tangent = jax.jvp(reversed_, (X,), (direction,))
  _, expected = jax.jvp(f, (X,), (direction * factor,))
  chex.assert_trees_all_close(tangent, expected, rtol=1e-6)
  _, linear = jax.linearize(reversed_, X)
  chex.assert_trees_all_close(linear(direction), expected, rtol=1e-6)


@pytest.mark.parametrize('scale', [1.0, 0.5])
def test_second_derivatives(scale):
  def reversed_(x):
    return curved(optax_ghm.reverse_gradient(x, scale))

  expected = scale**2 * jax.hessian(curved)(X)
  reverse_over_reverse = jax.jacrev(jax.jacrev(reversed_))(X)
  np.testing.assert_allclose(jax.hessian(reversed_)(X), expected, rtol=1e-5)
  np.testing.assert_allclose(reverse_over_reverse, expected, rtol=1e-5)

  def penalty(x):  # of the gradient's norm, as WGAN-GP has it
    return jnp.sum(jnp.square(jax.grad(reversed_)(x)))

  plain = jax.grad(lambda x: jnp.sum(jnp.square(jax.grad(curved)(x))))(X)
  # grad of |-s f'(r(x))|^2 is -s * s^2 times that of |f'|^2
  np.testing.assert_allclose(
    jax.grad(penalty)(X), -(scale**3) * plain, rtol=1e-5
  )


def test_a_reversed_reversal_has_the_derivatives_of_the_identity():
  check_grads(
    lambda x: jnp.sin(
      optax_ghm.reverse_gradient(optax_ghm.reverse_gradient(x))
    ),
    (X,),
    order=3,
    atol=2e-2,
    rtol=2e-2,
  )


@given(bits=hnp.arrays(np.uint32, hnp.array_shapes(max_dims=3, max_side=3)))
def test_forward_is_bit_for_bit_the_input(bits):
  x = bits.view(np.float32)
  for run in (optax_ghm.reverse_gradient, jax.jit(optax_ghm.reverse_gradient)):
    y = np.asarray(run(x, 0.3))
    np.testing.assert_array_equal(y.view(np.uint32), bits)


@given(
  cotangent=hnp.arrays(
    np.float32, (3, 2), elements=st.floats(width=32, allow_subnormal=False)
  ),
  scale=st.floats(-8, 8, width=16),
)
def test_the_cotangent_is_multiplied_and_nothing_else(cotangent, scale):
  _, vjp = jax.vjp(
    lambda x: optax_ghm.reverse_gradient(x, scale), jnp.zeros((3, 2))
  )
  with np.errstate(invalid='ignore', over='ignore', under='ignore'):
    expected = cotangent * np.float32(-scale)
  tiny = np.finfo(np.float32).tiny  # XLA flushes what is smaller
  np.testing.assert_allclose(vjp(cotangent)[0], expected, rtol=0, atol=tiny)


@pytest.mark.parametrize('value', [np.inf, -np.inf, np.nan, -0.0, 1e-45])
def test_odd_numbers_pass_forward(value):
  x = jnp.full((2,), value, jnp.float32)
  y = optax_ghm.reverse_gradient({'x': x}, jnp.zeros(2))['x']
  np.testing.assert_array_equal(
    np.asarray(y).view(np.uint32), np.asarray(x).view(np.uint32)
  )


@pytest.mark.parametrize(
  'dtype', [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64]
)
@pytest.mark.parametrize('scale', [0.5, jnp.float32(0.5), jnp.ones(2)])
def test_every_dtype_is_kept(dtype, scale):
  x = jnp.ones((2, 3), dtype)
  y, vjp = jax.vjp(lambda x: optax_ghm.reverse_gradient(x, scale), x)
  (cotangent,) = vjp(3 * x)
  assert y.dtype == cotangent.dtype == dtype
  expected = -np.broadcast_to(columns(scale, X), (2, 3)) * 3
  np.testing.assert_array_equal(np.asarray(cotangent, np.complex64), expected)


def test_complex_cotangents_are_multiplied_by_a_real_number():
  x = jnp.array([1 + 2j, -3j])
  _, vjp = jax.vjp(lambda x: optax_ghm.reverse_gradient(x, 0.5), x)
  np.testing.assert_array_equal(
    vjp(jnp.array([2 + 1j, 1j]))[0], [-1 - 0.5j, -0.5j]
  )


def test_leaves_of_every_kind():
  tree = {
    'float0': np.zeros((2,), jax.dtypes.float0),
    'integer': jnp.arange(3),
    'key': jax.random.key(0),
    'nothing': None,
    'bool': jnp.array(True),
    'number': 1.5,
    'empty': jnp.zeros((0, 2)),
    'float64 of NumPy': np.ones(2),
    'scalar': jnp.array(2.0),
  }
  same = optax_ghm.reverse_gradient(tree, 0.5)
  assert jax.tree.structure(same) == jax.tree.structure(tree)
  for name in ('float0', 'integer', 'key', 'bool', 'number'):
    assert same[name] is tree[name]

  def loss(floats):
    x = optax_ghm.reverse_gradient({**tree, **floats}, 0.5)
    key_bits = jax.random.bits(x['key']).astype(jnp.float32)
    return x['scalar'] * x['integer'][1].astype(jnp.float32) + 0 * key_bits

  assert jax.grad(loss)({'scalar': jnp.array(2.0)})['scalar'] == -0.5


@each_scale
def test_no_gradient_reaches_the_scale(scale):
  scale = jnp.asarray(scale).astype(jnp.float32)
  grads = jax.grad(
    lambda s: curved(optax_ghm.reverse_gradient(X * jnp.sum(s), s))
  )(scale)
  expected = jax.grad(
    lambda s: curved(optax_ghm.reverse_gradient(X * jnp.sum(s), scale))
  )(scale)
  chex.assert_trees_all_close(grads, expected, rtol=1e-6)
  _, tangent = jax.jvp(
    lambda s: optax_ghm.reverse_gradient(X, s), (scale,), (scale + 1,)
  )
  np.testing.assert_array_equal(tangent, jnp.zeros_like(X))


@pytest.mark.parametrize('shape', [(3,), (2, 2), (2, 3, 1), (1, 4)], ids=str)
def test_a_scale_that_does_not_fit_is_named(shape):
  with pytest.raises(ValueError, match=r'scale.*\(2, 3\)'):
    optax_ghm.reverse_gradient(X, jnp.ones(shape))


def test_a_complex_scale_is_named():
  with pytest.raises(TypeError, match='scale must be real'):
    optax_ghm.reverse_gradient(X, 1j)


def test_an_infinite_complex_cotangent_stays_as_it_is():
  _, vjp = jax.vjp(optax_ghm.reverse_gradient, jnp.ones(1, jnp.complex64))
  (cotangent,) = vjp(jnp.array([np.inf + 0j], jnp.complex64))
  np.testing.assert_array_equal(cotangent, [-np.inf - 0j])


def reversed_loss(x, scale):
  return curved(optax_ghm.reverse_gradient(x, scale))


EXPECTED = -0.5 * jax.grad(curved)(X)


def scanned(x, scale):
  def body(total, row):
    return total + curved(optax_ghm.reverse_gradient(row, scale)), None

  return jax.lax.scan(body, jnp.zeros(()), x)[0]


def by_cond(x, scale):
  return jax.lax.cond(
    scale > 0, lambda: reversed_loss(x, scale), lambda: curved(x)
  )


TRANSFORMED = {
  'jit': jax.jit(reversed_loss),
  'remat': jax.checkpoint(reversed_loss),
  'cond': by_cond,
  'custom_vjp inside': lambda x, s: curved(
    optax_ghm.in_backward(optax.identity())(optax_ghm.reverse_gradient(x, s))
  ),
  'while in the schedule': jax.jit(
    lambda x, s: reversed_loss(x, jax.lax.fori_loop(0, 3, lambda _, v: v, s))
  ),
}


@pytest.mark.parametrize('f', TRANSFORMED.values(), ids=TRANSFORMED)
def test_under_the_transformations_of_jax(f):
  np.testing.assert_allclose(
    jax.grad(f)(X, jnp.float32(0.5)), EXPECTED, rtol=1e-6
  )


def test_scan_and_vmap():
  per_row = -0.5 * jax.vmap(jax.grad(curved))(X)
  half = jnp.float32(0.5)
  np.testing.assert_allclose(jax.grad(scanned)(X, half), per_row, rtol=1e-6)
  mapped = jax.vmap(jax.grad(reversed_loss), (0, None))(X, half)
  np.testing.assert_allclose(mapped, per_row, rtol=1e-6)
  scales = jnp.array([0.5, 3.0])
  mapped = jax.vmap(jax.grad(reversed_loss))(X, scales)
  np.testing.assert_allclose(
    mapped, per_row * (scales / 0.5)[:, None], rtol=1e-6
  )


def test_export():
  pytest.importorskip('flatbuffers')
  exported = export.export(jax.jit(reversed_loss))(X, jnp.float32(0.5))
  again = export.deserialize(exported.serialize(vjp_order=1))
  np.testing.assert_allclose(
    jax.grad(again.call)(X, jnp.float32(0.5)), EXPECTED, rtol=1e-6
  )


def sharded_loss(x, scale):
  return jnp.sum(jnp.square(optax_ghm.reverse_gradient(x, scale)) * jnp.sin(x))


@pytest.fixture(params=[False, True], ids=['one scale', 'per example'])
def rows(request):
  """Sixteen rows, a scale for all or for each, and the gradient to expect."""
  x = jnp.arange(48.0).reshape(16, 3) / 10
  scale = jnp.linspace(0, 2, 16) if request.param else jnp.float32(0.5)
  return x, scale, jax.jit(jax.grad(sharded_loss))(x, scale)


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
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_shard_map(rows):
  x, scale, expected = rows
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))
  mapped = jax.shard_map(
    lambda x, scale: jax.lax.psum(sharded_loss(x, scale), 'batch'),
    mesh=mesh,
    in_specs=(P('batch'), P('batch') if scale.ndim else P()),
    out_specs=P(),
  )
  np.testing.assert_allclose(
    jax.jit(jax.grad(mapped))(x, scale), expected, rtol=1e-5
  )


def instructions(f, *args):
  """The optimized program, its names and source notes left out."""
  text = jax.jit(f).lower(*args).compile().as_text()
  text = re.sub(r', metadata=\{[^}]*\}|^HloModule.*$', '', text, flags=re.M)
  text = re.split(r'\n\s*(?=FileNames|FunctionNames)', text)[0]
  opcodes = re.findall(r'= \S+ ([\w-]+)\(', text)
  return sorted(opcodes)


@pytest.mark.parametrize('scale', [0.5, jnp.float32(0.5), jnp.ones(8)])
def test_costs_the_multiplication_and_nothing_else(scale):
  """The optimized programs have the same operations, one by one."""
  x, w = jnp.ones((8, 4)), jnp.ones((4, 4))

  def features(w, x):
    return jnp.tanh(x @ w)

  def reversed_(w, x, scale):
    def loss(w):
      h = optax_ghm.reverse_gradient(features(w, x), scale)
      return jnp.sum(jnp.square(h))

    return jax.value_and_grad(loss)(w)

  def by_hand(w, x, scale):
    h, pull = jax.vjp(lambda w: features(w, x), w)
    loss, cotangent = jax.value_and_grad(lambda h: jnp.sum(jnp.square(h)))(h)
    return loss, *pull(cotangent * -columns(scale, h))

  chex.assert_trees_all_close(
    reversed_(w, x, scale), by_hand(w, x, scale), rtol=1e-6
  )
  if isinstance(scale, float):
    reversed_ = functools.partial(reversed_, scale=scale)
    by_hand = functools.partial(by_hand, scale=scale)
    assert instructions(reversed_, w, x) == instructions(by_hand, w, x)
  else:
    assert instructions(reversed_, w, x, scale) == instructions(
      by_hand, w, x, scale
    )


def test_optax_scale_in_the_backward_pass_is_the_same_function():
  @jax.jit
  def by_optax(x, scale):
    return curved(optax_ghm.in_backward(optax.scale(-scale))(x))

  np.testing.assert_array_equal(
    jax.grad(by_optax)(X, jnp.float32(0.3)),
    jax.jit(jax.grad(reversed_loss))(X, jnp.float32(0.3)),
  )
