"""Batch norm as modules: in the place of Flax's, and what they keep."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import optax_ghm
import optax_ghm.linen
import optax_ghm.nnx
from tests.support.faces_batch_norm import both, face_of, widening

same = np.testing.assert_array_equal


def close(found, expected, rtol=1e-5, atol=1e-6):
  chex.assert_trees_all_close(found, expected, rtol=rtol, atol=atol)


def random(key, shape, dtype=jnp.float32):
  return jax.random.normal(key, shape, dtype)


# The modules in the place of Flax's.


def train(face, variables, xs, **kwargs):
  """Three steps with SGD: variables, and what y and the gradients were."""

  def step(variables, x):
    def loss(params, x):
      y, updated = face({**variables, 'params': params}, x, **kwargs)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, updated)

    params = variables.get('params', {})
    grads, (y, updated) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    params = jax.tree.map(
      lambda p, g: p - g * jnp.asarray(0.1, g.dtype), params, grads[0]
    )
    updated = {'params': params, 'batch_stats': updated['batch_stats']}
    return {name: updated[name] for name in variables}, (y, grads)

  return jax.lax.scan(step, variables, xs)


CASES = {
  'default, mask': ({}, 'float32'),
  'axes': (
    {
      'axis': (-1, 1),
      'momentum': 0.3,
      'epsilon': 0.5,
      'scale_init': random,
      'bias_init': random,
    },
    'float32',
  ),
  'no scale': ({'use_scale': False, 'bias_init': random}, 'bfloat16'),
  'neither': ({'use_scale': False, 'use_bias': False}, 'bfloat16'),
  'to bfloat16': (
    {
      'dtype': jnp.bfloat16,
      'param_dtype': jnp.bfloat16,
      'use_bias': False,
      'scale_init': random,
    },
    'float32',
  ),
}


@pytest.mark.device
@both
@pytest.mark.parametrize('case', CASES)
def test_trains_as_that_of_flax(name, case, rng):
  options, dtype = CASES[case]
  if name == 'nnx' and case == 'axes':
    options = {**options, 'axis': 1}  # there is one only
  xs = jnp.asarray(rng.normal(1, 2, size=(3, 4, 3, 5)), dtype)
  kwargs = {'use_running_average': False}
  if 'mask' in case:
    kwargs['mask'] = rng.uniform(size=(4, 3, 1)) < 0.7
  features = 3 if case == 'axes' else 5
  theirs, ours = (
    face_of(name, features=features, flax=flax, **options)
    for flax in (True, False)
  )

  @jax.jit
  def program(xs):
    starts, ends, outputs = [], [], []
    for face in (theirs, ours):
      variables = face.init(xs[0], use_running_average=False)
      starts.append(variables)
      end, output = train(face, variables, xs, **kwargs)
      ends.append(end)
      outputs.append(output)
    # Each is evaluated with the variables of the other.
    evaluated = [
      face(variables, xs[0], use_running_average=True)
      for face, variables in ((theirs, ends[1]), (ours, ends[0]))
    ]
    return starts, ends, outputs, evaluated

  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    found = jax.device_get(program(xs))
  starts, ends, outputs, ((y, _), (mine, after)) = found
  chex.assert_trees_all_equal(*starts)
  for pair in (starts, ends, outputs, (y, mine)):
    chex.assert_trees_all_equal_shapes_and_dtypes(*pair)
  half = 'bfloat16' in case or dtype == 'bfloat16'
  tolerance = 0.04 if half else 2e-5
  close(outputs[1], outputs[0], tolerance, tolerance)
  # The module of NNX rounds the input first.
  tolerance = 0.01 if name == 'nnx' and case == 'to bfloat16' else 1e-5
  close(ends[1]['batch_stats'], ends[0]['batch_stats'], tolerance, tolerance)
  tolerance = 0.04 if half else 1e-5
  mine, y = (u.astype(np.float32) for u in (mine, y))
  close(mine, y, tolerance, tolerance)
  chex.assert_trees_all_equal(after, ends[0])


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('linen', {'axis_index_groups': [[0, 1], [2, 3]]}),
    ('linen', {'force_float32_reductions': False}),
    ('nnx', {'axis_index_groups': [[0, 1], [2, 3]]}),
    ('nnx', {'promote_dtype': lambda args, dtype: args}),
  ],
)
def test_arguments_of_flax_that_mean_something_else_are_refused(
  name, options, x
):
  (argument,) = options
  with pytest.raises(ValueError, match=f'{argument} must have its default'):
    jax.eval_shape(lambda: face_of(name, **options).init(x, False))


@both
@pytest.mark.parametrize(
  ('kind', 'options'),
  [
    ('BatchNorm', {'momentum': 1.5}),
    ('BatchRenorm', {'r_max': 0.5}),
    ('BatchRenorm', {'d_max': -1.0}),
  ],
)
def test_numbers_out_of_range_are_named(name, kind, options, x):
  ((argument, value),) = options.items()
  with pytest.raises(ValueError, match=f'{argument} must .*got {value}'):
    jax.eval_shape(lambda: face_of(name, kind, **options).init(x, False))


@pytest.mark.parametrize(
  ('ours', 'theirs'),
  [
    (optax_ghm.linen.BatchNorm, nn.BatchNorm),
    (optax_ghm.nnx.BatchNorm, nnx.BatchNorm),
  ],
)
def test_the_arguments_are_those_of_flax_in_their_order(ours, theirs):
  ours, theirs = (
    inspect.signature(kind.__init__).parameters for kind in (ours, theirs)
  )
  assert [name for name in ours if name in theirs] == list(theirs)
  for name, parameter in theirs.items():
    assert ours[name].kind == parameter.kind
    # Initializers and empty metadata have other objects of the same meaning.
    if not (callable(parameter.default) or name.endswith('metadata')):
      assert ours[name].default == parameter.default
  kinds = {parameter.kind for parameter in ours.values()}
  assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_where_to_use_running_averages_must_be_said(x):
  linen = optax_ghm.linen.BatchNorm

  def call(norm, *args):
    return norm(3, use_running_average=None, rngs=nnx.Rngs(0))(x, *args)

  for f in (
    lambda: linen().init(jax.random.key(0), x),
    lambda: linen(True).init(jax.random.key(0), x, True),  # as Flax does
    lambda: call(optax_ghm.nnx.BatchNorm),
  ):
    with pytest.raises(ValueError, match='use_running_average'):
      jax.eval_shape(f)
  with pytest.raises(ValueError, match=r'scale must .*\(2,\), got \(3,\)'):
    norm = face_of('nnx')
    jax.eval_shape(lambda: norm(norm.init(x), x[:, :2]))


@pytest.mark.device
@both
def test_the_constructor_or_the_call_decides(name, x):
  @jax.jit
  def program(x):
    training = face_of(name, momentum=0.25, use_running_average=False)
    y, variables = training(training.init(x), x)
    called = face_of(name, momentum=0.25, use_running_average=None)
    by_call, after = called(called.init(x, False), x, False)
    evaluating = face_of(name, momentum=0.25, use_running_average=True)
    results = [(y, variables), (by_call, after), evaluating(variables, x)]
    if name == 'nnx':
      results.append(evaluating(training.init(x), x, False))
    return results

  trained, called, (evaluated, _), *more = jax.device_get(program(x))
  stats = trained[1]['batch_stats']
  mean, var = 0.75 * x.mean(0), 0.25 + 0.75 * x.var(0)
  close(stats, {'mean': mean, 'var': var})
  for other in (called, *more):
    chex.assert_trees_all_equal(other, trained)
  close(evaluated, (x - mean) / np.sqrt(var + 1e-5))


def test_initializing_linen_updates_nothing(x):
  @jax.jit
  def program(x):
    faces = [
      (face_of('linen'), ()),
      (face_of('linen', 'BatchRenorm', d_max=widening), ()),
      (face_of('linen', 'DomainBatchNorm', num_domains=4), (np.arange(6) % 3,)),
    ]
    return [
      [face.init(x, *args, mode) for mode in (False, True)]
      for face, args in faces
    ]

  for variables, again in program(x):
    chex.assert_trees_all_equal(again, variables)
    assert variables.keys() == {'params', 'batch_stats'}
    stats = dict(variables['batch_stats'])
    same(stats['mean'], np.zeros_like(stats['mean']))
    same(stats['var'], np.ones_like(stats['var']))
    assert stats.get('steps', 0) == 0


def test_stats_are_measured_only_if_asked_for(x):
  norm = optax_ghm.linen.BatchNorm(False)

  @jax.jit
  def program(x):
    variables = norm.init(jax.random.key(0), x)
    _, updated = norm.apply(variables, x, mutable=['batch_stats'])
    plain = optax_ghm.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    plain(x)
    kept = optax_ghm.nnx.BatchNorm(3, measure=True, rngs=nnx.Rngs(0))
    kept.eval()
    kept(x)
    return updated, nnx.to_pure_dict(nnx.state(plain)), kept.stats.get_value()

  linen, plain, stats = program(x)
  assert linen.keys() == {'batch_stats'}
  assert plain.keys() == {'scale', 'bias', 'mean', 'var'}
  same(stats.numbers, np.zeros(5))


def test_nnx_split_and_merge_keep_everything(x):
  @jax.jit
  def program(x):
    norm = optax_ghm.nnx.BatchRenorm(
      3, r_max=widening, debias=True, measure=True, rngs=nnx.Rngs(0)
    )
    norm(x)
    graph, state = nnx.split(norm)
    copy = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    ys = norm(x + 1), copy(x + 1)
    states = (nnx.to_pure_dict(nnx.state(n)) for n in (norm, copy))
    return list(zip(ys, states, strict=True))

  mine, copied = program(x)
  chex.assert_trees_all_equal(mine, copied)
  assert mine[1]['steps'] == 2


def test_views_and_modes_of_nnx_models_reach_our_modules():
  def build():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
      nnx.BatchNorm(3, rngs=rngs), optax_ghm.nnx.BatchNorm(3, rngs=rngs)
    )

  model = nnx.eval_shape(build)
  for mode in (True, False):
    for changed in (nnx.view(model, use_running_average=mode), model):
      if changed is model:
        model.eval() if mode else model.train()
      found = [norm.use_running_average for norm in changed.layers]
      assert found == [mode, mode]
  assert not nnx.view(model).layers[1].use_running_average
