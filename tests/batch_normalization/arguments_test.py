"""Arguments that do not fit, and how errors name them."""

import functools
import inspect

import jax
import numpy as np
import pytest

import optax_ghm
from tests.support.oracles_batch_norm import averages

X = np.ones((4, 3), np.float32)
RUNNING = averages(np.zeros(3), np.ones(3))
FUNCTIONS = {
  'batch_norm': (optax_ghm.batch_norm, {}),
  'ghosts': (optax_ghm.ghost_batch_norm, {'ghost_size': 2}),
  'domains': (
    optax_ghm.domain_batch_norm,
    {'domain': np.zeros(4, int), 'num_domains': 2},
  ),
  'renorm': (optax_ghm.batch_renorm, {'running': RUNNING}),
  'inference': (optax_ghm.batch_norm_inference, {'running': RUNNING}),
  'moments': (optax_ghm.Moments.of, {}),
}


def assert_raises(name, error, match, **kwargs):
  f, given = FUNCTIONS[name]
  with pytest.raises(error, match=match):
    jax.eval_shape(functools.partial(f, **{'x': X, **given, **kwargs}))


@pytest.mark.parametrize('name', FUNCTIONS)
def test_x_must_be_real_and_floating_and_a_mask_bool(name):
  for dtype in (np.int32, np.complex64, bool):
    match = f'x must be a real floating array.*{np.dtype(dtype)}'
    assert_raises(name, TypeError, match, x=X.astype(dtype))
  if name != 'inference':
    match = 'mask must be bool, got float'
    assert_raises(name, TypeError, match, mask=X)


@pytest.mark.parametrize('name', FUNCTIONS)
@pytest.mark.parametrize(
  ('kwargs', 'match'),
  [
    ({'axis': 2}, r'axis must .*\(4, 3\), got 2'),
    ({'axis': (0, -3)}, r'axis must .*\(0, -3\)'),
    ({'x': np.float32(1), 'axis': ()}, r'axis must .*\(\), got \(\)'),
    ({'mask': X[:3, :1] > 0}, r'mask of shape \(3, 1\)'),
    ({'mask': X[None] > 0}, r'mask of shape \(1, 4, 3\)'),
    ({'x': X[:, :1], 'mask': X > 0}, r'mask of shape \(4, 3\)'),
    ({'mask': X[:, 0] > 0}, r'mask of shape \(4,\).*Give mask\[:, None\]'),
    ({'x': X[:3], 'mask': X[0] > 0}, r'mask\[:, None\] or mask\[None, :\]'),
    ({'scale': X[:, 0]}, r'scale must .*3\), got \(4,\)|scale .*\(3,\), got'),
    ({'scale': np.float32(1)}, r'scale must .*got \(\)'),
    ({'bias': X[:1]}, r'bias must .*got \(1, 3\)'),
  ],
  ids=str,
)
def test_what_does_not_fit_x(name, kwargs, match):
  if set(kwargs) <= set(inspect.signature(FUNCTIONS[name][0]).parameters):
    assert_raises(name, ValueError, match, **kwargs)


@pytest.mark.parametrize(
  ('name', 'kwargs', 'match'),
  [
    *(
      ('ghosts', {'ghost_size': n}, f'ghost_size must .* 4 examples, got {n}')
      for n in (3, 0, -2)
    ),
    ('ghosts', {'axis': 0}, 'axis 0 of x holds the examples, got axis=0'),
    ('ghosts', {'axis': (-2, 1)}, 'axis 0 of x'),
    ('domains', {'axis': 0}, 'axis 0 of x holds the examples'),
    ('domains', {'num_domains': 0}, 'num_domains must be at least 1'),
    ('domains', {'domain': np.zeros(3, int)}, r'domain must .*\(3,\)'),
    ('domains', {'domain': np.zeros((4, 1), int)}, 'domain must'),
    ('domains', {'scale': X}, r'scale must .*\(2, 3\)'),
    (
      'renorm',
      {'running': RUNNING._replace(mean=X[0, :2])},
      'running.mean must',
    ),
    ('renorm', {'running': RUNNING._replace(var=X[0, :2])}, 'running.var must'),
    ('renorm', {'r_max': 0.5}, 'r_max must be from 1 to inf, got 0.5'),
    ('renorm', {'d_max': -1.0}, 'd_max must be from 0 to inf, got -1.0'),
    ('inference', {'running': RUNNING._replace(mean=X[:, 0])}, 'mean must'),
    ('inference', {'running': RUNNING._replace(var=X[:1])}, 'var must'),
    ('inference', {'domain': np.zeros(4, int)}, 'mean must'),
    (
      'inference',
      {'domain': np.zeros(3, int), 'running': averages(X[:2], X[:2])},
      'domain must',
    ),
  ],
  ids=str,
)
def test_what_does_not_fit_in_one_of_them(name, kwargs, match):
  assert_raises(name, ValueError, match, **kwargs)


@pytest.mark.parametrize(
  'options',
  [{'r_max': 0.5}, {'d_max': -1.0}, {'start': -1}, {'r_end': -1}],
  ids=str,
)
def test_schedules_of_limits_out_of_range_are_named(options):
  ((name, value),) = options.items()
  with pytest.raises(ValueError, match=f'{name} must .*got {value}'):
    optax_ghm.renorm_schedules(**options)


@pytest.mark.parametrize('name', ['domains', 'inference'])
def test_domains_must_be_integers_or_bool(name):
  match = 'domain must be integers or bool, got float'
  assert_raises(name, TypeError, match, domain=np.zeros(4))
