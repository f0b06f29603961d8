import functools
import re
import types
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import optax_ghm

EPSILON = 1e-3


def definition(x, scale, bias, counts, axis=-1, constants=None):
  """Batch norm as in the paper, and its moments, in NumPy's float64.

  ``counts`` is the mask, as numbers; ``constants`` is renormalization's r and
  d. Arrays may have any axes in front of those of the batch.
  """
  ndim = counts.ndim
  features = {a % ndim for a in np.atleast_1d(axis).astype(int)}
  over = tuple(a - ndim for a in range(ndim) if a not in features)
  r, d = (1.0, 0.0) if constants is None else constants
  r, d, scale, bias = (
    np.expand_dims(u, over) if np.ndim(u) else u for u in (r, d, scale, bias)
  )
  n = np.sum(counts, over, keepdims=True)
  mean = np.sum(counts * x, over, keepdims=True) / np.maximum(n, 1)
  var = np.sum(counts * (x - mean) ** 2, over, keepdims=True)
  var = var / np.maximum(n, 1)
  x_hat = (x - mean) / np.sqrt(var + EPSILON) * (n > 0)
  y = (x_hat * r + d) * scale + bias
  return y, tuple(np.squeeze(u, over) for u in (mean, var))


def derivatives(f, args, dy, u=None):
  """The gradient of ``f`` for dy, and the gradient of that along u, in NumPy.

  By complex steps, exact to rounding; twice by differences of these, to 1e-10.
  """
  sizes = np.cumsum([a.size for a in args])

  def parts(flat):
    pieces = np.split(flat, sizes[:-1], -1)
    return [
      p.reshape((*flat.shape[:-1], *a.shape))
      for p, a in zip(pieces, args, strict=True)
    ]

  def gradient(flat):
    steps = flat + 1e-30j * np.eye(flat.size)
    y = f(*parts(steps)).imag * 1e30
    return np.sum(dy * y, tuple(range(1, y.ndim)))

  flat = np.concatenate([np.ravel(a) for a in args])
  grads = parts(gradient(flat))
  if u is None:
    return grads, None
  along = np.concatenate([np.ravel(a) for a in u])
  h = 1e-3
  near, far = (
    gradient(flat + k * h * along) - gradient(flat - k * h * along)
    for k in (1, 2)
  )
  twice = parts((8 * near - far) / (12 * h))
  return grads, [*twice, f(*parts(flat + 1e-30j * along)).imag * 1e30]


def differentiated(norm, x, scale, bias, dy, u, second=True):
  """Returns y, moments and gradients of a batch norm in JAX."""

  def first(x, scale, bias, dy):
    y, vjp, moments = jax.vjp(norm, x, scale, bias, has_aux=True)
    return (y, moments), vjp(dy)

  def along(*args):
    grads = first(*args)[1]
    return sum(
      jnp.sum(g.astype(v.dtype) * v) for g, v in zip(grads, u, strict=True)
    )

  args = x, scale, bias, dy
  (y, moments), grads = first(*args)
  twice = jax.grad(along, argnums=(0, 1, 2, 3))(*args) if second else None
  return Found(y, moments, grads, twice)


class Found(NamedTuple):
  """Results of a batch norm: gradients are of x, scale, bias (and dy)."""

  y: Any
  moments: Any
  grads: Any
  second: Any


@functools.partial(jax.jit, static_argnames=('axis', 'second', 'dtype'))
def _ours(x, scale, bias, mask, dy, u, *, axis, second, dtype):
  norm = functools.partial(
    optax_ghm.batch_norm, axis=axis, epsilon=EPSILON, mask=mask, dtype=dtype
  )
  return differentiated(norm, x, scale, bias, dy, u, second)


def ours(case, second=True, dtype=None):
  found = _ours(
    case.x,
    case.scale,
    case.bias,
    case.mask,
    case.dy.astype(dtype or case.x.dtype),
    case.u,
    axis=case.axis,
    second=second,
    dtype=dtype,
  )
  return jax.device_get(found)


def defined(case, second=True, norm=definition):
  """Results of the definition, with 0 for masked NaN and infinities."""
  mask = True if case.mask is None else np.asarray(case.mask) != 0
  counts = np.broadcast_to(mask, case.x.shape).astype(np.float64)
  x, scale, bias, dy, *u = (
    np.asarray(a).astype(np.float64)
    for a in (case.x, case.scale, case.bias, case.dy, *case.u)
  )
  x = np.where((counts == 0) & ~np.isfinite(x), 0, x)
  f = functools.partial(norm, counts=counts, axis=case.axis)
  y, moments = f(x, scale, bias)
  grads, twice = derivatives(
    lambda *args: f(*args)[0], (x, scale, bias), dy, u if second else None
  )
  return Found(y, moments, grads, twice)


