"""Several losses made one, without a look at their gradients."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

SMALLEST_LOSS = 1e-8
"""What a loss is at least, before its logarithm is taken."""


def uncertainty_weighted(
  losses: jax.Array, log_variances: jax.Array
) -> jax.Array:
  r"""The sum of losses, weighted by what noise they are thought to have.

  .. math::
    \ell = \frac{1}{2} \sum_i \big(e^{-s_i}\, \ell_i + s_i\big)

  with :math:`s_i = \log \sigma_i^2`, which are parameters, trained with the
  others from 0 on. The best :math:`s_i` is :math:`\log \ell_i`: in the end, the
  sum has the gradient of the sum of the logarithms.

  Args:
    losses: (m,), not negative.
    log_variances: (m,), s.

  Returns:
    A scalar; it may be negative.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm import conflict
    >>> losses = jnp.array([1.0, 100.0])
    >>> loss = conflict.uncertainty_weighted(losses, jnp.log(losses))
    >>> print(np.float64(loss).round(4))
    3.3026

  References:
    Kendall et al., `Multi-Task Learning Using Uncertainty to Weigh Losses
    <https://arxiv.org/abs/1705.07115>`_, 2018
  """
  return jnp.sum(jnp.exp(-log_variances) * losses + log_variances) / 2


def geometric_mean(losses: jax.Array) -> jax.Array:
  r"""The geometric mean of losses, to which every scale is the same.

  .. math::
    \ell = \Big(\prod_i \ell_i\Big)^{1/m}

  A loss that is scaled by c scales the gradient, and does not change its
  direction.

  Args:
    losses: (m,), positive. One below 1e-8 counts as 1e-8, and has no gradient.

  Returns:
    A scalar.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm import conflict
    >>> loss = conflict.geometric_mean(jnp.array([1.0, 100.0]))
    >>> print(np.float64(loss).round(4))
    10.0

  References:
    Chennupati et al., `MultiNet++: Multi-Stream Feature Aggregation and
    Geometric Loss Strategy for Multi-Task Learning
    <https://arxiv.org/abs/1904.08492>`_, 2019
  """
  return jnp.exp(jnp.mean(jnp.log(jnp.maximum(losses, SMALLEST_LOSS))))


def smooth_tchebycheff(
  losses: jax.Array,
  weights: ArrayLike = 1.0,
  *,
  ideal: ArrayLike = 0.0,
  smoothing: ArrayLike = 1.0,
) -> jax.Array:
  r"""A smooth maximum of weighted losses: the worst one decides.

  .. math::
    \ell = \mu \log \sum_i \exp\!\big(\lambda_i (\ell_i - z_i) / \mu\big)

  Unlike a weighted sum, it reaches every trade-off by some weights, also where
  the set of trade-offs is not convex.

  Args:
    losses: (m,).
    weights: λ, a scalar or (m,).
    ideal: z, a scalar or (m,): the losses if each were alone.
    smoothing: μ. The smaller it is, the more the worst one decides.

  Returns:
    A scalar.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_ghm import conflict
    >>> losses = jnp.array([1.0, 3.0])
    >>> gradient = jax.grad(conflict.smooth_tchebycheff)(losses)
    >>> print(np.float64(gradient).round(4))
    [0.1192 0.8808]

  References:
    Lin et al., `Smooth Tchebycheff Scalarization for Multi-Objective
    Optimization <https://arxiv.org/abs/2402.19078>`_, 2024
  """
  weights, ideal, smoothing = (
    jnp.asarray(u, losses.dtype) for u in (weights, ideal, smoothing)
  )
  return smoothing * jax.nn.logsumexp(weights * (losses - ideal) / smoothing)


def famo_loss(losses: jax.Array, logits: jax.Array) -> jax.Array:
  r"""The loss of FAMO, which lets all losses fall at one relative rate.

  .. math::
    \ell = c \sum_i z_i \log \ell_i, \qquad z = \operatorname{softmax}(\xi),
    \qquad 1 / c = \sum_i z_i / \ell_i

  with c and z constants for the gradient. It costs one backward pass, whatever
  the number of losses: :func:`famo_logits_gradient` learns ξ from how much the
  losses fell.

  Args:
    losses: (m,), positive. One below 1e-8 counts as 1e-8, and has no gradient.
      Subtract what they cannot fall below.
    logits: (m,), ξ, from 0 on.

  Returns:
    A scalar; its value means nothing.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax_ghm import conflict
    >>> tx = optax.sgd(0.1)
    >>> of_logits = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1))
    >>> def losses_fn(w):
    ...   return jnp.stack([(w[0] - 1) ** 2, 9 * (w[1] + 1) ** 2])
    >>> @jax.jit
    ... def step(w, state, logits, logits_state):
    ...   def loss(w):
    ...     losses = losses_fn(w)
    ...     return conflict.famo_loss(losses, logits), losses
    ...
    ...   grads, before = jax.grad(loss, has_aux=True)(w)
    ...   updates, state = tx.update(grads, state)
    ...   w = optax.apply_updates(w, updates)
    ...   grads = conflict.famo_logits_gradient(logits, before, losses_fn(w))
    ...   updates, logits_state = of_logits.update(grads, logits_state, logits)
    ...   return w, state, optax.apply_updates(logits, updates), logits_state
    >>> w = logits = jnp.zeros(2)
    >>> state, logits_state = tx.init(w), of_logits.init(logits)
    >>> for _ in range(9):
    ...   w, state, logits, logits_state = step(w, state, logits, logits_state)
    >>> print(losses_fn(w) < losses_fn(jnp.zeros(2)))
    [ True  True]

  References:
    Liu et al., `FAMO: Fast Adaptive Multitask Optimization
    <https://arxiv.org/abs/2306.03792>`_, 2023
  """
  z = jax.nn.softmax(logits)
  losses = jnp.maximum(losses, SMALLEST_LOSS)
  factor = jax.lax.stop_gradient(z / jnp.sum(z / losses))
  return jnp.sum(factor * jnp.log(losses))


def famo_logits_gradient(
  logits: jax.Array, before: jax.Array, after: jax.Array
) -> jax.Array:
  r"""The gradient for the logits of :func:`famo_loss`.

  .. math::
    \delta_i = \log \ell_i^{\text{before}} - \log \ell_i^{\text{after}},
    \qquad g = \Big(\frac{\partial z}{\partial \xi}\Big)^T \delta

  An optimizer of the logits that follows it makes the losses that fell least
  weigh more. The authors take Adam with a rate of 0.025 and a weight decay of
  0.001.

  Args:
    logits: (m,), ξ.
    before: (m,), the losses before the step.
    after: (m,), the losses after the step, on the same batch.

  Returns:
    (m,). It is 0 where a loss is not finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import conflict
    >>> before, after = jnp.array([1.0, 1.0]), jnp.array([0.5, 1.0])
    >>> print(conflict.famo_logits_gradient(jnp.zeros(2), before, after))
    [ 0.173... -0.173...]

  References:
    Liu et al., `FAMO: Fast Adaptive Multitask Optimization
    <https://arxiv.org/abs/2306.03792>`_, 2023
  """
  fell = jnp.log(jnp.maximum(before, SMALLEST_LOSS))
  fell -= jnp.log(jnp.maximum(after, SMALLEST_LOSS))
  fell = jnp.where(jnp.all(jnp.isfinite(fell)), fell, 0)
  z = jax.nn.softmax(logits)
  return z * (fell - jnp.sum(z * fell))
