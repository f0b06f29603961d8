"""Mistakes of users, one on each line that says so, for type checkers to find.

Nothing here runs.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optax_ghm as ghm
from optax_ghm import conflict, flow, harmonization
from optax_ghm.nnx import BatchNorm, Tapped


def train(
  model: nnx.Linear,
  x: jax.Array,
  y: jax.Array,
  density: harmonization.DensityState,
  optimizer: nnx.Optimizer[nnx.Linear],
  record: flow.Record,
) -> None:
  logits = model(x)
  ghm.sigmoid_ghm_loss(logits, y, weight=x)  # mistake: weights
  ghm.clip_by_zscore('2.5')  # mistake: a string
  ghm.sigmoid_ghm_loss_with_state(logits, y)  # mistake: no state
  ghm.sigmoid_ghm_loss_with_state(logits, y, density).mean()  # mistake: a pair
  jnp.tanh(ghm.batch_norm(x))  # mistake: a pair with the moments
  ghm.harmonize(logits, reduction='avg')  # mistake: 'mean'
  ghm.clip_by_norm(1.0, scope='layer')  # mistake: 'leaf'
  ghm.calibrated(optax.adamw)  # mistake: adamw is not called
  flow.watch(optimizer)  # mistake: an optimizer of Flax, not of Optax
  ghm.reverse_gradient(x, ghm.dann_reversal_schedule(9))  # mistake: no step
  ghm.domain_loss(logits, y, axis_name=0)  # mistake: the name of an axis
  ghm.sigmoid_ghm_losses(logits, y)  # mistake: sigmoid_ghm_loss
  ghm.HarmonyWeighting(density='exact')  # mistake: ExactDensity()
  ghm.clip_by_norm(1.0).init(model).skips  # mistake: skipped
  flow.diagnose(record)[0].suggestions  # mistake: suggestion
  record.layer_statistics  # mistake: layer_stats
  record.add(loss=1.0)  # mistake: no step
  value, grads = Tapped().value_and_grad(sum)(model)  # mistake: and the taps
  BatchNorm(8)  # mistake: no rngs
  conflict.fork(x, 3, 'mgda')  # mistake: mgda_weights
