"""The transformations under contract: an entry here runs every test of it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_ghm
from optax_ghm import calibration, flow, harmonization


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
  """A transformation under contract.

  Attributes:
    name: of the test's parameter.
    factory: makes the transformation from ``keywords`` alone.
    per_example: whether its updates have a batch axis before those of the
      params' leaves; ``update`` then takes the extra argument ``mask``.
    keywords: those arguments of ``factory`` that ``inject_hyperparams`` traces,
      each with a value to test it with.
    typical: whether it stands for all with its engine, in what depends on the
      shape of the state alone.
    own: whether it is of this library, whose states hold float32 and have field
      names of their own; Optax's need not.
  """

  name: str
  factory: Callable[..., optax.GradientTransformationExtraArgs]
  per_example: bool = False
  keywords: Mapping[str, float] = dataclasses.field(default_factory=dict)
  typical: bool = False
  own: bool = True

  @functools.cached_property
  def tx(self) -> optax.GradientTransformationExtraArgs:
    """One and the same in all tests, so that they share what is compiled."""
    return self.factory(**self.keywords)


def _guarded_trace(decay=0.9):
  """Optax's momentum, with what else the contract asks for, all from Optax."""
  return optax.masked(
    optax.apply_if_finite(optax.trace(decay), max_consecutive_errors=9),
    lambda tree: jax.tree.map(
      lambda x: jnp.issubdtype(x.dtype, jnp.floating), tree
    ),
  )


def _clipped_matrices(threshold=2.0):
  """QK-clip, for which all matrices are queries with logits of 1, 2, 3, ..."""
  tx = calibration.qk_clip(
    threshold, powers=lambda path, leaf: 0.5 if leaf.ndim > 1 else None
  )

  def max_logits(leaf):
    if getattr(leaf, 'ndim', 0) > 1:
      return np.arange(1, leaf.shape[-2] + 1, dtype=np.float32)
    return None

  def update_fn(updates, state, params=None, **extra_args):
    logits = jax.tree.map(max_logits, updates)
    return tx.update(updates, state, params, max_logits=logits, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)


ENTRIES = (
  Entry(
    'reference_trace',
    _guarded_trace,
    keywords={'decay': 0.8},
    own=False,
  ),
  Entry(
    'harmonized_aggregate',
    optax_ghm.harmonized_aggregate,
    per_example=True,
  ),
  Entry(
    'harmonized_aggregate_with_momentum',
    functools.partial(
      optax_ghm.harmonized_aggregate,
      optax_ghm.HarmonyWeighting(
        density=optax_ghm.BinnedDensity(
          bins=16, low=1e-8, high=1e8, log=True, momentum=0.9
        )
      ),
    ),
    per_example=True,
  ),
  Entry(
    'harmonized_aggregate_exact',
    functools.partial(
      optax_ghm.harmonized_aggregate,
      optax_ghm.HarmonyWeighting(
        density=harmonization.ExactDensity(width=1.0, high=10.0)
      ),
    ),
    per_example=True,
  ),
  Entry(
    'noise_scale_aggregate',
    functools.partial(optax_ghm.noise_scale_aggregate, 2),
    per_example=True,
    keywords={'decay': 0.5},
    typical=True,
  ),
  Entry('clip_by_norm', optax_ghm.clip_by_norm, keywords={'max_norm': 2.0}),
  Entry(
    'clip_by_norm_of_groups',
    functools.partial(
      optax_ghm.clip_by_norm,
      2.0,
      scope=optax_ghm.Groups(
        lambda tree: jax.tree.map(lambda u: f'rank {u.ndim}', tree)
      ),
    ),
  ),
  Entry(
    'clip_by_percentile',
    functools.partial(
      optax_ghm.clip_by_percentile,
      estimator=optax_ghm.WindowPercentile(length=4),
    ),
    keywords={'percentile': 40.0},
  ),
  Entry(
    'clip_by_quantile_of_leaves',
    functools.partial(
      optax_ghm.clip_by_percentile,
      estimator=optax_ghm.GeometricQuantile(),
      scope='leaf',
    ),
    keywords={'percentile': 40.0},
  ),
  Entry(
    'clip_by_zscore',
    optax_ghm.clip_by_zscore,
    keywords={'z_threshold': 0.5, 'decay': 0.9, 'warmup_steps': 1},
    typical=True,
  ),
  Entry(
    'clip_by_norm_ema',
    optax_ghm.clip_by_norm_ema,
    keywords={
      'ratio': 1.05,
      'decay': 0.9,
      'max_norm': 3.0,
      'warmup_steps': 1,
    },
  ),
  Entry(
    'clip_by_parameter_norm',
    optax_ghm.clip_by_parameter_norm,
    keywords={'ratio': 0.1, 'eps': 1e-3},
  ),
  Entry(
    'clip_by_rms',
    optax_ghm.clip_by_rms,
    keywords={'max_rms': 0.5},
  ),
  Entry('qk_clip', _clipped_matrices, keywords={'threshold': 1.5}),
  Entry(
    'normalize_by_norm',
    functools.partial(optax_ghm.normalize_by_norm, scope='leaf'),
  ),
  Entry(
    'normalize_by_norm_of_units',
    functools.partial(optax_ghm.normalize_by_norm, scope='unit'),
    typical=True,
  ),
  Entry('standardize', optax_ghm.standardize),
  Entry('centralize', optax_ghm.centralize),
  Entry(
    'skip_spikes',
    functools.partial(
      optax_ghm.skip_spikes,
      _guarded_trace(0.5),
      window=optax_ghm.SpikeWindow(length=4),
    ),
    keywords={'sigmas': 3.0, 'max_consecutive': 2},
    typical=True,
    own=False,  # its optimizer is Optax's
  ),
  Entry(
    'calibrated',
    functools.partial(
      optax_ghm.calibrated,
      _guarded_trace(0.5),
      optax_ghm.clip_by_zscore(0.5, warmup_steps=1),
    ),
    typical=True,
    own=False,  # its optimizer is Optax's
  ),
  Entry(
    'watch',
    functools.partial(flow.watch, _guarded_trace(0.5)),
    typical=True,
    own=False,  # its optimizer is Optax's
  ),
)
