"""The gradient noise scale: how large a batch still pays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, per_example
from optax_ghm._core.norms import global_norm


class GradientNoise(NamedTuple):
  """How much of a gradient is signal, and how much noise.

  Attributes:
    signal: an estimate of ‖G‖², the squared norm of the true gradient; without
      bias, so that it can be negative where the noise is large.
    variance: an estimate of tr Σ, that of the gradient of one example,
      summed over the parameters.
  """

  signal: jax.Array
  variance: jax.Array

  @property
  def noise_scale(self) -> jax.Array:
    """The ratio tr Σ / ‖G‖², in examples; inf where no signal is seen."""
    seen = self.signal > 0
    return jnp.where(
      seen, self.variance / jnp.where(seen, self.signal, 1), jnp.inf
    )


def gradient_noise(
  norms: jax.Array, norm_of_mean: jax.Array, batch_size: ArrayLike
) -> GradientNoise:
  r"""Signal and variance from the gradients of micro-batches.

  .. math::
    |G|^2 \approx \frac{k \lvert \bar g \rvert^2 - \overline{|g_i|^2}}{k - 1},
    \qquad
    \operatorname{tr} \Sigma \approx
    \frac{k b}{k - 1} \left(\overline{|g_i|^2} - |\bar g|^2\right)

  for k micro-batches of b examples each. Their ratio is the simple noise scale
  :math:`B = \operatorname{tr} \Sigma / |G|^2`: batches far smaller than that
  lose little by being averaged, batches far larger gain little.

  One step says little: average signal and variance over many, each by itself,
  as :func:`noise_scale_aggregate` does.

  Args:
    norms: of the gradients of k > 1 micro-batches, shape (k,): one per step of
      an accumulation, one per device, or one per example.
    norm_of_mean: the norm of their mean.
    batch_size: b.

  Returns:
    A :class:`GradientNoise` of float32 scalars, which hold the squares of norms
    from 1e-18 to 1e18.

  Raises:
    ValueError: if there are not two norms at least.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> # 500 micro-batches of 4 examples: 3 and noise of deviation 6.
    >>> examples = 3 + 6 * jax.random.normal(jax.random.key(0), (500, 4))
    >>> grads = examples.mean(axis=1)
    >>> noise = optax_ghm.gradient_noise(abs(grads), abs(grads.mean()), 4)
    >>> print(f'{noise.noise_scale:.1f} of 36 / 9')
    4.4 of 36 / 9

  References:
    McCandlish et al., `An Empirical Model of Large-Batch Training
    <https://arxiv.org/abs/1812.06162>`_, 2018
  """
  norms = jnp.asarray(norms)
  if norms.ndim != 1 or norms.shape[0] < 2:
    raise ValueError(
      f'norms must have shape (k,) with k > 1, got {norms.shape}.'
    )
  return _from_squares(
    jnp.mean(jnp.square(norms.astype(jnp.float32))),
    jnp.square(jnp.asarray(norm_of_mean, jnp.float32)),
    jnp.float32(norms.shape[0]),
    batch_size,
  )


def _from_squares(small, big, count, batch_size):
  """The formula, of the mean square and the square of the mean."""
  others = jnp.maximum(count - 1, 1)
  size = jnp.asarray(batch_size, jnp.float32)
  return GradientNoise(
    signal=(count * big - small) / others,
    variance=size * count / others * (small - big),
  )


class NoiseScaleState(NamedTuple):
  """State of :func:`noise_scale_aggregate`.

  Attributes:
    noise: a :class:`GradientNoise`, averaged over the steps.
    recorded: int32, how many steps are in it.
    skipped: int32, how many are not: with less than two good gradients.
  """

  noise: GradientNoise
  recorded: jax.Array
  skipped: jax.Array


def noise_scale_aggregate(
  batch_size: ArrayLike = 1,
  *,
  decay: ArrayLike = 0.99,
  axis_name: arrays.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Averages the gradients of micro-batches, and measures their noise.

  The first link of a chain: it takes updates with the micro-batches along the
  leading axis of every leaf, as ``jax.vmap(jax.grad(...))`` makes them, and
  gives their mean. For micro-batches that are not there at once, see
  :func:`gradient_noise`.

  Args:
    batch_size: how many examples a micro-batch has.
    decay: of the averages of signal and variance; before 1 / (1 - decay) steps
      they are plain means.
    axis_name: mapped axis, or axes, over which the micro-batches are split; the
      result is then the average over all of them.

  Returns:
    A ``GradientTransformationExtraArgs`` with a :class:`NoiseScaleState`; the
    noise scale is ``state.noise.noise_scale``. Its ``update`` takes the extra
    argument ``mask``, bool of shape (micro-batches,): which of them count. One
    with NaN or inf is left out; if none is left, the update is 0.

  Raises:
    ValueError: on update, if leaves differ in their leading axis or have none,
      or do not have the shape of ``params`` behind it.

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

  def init_fn(params):
    del params
    zero = jnp.zeros([], jnp.float32)
    count = jnp.zeros([], jnp.int32)
    return NoiseScaleState(
      GradientNoise(zero, jnp.copy(zero)), count, jnp.copy(count)
    )

  def update_fn(updates, state, params=None, *, mask=None, **extra_args):
    del extra_args
    if not any(map(arrays.is_inexact, jax.tree.leaves(updates))):
      return updates, state
    norms = per_example.norms(updates, params)
    valid = jnp.isfinite(norms)
    if mask is not None:
      valid &= jnp.asarray(mask).astype(bool)
    valid = valid.astype(jnp.float32)
    count = arrays.psum(jnp.sum(valid), axis_name)
    share = valid / jnp.maximum(count, 1)
    mean = per_example.weighted_sum(updates, share, axis_name)
    squares = jnp.square(jnp.where(valid > 0, norms, 0))
    noise = _from_squares(
      arrays.psum(jnp.sum(share * squares), axis_name),
      jnp.square(global_norm(mean).astype(jnp.float32)),
      count,
      batch_size,
    )
    good = (
      (count > 1) & jnp.isfinite(noise.signal) & jnp.isfinite(noise.variance)
    )
    recorded = state.recorded.astype(jnp.float32)
    rest = 1 - jnp.asarray(decay, jnp.float32)
    entering = jnp.maximum(1 / (recorded + 1), rest)
    average = jax.tree.map(
      lambda old, new: jnp.where(good, old + entering * (new - old), old),
      state.noise,
      noise,
    )
    return mean, NoiseScaleState(
      average,
      counters.count_if(good, state.recorded),
      counters.count_if(~good, state.skipped),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
