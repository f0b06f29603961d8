"""The modules are the functions: what they return, keep, and leave alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm
from optax_ghm import flow
from tests.support import strategies_arrays as arrays_of
from tests.support.faces_batch_norm import STATS, Linen, face_of, widening

close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


DOMAIN = np.array([0, 1, 1, 3])
KINDS = {  # of the module, options, and the function with its own
  'BatchNorm': ('BatchNorm', {'unbiased': True}, {}),
  'ghosts': ('BatchNorm', {'debias': True, 'momentum': 0.5}, {'ghost_size': 2}),
  'renorm': ('BatchRenorm', {'debias': True, 'epsilon': 0.1}, {}),
  'limits': ('BatchRenorm', {}, {'r_max': 1.5, 'd_max': 0.25}),
  'schedule of r': ('BatchRenorm', {}, {'r_max': widening}),
  'schedule of d': ('BatchRenorm', {'momentum': 0.5}, {'d_max': widening}),
  'domains': ('DomainBatchNorm', {'debias': True}, {'num_domains': 3}),
  'rows': (
    'DomainBatchNorm',
    {'shared_affine': False, 'unbiased': True},
    {'num_domains': 3},
  ),
}
FUNCTIONS = {
  'BatchNorm': optax_ghm.batch_norm,
  'BatchRenorm': optax_ghm.batch_renorm,
  'DomainBatchNorm': optax_ghm.domain_batch_norm,
}


def by_function(key, params, xs, mask):
  """What a module does in two steps, one without updates, and evaluation."""
  kind, options, more = KINDS[key]
  domains = kind == 'DomainBatchNorm'
  epsilon = {'epsilon': options.get('epsilon', 1e-5)}
  update = {k: options[k] for k in ('momentum', 'unbiased') if k in options}
  rows = (3,) if domains else ()
  running = optax_ghm.RunningMoments.init((*rows, 2), 'debias' in options)
  f = optax_ghm.ghost_batch_norm if key == 'ghosts' else FUNCTIONS[kind]
  found = []
  for step, x in enumerate(xs):
    args = {'running': running} if kind == 'BatchRenorm' else {}
    args |= {'domain': DOMAIN} if domains else {}
    given_ = {
      k: v(jnp.array(step)) if callable(v) else v for k, v in more.items()
    }
    y, moments = f(x, **args, **params, mask=mask, **epsilon, **given_)
    limits = {}
    if kind == 'BatchRenorm':
      limits = {'r_max': 3.0, 'd_max': 5.0, **given_}
    stats = flow.batch_norm_stats(moments, running, **epsilon, **limits)
    found.append((y, running._asdict(), stats.numbers))
    if step < 2:
      running = running.update(moments, **update)
  domain = {'domain': DOMAIN} if domains else {}
  y = optax_ghm.batch_norm_inference(
    xs[2], running, **params, **epsilon, **domain
  )
  return [*found, y]


@functools.partial(jax.jit, static_argnums=0)
def by_all(key, xs, mask):
  """The same of the function and of both modules."""
  kind, options, more = KINDS[key]
  args = (DOMAIN,) if kind == 'DomainBatchNorm' else ()
  results = []
  for name in ('linen', 'nnx'):
    face = face_of(
      name,
      kind,
      features=2,
      measure=True,
      scale_init=jax.random.normal,
      bias_init=jax.random.normal,
      **options,
      **more,
    )
    variables = face.init(xs[0], *args, use_running_average=False)
    params, found = variables['params'], []
    for step, x in enumerate(xs):  # the last without an update
      training = {'use_running_average': False, 'mask': mask}
      training['update_running_average'] = step < 2
      y, after = face(variables, x, *args, **training)
      found.append((y, variables['batch_stats'], after[STATS]['stats']))
      if step < 2:
        variables = after
    if isinstance(face, Linen):  # nothing need be mutable
      y = face.module.apply(variables, xs[2], *args, **training)
    evaluated, again = face(variables, xs[2], *args, use_running_average=True)
    states = variables, after, again
    results.append(
      (found, y, evaluated, states, by_function(key, params, xs, mask))
    )
  return results


@pytest.mark.device
@pytest.mark.parametrize('key', KINDS)
@settings(max_examples=15)
@given(
  layout=st.sampled_from(arrays_of.LAYOUTS),
  offset=st.sampled_from([0.0, 30.0]),
  bad=st.sampled_from([0.0, np.nan, np.inf, 1e30]),
  data=st.data(),
)
def test_modules_are_the_functions(key, layout, offset, bad, data):
  ordinary = st.integers(-32, 32).map(lambda n: n / 16)
  xs = data.draw(arrays_of.arrays(np.float32, (3, 4, 2), ordinary))
  xs += np.float32(offset)
  xs[0, 0, 0] += np.float32(bad)
  mask = data.draw(hnp.arrays(bool, (4, 1)))
  xs, mask = (arrays_of.laid_out(u, layout) for u in (xs, mask))
  kind, options, _ = KINDS[key]
  names = {'mean', 'var'} | ({'weight'} if 'debias' in options else set())
  names |= {'steps'} if 'schedule' in key else set()
  shape = (3, 2) if kind == 'DomainBatchNorm' else (2,)
  for found in jax.device_get(by_all(key, xs, mask)):
    steps, y, evaluated, (kept, after, again), wanted = found
    np.testing.assert_array_equal(y, steps[2][0])
    close(evaluated, wanted[-1])
    for i, (y, stats, numbers) in enumerate(steps):
      close(y, wanted[i][0])
      assert stats.keys() == names
      for name in names - {'steps'}:
        assert stats[name].shape == shape
        assert np.isfinite(stats[name]).all()
        np.testing.assert_allclose(stats[name], wanted[i][1][name], rtol=1e-6)
      if 'steps' in stats:
        assert stats['steps'] == i and stats['steps'].dtype == np.int32
      assert isinstance(numbers, flow.BatchNormStats)
      np.testing.assert_allclose(numbers.numbers, wanted[i][2], 1e-5, 1e-6)
    affine = {u.shape for u in kept['params'].values()}
    assert affine == {(2,) if options.get('shared_affine', True) else shape}
    # Bit for bit, without an update and in evaluation.
    same_state = functools.partial(chex.assert_trees_all_equal, strict=True)
    same_state(after['batch_stats'], kept['batch_stats'])
    same_state(again, kept)