def a_case(
  shape, axis=-1, mask=None, dtype=np.float32, mean=3.0, std=2.0, seed=0
):
  """Numbers of a shape; ``mask`` is the shape of one, with some of each."""
  rng = np.random.default_rng(seed)
  features = sorted(a % len(shape) for a in np.atleast_1d(axis))
  of_features = tuple(shape[a] for a in features)
  if mask is not None:
    mask = np.arange(np.prod(mask, dtype=int)).reshape(mask) % 3 != 1
  wide = np.float64 if dtype == np.float64 else np.float32
  x = mean + std * rng.normal(size=shape)
  scale, bias, u_scale, u_bias = (
    rng.normal(size=of_features).astype(wide) for _ in range(4)
  )
  u = (rng.normal(size=shape).astype(wide), u_scale, u_bias)
  dy = rng.normal(size=shape)
  return types.SimpleNamespace(
    x=np.asarray(x, dtype),
    scale=scale,
    bias=bias,
    mask=mask,
    dy=np.asarray(dy, dtype),
    u=u,
    axis=axis,
  )


def assert_close(actual, expected, rtol=1e-5, rounding=0.0):
  """Relative to the largest (or 1), and to each by its own rounding."""
  actual = np.asarray(actual, np.float64)
  expected = np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  largest = np.max(np.abs(expected), initial=1)
  np.testing.assert_allclose(
    actual, expected, rtol=rounding, atol=rtol * largest
  )


def assert_same(actual, expected, rtol=1e-5, second=1e-4, rounding=0.0):
  assert_close(actual.y, expected.y, rtol, rounding)
  mean, var = expected.moments
  assert_close(actual.moments.mean, mean, 1e-6)
  assert_close(actual.moments.variance(), var)
  for i, grad in enumerate(expected.grads):
    assert_close(actual.grads[i], grad, rtol, rounding if i == 0 else 0)
  if expected.second is not None:
    for i, grad in enumerate(expected.second):
      own = rounding if i in (0, 3) else 0
      assert_close(actual.second[i], grad, second, own)


CASES = [  # the last: whether to check the gradient of the gradient
  ((6,), -1, None, False),
  ((7, 3), -1, None, True),
  ((3, 7), 0, (1, 7), False),
  ((4, 5, 3), (0, -1), None, False),
  ((4, 5, 3), (), (4, 1, 1), False),
  ((4, 2, 3, 5), -1, (4, 1, 1, 1), False),
  ((4, 2, 3, 5), -1, (2, 3, 1), False),
  ((4, 2, 3, 5), -1, (5,), False),
  ((4, 2, 3, 5), -1, (4, 2, 3, 5), True),
  ((2, 3, 2, 2, 3), (1, -1), (2, 1, 1, 2, 1), False),
  ((1, 4), -1, None, False),
  ((5, 1), -1, (5, 1), False),
  ((0, 3), -1, (0, 1), False),
  ((3, 0), -1, (3, 1), False),
]


@pytest.mark.parametrize(('shape', 'axis', 'mask', 'second'), CASES, ids=str)
def test_is_the_definition_and_so_are_its_gradients(shape, axis, mask, second):
  case = a_case(shape, axis, mask)
  actual = ours(case, second)
  assert actual.y.shape == shape
  assert actual.y.dtype == np.float32
  assert_same(actual, defined(case, second))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, np.float64])
def test_every_dtype_is_summed_in_at_least_float32(dtype):
  case = a_case((4, 2, 3, 5), -1, (4, 2, 3, 1), dtype)
  wide = np.float64 if dtype == np.float64 else np.float32
  second = dtype == np.float64
  with jax.enable_x64(dtype == np.float64):
    actual = ours(case, second)
  assert actual.y.dtype == actual.grads[0].dtype == dtype
  if second:
    assert actual.second[0].dtype == actual.second[3].dtype == dtype
  for u in (*actual.moments, *actual.grads[1:]):
    assert u.dtype == wide
  expected = defined(case, second)
  if dtype == np.float64:
    assert_same(actual, expected, 1e-12, 1e-8)
  else:
    rounding = float(jnp.finfo(dtype).eps) / 2  # of the result, once
    assert_same(actual, expected, rounding=rounding)


@pytest.mark.parametrize('offset', [1e2, 1e3, -1e4])
def test_a_mean_of_many_standard_deviations(offset):
  """To 1e-5; fast variances, Flax's default, are off by more than 2."""
  case = a_case((60, 4), mean=offset, std=1.0)
  case.dy[:, 1:3] += case.x[:, 1:3] - np.float32(offset)
  case.x[:, 0] -= offset  # near and far in one array
  actual, expected = ours(case), defined(case)
  assert_same(actual, expected, second=1e-3)
  for f in (0, 3):  # and each of the features by itself
    assert_close(actual.y[:, f], expected.y[:, f])
    assert_close(actual.grads[0][:, f], expected.grads[0][:, f])
    assert_close(actual.moments.variance()[f], expected.moments[1][f])
  if offset == -1e4:
    norm = flax.linen.BatchNorm(
      False, momentum=0.0, use_scale=False, use_bias=False
    )
    stats = {'batch_stats': {'mean': jnp.zeros(4), 'var': jnp.ones(4)}}
    apply = jax.jit(functools.partial(norm.apply, mutable='batch_stats'))
    fast = apply(stats, case.x)[1]['batch_stats']['var']
    ratio = np.abs(np.log(np.maximum(fast, 1e-9) / expected.moments[1]))
    assert ratio[1:].max() > np.log(2)


