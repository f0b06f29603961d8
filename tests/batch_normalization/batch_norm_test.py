"""Value, gradient, and the gradient of that, of the batch norms of batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ghm
from tests.support import oracles_batch_norm as oracle
from tests.support.oracles_batch_norm import (
  EPSILON,
  a_case,
  assert_close,
  assert_same,
  expected,
  found,
)

same = np.testing.assert_array_equal
RUNNING = oracle.averages([2.0, 5.0, 3.5], [2.0, 40.0, 0.1])
ALL = {
  'batch_norm': {},
  'ghost_batch_norm': {'ghost_size': 3},
  'domain_batch_norm': {'num_domains': 3},
  'batch_renorm': {'running': RUNNING},
}


CASES = [  # the last: whether to check the gradient of the gradient
  ((6,), -1, None, np.float32, False),
  ((7, 3), -1, (7, 1), np.float32, True),
  ((3, 7), 0, (1, 7), np.float32, False),
  ((4, 5, 3), (0, -1), None, np.float32, False),
  ((4, 5, 3), (), (4, 1, 1), np.float32, False),
  ((4, 2, 3, 5), -1, (2, 3, 1), np.float32, False),
  ((4, 2, 3, 5), -1, (5,), np.float32, False),
  ((4, 2, 3, 5), -1, (4, 2, 3, 5), np.float64, True),
  ((4, 2, 3, 5), -1, (4, 2, 3, 1), jnp.float16, False),
  ((4, 2, 3, 5), -1, (4, 1, 1, 1), jnp.bfloat16, False),
  ((2, 3, 2, 2, 3), (1, -1), (2, 1, 1, 2, 1), np.float32, False),
  ((1, 4), -1, None, np.float32, False),
  ((0, 3), -1, (0, 1), np.float32, False),
  ((3, 0), -1, (3, 1), np.float32, False),
]


@pytest.mark.device
@pytest.mark.parametrize(
  ('shape', 'axis', 'mask', 'dtype', 'second'), CASES, ids=str
)
def test_is_the_definition_and_so_are_its_gradients(
  shape, axis, mask, dtype, second
):
  """In at least float32, and what is of 16 bits is rounded once."""
  case = a_case(shape, axis, mask, dtype)
  with jax.enable_x64(dtype == np.float64):
    actual = found(case, second=second)
  wide = np.promote_types(dtype, np.float32)
  assert actual.y.dtype == actual.grads[0].dtype == dtype
  assert {u.dtype for u in (*actual.moments, *actual.grads[1:])} == {wide}
  if second:
    assert actual.second[0].dtype == actual.second[3].dtype == dtype
  precision = (1e-12, 1e-8) if dtype == np.float64 else (1e-5, 1e-4)
  rounding = oracle.half_a_digit(dtype)
  assert_same(actual, expected(case, second), *precision, rounding)


@pytest.mark.device
@pytest.mark.parametrize('offset', [1e2, 1e3, -1e4])
def test_a_mean_of_many_standard_deviations(offset):
  """To 1e-5; a difference of squares would be off by more than 2."""
  case = a_case((60, 4), mean=offset, std=1.0)
  case.dy[:, 1:3] += case.x[:, 1:3] - np.float32(offset)
  case.x[:, 0] -= offset  # near and far in one array
  actual, wanted = found(case, second=True), expected(case, second=True)
  assert_same(actual, wanted, second=1e-3)
  for f in (0, 3):  # and each of the features by itself
    assert_close(actual.y[:, f], wanted.y[:, f])
    assert_close(actual.grads[0][:, f], wanted.grads[0][:, f])
    assert_close(actual.moments.var[f], wanted.moments.var[f])


@pytest.mark.parametrize('shape', [(7, 256), (13, 5, 64)], ids=str)
def test_far_from_zero_compiled_loops_agree_on_the_mean(shape):
  """A compiler that divides again in each loop must not see several means."""
  x = np.random.default_rng(0).normal(1e4, 1, shape).astype(np.float32)
  axes = tuple(range(len(shape) - 1))
  wide = x.astype(np.float64)
  want = (wide - wide.mean(axes)) / np.sqrt(wide.var(axes) + 1e-5)
  norm = jax.jit(optax_ghm.batch_norm)
  np.testing.assert_allclose(norm(x)[0], want, atol=2e-6)
  constants = np.linspace(1e4, 1e5, shape[-1], dtype=np.float32)
  assert not np.any(norm(np.broadcast_to(constants, shape))[0])


@pytest.mark.device
@pytest.mark.parametrize('name', ['batch_norm', 'batch_renorm'])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_masked_out_numbers_stay_in_their_place(name, bad):
  case = a_case((7, 3), -1, (7, 1))
  out = ~case.mask[:, 0]
  case.dy[out] = 0
  before = found(case, name, True, ALL[name])
  case.x[out] = bad
  after = found(case, name, True, ALL[name])
  assert not np.isfinite(after.y[out]).any()
  assert not after.grads[0][out].any()
  same(after.y[~out], before.y[~out])
  jax.tree.map(same, after[1:3], before[1:3])
  for i in (0, 3):  # the gradient of the gradient, of x and of dy
    assert np.isfinite(after.second[i][~out]).all()


@pytest.mark.device
def test_where_nothing_counts_y_is_the_bias():
  case = a_case((7, 3), -1, (7, 1))
  case.mask[:] = False
  actual = found(case, second=True)
  same(actual.y, np.tile(case.bias, (7, 1)))
  assert not actual.grads[0].any()
  assert not actual.grads[1].any()
  np.testing.assert_allclose(actual.grads[2], case.dy.sum(0), rtol=1e-5)
  assert not np.any(actual.moments)
  assert all(np.isfinite(grad).all() for grad in actual.second)
  case.x[2], case.dy[2] = np.nan, 0
  actual = found(case, second=True)
  assert all(np.isfinite(grad).all() for grad in actual.grads)


@pytest.mark.device
def test_parameters_may_be_missing_and_epsilon_is_1e_5_unless_said():
  x = np.float32([[0], [0.01], [1], [1.01]])
  domain = np.int32([0, 0, 1, 1])
  running = oracle.averages([0.5], [0.25])

  @jax.jit
  def program(x):
    ones = jnp.ones(1), jnp.zeros(1)
    norms = {
      'batch': optax_ghm.batch_norm,
      'ghosts': functools.partial(optax_ghm.ghost_batch_norm, ghost_size=2),
      'domains': functools.partial(
        optax_ghm.domain_batch_norm, domain=domain, num_domains=2
      ),
      'renorm': functools.partial(
        optax_ghm.batch_renorm, running=running, r_max=1.0, d_max=0.0
      ),
    }
    found = {key: norm(1e-2 * x)[0] for key, norm in norms.items()}
    given = {
      key: norm(1e-2 * x, scale=ones[0], bias=ones[1])[0]
      for key, norm in norms.items()
    }
    return found, given

  actual, given = program(100 * x)
  jax.tree.map(same, actual, given)
  wide = x.astype(np.float64)
  whole = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5)
  half = 0.005 / np.sqrt(0.005**2 + 1e-5) * np.array([[-1], [1], [-1], [1]])
  for key, y in actual.items():
    close = functools.partial(np.testing.assert_allclose, y, rtol=1e-4)
    close(half if key in ('ghosts', 'domains') else whole, atol=1e-4)


@pytest.mark.device
def test_dtypes_of_results_and_of_gradients():
  """Of y as asked for, and of gradients as of what they are gradients of."""
  domain = np.array([0, 1, 1, 0, 2, 2])
  norms = {
    'batch_norm': ({}, {}, oracle.definition),
    'ghost_batch_norm': ({}, {'ghost_size': 3}, oracle.by_slices(3)),
    'domain_batch_norm': (
      {'domain': domain},
      {'num_domains': 3},
      oracle.by_subsets(domain),
    ),
    'batch_renorm': (
      {'running': RUNNING, 'r_max': 1.0, 'd_max': 0.0},
      {},
      None,
    ),
  }
  pairs = [
    (jnp.bfloat16, jnp.float32),
    (jnp.bfloat16, jnp.float16),
    (jnp.float32, jnp.bfloat16),
  ]
  cases = [a_case((6, 3), dtype=of_x) for of_x, _ in pairs]
  half = cases[0].scale.astype(jnp.bfloat16), cases[0].bias.astype(jnp.bfloat16)

  @jax.jit
  def program(xs, dys, half):
    results = {}
    for name, (traced, static, _) in norms.items():
      for i, (_, dtype) in enumerate(pairs):
        norm = oracle.norm_of(name, {**traced, 'dtype': dtype}, static.items())
        args = xs[i], cases[i].scale, cases[i].bias, dys[i].astype(dtype)
        results[name, i] = oracle.differentiate(norm, *args)
    norm = oracle.norm_of('batch_norm', {})
    return results, oracle.differentiate(norm, xs[2], *half, dys[2]).grads

  actual, grads = program([c.x for c in cases], [c.dy for c in cases], half)
  for (name, i), one in actual.items():
    of_x, dtype = pairs[i]
    assert one.y.dtype == dtype and one.grads[0].dtype == of_x
    assert {u.dtype for u in one.moments} == {np.dtype(np.float32)}
    case = cases[i]
    case.dy = case.dy.astype(dtype)
    wanted = expected(case, norm=norms[name][2] or oracle.definition)
    rounding = oracle.half_a_digit(dtype)
    assert_close(one.y, wanted.y, rounding=rounding)
    rounding = oracle.half_a_digit(of_x)
    assert_close(one.grads[0], wanted.grads[0], rounding=rounding)
  assert [g.dtype for g in grads] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]


@pytest.mark.device
def test_no_gradient_of_any_order_flows_through_the_moments():
  case = a_case((7, 3))

  def loss(weight, x, scale, bias):
    y, moments = optax_ghm.batch_norm(x, scale, bias)
    parts = [*moments, moments.variance()]
    return jnp.sum(y * case.dy) + weight * sum(
      jnp.sum(jnp.square(u)) for u in parts
    )

  def of_sine(x):
    y, moments = optax_ghm.batch_norm(x, case.scale)
    return jnp.sum(jnp.sin(y)), [*moments, moments.variance()]

  @jax.jit
  def program(weight):
    def again(x):
      grad, parts = jax.grad(of_sine, has_aux=True)(x)
      return jnp.sum(grad * case.dy) + weight * sum(jnp.sum(u) for u in parts)

    args = weight, case.x, case.scale, case.bias
    return *jax.grad(loss, argnums=(1, 2, 3))(*args), jax.grad(again)(case.x)

  for a, b in zip(program(0.0), program(5.0), strict=True):
    assert np.any(a)
    same(a, b)


def test_forward_mode_raises_and_inference_is_the_same_there():
  case = a_case((7, 3), -1, (7, 1))
  tangent = case.u[0]
  with pytest.raises(TypeError, match='jvp'):
    jax.jit(lambda x: jax.jvp(optax_ghm.batch_norm, (x,), (tangent,)))(case.x)

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
  wanted = expected(case)
  assert_close(y, wanted.y)
  assert_close(backward, wanted.grads[0])
  assert_close(np.vdot(forward, case.dy), np.vdot(tangent, wanted.grads[0]))


@pytest.mark.device
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
    counts = np.broadcast_to(case.mask, case.x.shape)
    outputs = []
    for model in range(2):
      y = x
      for i in range(3):
        scale = models[..., model, i, :]
        y = np.tanh(oracle.definition(y, scale, 0 * scale, counts)[0])
      outputs.append(y)
    return np.sum(outputs, 0)

  args = (case.x.astype(np.float64), models.astype(np.float64))
  dy = case.dy.astype(np.float64)
  wanted, _ = oracle.derivatives(unrolled, args, dy)
  for a, b in zip(actual, wanted, strict=True):
    assert_close(a, b)


@pytest.mark.parametrize('axis', [np.int64(1), (np.int64(1),), 1])
def test_numpy_numbers_name_axes(axis):
  norm = jax.jit(optax_ghm.batch_norm, static_argnames='axis')
  y, _ = norm(np.float32([[1, 5], [3, 5]]), axis=axis)
  np.testing.assert_allclose(y[:, 0], [-1, 1], atol=1e-4)
