"""Per-example gradients, averaged by their harmony."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_ghm._core import arrays, counters, masks, per_example, stateful
from optax_ghm.harmonization import (
  _density,
  _weighting,
  _weights,
  _windowed,
)

PARAMETER_DENSITY = _windowed.WindowedDensity(
  low=1e-8, high=1e8, log=True, width=0.5
)
"""Windows of half a decade over sixteen decades, for norms of unknown scale."""


class HarmonizedAggregateState(NamedTuple):
  """State of :func:`optax_ghm.harmonized_aggregate`.

  Attributes:
    density: the state of the density estimator.
  """

  density: _density.DensityState


def harmonized_aggregate(
  weighting: _weighting.HarmonyWeighting = _weighting.DEFAULT,
  *,
  axis_name: arrays.AxisName = None,
) -> stateful.StatefulTransformation[HarmonizedAggregateState]:
  r"""Averages per-example gradients by the harmony of their global norms.

  .. math::
    \bar g = \frac{\sum_i w_i \beta_i g_i}{\sum_i w_i}

  with β the harmony weights (:func:`harmony_weights`) of
  :math:`\lVert g_i \rVert_2`.

  The transformation is the first link of a chain, before any moments. It takes
  updates with the examples along the leading axis of every leaf, as
  ``jax.vmap(jax.grad(...))`` makes them and
  ``optax.contrib.differentially_private_aggregate`` takes them, and gives
  updates shaped as the parameters. Put ``optax.MultiSteps`` behind it, not
  around it.

  Args:
    weighting: which weight a global norm has. Without a density of its own it
      has :data:`optax_ghm.harmonization.PARAMETER_DENSITY`, with logarithmic
      windows for norms of any scale.
    axis_name: mapped axis, or axes, over which the batch is split; the result
      is then the average over all of it.

  Returns:
    A ``GradientTransformationExtraArgs`` whose ``update`` takes two extra
    arguments of shape (batch,): ``mask``, bool, says which examples count, and
    ``weights``, real numbers w, as how many examples each counts, in the
    density and in the average. An example whose gradient holds NaN or inf is
    left out and counted in ``state.density.non_finite``. If no example is left,
    the update is 0. Leaves that are not floating or complex pass unchanged.

  Raises:
    TypeError: if ``weighting`` is none; on update, if ``mask`` is not
      bool or ``weights`` are not real.
    ValueError: on update, if leaves differ in their leading axis or have none,
      or do not have the shape of ``params`` behind it.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> tx = optax.chain(optax_ghm.harmonized_aggregate(), optax.sgd(0.1))
    >>> params = {'w': jnp.ones(2)}
    >>> loss = lambda params, x: jnp.sum(params['w'] * x)
    >>> grads = jax.vmap(jax.grad(loss), (None, 0))(params, jnp.eye(3, 2))
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> updates['w'].shape
    (2,)

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, 2019
  """
  counters.check_type('weighting', weighting, _weighting.HarmonyWeighting)
  weighting = weighting.with_density(PARAMETER_DENSITY)

  def init_fn(params):
    del params
    return HarmonizedAggregateState(weighting.init())

  def update_fn(
    updates, state, params=None, *, mask=None, weights=None, **extra_args
  ):
    del extra_args
    if not any(map(arrays.is_inexact, jax.tree.leaves(updates))):
      return updates, state
    norms = per_example.norms(updates, params)
    amounts = masks.amounts(mask, weights, norms.shape)
    harmony, density_state = _weights.weigh(
      norms, amounts, state.density, weighting, axis_name, True
    )
    amount = jnp.asarray(1 if amounts is None else amounts, jnp.float32)
    total = arrays.psum(jnp.sum(jnp.where(harmony > 0, amount, 0)), axis_name)
    averaged = per_example.weighted_sum(
      updates, harmony / _density.nonzero(total), axis_name
    )
    return averaged, HarmonizedAggregateState(density_state)

  return stateful.StatefulTransformation(init_fn, update_fn)