@pytest.mark.parametrize(
  ('shape', 'mask'), [((7, 3), (7, 1)), ((4, 2, 3, 5), (4, 2, 3, 1))], ids=str
)
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_masked_out_numbers_stay_in_their_place(shape, mask, bad):
  case = a_case(shape, -1, mask)
  out = ~np.broadcast_to(case.mask, shape)
  case.dy[out] = 0
  expected = ours(case, second=False)
  case.x[out] = bad
  actual = ours(case, second=False)
  assert not np.isfinite(actual.y[out]).any()
  np.testing.assert_array_equal(actual.y[~out], expected.y[~out])
  for a, b in zip(actual.moments, expected.moments, strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(actual.grads, expected.grads, strict=True):
    np.testing.assert_array_equal(a, b)
  assert not actual.grads[0][out].any()
  expected = defined(case, second=False)
  y = np.where(out, expected.y, actual.y)
  assert_same(actual._replace(y=y), expected)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_bad_numbers_that_count_reach_their_feature_only(bad):
  case = a_case((4, 2, 3, 5), -1, (4, 2, 3, 1))
  expected = ours(case, second=False)
  where = tuple(np.argwhere(case.mask[..., 0])[3])
  case.x[(*where, 2)] = bad
  actual = ours(case, second=False)
  others = [0, 1, 3, 4]
  assert np.isnan(actual.y[..., 2]).all()
  assert np.isnan(actual.grads[0][..., 2][case.mask[..., 0]]).all()
  assert np.isnan(actual.grads[1][2])
  assert np.isnan(actual.moments.m2[2])
  np.testing.assert_array_equal(actual.grads[2], expected.grads[2])
  np.testing.assert_array_equal(actual.moments.count, expected.moments.count)

  def chosen(r):
    return r.y, r.grads[0], r.grads[1], r.moments.variance()

  for a, b in zip(chosen(actual), chosen(expected), strict=True):
    np.testing.assert_allclose(
      a[..., others], b[..., others], rtol=1e-5, atol=1e-6
    )


def test_where_nothing_counts_y_is_the_bias():
  case = a_case((7, 3), -1, (7, 1))
  case.mask[:] = False
  found = ours(case)
  np.testing.assert_array_equal(found.y, np.tile(case.bias, (7, 1)))
  assert not found.grads[0].any()
  assert not found.grads[1].any()
  np.testing.assert_allclose(found.grads[2], case.dy.sum(0), rtol=1e-5)
  assert not np.any(found.moments)
  for grad in found.second:
    assert np.isfinite(grad).all()
  case.x[2] = np.nan
  case.dy[2] = 0
  found = ours(case, second=False)
  for grad in found.grads:
    assert np.isfinite(grad).all()


@pytest.mark.parametrize('value', [0.0, 0.1, -3e4])
def test_a_constant_feature_becomes_the_bias(value):
  case = a_case((7, 3))
  case.x[:, 1] = value
  found = ours(case)
  np.testing.assert_allclose(found.y[:, 1], np.full(7, case.bias[1]), rtol=1e-4)
  assert_same(found, defined(case))


def test_scale_and_bias_may_be_missing():
  x = a_case((7, 3)).x
  y, _ = jax.jit(optax_ghm.batch_norm)(x)
  x = x.astype(np.float64)
  assert_close(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), 1e-6)


@pytest.mark.parametrize(
  ('of_x', 'dtype'),
  [
    (jnp.bfloat16, jnp.float32),
    (jnp.bfloat16, jnp.float16),
    (jnp.float32, jnp.bfloat16),
  ],
)
def test_dtype_is_that_of_the_result(of_x, dtype):
  case = a_case((7, 3), dtype=of_x)
  found = ours(case, second=False, dtype=dtype)
  assert found.y.dtype == dtype
  assert found.grads[0].dtype == of_x
  case.dy = case.dy.astype(dtype)
  expected = defined(case, False)
  rounding = float(jnp.finfo(dtype).eps) / 2
  assert_close(found.y, expected.y, rounding=rounding)
  assert_close(
    found.grads[0],
    expected.grads[0],
    rounding=float(jnp.finfo(of_x).eps) / 2,
  )


