"""The schedules of domain-adversarial training."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_ghm._core import counters


def dann_reversal_schedule(
  transition_steps: int,
  peak_value: float = 1.0,
  *,
  gamma: float = 10.0,
  init_value: float = 0.0,
  transition_begin: int = 0,
) -> Callable[[ArrayLike], jax.Array]:
  r"""The λ of :func:`reverse_gradient` over training, rising to a peak.

  .. math::
    \lambda(p) = \lambda_0 + (\lambda_1 - \lambda_0)
      \left(\frac{2}{1 + e^{-\gamma p}} - 1\right), \qquad
    p = \frac{\text{step} - \text{begin}}{\text{steps}} \in [0, 1]

  The features are not disturbed while the domain classifier has yet to learn.
  The paper has :math:`\lambda_0 = 0`, :math:`\lambda_1 = 1` and γ = 10.

  Args:
    transition_steps: how many steps the rise takes; p stays 1 after them.
    peak_value: :math:`\lambda_1`. The rise ends below it, by a share of
      :math:`2 / (1 + e^\gamma)` of the whole rise.
    gamma: how steep the rise is.
    init_value: :math:`\lambda_0`.
    transition_begin: how many steps λ stays ``init_value`` before the rise.

  Returns:
    A schedule, which returns λ in float32.

  Raises:
    ValueError: if ``transition_steps`` is not positive, or ``transition_begin``
      is negative.

  Examples:
    >>> import optax_ghm
    >>> schedule = optax_ghm.dann_reversal_schedule(1000, transition_begin=100)
    >>> [round(float(schedule(step)), 3) for step in (0, 100, 200, 600, 1100)]
    [0.0, 0.0, 0.462, 0.987, 1.0]

  References:
    Ganin et al., `Domain-Adversarial Training of Neural Networks
    <https://arxiv.org/abs/1505.07818>`_, 2016, section 5.2.2
  """
  progress = _progress(transition_steps, transition_begin)

  def schedule(count):
    # 2 / (1 + exp(-z)) - 1 = tanh(z / 2), without the cancellation near 0.
    rise = jnp.tanh(gamma * progress(count) / 2)
    return init_value + (peak_value - init_value) * rise

  return schedule


def dann_learning_rate_schedule(
  transition_steps: int,
  init_value: float = 0.01,
  *,
  alpha: float = 10.0,
  beta: float = 0.75,
) -> Callable[[ArrayLike], jax.Array]:
  r"""The learning rate that goes with :func:`dann_reversal_schedule`.

  .. math::
    \mu(p) = \frac{\mu_0}{(1 + \alpha p)^\beta}, \qquad
    p = \frac{\text{step}}{\text{steps}} \in [0, 1]

  The paper uses it with stochastic gradient descent, momentum 0.9.

  Args:
    transition_steps: length of the training; p stays 1 after it.
    init_value: :math:`\mu_0`.
    alpha: how early the learning rate falls.
    beta: the power of the fall.

  Returns:
    A schedule, which returns μ in float32.

  Raises:
    ValueError: if ``transition_steps`` is not positive.

  Examples:
    >>> import optax_ghm
    >>> schedule = optax_ghm.dann_learning_rate_schedule(1000)
    >>> [round(float(schedule(step)), 5) for step in (0, 100, 1000)]
    [0.01, 0.00595, 0.00166]

  References:
    Ganin et al., `Domain-Adversarial Training of Neural Networks
    <https://arxiv.org/abs/1505.07818>`_, 2016, section 5.2.2
  """
  progress = _progress(transition_steps)

  def schedule(count):
    return init_value * (1 + alpha * progress(count)) ** -beta

  return schedule


def _progress(steps: int, begin: int = 0) -> Callable[[ArrayLike], jax.Array]:
  """The share of the steps that is done, from 0 to 1."""
  if isinstance(steps, int | float) and not steps > 0:
    raise ValueError(f'transition_steps must be positive, got {steps}.')
  counters.check_range('transition_begin', begin, 0, math.inf)

  def progress(count):
    # Subtracted as int32: float32 cannot tell step 2**24 + 1 from 2**24, and
    # unsigned or short integers would wrap.
    count = jnp.asarray(count)
    if jnp.issubdtype(count.dtype, jnp.integer):
      count = count.astype(jnp.int32)
    return jnp.clip((count - begin).astype(jnp.float32) / steps, 0.0, 1.0)

  return progress
