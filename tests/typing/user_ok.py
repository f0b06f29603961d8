"""What a user writes: type checkers accept it, and know the types in it."""

from typing import assert_type

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optax_ghm as ghm
from optax_ghm import calibration, flow, harmonization
from optax_ghm.nnx import BatchNorm, Tapped


def train() -> list[str]:
  x, y = jax.random.normal(jax.random.key(0), (64, 8)), jnp.zeros((64, 1))
  rngs = nnx.Rngs(0)
  linear = nnx.Linear(8, 1, rngs=rngs)
  model = nnx.Sequential(BatchNorm(8, rngs=rngs), linear)
  weighting = ghm.HarmonyWeighting(density=ghm.WindowedDensity(momentum=0.9))
  tx = ghm.calibrated(optax.adam(1e-3), ghm.clip_by_zscore(2.5))
  optimizer = nnx.Optimizer(model, flow.watch(tx), wrt=nnx.Param)
  params = nnx.state(model, nnx.Param)
  record = flow.Record(params)

  def loss(
    model: nnx.Sequential, density: harmonization.DensityState
  ) -> tuple[jax.Array, harmonization.DensityState]:
    logits = ghm.reverse_gradient(model(x), 0.5)
    losses, density = ghm.sigmoid_ghm_loss_with_state(
      logits, y, density, weighting=weighting
    )
    return losses.mean(), density

  step = Tapped().value_and_grad(loss, has_aux=True)
  (value, density), grads, taps = step(model, weighting.init())
  optimizer.update(model, grads)
  record.add(0, loss=value, taps=taps, opt_state=optimizer.opt_state)
  updates, state = tx.update(grads, tx.init(params), params)

  assert_type(taps, flow.Taps)
  assert_type(taps['layers/1'].norm, jax.Array)
  assert_type(state, calibration.CalibratedState)
  assert_type(state.clip.skipped, jax.Array)
  return [verdict.suggestion for verdict in flow.diagnose(record)]