def test_parameters_of_other_dtypes_have_gradients_of_theirs():
  case = a_case((7, 3))
  scale, bias = (jnp.asarray(u, jnp.bfloat16) for u in (case.scale, case.bias))

  @jax.jit
  def step(*args):
    y, vjp = jax.vjp(
      lambda *args: optax_ghm.batch_norm(case.x, *args)[0], *args
    )
    return y, vjp(case.dy)

  y, grads = step(scale, bias)
  assert y.dtype == np.float32
  assert {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}


def test_no_gradient_flows_through_the_moments():
  case = a_case((7, 3))

  def weighed(weight):
    def loss(x, scale, bias):
      y, moments = optax_ghm.batch_norm(x, scale, bias)
      return jnp.sum(y * case.dy) + weight * sum(
        jnp.sum(jnp.square(u)) for u in (*moments, moments.variance())
      )

    return jax.grad(loss, argnums=(0, 1, 2))(case.x, case.scale, case.bias)

  weighed = jax.jit(weighed)
  for a, b in zip(weighed(0.0), weighed(5.0), strict=True):
    assert np.any(a)
    np.testing.assert_array_equal(a, b)


def test_no_gradient_of_the_gradient_flows_through_the_moments():
  case = a_case((7, 3))

  def loss(x):
    y, moments = optax_ghm.batch_norm(x, case.scale)
    return jnp.sum(jnp.sin(y)), moments

  @jax.jit
  @jax.grad
  def twice(x, weight):
    grad, moments = jax.grad(loss, has_aux=True)(x)
    parts = [*moments, moments.variance()]
    return jnp.sum(grad * case.dy) + weight * sum(jnp.sum(u) for u in parts)

  assert np.any(twice(case.x, 0.0))
  np.testing.assert_array_equal(twice(case.x, 0.0), twice(case.x, 5.0))


def test_forward_mode_raises_and_inference_is_the_same_there():
  case = a_case((7, 3), -1, (7, 1))
  tangent = case.u[0]
  with pytest.raises(TypeError, match='jvp'):
    jax.jvp(lambda x: optax_ghm.batch_norm(x)[0], (case.x,), (tangent,))

  def norm(x):
    moments = optax_ghm.Moments.of(x, mask=case.mask)
    return optax_ghm.batch_norm_inference(
      x, moments, case.scale, case.bias, epsilon=EPSILON
    )

  @jax.jit
  def both(x):
    y, forward = jax.jvp(norm, (x,), (tangent,))
    return y, forward, jax.vjp(norm, x)[1](case.dy)[0]

  y, forward, backward = both(case.x)
  expected = defined(case, second=False)
  assert_close(y, expected.y)
  assert_close(backward, expected.grads[0])
  assert_close(np.vdot(forward, case.dy), np.vdot(tangent, expected.grads[0]))


def test_scans_checkpoints_and_models_side_by_side():
  """Three layers in a loop, recomputed, of two models at once."""
  case = a_case((7, 3), -1, (7, 1))
  scales = np.stack([1 + case.scale, 2 - case.scale, 1 + case.bias])
  models = np.stack([scales, scales[::-1] * 0.5])

  @jax.checkpoint
  def layer(x, scale):
    y, _ = optax_ghm.batch_norm(x, scale, mask=case.mask, epsilon=EPSILON)
    return jnp.tanh(y), None

  def loss(x, models):
    network = jax.vmap(lambda scales: jax.lax.scan(layer, x, scales)[0])
    return jnp.sum(network(models) * case.dy[None])

  actual = jax.jit(jax.grad(loss, argnums=(0, 1)))(case.x, models)

  def unrolled(x, models):
    counts = np.broadcast_to(case.mask, case.x.shape).astype(np.float64)
    outputs = []
    for model in range(2):
      y = x
      for i in range(3):
        scale = models[..., model, i, :]
        y = np.tanh(definition(y, scale, np.zeros_like(scale), counts)[0])
      outputs.append(y)
    return np.sum(outputs, 0)

  args = (case.x.astype(np.float64), models.astype(np.float64))
  expected, _ = derivatives(unrolled, args, case.dy.astype(np.float64))
  for a, b in zip(actual, expected, strict=True):
    assert_close(a, b)


# Devices.

MASK = np.arange(32) % 5 > 1
MASK[:4] = False  # nothing on the first device
MASK[4:8] = [True, False, False, False]  # one number on the second
MASK[8:12] = True


@functools.cache
def mesh(kind, shape=(8,), names=('d',)):
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def stepped(x, scale, bias, mask, dy, axis_name=None):
  """The results of a batch norm that a training step needs."""

  def norm(x, scale, bias):
    return optax_ghm.batch_norm(
      x, scale, bias, mask=mask, axis_name=axis_name, epsilon=EPSILON
    )

  y, vjp, moments = jax.vjp(norm, x, scale, bias, has_aux=True)
  return y, vjp(dy), moments


