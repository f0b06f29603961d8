"""The risk on the target, estimated from labeled examples of the source."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, masks


def density_ratios(
  source: jax.Array,
  target: jax.Array,
  features: jax.Array,
  *,
  penalty: ArrayLike = 1.0,
) -> jax.Array:
  r"""How much likelier features are in the target than in the source.

  .. math::
    r(f) = \frac{N_S}{N_T} \frac{P(\text{target} \mid f)}
      {P(\text{source} \mid f)} = \frac{N_S}{N_T} e^{w \cdot f + b}, \qquad
    \min_{w, b}\ \sum_i \ell_i + \frac{\lambda}{2} \lVert w \rVert^2

  A logistic regression tells the domains apart, with the cross-entropy
  :math:`\ell_i` of every example. It is fitted anew, since the adversary of a
  domain-adversarial training was kept from telling them apart. It sees linear
  differences only.

  The ratios mean little where the regression separates the domains: few
  examples then have all the weight. :math:`(\sum_i r_i)^2 / \sum_i r_i^2` is
  how many examples they amount to; if that is small, take a larger penalty. The
  fit is by Newton's method, with a matrix (F, F), and is not differentiable.

  Args:
    source: floating, :math:`(N_S, F)`, features of examples of the source that
      the model was trained on.
    target: floating, :math:`(N_T, F)`, features of examples of the target.
    features: floating, (N, F), of the labeled source examples to be weighted,
      which the model was not trained on.
    penalty: λ. Standardize the features, or give a λ that goes with the square
      of their scale.

  Returns:
    float32, (N,). Examples where a feature is not finite are left out of the
    fit and of the numbers of examples, and have ratio 0: NaN serves as padding.

  Raises:
    ValueError: if the arrays are not of shapes (N, F) with one F, ``source`` or
      ``target`` is empty, or ``penalty`` is negative.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_ghm import reversal
    >>> here, there = jax.random.normal(jax.random.key(0), (2, 4000, 1))
    >>> ratios = jax.jit(reversal.density_ratios)(
    ...   here, there + 1, jnp.array([[0.5], [2.5]])
    ... )
    >>> [round(float(ratio), 1) for ratio in ratios]  # 1 and e², about
    [1.0, 7.4]

  References:
    Bickel et al., `Discriminative Learning for Differing Training and Test
    Distributions <https://doi.org/10.1145/1273496.1273507>`_, 2007
  """
  counters.check_range('penalty', penalty, 0, float('inf'))
  given = {'source': source, 'target': target, 'features': features}
  shapes = {name: jnp.shape(x) for name, x in given.items()}
  if (
    {len(shape) for shape in shapes.values()} != {2}
    or len({shape[1:] for shape in shapes.values()}) > 1
    or 0 in (*shapes['source'], *shapes['target'])
  ):
    raise ValueError(
      'source, target and features must be of shapes (N, F), with examples and'
      f' one F, got {shapes}.'
    )
  source, target, features = (_with_one(x) for x in given.values())
  x = jnp.concatenate([source, target])
  # About the mean, which the bias makes up for; the 1 of the bias stays.
  known = x[:, -1:]
  mean = jnp.sum(x, 0, keepdims=True) / jnp.maximum(jnp.sum(known), 1)
  mean = mean.at[0, -1].set(0)
  x = (x - mean) * known
  features = (features - mean) * features[:, -1:]
  label = (jnp.arange(x.shape[0]) >= source.shape[0]).astype(jnp.float32)
  label *= x[:, -1]  # an example that is left out is a row of zeros
  ridge = penalty * jnp.ones_like(x[0]).at[-1].set(0)

  def objective(w):
    losses = optax.sigmoid_binary_cross_entropy(_logits(x, w), label)
    return jnp.sum(losses * x[:, -1]) + jnp.sum(ridge * jnp.square(w)) / 2

  def newton(carry):
    w, _, count = carry
    p = jax.nn.sigmoid(_logits(x, w))
    gradient = _logits(x.T, p - label) + ridge * w
    hessian = _logits(x.T, (p * (1 - p))[:, None] * x) + jnp.diag(ridge)
    step = jax.scipy.linalg.solve(hessian, gradient, assume_a='pos')
    step = jnp.where(jnp.isfinite(step), step, 0)  # of a singular matrix
    # The largest part of the step that does not make the objective larger.
    parts = jnp.append(0.5 ** jnp.arange(10.0, dtype=x.dtype), 0)
    values = jax.lax.map(lambda part: objective(w - part * step), parts)
    part = parts[jnp.argmax(values <= values[-1] * (1 + 1e-6))]
    # What the step gains, as far as a part of it does: Newton's decrement.
    gain = part * jnp.sum(gradient * step) / jnp.maximum(values[-1], 1)
    return w - part * step, gain, count + 1

  def unfinished(carry):
    _, gain, count = carry
    return (gain > 1e-7) & (count < 50)

  start = jnp.zeros_like(x[0]), jnp.full_like(x[0, 0], jnp.inf), 0
  w, *_ = jax.lax.while_loop(unfinished, newton, start)
  z = jnp.clip(_logits(features, w), -80, 80)  # so that ratios are finite
  size = jnp.sum(source[:, -1]) / jnp.maximum(jnp.sum(target[:, -1]), 1)
  return size * jnp.exp(z) * features[:, -1]


def _with_one(x: jax.Array) -> jax.Array:
  """float32 features and a 1 for the bias; a row of zeros if not finite."""
  x = arrays.replicated(jnp.asarray(x, jnp.float32))
  x = jnp.append(x, jnp.ones_like(x[:, :1]), 1)
  return jnp.where(jnp.all(jnp.isfinite(x), 1, keepdims=True), x, 0)


def _logits(x: jax.Array, w: jax.Array) -> jax.Array:
  return jnp.dot(x, w, precision=jax.lax.Precision.HIGHEST)


def importance_weighted_risk(losses: jax.Array, ratios: jax.Array) -> jax.Array:
  r"""The risk on the target by weighted source examples (IWCV).

  .. math:: \frac{\sum_i r_i \ell_i}{\sum_i r_i}

  **Lower is better.** The estimate is right under covariate shift: where
  :math:`P(y \mid x)` is the same in both domains, and the source has examples
  of every kind that the target has. The sum of the ratios in the place of N
  keeps the risk of a loss of at most 1 at most 1.

  Args:
    losses: (N,), of labeled source examples that were not trained on: the
      cross-entropy, or the error as 0 or 1.
    ratios: (N,), their :func:`density_ratios`. Negative numbers and NaN count
      as 0, inf as the largest float32.

  Returns:
    float32, a scalar; inf if the loss of an example with a ratio above 0 is NaN
    or inf, or if no ratio is above 0.

  Raises:
    TypeError: if ``ratios`` are bool or complex.
    ValueError: if the shapes are not (N,) both.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import reversal
    >>> losses, ratios = jnp.array([0.0, 1.0, 1.0]), jnp.array([3.0, 1.0, 0.0])
    >>> reversal.importance_weighted_risk(losses, ratios)
    Array(0.25, dtype=float32)

  References:
    Sugiyama et al., `Covariate Shift Adaptation by Importance Weighted Cross
    Validation <https://jmlr.org/papers/v8/sugiyama07a.html>`_, 2007
  """
  losses, ratios, _ = _known(losses, ratios)
  return _weighted_mean(losses, ratios)


def deep_embedded_validation(losses: jax.Array, ratios: jax.Array) -> jax.Array:
  r"""The risk on the target by weighted source examples, with less noise (DEV).

  .. math::
    \frac{1}{N} \sum_i r_i \ell_i
      + \eta \left(\frac{1}{N} \sum_i r_i - 1\right), \qquad
    \eta = -\frac{\operatorname{Cov}(r \ell, r)}{\operatorname{Var}(r)}

  The mean of the ratios is known to be 1, and its error tells that of the risk:
  the ratios are a control variate. **Lower is better**, and an estimate below 0
  is possible: far below where a few ratios are much larger than all others. The
  ratios are those of the model's own features, which makes the risks of two
  models comparable only as far as both logistic regressions fit.

  Args:
    losses: (N,), of labeled source examples that were not trained on, without
      padding.
    ratios: (N,), their :func:`density_ratios`. Negative numbers and NaN count
      as 0, inf as the largest float32.

  Returns:
    float32, a scalar; inf if the loss of an example with a ratio above 0 is NaN
    or inf, or if no ratio is above 0.

  Raises:
    TypeError: if ``ratios`` are bool or complex.
    ValueError: if the shapes are not (N,) both.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_ghm import reversal
    >>> losses, ratios = jnp.array([2.0, 1.0, 2.0]), jnp.array([1.0, 1.0, 4.0])
    >>> print(reversal.deep_embedded_validation(losses, ratios))  # not 3.67
    1.5

  References:
    You et al., `Towards Accurate Model Selection in Deep Unsupervised Domain
    Adaptation <https://proceedings.mlr.press/v97/you19a.html>`_, 2019
  """
  losses, ratios, largest = _known(losses, ratios)
  mean = _weighted_mean(losses, ratios)
  # Losses that are smaller by c have a risk that is smaller by c. With c their
  # weighted mean, the first sum of the formula is 0, and nothing cancels.
  centered = jnp.where(jnp.isfinite(mean), losses - mean, 0)
  deviation = ratios - jnp.mean(ratios)
  variance = jnp.mean(jnp.square(deviation))
  covariance = jnp.mean(deviation * ratios * centered)
  eta = -covariance / jnp.where(variance > 0, variance, 1)
  risk = mean + eta * (jnp.mean(ratios) * largest - 1)
  return jnp.where(jnp.isfinite(risk), risk, jnp.inf)


def _known(
  losses: ArrayLike, ratios: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Losses, 0 for ratio 0; ratios as shares of the largest; the largest."""
  losses = jnp.asarray(losses)
  if losses.ndim != 1 or jnp.shape(ratios) != losses.shape:
    raise ValueError(
      'losses and ratios must be of shape (N,) both, got'
      f' {losses.shape} and {jnp.shape(ratios)}.'
    )
  weights: Any = masks.broadcast_weights(ratios, losses.shape, 'ratios')
  weights = jnp.minimum(weights, jnp.finfo(jnp.float32).max)
  losses = losses.astype(jnp.float32)
  losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
  largest = jnp.max(weights, initial=0)
  relative = weights / jnp.where(largest > 0, largest, 1)
  return jnp.where(weights > 0, losses, 0), relative, largest


def _weighted_mean(losses: jax.Array, ratios: jax.Array) -> jax.Array:
  """The mean, or inf if a loss is not finite or no ratio is above 0."""
  sound = jnp.any(ratios > 0) & jnp.all(jnp.isfinite(losses))
  total = jnp.where(sound, jnp.sum(ratios), 1)
  mean = jnp.sum(ratios * jnp.where(sound, losses, 0)) / total
  return jnp.where(sound, mean, jnp.inf)
