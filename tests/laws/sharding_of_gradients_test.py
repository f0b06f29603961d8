"""Gradients, clips and normalizations where leaves are split over devices.

Every transformation of gradients is in one table.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import optax_ghm as ghm
from optax_ghm import conflict, flow
from tests.support.sharded import Case, check, parametrize

PROGRAMS = 40

BINNED = ghm.BinnedDensity(bins=30, momentum=0.9)  # sends 34 numbers
N = 64
MASK = np.arange(N) >= 8  # without the whole first shard
RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


# Gradients whose leaves are split, in steps, one of which is bad on a device.

FAN_IN = {
  'conv': {'kernel': P(None, 'd'), 'bias': P('d')},
  'embed': {'embedding': P(None, 'd')},
}
FAN_OUT = {
  'conv': {'kernel': P(None, None, 'd'), 'bias': P()},
  'embed': {'embedding': P('d')},
}
PARAMS = {
  'conv': {'kernel': normal(3, 8, 16), 'bias': normal(16)},
  'embed': {'embedding': normal(16, 8)},
}
STEPS = np.float32([1.0, 1.5, 0.7, 30.0, 1.2, 1.1])
VALUES = np.float32([2.0, 2.5, 2.2, 2.1, 30.0, 2.3])


def gradients():
  """Each device has another mean and size; a unit is NaN in the third step."""

  def leaf(x):
    size = 10 ** RNG.uniform(-4, 0, x.shape[-1:])
    split = (1 + np.arange(x.shape[-2])[:, None]) if x.ndim > 1 else 1
    return np.multiply.outer(STEPS, size * split * x).astype(np.float32)

  grads = jax.tree.map(leaf, PARAMS)
  grads['conv']['kernel'][2, 1, 5, 3] = np.nan
  return grads


GRADIENTS = gradients()


def clips(axis_name):
  options = {'axis_name': axis_name}
  agc = functools.partial(ghm.clip_by_parameter_norm, 0.02, eps=0.0, **options)
  return {
    'clip_by_norm': ghm.clip_by_norm(1.0, **options),
    'clip_by_rms': ghm.clip_by_rms(0.05, scope='unit', **options),
    'clip_by_rms of leaves': ghm.clip_by_rms(0.05, **options),
    'clip_by_parameter_norm': agc(),
    'clip_by_parameter_norm of leaves': agc(scope='leaf'),
    'clip_by_zscore': ghm.clip_by_zscore(0.5, warmup_steps=1, **options),
    'clip_by_zscore of leaves': ghm.clip_by_zscore(
      0.5, warmup_steps=1, scope='leaf', **options
    ),
    'clip_by_percentile': ghm.clip_by_percentile(
      estimator=ghm.WindowPercentile(length=4), **options
    ),
    'clip_by_norm_ema': ghm.clip_by_norm_ema(warmup_steps=1, **options),
  }


def normalizations(axis_name):
  options = {'axis_name': axis_name}
  return {
    **{
      f'normalize_by_norm, {scope}': ghm.normalize_by_norm(
        scope=scope, **options
      )
      for scope in ('global', 'leaf', 'unit')
    },
    'standardize': ghm.standardize(**options),
    'centralize': ghm.centralize(**options),
  }


def wrappers(axis_name):
  momentum = optax.sgd(0.1, 0.9)
  return {
    'skip_spikes': ghm.skip_spikes(
      momentum, window=ghm.SpikeWindow(length=16), axis_name=axis_name
    ),
    'calibrated': ghm.calibrated(
      momentum, ghm.clip_by_zscore(0.5, warmup_steps=1, axis_name=axis_name)
    ),
  }


def in_steps(make):
  """All updates, and the last states but those of optimizers."""

  def f(grads, params, axis_name=None):
    every = make(axis_name)

    def step(states, of_step):
      gradient, value = of_step
      updates = {}
      for name, tx in every.items():
        updates[name], states[name] = tx.update(
          gradient, states[name], params, value=value
        )
      return states, updates

    states = {name: tx.init(params) for name, tx in every.items()}
    states, updates = jax.lax.scan(step, states, (grads, VALUES))
    return updates, {
      name: state._replace(optimizer=())
      if hasattr(state, 'optimizer')
      else state
      for name, state in states.items()
    }

  return f


def of_gradients(make, scales=(1.0, 1e30, 1e-30)):
  specs = jax.tree.map(lambda spec: P(None, *spec), FAN_IN)
  return Case(
    *(in_steps(make), (GRADIENTS, PARAMS), (specs, FAN_IN)),
    out=(dict.fromkeys(make(None), specs), P()),
    scales=scales,
  )


def one_step(grads, params, axis_name=None):
  """In a scan the state could not be split."""
  del axis_name
  agc, watch = ghm.clip_by_parameter_norm(0.02), flow.watch(optax.identity())
  updates, _ = agc.update(grads, agc.init(params), params)
  same, state = watch.update(grads, watch.init(params), params)
  return [updates, same], state


def of_examples(grads, mask, axis_name=None):
  """The axis of the examples is the second, behind that of the steps."""
  every = {
    'harmonized_aggregate': ghm.harmonized_aggregate(
      ghm.HarmonyWeighting(density=BINNED), axis_name=axis_name
    ),
    'noise_scale_aggregate': ghm.noise_scale_aggregate(2, axis_name=axis_name),
  }
  params = jax.tree.map(lambda g: jnp.zeros(g.shape[2:]), grads)
  return {
    name: jax.lax.scan(
      lambda state, g, tx=tx: tx.update(g, state, params, mask=mask)[::-1],
      tx.init(params),
      grads,
    )
    for name, tx in every.items()
  }


def of_losses(grads, axis_name=None):
  """The axis of the losses comes first, and the leaves are split."""
  tx = conflict.reconciled_aggregate(3, decay=0.5, axis_name=axis_name)
  return tx.update(grads, tx.init(None))


LOSSES = {'w': normal(3, N, 3), 'b': normal(3, N)}
LOSSES['w'][2] -= LOSSES['w'][0]


def examples():
  grads = {'w': normal(3, N, 2, 3), 'b': normal(3, N, 3)}
  sizes = 10 ** RNG.uniform(-2, 2, (3, N))
  grads = jax.tree.map(lambda g: np.float32(g.T * sizes.T).T, grads)
  grads['b'][1, 30, 2] = np.nan
  return grads


CASES = {
  'clips': of_gradients(clips, (1.0, 1e25, 1e-25)),
  'normalizations': of_gradients(normalizations),
  'wrappers': of_gradients(wrappers),
  'watch, clip_by_parameter_norm, fan-out': Case(
    one_step,
    (jax.tree.map(operator.itemgetter(0), GRADIENTS), PARAMS),
    (FAN_OUT, FAN_OUT),
    ([FAN_OUT] * 2, P()),
    sent=128,
    modes=('auto', 'explicit'),
    also=('all-gather', 'collective-permute'),
  ),
  'reconciled_aggregate': Case(
    of_losses,
    (LOSSES,),
    P(None, 'd'),
    (P('d'), P()),
    sent=9,
    scales=(1.0, 1e15, 1e-15),
  ),
  'aggregates': Case(
    *(of_examples, (examples(), MASK), (P(None, 'd'), P('d')), P(), [34])
  ),
}


@parametrize(CASES)
def test_devices_do_together_what_one_does(case, mode):
  """Nothing is sent but sums, and these are small."""
  check(case, mode)