@functools.cache
def split():
  """A batch for eight devices, and all of it, as one."""
  case = a_case((32, 4), mean=5.0)
  batch = case.x, case.scale, case.bias, MASK[:, None], case.dy
  whole = jax.device_get(jax.jit(stepped)(*batch))
  case.mask = batch[3]
  assert_close(whole[0], defined(case, False).y)
  return batch, whole


def assert_whole(found, whole):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
    assert_close(a, b, 1e-6)


OUT = (P('d'), (P('d'), P(), P()), P())


def test_shards_of_unequal_masks_are_one_batch():
  batch, whole = split()
  step = functools.partial(stepped, axis_name='d')
  found = jax.jit(
    jax.shard_map(
      step,
      mesh=mesh(AxisType.Auto),
      in_specs=(P('d'), P(), P(), P('d'), P('d')),
      out_specs=OUT,
    )
  )(*batch)
  assert_whole(found, whole)


def test_shards_without_parameters():
  (x, *_, mask, dy), _ = split()
  case = a_case((32, 4), mean=5.0)
  case.mask, case.scale, case.bias = mask, np.ones(4), np.zeros(4)
  step = jax.shard_map(
    lambda x, mask, dy: stepped(x, None, None, mask, dy, 'd'),
    mesh=mesh(AxisType.Auto),
    in_specs=P('d'),
    out_specs=(P('d'), (P('d'), None, None), P()),
  )
  y, (dx, *_), _ = jax.jit(step)(x, mask, dy)
  expected = defined(case, second=False)
  assert_close(y, expected.y, 1e-6)
  assert_close(dx, expected.grads[0], 1e-6)


def test_the_gradient_of_shards_from_outside():
  (x, scale, bias, mask, dy), whole = split()

  def loss(x, scale, bias):
    y = jax.shard_map(
      lambda *args: stepped(*args, axis_name='d')[0],
      mesh=mesh(AxisType.Auto),
      in_specs=(P('d'), P(), P(), P('d'), P('d')),
      out_specs=P('d'),
    )(x, scale, bias, mask, dy)
    return jnp.sum(y * dy)

  found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, scale, bias)
  assert_whole(found, whole[1])


def in_parts(u):
  return u.reshape(8, -1, *u.shape[1:])


def test_named_vmap_is_one_batch():
  (x, scale, bias, mask, dy), whole = split()
  axes = (0, None, None, 0, 0)
  step = jax.vmap(
    functools.partial(stepped, axis_name='d'), axes, axis_name='d'
  )
  y, (dx, d_scale, d_bias), moments = jax.jit(step)(
    in_parts(x), scale, bias, in_parts(mask), in_parts(dy)
  )
  for u in moments:
    assert_close(u, np.tile(u[0], (8, 1)), 0.0)
  found = (
    y.reshape(x.shape),
    dx.reshape(x.shape),
    jax.tree.map(lambda u: u[0], moments),
  )
  assert_whole(found, (whole[0], whole[1][0], whole[2]))
  assert_whole((d_scale.sum(0), d_bias.sum(0)), whole[1][1:])


def test_the_gradient_of_the_gradient_over_devices():
  case = a_case((32, 4), mean=5.0)
  case.mask = MASK[:, None]

  def step(x, scale, bias, mask, dy, u):
    norm = functools.partial(
      optax_ghm.batch_norm, mask=mask, axis_name='d', epsilon=EPSILON
    )
    return differentiated(norm, x, scale, bias, dy, u).second

  found = jax.jit(
    jax.shard_map(
      step,
      mesh=mesh(AxisType.Auto),
      in_specs=(P('d'), P(), P(), P('d'), P('d'), (P('d'), P(), P())),
      out_specs=(P('d'), P(), P(), P('d')),
    )
  )(
    case.x,
    case.scale,
    case.bias,
    case.mask,
    case.dy,
    (case.u[0], case.u[1] / 8, case.u[2] / 8),  # every device adds theirs
  )
  for a, b in zip(found, defined(case).second, strict=True):
    assert_close(a, b)


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
  (x, scale, bias, mask, dy), whole = split()
  devices = mesh(kind, (8,) if len(axes) == 1 else (4, 2), axes)
  with jax.set_mesh(devices):
    x, dy = jax.device_put((x, dy), NamedSharding(devices, P(*axes)))
    mask = jax.device_put(mask, NamedSharding(devices, P('d')))
    scale, bias = jax.device_put((scale, bias), NamedSharding(devices, P()))
    compiled = jax.jit(stepped).lower(x, scale, bias, mask, dy).compile()
    found = compiled(x, scale, bias, mask, dy)
  assert_whole(jax.device_get(found), whole)
  assert found[0].sharding.is_equivalent_to(x.sharding, 2)
  assert found[1][0].sharding.is_equivalent_to(x.sharding, 2)
  # The gradient of a whole scale, where the features are split, is gathered.
  assert max(size for _, size in collectives(compiled)) <= 4 * 4


