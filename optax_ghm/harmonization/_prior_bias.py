"""The bias with which a sigmoid layer starts at the prior."""

import jax
import jax.numpy as jnp
from jax.scipy.special import logit
from jax.typing import ArrayLike

from optax_ghm._core import arrays


def prior_bias(probability: ArrayLike) -> jax.Array:
  r"""The initial bias of a last layer whose sigmoid is to give the prior.

  .. math::
    b = \log \frac{\pi}{1 - \pi}

  With a bias of 0 every example starts at probability ½, and where positives
  are rare the first steps are spent on pushing all others down, by gradients
  that can wreck the layers below. From the prior, training starts with the rare
  examples. Set it before you try any other remedy for rare positives.

  Leave the bias at 0 where :func:`optax_ghm.adjust_sigmoid_logits` has the
  prior in the loss.

  Args:
    probability: π, in (0, 1), a number or an array with one for each class: the
      share of the examples that are positive. The paper takes 0.01. Arrays are
      clipped to the open interval, so that 0 and 1 have finite biases.

  Returns:
    The bias, of the shape of ``probability``, float32 at least.

  Raises:
    ValueError: if a Python number is not in (0, 1).

  Examples:
    ``constant`` takes one number for all classes, or one for each class, in
    Linen and NNX alike:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> from flax import linen, nnx
    >>> constant = jax.nn.initializers.constant
    >>> layer = linen.Dense(3, bias_init=constant(optax_ghm.prior_bias(0.01)))
    >>> variables = layer.init(jax.random.key(0), jnp.ones(8))
    >>> [round(float(b), 3) for b in variables['params']['bias']]
    [-4.595, -4.595, -4.595]
    >>> shares = jnp.array([0.5, 0.1, 0.01])
    >>> layer = nnx.Linear(
    ...   8,
    ...   3,
    ...   bias_init=constant(optax_ghm.prior_bias(shares)),
    ...   rngs=nnx.Rngs(0),
    ... )
    >>> [round(float(b), 3) for b in layer.bias[...]]
    [0.0, -2.197, -4.595]

    A layer with several anchors at each place, their classes last, takes
    ``jnp.tile(optax_ghm.prior_bias(shares), anchors)``.

  References:
    Lin et al., `Focal Loss for Dense Object Detection
    <https://arxiv.org/abs/1708.02002>`_, 2017, sections 3.3 and 4.1
  """
  if isinstance(probability, int | float):
    if not 0 < probability < 1:
      raise ValueError(f'probability must be in (0, 1), got {probability}.')
    probability = jnp.asarray(probability, jnp.float32)
  probability = jnp.asarray(probability)
  dtype = arrays.at_least_float32(probability.dtype)
  limits = jnp.finfo(dtype)
  return logit(
    jnp.clip(probability.astype(dtype), limits.tiny, 1 - limits.epsneg)
  )
