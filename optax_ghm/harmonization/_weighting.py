"""One weighting of gradient norms, of which GHM and others are corners."""

import dataclasses
import math

from optax_ghm._core import counters
from optax_ghm.harmonization import _density, _windowed


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarmonyWeighting:
  r"""The weight of an example by its gradient norm and how crowded that is.

  .. math::
    w(g) \propto \left(\frac{N}{GD(g)}\right)^\tau (1 - g)^q g^\gamma

  with g the norm as a share of the largest, which is that of an example that is
  certainly wrong, and GD the gradient density. Each factor does one thing:

  - τ, the exponent, mutes what is crowded: the easy examples in the mass of the
    frequent classes.
  - q, the robustness, mutes outliers: what is wrong with great certainty may be
    labeled wrongly.
  - γ, the focus, mutes what is learned already, crowded or not.

  Corners are losses that are known. Under a cross-entropy, whose norm is the
  probability 1 - p in the wrong place:

  ========================== ==== === ===
  weighting                  τ    q   γ
  ========================== ==== === ===
  the default                1/4  1/4 0
  GHM, as published          1    0   0
  generalized cross-entropy  0    q   0
  focal, as weights          0    0   γ
  the plain loss             0    0   0
  ========================== ==== === ===

  Before a softmax with more than two classes, :func:`optax_ghm.harmonize` takes
  the Euclidean norm of the gradient for g, which is less than 1 - p: there the
  corner is a milder loss than generalized cross-entropy.

  GHM as published makes all norms count alike, which mutes what should be
  learned where the hard examples are the crowd. It hurt in most of our
  measurements. The default cost half a point at most against the plain loss.

  Attributes:
    density: estimator of the gradient density. None is the default of the
      function that takes the weighting: :class:`optax_ghm.WindowedDensity` over
      the range that the norms have there.
    exponent: τ, at least 0.
    robustness: q, at least 0. It has no effect on norms far below the largest,
      so none on densities of a logarithmic range. A norm nearer to the largest
      than 1/8192 of it counts as so near: a probability p below 1/8192 does.
    focus: γ, at least 0. A norm below 1/8192 of the largest counts as that.
    normalize: whether the weights average to 1 over the examples of a batch, so
      that the learning rate keeps its meaning. The average is that of the
      regions of the density.

  Raises:
    ValueError: if a number is negative or not finite.
    TypeError: if ``density`` is no estimator.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> norms = jnp.array([0.1, 0.1, 0.1, 0.1, 0.5, 0.99])
    >>> for weighting in (optax_ghm.HarmonyWeighting(), optax_ghm.GHM):
    ...   weights, state = optax_ghm.harmony_weights(norms, weighting=weighting)
    ...   print([round(float(weight), 2) for weight in weights])
    [1.07, 1.07, 1.07, 1.07, 1.3, 0.43]
    [0.58, 0.58, 0.58, 0.58, 2.31, 1.38]

  References:
    Li et al., `Gradient Harmonized Single-stage Detector
    <https://arxiv.org/abs/1811.05181>`_, 2019; Zhang & Sabuncu, `Generalized
    Cross Entropy Loss <https://arxiv.org/abs/1805.07836>`_, 2018; Lin et al.,
    `Focal Loss for Dense Object Detection <https://arxiv.org/abs/1708.02002>`_,
    2017
  """

  density: _density.DensityEstimator | None = None
  exponent: float = 0.25
  robustness: float = 0.25
  focus: float = 0.0
  normalize: bool = True

  def __post_init__(self) -> None:
    if self.density is not None:
      counters.check_type('density', self.density, _density.DensityEstimator)
    for name in ('exponent', 'robustness', 'focus'):
      value = getattr(self, name)
      if not 0 <= value < math.inf:
        raise ValueError(f'{name} must be from 0 on, and finite, got {value}.')

  def init(self) -> _density.DensityState:
    """The state of the density before the first batch."""
    # The default densities have states of one shape.
    density = _windowed.DEFAULT if self.density is None else self.density
    return density.init()

  def with_density(
    self, default: _density.DensityEstimator
  ) -> 'HarmonyWeighting':
    """The weighting with a density, the default if it has none."""
    if self.density is not None:
      return self
    return dataclasses.replace(self, density=default)


DEFAULT = HarmonyWeighting()

GHM = HarmonyWeighting(exponent=1.0, robustness=0.0)
"""The weighting as published: the inverse of the gradient density."""
