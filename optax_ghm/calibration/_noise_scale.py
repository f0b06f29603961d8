"""The gradient noise scale: how large a batch still pays."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, masks, per_example, stateful
from optax_ghm._core.norms import global_norm


class GradientNoise(NamedTuple):
  """How much of a gradient is signal, and how much is noise.

  Attributes:
    signal: unbiased estimate of ‖G‖², the squared norm of the true gradient. It
      may be negative where the noise is large.
    variance: estimate of tr Σ, the variance of the gradient of one example,
      summed over the parameters.
  """

  signal: jax.Array
  variance: jax.Array

  @property
  def noise_scale(self) -> jax.Array:
    """The ratio tr Σ / ‖G‖², in examples; inf if the signal is not positive."""
    seen = self.signal > 0
    return jnp.where(
      seen, self.variance / jnp.where(seen, self.signal, 1), jnp.inf
    )


def gradient_noise(
  norms: jax.Array, norm_of_mean: jax.Array, batch_size: ArrayLike
) -> GradientNoise:
  r"""Estimates signal and variance from the gradients of micro-batches.

  .. math::
    |G|^2 \approx \frac{k |\bar g|^2 - \overline{|g_i|^2}}{k - 1},
    \qquad
    \operatorname{tr} \Sigma \approx
    \frac{k b}{k - 1} \left(\overline{|g_i|^2} - |\bar g|^2\right)

  Each of the k micro-batches has b examples. The ratio of the two is the simple
  noise scale :math:`B = \operatorname{tr} \Sigma / |G|^2`. A batch far smaller
  than B loses little by being averaged, and a batch far larger gains little.

  One step says little. Average signal and variance over many steps, each by
  itself, as :func:`~optax_ghm.noise_scale_aggregate` does.

  Args:
    norms: norms of the gradients of k > 1 micro-batches, shape (k,): one per
      step of an accumulation, one per device, or one per example.
    norm_of_mean: norm of the mean of these gradients.
    batch_size: b, the number of examples in each micro-batch.

  Returns:
    A :class:`GradientNoise` of float32 scalars, which hold the squares of norms
    from 1e-18 to 1e18.

  Raises:
    ValueError: if ``norms`` has not one axis, or fewer than two entries.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import calibration
    >>> # 500 micro-batches of 4 examples: 3 and noise of deviation 6.
    >>> examples = 3 + 6 * jax.random.normal(jax.random.key(0), (500, 4))
    >>> grads = examples.mean(axis=1)
    >>> noise = calibration.gradient_noise(abs(grads), abs(grads.mean()), 4)
    >>> print(f'{noise.noise_scale:.1f} of 36 / 9')
    4.4 of 36 / 9

  References:
    McCandlish et al., `An Empirical Model of Large-Batch Training
    <https://arxiv.org/abs/1812.06162>`_, 2018
  """
  norms = jnp.asarray(norms, jnp.float32)
  if norms.ndim != 1 or norms.shape[0] in (0, 1):
    raise ValueError(
      f'norms must have shape (k,) with k > 1, got {norms.shape}.'
    )
  return _from_squares(
    jnp.mean(jnp.square(norms)),
    jnp.square(jnp.asarray(norm_of_mean, jnp.float32)),
    jnp.asarray(norms.shape[0], jnp.float32),
    jnp.asarray(batch_size, jnp.float32) * norms.shape[0],
  )


def _from_squares(mean_of_squares, square_of_mean, count, examples):
  """The formula, for ``count`` micro-batches of so many examples together."""
  others = jnp.maximum(count - 1, 1)
  return GradientNoise(
    signal=(count * square_of_mean - mean_of_squares) / others,
    variance=examples / others * (mean_of_squares - square_of_mean),
  )


class NoiseScaleState(NamedTuple):
  """State of :func:`~optax_ghm.noise_scale_aggregate`.

  Attributes:
    noise: a :class:`GradientNoise`, averaged over the steps.
    recorded: int32, number of steps in the average.
    skipped: int32, number of steps with fewer than two good gradients, which
      are not in the average.
  """

  noise: GradientNoise
  recorded: jax.Array
  skipped: jax.Array


def noise_scale_aggregate(
  batch_size: ArrayLike = 1,
  *,
  decay: ArrayLike = 0.99,
  axis_name: arrays.AxisName = None,
) -> stateful.StatefulTransformation[NoiseScaleState]:
  r"""Averages the gradients of micro-batches, and measures their noise.

  This is the first transformation of a chain. It takes updates with the
  micro-batches along the leading axis of every leaf, as
  ``jax.vmap(jax.grad(...))`` makes them, and returns their mean. If the
  gradients are not there at the same time, use
  :func:`~optax_ghm.calibration.gradient_noise`.

  Args:
    batch_size: number of examples in a micro-batch of weight 1.
    decay: decay rate of the averages of signal and variance. In the first
      1 / (1 - decay) steps, they are plain means.
    axis_name: mapped axis, or axes, over which the micro-batches are split; the
      result is the average over all of them.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`~optax_ghm.calibration.NoiseScaleState`, whose noise scale is
    ``state.noise.noise_scale``. Its ``update`` takes two extra arguments of
    shape (micro-batches,): ``mask``, bool, says which micro-batches count, and
    ``weights``, float, says how much. A weight is the size of a micro-batch
    relative to ``batch_size``: the update is the mean over examples, and the
    noise of a gradient is that of so many examples. A micro-batch with NaN or
    inf is left out; if none remains, the update is 0.

  Raises:
    TypeError: on update, if ``mask`` is not bool, or ``weights`` is.
    ValueError: if ``batch_size`` is negative, or ``decay`` not from 0 to 1; on
      update, if leaves differ in their leading axis or have none, if the other
      axes differ from those of ``params``, or if ``mask`` or ``weights`` does
      not have one entry per micro-batch.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> tx = optax.chain(optax_ghm.noise_scale_aggregate(), optax.sgd(0.1))
    >>> params = {'w': jnp.zeros(2)}
    >>> loss = lambda params, x: jnp.sum(jnp.square(params['w'] - x))
    >>> x = 1 + jax.random.normal(jax.random.key(0), (100, 2))
    >>> grads = jax.vmap(jax.grad(loss), (None, 0))(params, x)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(f'{state[0].noise.noise_scale:.2f}')  # 2 / 2 in truth
    0.93

  References:
    McCandlish et al., `An Empirical Model of Large-Batch Training
    <https://arxiv.org/abs/1812.06162>`_, 2018
  """
  counters.check_range('batch_size', batch_size, 0, math.inf)
  counters.check_range('decay', decay, 0, 1)

  def init_fn(params):
    del params
    noise = GradientNoise(*jnp.zeros([2], jnp.float32))
    return NoiseScaleState(noise, *jnp.zeros([2], jnp.int32))

  def update_fn(
    updates, state, params=None, *, mask=None, weights=None, **extra_args
  ):
    del extra_args
    if not any(map(arrays.is_inexact, jax.tree.leaves(updates))):
      return updates, state
    norms = per_example.norms(updates, params)
    sizes = masks.amounts(mask, weights, norms.shape)
    sizes = jnp.asarray(1 if sizes is None else sizes, jnp.float32)
    sizes = jnp.where(jnp.isfinite(norms), sizes, 0)
    counted = sizes > 0
    count, size = arrays.psum(
      (jnp.sum(counted, dtype=jnp.float32), jnp.sum(sizes)), axis_name
    )
    shares = sizes / jnp.where(size > 0, size, 1)
    mean = per_example.weighted_sum(updates, shares, axis_name)
    squares = jnp.square(jnp.where(counted, norms, 0))
    noise = _from_squares(
      arrays.psum(jnp.sum(shares * squares), axis_name),
      jnp.square(global_norm(mean).astype(jnp.float32)),
      count,
      jnp.asarray(batch_size, jnp.float32) * size,
    )
    good = (count > 1) & jnp.isfinite(noise.signal + noise.variance)
    plain = 1 / (state.recorded.astype(jnp.float32) + 1)
    share = jnp.maximum(plain, 1 - jnp.asarray(decay, jnp.float32))
    return mean, NoiseScaleState(
      jax.tree.map(
        lambda old, new: jnp.where(good, old + share * (new - old), old),
        state.noise,
        noise,
      ),
      counters.count_if(good, state.recorded),
      counters.count_if(~good, state.skipped),
    )

  return stateful.StatefulTransformation(init_fn, update_fn)
