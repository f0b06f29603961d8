"""The laws and the golden numbers, on whatever device there is.

Every law gives the largest deviation that it found, to be compared with what
rounding explains. They are those of the tests, at the sizes of a training, and
need no pytest.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_ghm as ghm
from optax_ghm import conflict, flow, harmonization

GOLDEN = pathlib.Path(__file__).parent.parent / 'tests' / 'golden' / 'ghm.npz'
EXAMPLES = 10**6


class Law(NamedTuple):
  """A law holds if what ``deviation`` returns is not above ``limit``."""

  deviation: Callable[[], Any]
  limit: float


def check(laws: Mapping[str, Law]) -> dict[str, dict[str, Any]]:
  """What each law deviates by, its limit, and whether it holds."""
  rows = {}
  for name, law in laws.items():
    found = float(law.deviation())
    rows[name] = {
      'deviation': found,
      'limit': law.limit,
      'holds': bool(found <= law.limit),  # NaN does not
    }
  return rows


def apart(found: Any, expected: Any) -> float:
  """The largest difference, in units of the largest expected number."""
  differences = [
    np.max(np.abs(np.asarray(u, np.float64) - np.asarray(v, np.float64)))
    / max(np.max(np.abs(np.asarray(v, np.float64))), 1e-30)
    for u, v in zip(*map(jax.tree.leaves, (found, expected)), strict=True)
  ]
  return max(differences)


@functools.cache
def examples() -> tuple[np.ndarray, np.ndarray]:
  """Logits and labels as a detector's: nearly all of them easy negatives."""
  rng = np.random.default_rng(0)
  labels = rng.random(EXAMPLES) < 0.02
  logits = rng.normal(size=EXAMPLES) + np.where(labels, 1, -6)
  return logits.astype(np.float32), labels.astype(np.float32)


@functools.partial(jax.jit, static_argnames='density')
def golden_step(pred, target, mask, state, density):
  """The mean loss as mmdetection takes it, with the state, and the gradient."""
  weighting = dataclasses.replace(ghm.GHM, density=density, normalize=False)

  def mean(pred):
    losses, new_state = ghm.sigmoid_ghm_loss_with_state(
      pred, target, state, mask=mask, weighting=weighting
    )
    return jnp.sum(losses) / jnp.maximum(jnp.sum(mask), 1), new_state

  return jax.value_and_grad(mean, has_aux=True)(pred)


def golden():
  """GHM-C of mmdetection, whose file has loss and gradient."""
  data, worst = np.load(GOLDEN), 0.0
  for case in {name.split('/')[0] for name in data if name.startswith('ghmc_')}:
    field = {k.split('/')[1]: data[k] for k in data if k.startswith(f'{case}/')}
    density = harmonization.MMDetectionDensity(
      bins=int(field['bins']), momentum=float(field['momentum'])
    )
    state = density.init()
    for i, pred in enumerate(field['pred']):
      mask = field['label_weight'][i] > 0
      target = field['target'][i]
      (value, state), grad = golden_step(pred, target, mask, state, density)
      scale = field['loss_weight']
      expected = field['loss'][i] / scale, field['grad'][i] / scale
      worst = max(worst, apart((value, grad), expected))
  return worst


def harmonized():
  """The gradient through ``harmonize`` is that of the loss."""
  logits, labels = examples()

  def before(x):
    losses = optax.sigmoid_binary_cross_entropy(ghm.harmonize(x), labels)
    return losses.mean()

  def loss(x):
    return ghm.sigmoid_ghm_loss(x, labels).mean()

  return apart(*(jax.jit(jax.grad(f))(logits) for f in (before, loss)))


def counted():
  """A histogram of crowded norms, however the device counts, is NumPy's."""
  logits, labels = examples()
  norms = np.abs(1 / (1 + np.exp(-logits.astype(np.float64))) - labels)
  bins = 30
  at = np.minimum((norms * bins).astype(int), bins - 1)
  counts = np.bincount(at, minlength=bins)
  weighting = dataclasses.replace(ghm.GHM, density=ghm.BinnedDensity(bins=bins))
  weights, _ = jax.jit(
    lambda x: harmonization.harmony_weights(x, weighting=weighting)
  )(norms.astype(np.float32))
  expected = 1 / counts[at]
  expected /= expected.mean()
  inside = np.abs(norms * bins - np.round(norms * bins)) > 1e-3  # off the edges
  return apart(weights[inside], expected[inside])