def test_means_of_local_means_are_not_of_the_batch():
  """Flax averages the means of devices, whatever the masks count."""
  (x, *_, mask, _), _ = split()
  norm = flax.linen.BatchNorm(
    use_running_average=False,
    axis_name='d',
    use_bias=False,
    use_scale=False,
    use_fast_variance=False,
  )
  variables = {
    'batch_stats': {'mean': jnp.zeros(x.shape[1:]), 'var': jnp.ones(4)}
  }

  def apply(x, mask):
    return norm.apply(variables, x, mask=mask, mutable='batch_stats')

  counted = mask.reshape(8, 4)[:, :, None].copy()
  counted[0, 0] = True  # nothing at all is NaN in Flax
  step = jax.jit(jax.vmap(apply, axis_name='d'))
  _, updated = step(in_parts(x), counted)
  mean = updated['batch_stats']['mean'][0] / 0.01
  exact = x[counted.reshape(-1)].mean(0)
  assert np.abs(np.asarray(mean) - exact).max() > 0.1


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


def all_reduced(program, *args):
  """The sizes of all sums over devices, and nothing else, in shard_map."""
  sharded = jax.shard_map(
    program,
    mesh=mesh(AxisType.Auto),
    in_specs=(P('d'), P(), P(), P('d'), P('d')),
    out_specs=OUT,
  )
  found = collectives(jax.jit(sharded).lower(*args).compile())
  assert {kind for kind, _ in found} <= {'all-reduce'}
  return sorted(size for _, size in found)


def test_all_reduces_of_statistics_only():
  """Two forward, one more for the gradient of x, one of the parameters."""
  batch, _ = split()

  def step(x, scale, bias, mask, dy):
    return stepped(x, scale, bias, mask, dy, 'd')

  def forward(*args):
    y, (dx, *_), moments = step(*args)
    none = jnp.zeros(4)
    return y, (jnp.zeros_like(dx), none, none), moments

  def of_x(*args):
    y, (dx, *_), moments = step(*args)
    return y, (dx, jnp.zeros(4), jnp.zeros(4)), moments

  pair = 2 * 4  # two numbers per feature
  assert all_reduced(forward, *batch) == [pair] * 2
  assert all_reduced(of_x, *batch) == [pair] * 3
  # XLA joins that of scale and bias with that of x: they are of one size.
  assert sum(all_reduced(step, *batch)) == pair * 4


@pytest.mark.parametrize('shape', [(64, 8, 8, 32), (256, 128)], ids=str)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
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


# Inference.


def running(mean, var):
  return optax_ghm.RunningMoments(mean, var, jnp.ones_like(mean))


def test_inference_is_the_formula(rng):
  x = rng.normal(size=(4, 5, 3)).astype(np.float32)
  mean, var, scale, bias = (
    rng.uniform(1, 2, size=(4, 3)).astype(np.float32) for _ in range(4)
  )
  y = optax_ghm.batch_norm_inference(
    x, running(mean, var), scale, bias, axis=(0, 2), epsilon=EPSILON
  )
  wide = (u.astype(np.float64)[:, None] for u in (mean, var, scale, bias))
  mean, var, scale, bias = wide
  expected = scale * (x - mean) / np.sqrt(var + EPSILON) + bias
  assert_close(y, expected, 1e-6)


inference = jax.jit(
  optax_ghm.batch_norm_inference, static_argnames=('axis', 'epsilon', 'dtype')
)


def test_inference_by_domain(rng):
  x = rng.normal(size=(6, 2, 3)).astype(np.float32)
  mean, var, scale = rng.uniform(1, 2, size=(3, 4, 3)).astype(np.float32)
  domain = np.array([0, 3, 1, 4, -1, 3])
  bias = np.float32([1, 2, 3])  # of all domains
  averages = running(mean, var)
  y = inference(x, averages, scale, bias, domain=domain, epsilon=EPSILON)
  for i, d in enumerate(domain):
    expected = np.zeros((2, 3))
    if 0 <= d < 4:
      expected = (x[i] - mean[d]) / np.sqrt(var[d] + EPSILON) * scale[d] + bias
    assert_close(y[i], expected, 1e-6)
  one = inference(x, averages, domain=np.array(3), epsilon=EPSILON)
  assert_close(one, (x - mean[3]) / np.sqrt(var[3] + EPSILON), 1e-6)


def test_inference_is_in_float32_and_then_rounded(rng):
  x = jnp.asarray(3 + rng.normal(size=(6, 3)), jnp.bfloat16)
  mean, var, scale = rng.uniform(1, 2, size=(3, 3)).astype(np.float32)
  wide = np.asarray(x, np.float64)
  expected = (wide - mean) / np.sqrt(var + 1e-5) * scale
  for dtype in (jnp.float32, jnp.bfloat16):
    y = inference(x, running(mean, var), scale, dtype=dtype)
    assert y.dtype == dtype
    assert_close(y, expected, 1e-6, rounding=float(jnp.finfo(dtype).eps) / 2)


