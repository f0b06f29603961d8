"""Harmony weights of gradient norms."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, masks
from optax_ghm.harmonization import _density, _weighting, _windowed

LEAST_SHARE = 2.0**-13
"""Norms nearer to an end of the range count as so near: half a cell of the
default density. A range that does not fit the norms then stops no training."""


def harmony_weights(
  norms: jax.Array,
  state: _density.DensityState | None = None,
  *,
  weighting: _weighting.HarmonyWeighting = _weighting.DEFAULT,
  mask: ArrayLike | None = None,
  weights: ArrayLike | None = None,
  axis_name: arrays.AxisName = None,
  train: bool = True,
) -> tuple[jax.Array, _density.DensityState]:
  r"""Weighs every example by its gradient norm and how crowded that is.

  .. math::
    \beta_i = w(g_i) \propto \left(\frac{N}{GD(g_i)}\right)^\tau (1 - g_i)^q
      g_i^\gamma, \qquad \text{divided by }
    \frac{\sum_k w_k \beta_k}{\sum_k w_k}

  by the numbers of ``weighting``. The division makes the weights average to 1
  over the batch. Harmony weights are constants to differentiation.

  Args:
    norms: gradient norms g of the examples, any shape and floating dtype.
    state: of the density, from ``weighting.init()`` or the last call; None is
      that before the first batch.
    weighting: which weight a norm has. The density of the default is over
      norms from 0 to 1.
    mask: bool, broadcastable to ``norms``: which examples count.
    weights: finite real numbers w, broadcastable to ``norms``: as how many
      examples each example counts in the density. They multiply the result,
      too. They are added up in float32: a million of them in one region count
      to 1 %.
    axis_name: mapped axis, or axes, over which the batch is split; the price
      is one all-reduce of the estimator's histogram.
    train: False reads the density of the batches before from the state, and
      leaves the state as it is. The weight of an example then does not depend
      on its batch, and weights average to 1 over the examples remembered.

  Returns:
    The factors :math:`w_i \beta_i` of the losses, float32 with the shape of
    ``norms``, and the next state. The factors are finite and non-negative.
    They are 0 for examples whose mask is False or weight 0, and for examples
    whose norm is NaN or infinite in float32, which ``state.non_finite`` counts.
    A batch without examples leaves the running density as it is.

  Raises:
    TypeError: if ``weighting`` is none, ``norms`` are not real and floating,
      ``mask`` is not bool or ``weights`` are not real.
    ValueError: if ``mask`` or ``weights`` do not broadcast to ``norms``, or
      ``state`` is of another density.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> weights, state = optax_ghm.harmony_weights(jnp.array([0.1] * 3 + [0.5]))
    >>> [round(float(w), 3) for w in weights]
    [0.967, 0.967, 0.967, 1.099]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, 2019
  """
  counters.check_type('weighting', weighting, _weighting.HarmonyWeighting)
  norms = jnp.asarray(norms)
  if not jnp.issubdtype(norms.dtype, jnp.floating):
    raise TypeError(f'norms must be real floats, got dtype {norms.dtype}.')
  amounts = masks.amounts(mask, weights, norms.shape)
  state = weighting.init() if state is None else state
  weighting = weighting.with_density(_windowed.DEFAULT)
  return weigh(norms, amounts, state, weighting, axis_name, train)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def weigh(norms, amounts, state, weighting, axis_name, train):
  """The harmony weights of examples that count as ``amounts``; the state."""
  expected = jax.tree.map(jnp.shape, jax.eval_shape(weighting.init))
  if jax.tree.map(jnp.shape, state) != expected:
    raise ValueError(
      'state must come from init() of the same weighting, of shapes'
      f' {expected}; got {jax.tree.map(jnp.shape, state)}.'
    )
  norms, amounts, state = lax.stop_gradient((norms, amounts, state))
  norms, density = norms.astype(jnp.float32), weighting.density
  regions, state = density.update(norms, state, amounts, axis_name, train)

  def by_norm(norms):
    share = jnp.clip(norms / density.high, LEAST_SHARE, 1 - LEAST_SHARE)
    robust, focused = weighting.robustness, weighting.focus
    return _power(1 - share, robust) * _power(share, focused)

  total = jnp.sum(regions.count)
  occupied = regions.density > 0
  sparsity = total / jnp.where(occupied, regions.density, 1.0)
  by_region = jnp.where(occupied, _power(sparsity, weighting.exponent), 0.0)
  if weighting.normalize:
    sums = jnp.sum(regions.count * by_region * by_norm(regions.norm))
    by_region = by_region / _density.nonzero(sums / _density.nonzero(total))
  known = jnp.where(regions.region >= 0, norms, 0.0)
  harmony = regions.at_examples(by_region) * by_norm(known)
  if amounts is not None and amounts.dtype != bool:
    harmony = amounts * harmony
  return harmony, state


def _power(x, exponent):
  """A power of x; by roots for multiples of 1/4, which CPUs take faster."""
  whole, quarters = divmod(4 * exponent, 4)
  if quarters not in (0, 1, 2, 3):
    return x**exponent
  power = x ** int(whole)
  if quarters >= 2:
    power = power * jnp.sqrt(x)
  return power * jnp.sqrt(jnp.sqrt(x)) if quarters % 2 else power


def init_without_momentum(weighting):
  """The state for a call without one, which forgets what it learns.

  Raises:
    ValueError: if the density has a momentum, and so needs a state.
  """
  momentum = getattr(weighting.density, 'momentum', 0)
  if momentum > 0:
    raise ValueError(
      f'A density with momentum={momentum} needs its state: give'
      ' weighting.init() to harmonize, or to the ..._with_state form of a loss.'
    )
  return weighting.init()