def reversed_gradient():
  """The gradient behind ``reverse_gradient`` is -0.3 times that without it."""
  logits, _ = examples()

  def loss(x):
    return jnp.sum(jnp.tanh(x))

  def behind(x):
    return loss(ghm.reverse_gradient(x, 0.3))

  value, expected = jax.jit(jax.value_and_grad(loss))(logits)
  found = jax.jit(jax.value_and_grad(behind))(logits)
  return apart(found, (value, -0.3 * expected))


def inside_backward():
  """The cotangent behind ``in_backward(tx)`` is ``tx.update`` of it."""
  logits, _ = examples()
  tx = optax.clip_by_global_norm(1.0)
  clip = ghm.in_backward(tx)
  grad = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(clip(x)))))(logits)
  return apart(grad, jax.jit(tx.update)(2 * logits, tx.init(logits))[0])


def tapped():
  """A tap changes nothing, and measures the norm."""
  logits, _ = examples()

  def loss(x, stats):
    return jnp.sum(jnp.square(flow.tap(x, stats)))

  grad, stats = jax.jit(jax.grad(loss, argnums=(0, 1)))(
    logits, flow.empty_tap()
  )
  norm = np.linalg.norm(2 * logits.astype(np.float64))
  return apart((grad, stats.norm), (2 * logits, norm))


def bad_step():
  """After a step with NaN, everything is as if there had not been one."""
  tx = ghm.calibrated(optax.adam(1e-3))
  update, rng = jax.jit(tx.update), np.random.default_rng(0)
  grads = [rng.normal(size=10**6).astype(np.float32) for _ in range(40)]
  clean = hit = tx.init(grads[0])
  bad = np.full_like(grads[0], np.nan)
  for grad in grads[:20]:
    clean = hit = update(grad, hit)[1]
  left_out, hit = update(bad, hit)
  for grad in grads[20:-1]:
    clean, hit = (update(grad, state)[1] for state in (clean, hit))
  found, expected = (update(grads[-1], state)[0] for state in (hit, clean))
  return apart((found, left_out + 1), (expected, np.ones_like(expected)))


def no_loss_rises():
  """The direction of UPGrad has a product of 0 or more with all gradients."""
  rng = np.random.default_rng(0)
  jacobian = rng.normal(size=(8, 10**5)).astype(np.float32)
  jacobian[1:] -= 0.5 * jacobian[:1]
  gramian = jacobian.astype(np.float64) @ jacobian.T.astype(np.float64)
  weights = jax.jit(conflict.upgrad_weights)(gramian.astype(np.float32))
  products = gramian @ np.asarray(weights, np.float64)
  return -products.min() / np.abs(products).max()


def normalized():
  """The value of batch norm and its gradient are those of the definition."""
  rng = np.random.default_rng(0)
  x = rng.normal(3, 2, size=(4096, 64)).astype(np.float32)
  t = rng.normal(size=x.shape).astype(np.float32)

  def product(x):
    y = ghm.batch_norm(x)[0]
    return jnp.sum(y * t), y

  grad, y = jax.jit(jax.grad(product, has_aux=True))(x)
  wide, t = x.astype(np.float64), t.astype(np.float64)
  scale = 1 / np.sqrt(wide.var(0) + 1e-5)
  expected = (wide - wide.mean(0)) * scale
  along = expected * (t * expected).mean(0)
  return apart((y, grad), (expected, scale * (t - t.mean(0) - along)))


LAWS = {
  "mmdetection's numbers": Law(golden, 2e-5),
  'harmonize: the gradient of the loss': Law(harmonized, 3e-4),
  'weights of crowded norms: one over the count': Law(counted, 1e-5),
  'reverse_gradient: minus the scale': Law(reversed_gradient, 1e-6),
  'in_backward: the update of the cotangent': Law(inside_backward, 1e-6),
  'tap: no change, and the norm': Law(tapped, 1e-6),
  'calibrated: as without the bad step': Law(bad_step, 1e-6),
  'upgrad: no loss rises': Law(no_loss_rises, 1e-5),
  'batch_norm: the definition': Law(normalized, 1e-5),
}