def test_inference_keeps_1e4_standard_deviations(rng):
  x = (1e4 + rng.normal(size=(9, 2))).astype(np.float32)
  y = optax_ghm.batch_norm_inference(x, running(jnp.full(2, 1e4), jnp.ones(2)))
  np.testing.assert_allclose(
    y, (x.astype(np.float64) - 1e4) / np.sqrt(1 + 1e-5), rtol=1e-6
  )


def test_inference_is_differentiable_in_everything(rng):
  x = rng.normal(size=(4, 3)).astype(np.float32)
  args = [x, *(u.astype(np.float32) for u in rng.uniform(1, 2, size=(4, 3)))]
  dy = rng.normal(size=(4, 3)).astype(np.float32)

  def formula(x, mean, var, scale, bias):
    mean, var, scale, bias = (u[..., None, :] for u in (mean, var, scale, bias))
    return (x - mean) / np.sqrt(var + EPSILON) * scale + bias

  def f(x, mean, var, scale, bias):
    return optax_ghm.batch_norm_inference(
      x, running(mean, var), scale, bias, epsilon=EPSILON
    )

  found = jax.jit(lambda *args: jax.vjp(f, *args)[1](dy))(*args)
  wide = [u.astype(np.float64) for u in args]
  expected, _ = derivatives(formula, wide, dy.astype(np.float64))
  for a, b in zip(found, expected, strict=True):
    assert_close(a, b, 1e-6)


# Errors.

X = np.ones((4, 3), np.float32)


@pytest.mark.parametrize('dtype', [np.int32, np.complex64, bool])
def test_x_must_be_real_and_floating(dtype):
  x = jnp.ones((4, 3), dtype)
  for f in (
    optax_ghm.batch_norm,
    lambda x: optax_ghm.batch_norm_inference(
      x, running(jnp.ones(3), jnp.ones(3))
    ),
  ):
    with pytest.raises(TypeError, match=f'x must be .*{np.dtype(dtype)}'):
      f(x)


@pytest.mark.parametrize(
  ('kwargs', 'match'),
  [
    ({'axis': 2}, r'axis must .*\(4, 3\), got 2'),
    ({'axis': (0, -3)}, r'axis must .*\(0, -3\)'),
    ({'mask': np.ones((3, 1), bool)}, r'mask of shape \(3, 1\)'),
    ({'mask': np.ones((1, 4, 3), bool)}, r'mask of shape \(1, 4, 3\)'),
    ({'mask': np.ones(4, bool)}, r'mask of shape \(4,\)'),
    ({'scale': np.ones(4, np.float32)}, r'scale must .*\(3,\), got \(4,\)'),
    ({'scale': np.float32(1)}, r'scale must .*got \(\)'),
    ({'bias': np.ones((1, 3), np.float32)}, r'bias must .*got \(1, 3\)'),
  ],
  ids=str,
)
def test_arguments_that_do_not_fit(kwargs, match):
  with pytest.raises(ValueError, match=match):
    optax_ghm.batch_norm(X, **kwargs)


@pytest.mark.parametrize(
  ('shape', 'mask', 'error', 'match'),
  [
    ((4, 3), np.ones(4, bool), ValueError, r'Give mask\[:, None\]'),
    (
      (3, 3),
      np.ones(3, bool),
      ValueError,
      r'mask\[:, None\] or mask\[None, :\]',
    ),
    ((4, 3), np.ones((4, 1)), TypeError, 'mask must be bool, got float'),
  ],
  ids=str,
)
def test_masks_that_could_mean_something_else(shape, mask, error, match):
  with pytest.raises(error, match=match):
    optax_ghm.batch_norm(np.ones(shape, np.float32), mask=mask)


@pytest.mark.parametrize(
  ('kwargs', 'error', 'match'),
  [
    ({'mean': np.ones(4)}, ValueError, 'mean must'),
    ({'var': np.ones((1, 3))}, ValueError, 'var must'),
    ({'scale': np.ones(2)}, ValueError, 'scale must'),
    ({'bias': np.ones(2)}, ValueError, 'bias must'),
    ({'axis': 5}, ValueError, 'axis must'),
    ({'domain': np.zeros(4, int)}, ValueError, 'mean must'),
    (
      {
        'domain': np.zeros(3, int),
        'mean': np.ones((2, 3)),
        'var': np.ones((2, 3)),
      },
      ValueError,
      'domain must',
    ),
    ({'domain': np.zeros(4)}, TypeError, 'domain must be integers'),
  ],
  ids=str,
)
def test_arguments_of_inference_that_do_not_fit(kwargs, error, match):
  kwargs = {'mean': np.ones(3), 'var': np.ones(3), **kwargs}
  averages = running(kwargs.pop('mean'), kwargs.pop('var'))
  with pytest.raises(error, match=match):
    optax_ghm.batch_norm_inference(X, averages, **kwargs)


