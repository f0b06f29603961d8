"""What domain-adversarial training needs around the reversal."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ghm import density as _density, norms as _norms

Rule = Literal['gh', 'gh++']


def domain_loss(
  logits: jax.Array,
  domains: jax.Array,
  *,
  domain_weights: jax.Array | None = None,
  example_weights: jax.Array | None = None,
  axis_name: _density.AxisName = None,
) -> jax.Array:
  r"""Cross-entropy of the domains, every domain with a share of its own.

  .. math::
    \ell_i = N\, \omega_{d_i} \frac{w_i}{\sum_{j: d_j = d_i} w_j}
      \left(-\log \operatorname{softmax}(z_i)_{d_i}\right)

  so that its mean over the batch is :math:`\sum_d \omega_d` times the weighted
  mean inside domain d, however many of the N examples are of each domain.

  Args:
    logits: (N, D), one per domain; or (N,), the logit of domain 1 against
      domain 0.
    domains: integers, (N,). Examples whose domain is not in [0, D) get loss 0.
    domain_weights: :math:`\omega`, (D,); None is 1 / D each, which for two
      domains is half the domain term of the paper. A domain without an example
      contributes 0.
    example_weights: w, (N,), not negative, such as :func:`entropy_weights`;
      None is 1 each. No gradient flows through them.
    axis_name: mapped axis, or axes, over which the batch is split; N and the
      sums are then those of the whole batch.

  Returns:
    One loss per example, (N,), in the dtype of ``logits``.

  Raises:
    TypeError: if ``domains`` are not integers or ``logits`` not floating.
    ValueError: if the shapes do not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> domains = jnp.array([0, 0, 0, 1])
    >>> losses = optax_ghm.domain_loss(jnp.zeros(4), domains)
    >>> [round(float(loss), 3) for loss in losses]
    [0.462, 0.462, 0.462, 1.386]

  References:
    Ganin et al., `Domain-Adversarial Training of Neural Networks
    <https://arxiv.org/abs/1505.07818>`_, 2016, equation 9
  """
  logits, domains = jnp.asarray(logits), jnp.asarray(domains)
  if not jnp.issubdtype(domains.dtype, jnp.integer):
    raise TypeError(f'domains must be integers, got dtype {domains.dtype}.')
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise TypeError(f'logits must be floating, got dtype {logits.dtype}.')
  if logits.ndim not in (1, 2) or logits.shape[:1] != domains.shape:
    raise ValueError(
      'logits must be of shape (N,) or (N, D) for domains of shape (N,), got'
      f' {logits.shape} and {domains.shape}.'
    )
  count = 2 if logits.ndim == 1 else logits.shape[1]
  if count < 2:
    raise ValueError(
      'logits of shape (N, D) must be those of two domains or more, got'
      f' {logits.shape}: for one logit, give (N,).'
    )
  if domain_weights is None:
    domain_weights = jnp.full((count,), 1 / count, jnp.float32)
  elif jnp.shape(domain_weights) != (count,):
    raise ValueError(
      f'domain_weights must be of shape ({count},), one per domain, got'
      f' {jnp.shape(domain_weights)}.'
    )
  if example_weights is None:
    example_weights = jnp.ones(domains.shape, jnp.float32)
  elif jnp.shape(example_weights) != domains.shape:
    raise ValueError(
      f'example_weights must be of shape {domains.shape}, one per example, got'
      f' {jnp.shape(example_weights)}.'
    )
  dtype = _norms.at_least_float32(logits.dtype)
  domains = domains.astype(jnp.int32)
  known = (domains >= 0) & (domains < count)
  label = jnp.where(known, domains, 0)
  # Masked before the loss, so that no gradient of it is NaN times 0.
  seen = jnp.expand_dims(known, tuple(range(1, logits.ndim)))
  z = jnp.where(seen, logits.astype(dtype), 0)
  if logits.ndim == 1:
    losses = optax.sigmoid_binary_cross_entropy(z, label.astype(dtype))
  else:
    losses = optax.softmax_cross_entropy_with_integer_labels(z, label)

  # (N, D): which domain, so that sums over it need no gather when sharded.
  member = known[:, None] & (label[:, None] == jnp.arange(count)[None])
  weights = jax.lax.stop_gradient(jnp.asarray(example_weights).astype(dtype))
  amount = jnp.where(member, weights[:, None], 0)
  total, size = jnp.sum(amount, axis=0), jnp.asarray(domains.size, dtype)
  if axis_name is not None:
    total, size = jax.lax.psum((total, size), axis_name)
  # A domain of no weight contributes 0, one with a NaN among them NaN.
  share = jnp.asarray(domain_weights).astype(dtype) / jnp.where(
    total == 0, 1, total
  )
  factor = jnp.sum(jnp.where(member, amount * share[None], 0), axis=1)
  return jnp.where(known, size * factor * losses, 0).astype(logits.dtype)


def multilinear_map(features: jax.Array, predictions: jax.Array) -> jax.Array:
  r"""Conditions the domain classifier on the prediction: CDAN's outer product.

  .. math:: T(f, g) = \operatorname{vec}(f \otimes g)

  The domain classifier then sees the features class by class, and cannot be
  fooled by aligning one class with another. The authors' code lets no gradient
  through the predictions: give ``jax.lax.stop_gradient(jax.nn.softmax(...))``.

  Args:
    features: (..., F).
    predictions: (..., C), class probabilities.

  Returns:
    (..., F · C), the C products of a feature side by side. Where that passes
    4,096 the paper takes :func:`randomized_multilinear_map`.

  Raises:
    ValueError: if the leading axes differ.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> optax_ghm.multilinear_map(jnp.array([1.0, 2.0]), jnp.array([0.5, 0.5]))
    Array([0.5, 0.5, 1. , 1. ], dtype=float32)

  References:
    Long et al., `Conditional Adversarial Domain Adaptation
    <https://arxiv.org/abs/1705.10667>`_, 2018
  """
  _check_leading(features, predictions)
  product = features[..., :, None] * predictions[..., None, :]
  *leading, count, classes = product.shape
  return product.reshape(*leading, count * classes)


def multilinear_projections(
  key: jax.Array,
  features: int,
  classes: int,
  outputs: int = 1024,
) -> tuple[jax.Array, jax.Array]:
  """The two random matrices of :func:`randomized_multilinear_map`.

  Drawn once, standard normal, and kept for the whole training.

  Args:
    key: PRNG key.
    features: F, the number of features.
    classes: C, the number of classes.
    outputs: d, the number of products to keep.

  Returns:
    float32 matrices of shapes (F, d) and (C, d).

  Examples:
    >>> import jax
    >>> import optax_ghm
    >>> of_features, of_classes = optax_ghm.multilinear_projections(
    ...   jax.random.key(0), 256, 10
    ... )
    >>> of_features.shape, of_classes.shape
    ((256, 1024), (10, 1024))
  """
  one, two = jax.random.split(key)
  return (
    jax.random.normal(one, (features, outputs), jnp.float32),
    jax.random.normal(two, (classes, outputs), jnp.float32),
  )


def randomized_multilinear_map(
  features: jax.Array,
  predictions: jax.Array,
  projections: tuple[jax.Array, jax.Array],
) -> jax.Array:
  r"""CDAN's conditioning for large products: random products of the two.

  .. math::
    T(f, g) = \frac{1}{\sqrt d} (R_f f) \odot (R_g g), \qquad
    \operatorname{E} \langle T(f, g), T(f', g') \rangle =
      \langle f, f' \rangle \langle g, g' \rangle

  the inner product of :func:`multilinear_map`, with variance in 1 / d.

  Args:
    features: (..., F).
    predictions: (..., C), class probabilities.
    projections: of shapes (F, d) and (C, d), from
      :func:`multilinear_projections`, cast to the dtype of what they multiply.

  Returns:
    (..., d).

  Raises:
    ValueError: if the shapes do not fit.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> projections = optax_ghm.multilinear_projections(
    ...   jax.random.key(0), 4096, 100
    ... )
    >>> optax_ghm.randomized_multilinear_map(
    ...   jnp.ones((8, 4096)), jnp.ones((8, 100)) / 100, projections
    ... ).shape
    (8, 1024)

  References:
    Long et al., `Conditional Adversarial Domain Adaptation
    <https://arxiv.org/abs/1705.10667>`_, 2018
  """
  _check_leading(features, predictions)
  of_features, of_classes = projections
  if (
    of_features.shape[0] != features.shape[-1]
    or of_classes.shape[0] != predictions.shape[-1]
    or of_features.shape[1:] != of_classes.shape[1:]
  ):
    raise ValueError(
      'projections must be of shapes (F, d) and (C, d), got'
      f' {of_features.shape} and {of_classes.shape} for features'
      f' {features.shape} and predictions {predictions.shape}.'
    )
  left = features @ of_features.astype(features.dtype)
  right = predictions @ of_classes.astype(predictions.dtype)
  return left * right / math.sqrt(of_features.shape[1])


def _check_leading(features, predictions):
  if features.shape[:-1] != predictions.shape[:-1]:
    raise ValueError(
      'features and predictions must have the same leading axes, got'
      f' {features.shape} and {predictions.shape}.'
    )


def entropy_weights(logits: jax.Array) -> jax.Array:
  r"""How much an example counts for the domain classifier: CDAN+E's weights.

  .. math::
    w = 1 + e^{-H}, \qquad H = -\sum_c p_c \log p_c, \qquad
    p = \operatorname{softmax}(z)

  Sure predictions, which are easier to transfer, count up to twice as much.

  Args:
    logits: (..., C), of the class predictor. No gradient flows back.

  Returns:
    (...), in (1, 2], in the dtype of ``logits``; 0 where these are NaN or have
    no largest finite one. Give it to :func:`domain_loss` as
    ``example_weights``, which divides by their sum in each domain, as the
    authors' code does.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> sure, unsure = optax_ghm.entropy_weights(
    ...   jnp.array([[99.0, 0.0], [0.0, 0.0]])
    ... )
    >>> float(sure), float(unsure)
    (2.0, 1.5)

  References:
    Long et al., `Conditional Adversarial Domain Adaptation
    <https://arxiv.org/abs/1705.10667>`_, 2018, equation 8
  """
  dtype = _norms.at_least_float32(logits.dtype)
  log_p = jax.nn.log_softmax(jax.lax.stop_gradient(logits).astype(dtype))
  # A class that is ruled out has p = 0 and log p = -inf: it adds nothing.
  p = jnp.exp(log_p)
  terms = jnp.where(p > 0, p * jnp.where(p > 0, log_p, 0), 0)
  weights = 1 + jnp.exp(jnp.sum(terms, axis=-1))
  sound = ~jnp.any(jnp.isnan(p), axis=-1)
  return jnp.where(sound, weights, 0).astype(logits.dtype)


def conflict_weights(
  first: Any,
  second: Any,
  *,
  rule: Rule = 'gh',
  harmonic_range: float = 0.5,
  axis_name: _density.AxisName = None,
) -> tuple[jax.Array, jax.Array]:
  r"""Weights for two losses whose gradients point against each other.

  Where :math:`g_1 \cdot g_2 < 0`, with θ the angle between them,

  .. math::
    \text{GH:} \quad & \tau_1 = 1 - \frac{g_1 \cdot g_2}{|g_1|^2}, \qquad
      \tau_2 = 1 - \frac{g_1 \cdot g_2}{|g_2|^2} \\
    \text{GH++:} \quad & \tau_1 = 1 + 2 \sin \frac{\beta}{2}, \qquad
      \tau_2 = 1 - 2 \sin \frac{\theta - \pi/2 - \beta}{2}, \qquad
      \beta = \eta\, (\theta - \pi / 2)

  and 1 elsewhere. GH makes :math:`\tau_1 g_1 + \tau_2 g_2` the sum of the two
  gradients after each has lost what points against the other, so that a small
  step along it raises neither loss. GH++ deviates less from the gradients.

  Args:
    first: :math:`g_1`, a pytree of gradients; the domain loss's, for GH++.
    second: :math:`g_2`, the same structure; the task's, for GH++.
    rule: ``'gh'`` or ``'gh++'``, whose formula here is that of the authors'
      published code.
    harmonic_range: η of GH++, from 0 to 1, how the excess of the angle over a
      right angle is split between the two.
    axis_name: mapped axis, or axes, over which the gradients are split.

  Returns:
    :math:`(\tau_1, \tau_2)`, float32 scalars (float64 where a leaf is of 64
    bits), no larger than that holds. Both are 1 where a gradient is 0 or not
    finite.

  Raises:
    ValueError: if the rule is unknown or the structures differ.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> g1, g2 = jnp.array([1.0, 0.0]), jnp.array([-1.0, 1.0])
    >>> one, two = optax_ghm.conflict_weights(g1, g2)
    >>> float(one), float(two)
    (2.0, 1.5)
    >>> combined = one * g1 + two * g2
    >>> float(combined @ g1) >= 0, float(combined @ g2) >= 0
    (True, True)

  References:
    Huang et al., `Gradient Harmonization in Unsupervised Domain Adaptation
    <https://arxiv.org/abs/2408.00288>`_, 2024
  """
  if rule not in ('gh', 'gh++'):
    raise ValueError(f"rule must be 'gh' or 'gh++', got {rule!r}.")
  kinds = [jax.tree.map(jnp.shape, tree) for tree in (first, second)]
  if kinds[0] != kinds[1]:
    raise ValueError(
      'first and second must have the same structure and shapes, got'
      f' {kinds[0]} and {kinds[1]}.'
    )
  cosine, one, two = _cosine(first, second, axis_name)
  against = cosine < 0
  if rule == 'gh':
    weights = 1 - cosine * two / one, 1 - cosine * one / two
  else:
    # The derivative of the arc sine is infinite at -1, of opposite gradients.
    inside = against & (cosine > -1)
    excess = jnp.arcsin(jnp.where(inside, -cosine, 0))
    excess = jnp.where(inside, excess, math.pi / 2)
    beta = harmonic_range * excess
    weights = (
      1 + 2 * jnp.sin(beta / 2),
      1 - 2 * jnp.sin((excess - beta) / 2),
    )
  largest = jnp.finfo(cosine.dtype).max
  tau_1, tau_2 = (
    jnp.where(against, jnp.minimum(w, largest), 1) for w in weights
  )
  return tau_1, tau_2


def harmonized_fork(
  x: Any,
  *,
  rule: Rule = 'gh',
  harmonic_range: float = 0.5,
  axis_name: _density.AxisName = None,
  enabled: bool = True,
) -> tuple[Any, Any]:
  r"""Two branches of shared features, whose gradients are harmonised.

  .. math::
    (y_1, y_2) = (x, x), \qquad
    \bar x = \tau_1 \bar y_1 + \tau_2 \bar y_2

  with the weights τ of :func:`conflict_weights` for the two cotangents. One
  backward pass does what the paper does with one per loss. Under ``jax.vmap``
  every example gets weights of its own, elsewhere the batch shares them.

  Args:
    x: features, an array or a pytree of them; leaves that are neither floating
      nor complex pass unchanged.
    rule: see :func:`conflict_weights`, as are the following.
    harmonic_range: η of GH++.
    axis_name: mapped axis, or axes, over which the batch is split.
    enabled: False is ``(x, x)``, which forward mode needs: the rule is not
      linear in the cotangents.

  Returns:
    ``x`` twice: first for the domain's branch, then for the task's.

  Raises:
    ValueError: if the rule is unknown.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> def loss(x, fork):
    ...   first, second = fork(x)
    ...   return first @ jnp.array([1.0, 0.0]) + second @ jnp.array([-1.0, 1.0])
    >>> x = jnp.zeros(2)
    >>> jax.grad(loss)(x, lambda x: (x, x))
    Array([0., 1.], dtype=float32)
    >>> jax.grad(loss)(x, optax_ghm.harmonized_fork)
    Array([0.5, 1.5], dtype=float32)

  References:
    Huang et al., `Gradient Harmonization in Unsupervised Domain Adaptation
    <https://arxiv.org/abs/2408.00288>`_, 2024
  """
  if rule not in ('gh', 'gh++'):
    raise ValueError(f"rule must be 'gh' or 'gh++', got {rule!r}.")
  if not enabled:
    return x, x
  leaves, structure = jax.tree.flatten(x)
  floats = [leaf for leaf in leaves if _norms.is_inexact(leaf)]
  branches = _fork(rule, harmonic_range, axis_name, floats)

  def branch(floats):
    passed = iter(floats)
    return structure.unflatten(
      next(passed) if _norms.is_inexact(leaf) else leaf for leaf in leaves
    )

  first, second = map(branch, branches)
  return first, second


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fork(rule, harmonic_range, axis_name, x):
  del rule, harmonic_range, axis_name
  return x, x


def _fork_fwd(rule, harmonic_range, axis_name, x):
  # Calling the primitive again keeps its rule in a gradient of a gradient.
  return _fork(rule, harmonic_range, axis_name, x), None


def _fork_bwd(rule, harmonic_range, axis_name, residuals, cotangents):
  del residuals
  first, second = cotangents
  one, two = conflict_weights(
    first,
    second,
    rule=rule,
    harmonic_range=harmonic_range,
    axis_name=axis_name,
  )

  def combine(g1, g2):
    dtype = _norms.at_least_float32(g1.dtype)
    real = jnp.finfo(dtype).dtype
    sum_ = _norms.multiply(g1.astype(dtype), one.astype(real))
    sum_ += _norms.multiply(g2.astype(dtype), two.astype(real))
    return sum_.astype(g1.dtype)

  return (jax.tree.map(combine, first, second),)


_fork.defvjp(_fork_fwd, _fork_bwd)


def _cosine(first, second, axis_name):
  """The cosine of the angle between two trees, from -1 to 1, and their norms.

  0, and norms of 1, where a tree is 0 or not finite.
  """
  norms = [_norms.global_norm(tree, axis_name) for tree in (first, second)]
  dtype = np.promote_types(*(n.dtype for n in norms))
  sound = (norms[0] > 0) & (norms[1] > 0)
  sound &= jnp.isfinite(norms[0]) & jnp.isfinite(norms[1])
  one, two = (jnp.where(sound, n.astype(dtype), 1) for n in norms)
  by = [jnp.clip(n, max=_norms.LARGEST_DIVISOR) for n in (one, two)]
  dot = jnp.zeros([], dtype)
  for g1, g2 in zip(*map(jax.tree.leaves, (first, second)), strict=True):
    if not _norms.is_inexact(g1):
      continue
    # Divided each, not multiplied by 1 / by: XLA would pull those factors out
    # of the product, which then overflows.
    for u, v in zip(_parts(g1), _parts(g2), strict=True):
      dot += jnp.sum((u.astype(dtype) / by[0]) * (v.astype(dtype) / by[1]))
  if axis_name is not None:
    dot = jax.lax.psum(dot, axis_name)
  # Kept apart from it: XLA would make it dot * by / norm, which overflows.
  rest = jax.lax.optimization_barrier((one / by[0]) * (two / by[1]))
  cosine = jnp.clip(dot / rest, -1, 1)
  return jnp.where(sound, cosine, 0), one, two


def _parts(x):
  """The real parts that a number has."""
  return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
