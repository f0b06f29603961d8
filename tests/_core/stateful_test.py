"""Transformations say which state they keep, and keep it."""

import inspect
import typing

import jax
import numpy as np
import optax
import pytest

import optax_ghm
import optax_ghm.flow

OF_OPTIMIZERS = 'calibrated', 'skip_spikes', 'watch'
ALL = (
  *OF_OPTIMIZERS,
  'clip_by_norm',
  'clip_by_norm_ema',
  'clip_by_parameter_norm',
  'clip_by_percentile',
  'clip_by_rms',
  'clip_by_zscore',
  'harmonized_aggregate',
  'noise_scale_aggregate',
  'normalize_by_norm',
  'standardize',
)


@pytest.mark.parametrize('name', ALL)
def test_the_annotated_state_is_that_of_init_and_update(name):
  make = getattr(optax_ghm.flow if name == 'watch' else optax_ghm, name)
  annotation = inspect.signature(make).return_annotation
  args = {'clip_by_norm': (1.0,)} | dict.fromkeys(
    OF_OPTIMIZERS, (optax.sgd(1.0),)
  )
  tx = make(*args.get(name, ()))
  params = {'w': np.ones((2, 3), np.float32)}
  gradients = {'w': np.ones((4, 2, 3), np.float32)}
  updates = gradients if name.endswith('aggregate') else params
  state = jax.eval_shape(tx.init, params)
  _, new_state = jax.eval_shape(tx.update, updates, state, params)
  (expected,) = typing.get_args(annotation)
  assert type(state) is type(new_state) is expected
  assert isinstance(tx, optax.GradientTransformationExtraArgs)