# Anything.

KINDS = [
  ((0, 2), jnp.float32),
  ((3, 2), jnp.float32),
  ((3, 2), jnp.float16),
  ((2, 2, 3), jnp.bfloat16),
]
FINITE = [0.0, -0.0, 1.0, -3.5, 1e-30, 1e15, -1e15, 7e4]
NUMBERS = [*FINITE, 1e30, -1e30, np.nan, np.inf, -np.inf]


@given(st.data())
def test_never_raises_and_is_finite_where_it_can_be(data):
  shape, dtype = data.draw(st.sampled_from(KINDS))
  values = st.sampled_from(data.draw(st.sampled_from([FINITE, NUMBERS])))
  case = a_case(shape, -1, shape[:-1] + (1,))
  with np.errstate(over='ignore'):
    case.x = data.draw(hnp.arrays(np.float32, shape, elements=values))
    case.x = case.x.astype(dtype)
  case.dy = case.dy.astype(dtype)
  case.mask = data.draw(hnp.arrays(bool, case.mask.shape))
  case.dy = np.where(case.mask, case.dy, np.zeros_like(case.dy))
  found = ours(case, second=False)
  assert found.y.shape == found.grads[0].shape == shape
  assert found.y.dtype == found.grads[0].dtype == dtype
  assert all(u.shape == shape[-1:] for u in found.moments)
  over = tuple(range(len(shape) - 1))
  counted = np.broadcast_to(case.mask, shape)
  np.testing.assert_array_equal(found.moments.count, counted.sum(over))
  # Numbers that do not count and other features do not matter.
  wide = case.x.astype(np.float32)
  finite = np.isfinite(wide) & (np.abs(wide) <= 2e15)
  finite = np.broadcast_to(np.all(finite | ~counted, over), shape) & counted
  assert np.isfinite(found.y[finite]).all()
  assert np.isfinite(found.grads[0][finite]).all() or dtype == jnp.float16
  assert np.isfinite(found.grads[2]).all()


@pytest.mark.parametrize('shape', [(7, 256), (13, 5, 64), (100, 128)])
def test_far_from_zero_compiled_loops_agree_on_the_mean(shape):
  """A compiler that divides again in each loop must not see several means."""
  x = np.random.default_rng(0).normal(1e4, 1, shape).astype(np.float32)
  axes = tuple(range(len(shape) - 1))
  wide = x.astype(np.float64)
  want = (wide - wide.mean(axes)) / np.sqrt(wide.var(axes) + 1e-5)
  y, _ = jax.jit(optax_ghm.batch_norm)(x)
  np.testing.assert_allclose(y, want, atol=2e-6)
  constant = np.broadcast_to(
    np.linspace(1e4, 1e5, shape[-1], dtype=np.float32), shape
  )
  assert not jax.jit(optax_ghm.batch_norm)(constant)[0].any()


def test_inference_keeps_the_dtype():
  x = jnp.ones((2, 2), jnp.bfloat16)
  y = optax_ghm.batch_norm_inference(x, running(jnp.zeros(2), jnp.ones(2)))
  assert y.dtype == jnp.bfloat16


def test_statistics_of_another_precision():
  x = jnp.ones((2, 2))
  half = jnp.ones(2, jnp.bfloat16)
  y = optax_ghm.batch_norm_inference(x, running(half, half), half, half)
  np.testing.assert_allclose(y, 1)


@pytest.mark.parametrize('axis', [np.int64(1), (np.int64(1),), 1])
def test_numpy_numbers_name_axes(axis):
  y, _ = optax_ghm.batch_norm(jnp.array([[1.0, 5.0], [3.0, 5.0]]), axis=axis)
  np.testing.assert_allclose(y[:, 0], [-1, 1], atol=1e-4)


def test_a_single_number_has_no_batch():
  with pytest.raises(ValueError, match=r'axis must .*\(\), got \(\)'):
    optax_ghm.batch_norm(jnp.ones(()), axis=())


def test_nan_in_masked_places_stays_out_of_all_derivatives():
  x = jnp.array([[1.0, 2.0], [3.0, 5.0], [jnp.nan, 1.0]])
  mask = jnp.array([[True], [True], [False]])

  def variance(x):
    return optax_ghm.Moments.of(x, mask=mask).variance().sum()

  np.testing.assert_allclose(
    jax.grad(variance)(x), [[-1, -1.5], [1, 1.5], [0, 0]]
  )

  def gradient(x):
    _, pull = jax.vjp(lambda x: optax_ghm.batch_norm(x, mask=mask)[0], x)
    return pull(jnp.array([[1.0, 2.0], [3.0, -1.0], [0.0, 0.0]]))[0]

  second = jax.grad(lambda x: gradient(x)[:2].sum())(x)
  assert jnp.isfinite(second[:2]).all()
