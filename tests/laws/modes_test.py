"""Every public name under every mode of JAX, on numbers of every size."""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from jax.experimental import checkify

import optax_ghm as ghm
import optax_ghm.linen as ghm_linen
import optax_ghm.nnx as ghm_nnx
from optax_ghm import (
  backward,
  calibration,
  conflict,
  flow,
  harmonization,
  reversal,
)
from tests.support.oracles_harmonization import published
from tests.support.public import public_names
from tests.support.registry import ENTRIES

PROGRAMS = 245


class Given(NamedTuple):
  """What every case makes do with: four examples, of two domains."""

  x: Any  # (4, 2)
  labels: Any  # (4,), integers
  mask: Any  # (4,)


def given(scale=1.0, dtype=np.float32):
  x = np.array([[1.0, -2.0], [0.5, 0.0], [-1.0, 3.0], [2.0, 0.25]])
  return Given(
    np.asarray(scale * x, dtype),
    np.array([0, 1, 1, 0], np.int32),
    np.array([True, True, False, True]),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """One or several public names at work.

  Attributes:
    names: those that it covers.
    f: from :class:`Given` to arrays.
    on_host: whether it is not to be compiled.
    largest: numbers whose results are finite.
  """

  names: str
  f: Callable[[Given], Any]
  on_host: bool = False
  largest: float = 1e15

  @functools.cached_property
  def compiled(self):
    return self.f if self.on_host else jax.jit(self.f)

  @functools.cached_property
  def expected(self):
    return self.compiled(given())


def transformed(entry):
  """Two steps, and the state after them."""

  def f(given):
    params = {'bias': given.x[0], 'kernel': given.x + 1}
    updates = {'bias': 2 * given.x[1], 'kernel': given.x}
    if entry.per_example:
      updates = jax.tree.map(lambda u: jnp.stack([u, u / 2, 0 * u]), updates)

    def step(state, _):
      return entry.tx.update(updates, state, params)[::-1]

    return jax.lax.scan(step, entry.tx.init(params), None, length=2)

  return f


def differentiated(f):
  """Value and gradient of the sum of the first result, one by one too."""

  def total(x, given):
    result = f(given._replace(x=x))
    first = result[0] if isinstance(result, tuple) else result
    return jnp.sum(first), result

  def case(given):
    gradient, result = jax.grad(total, has_aux=True)(given.x, given)
    return result, gradient

  return case


def in_backward(f, state):
  """The gradients of x and of a state in the backward pass."""

  def case(given):
    def loss(x, state):
      return jnp.sum(jnp.square(f(x, state)))

    start = state(given.x) if callable(state) else state
    gradients = jax.grad(loss, argnums=(0, 1))(given.x, start)
    return gradients[0], ghm.overwrite_with_gradient(start, gradients[1])

  return case


def _adaptation(given):
  features, predictions = given.x, jax.nn.softmax(given.x)
  projections = reversal.multilinear_projections(jax.random.key(0), 2, 2, 3)
  return (
    ghm.domain_loss(
      features, given.labels, weights=ghm.entropy_weights(features)
    ),
    ghm.multilinear_map(features, predictions),
    ghm.randomized_multilinear_map(features, predictions, projections),
  )


def _batch_norms(given):
  x, scale = given.x, jnp.ones(2, jnp.float32)
  running = ghm.RunningMoments.init((2,), debias=True)
  y, moments = ghm.batch_norm(x, scale, mask=given.mask[:, None])
  running = running.update(moments)
  z, others = ghm.batch_renorm(x, running, scale)
  ghost, halves = ghm.ghost_batch_norm(x, ghost_size=2)
  domain, _ = ghm.domain_batch_norm(x, given.labels, num_domains=2)
  inferred = ghm.batch_norm_inference(x, running, scale)
  kernel, bias = ghm.fold_batch_norm(x, None, running)
  return (
    y + z + ghost + domain + inferred,
    kernel,
    bias,
    moments.merge(others),
    jax.tree.map(lambda u: u[None], halves).pool(axis=0),
    ghm.Moments.of(x),
    flow.batch_norm_stats(moments, running),
  )


def _densities(given):
  g = jax.nn.sigmoid(given.x)
  results = []
  for density in (
    ghm.BinnedDensity(bins=4, momentum=0.5),
    ghm.BinnedDensity(bins=4, low=1e-8, high=1e8, log=True),
    harmonization.MMDetectionDensity(momentum=0.5),
    ghm.WindowedDensity(cells=16, width=0.2),
    harmonization.ExactDensity(),
  ):
    norms = jnp.abs(given.x) if getattr(density, 'log', False) else g
    weights, state = ghm.harmony_weights(norms, weighting=published(density))
    regions, _ = density.update(norms, state, train=False)
    results += [weights, state, regions, regions.at_examples(regions.density)]
  return results


def _losses(given):
  density = ghm.WindowedDensity(cells=16, width=0.2)
  x, labels = given.x, given.labels
  options = {'weighting': ghm.HarmonyWeighting(density=density)}
  losses = [
    ghm.sigmoid_ghm_loss(x, x > 0, mask=given.mask[:, None], **options),
    ghm.sigmoid_ghm_loss_with_integer_labels(x, labels, **options),
    ghm.softmax_ghm_loss_with_integer_labels(x, labels, **options)[:, None],
    ghm.smooth_l1_ghm_loss(x, jnp.zeros_like(x), weighting=published(density)),
    ghm.authentic_smooth_l1_loss(x, jnp.zeros_like(x)),
  ]
  return sum(jnp.sum(loss) for loss in losses), losses


def _losses_with_state(given):
  density = ghm.WindowedDensity(cells=16, width=0.2, momentum=0.5)
  x, labels, state = given.x, given.labels, density.init()
  results = [
    ghm.sigmoid_ghm_loss_with_state(
      x, x > 0, state, weighting=published(density)
    ),
    ghm.sigmoid_ghm_loss_with_integer_labels_with_state(
      x, labels, state, weighting=published(density)
    ),
    ghm.softmax_ghm_loss_with_integer_labels_with_state(
      x, labels, state, weighting=published(density)
    ),
    ghm.smooth_l1_ghm_loss_with_state(
      x, jnp.zeros_like(x), state, weighting=published(density)
    ),
  ]
  return sum(jnp.sum(losses) for losses, _ in results), results


def _priors(given):
  state = ghm.ClassCounts.init(2).update(given.labels, mask=given.mask)
  state = state.update(given.x, weights=given.mask.astype(np.float32))
  counts, examples = state.counts, state.examples
  logits = ghm.adjust_logits(given.x, counts)
  logits += ghm.adjust_sigmoid_logits(given.x, counts, examples)
  return logits + ghm.prior_bias(state.frequencies)[None], state


def _dense(given):
  state = ghm.RunningPositives.init()
  loss, state = ghm.loss_per_positive(given.x, given.mask, state)
  other, state = ghm.loss_per_positive(given.x + 1, given.x, state)
  return loss + other, state


def _fork(given):
  one, other = conflict.fork(given.x)
  two, another = conflict.fork(given.x, weights=conflict.gh_plus_plus_weights)
  return jnp.stack([one - 2 * other, 3 * two - another])


METHODS = [name for name in conflict.__all__ if name.endswith('_weights')]


def _weights(given):
  """By every method, at two gradients that conflict at every scale."""
  gramian = conflict.gramian(jnp.stack([given.x[0], -given.x[1]]))
  weights = [getattr(conflict, name) for name in METHODS]
  weights += [conflict.of_unit_gradients(conflict.upgrad_weights)]
  return [method(gramian) for method in weights]


def _reconciled(given):
  def losses_fn(x):
    return {'near': jnp.sum(x**2), 'far': -jnp.sum(x)}

  rows, params = jnp.stack([given.x[0], -given.x[1]]), given.x[0]
  tx = conflict.reconciled_aggregate(2, conflict.mean_weights, decay=0.5)
  step = conflict.reconciled_value_and_grad(losses_fn)
  return tx.update(rows, tx.init(params), params), step(params)


def _scalarizers(given):
  losses, zeros = jnp.abs(given.x[:, 0]), 0 * given.x[:, 1]
  return [
    conflict.uncertainty_weighted(losses, zeros),
    conflict.geometric_mean(losses),
    conflict.smooth_tchebycheff(losses),
    conflict.famo_loss(losses, zeros),
    conflict.famo_logits_gradient(zeros, losses, losses + 1),
  ]


def _noise(given):
  noise = calibration.gradient_noise(jnp.abs(given.x[:, 0]), given.x[0, 0], 2)
  return noise, noise.noise_scale


def _attention(given):
  query = given.x.reshape(2, 2, 2, 1)  # two examples, two heads
  attended, max_logits = calibration.dot_product_attention_with_max_logits(
    query, query, query, is_causal=True
  )
  return attended, max_logits


def _linen_attention(given):
  model = nn.MultiHeadDotProductAttention(
    2, attention_fn=ghm_linen.dot_product_attention
  )
  x = given.x[None]
  variables = model.init(jax.random.key(0), x)
  return model.apply(variables, x, sow_weights=True, mutable=['intermediates'])


def _nnx_attention(given):
  model = nnx.MultiHeadAttention(
    num_heads=2,
    in_features=2,
    decode=False,
    attention_fn=ghm_nnx.dot_product_attention,
    rngs=nnx.Rngs(0),
  )
  attend = nnx.capture(model, nnx.Intermediate)
  y, max_logits = attend(given.x[None], sow_weights=True)
  return y, nnx.as_pure(max_logits)


def _schedules(given):
  steps = given.labels * 100
  return [
    jax.vmap(schedule)(steps)
    for schedule in (
      ghm.dann_reversal_schedule(100),
      ghm.dann_learning_rate_schedule(100),
      *ghm.renorm_schedules(start=5, r_end=50, d_end=70),
    )
  ]


def _apply_gradients(given):
  tx = optax.sgd(0.1)
  variables = {
    'params': given.x,
    backward.OVERWRITE_WITH_GRADIENT: ghm.BinnedDensity(bins=2).init(),
  }
  state = tx.init(given.x)
  return ghm.apply_gradients(tx, variables, state, variables)


def _taps(given):
  def loss(x, taps):
    x = flow.tap(2 * x, taps['one'])
    return jnp.sum(jnp.square(flow.tap(x, taps['two'])))

  empty_taps = flow.Taps.empty(
    ['one', 'two'], histogram=True, examples=given.x.shape[0]
  )
  stats = jax.grad(loss, argnums=1)(given.x, empty_taps).stats
  return [
    (s.norm, s.rms, s.largest, s.zeros, s.example_norms) for s in stats.values()
  ], flow.empty_tap(stack=(2,))


def _linen(module):
  def f(given):
    variables = module.init(jax.random.key(0), given.x)

    def loss(variables):
      y, changed = module.apply(variables, given.x, mutable=True)
      return jnp.sum(y * given.x), (y, changed)

    return jax.grad(loss, has_aux=True)(variables)

  return f


def _linen_domains(given):
  module = ghm_linen.DomainBatchNorm(num_domains=2, use_running_average=False)
  variables = module.init(jax.random.key(0), given.x, given.labels)
  return module.apply(variables, given.x, given.labels, mutable=True)


def _linen_tapped(given):
  model = ghm_linen.BatchNorm(use_running_average=True)
  variables = model.init(jax.random.key(0), given.x)
  tapped = ghm_linen.Tapped(model)

  def loss(taps):
    return jnp.sum(jnp.square(tapped.apply(variables, given.x, taps=taps)))

  return jax.grad(loss)(tapped.init(variables, given.x)).stats


def _linen_recalibrate(given):
  model = ghm_linen.BatchNorm(use_running_average=False)
  variables = jax.jit(model.init)(jax.random.key(0), given.x)
  apply = jax.jit(functools.partial(model.apply, mutable=['batch_stats']))
  return ghm_linen.recalibrate(apply, variables, [given.x])


def _nnx(make, *args):
  def f(given):
    model = make(nnx.Rngs(0))

    def loss(model):
      y = model(given.x, *(getattr(given, name) for name in args))
      return jnp.sum(y * given.x), y

    (_, y), gradients = ghm_nnx.value_and_grad(loss, has_aux=True)(model)
    return y, nnx.as_pure(gradients), nnx.as_pure(nnx.state(model))

  return f


class Linear(nnx.Module):
  def __init__(self, rngs):
    del rngs
    self.scale = nnx.Param(jnp.ones((), jnp.float32))
    self.harmony = ghm_nnx.Harmonize(
      ghm.HarmonyWeighting(density=ghm.BinnedDensity(bins=2, momentum=0.5))
    )

  def __call__(self, x):
    return self.harmony(x * self.scale.get_value())


def _nnx_harmonize(given):
  model = Linear(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  _, gradients = ghm_nnx.value_and_grad(
    lambda model: jnp.mean(jnp.square(model(given.x)))
  )(model)
  ghm_nnx.apply_gradients(optimizer, model, gradients)
  return nnx.as_pure(nnx.state(model))


def _nnx_tapped(given):
  model, tapped = Linear(nnx.Rngs(0)), ghm_nnx.Tapped()
  empty_taps = tapped.init(model, given.x)

  def loss(model, taps):
    return jnp.sum(jnp.square(tapped.apply(model, given.x, taps=taps)))

  return nnx.grad(loss, argnums=1)(model, empty_taps).stats


def _nnx_recalibrate(given):
  model = ghm_nnx.BatchNorm(2, use_running_average=False, rngs=nnx.Rngs(0))
  ghm_nnx.recalibrate(lambda model, x: model(x), model, [given.x])
  return nnx.as_pure(nnx.state(model, nnx.BatchStat))


def _range_test(given):
  test = ghm.learning_rate_range_test(
    lambda w, x: jnp.mean(jnp.square(x @ w - 1)),
    jnp.zeros(2, given.x.dtype),
    given.x[None],
    steps=20,
    high=0.1,
  )
  return test.losses, test.gradient_norms


def _model_selection(given):
  mixed = reversal.mix_examples(jax.random.key(0), given.x, given.x)
  sums = reversal.prediction_sums(given.x, given.mask)
  ratios = reversal.density_ratios(given.x, given.x[:2], given.x)
  losses = given.x[:, 0]
  return (
    reversal.prediction_entropy(sums),
    reversal.mutual_information(sums),
    reversal.mano(sums),
    reversal.importance_weighted_risk(losses, ratios),
    reversal.deep_embedded_validation(losses, ratios),
    reversal.mixval(mixed.x, mixed),
  )


DENSITY = ghm.BinnedDensity(bins=4, momentum=0.5)
CLIPPED = ghm.in_backward(ghm.clip_by_norm(1.0))
CASES = [
  Case(
    'domain_loss entropy_weights multilinear_map multilinear_projections'
    ' randomized_multilinear_map',
    differentiated(_adaptation),
  ),
  Case(
    'prediction_sums PredictionSums prediction_entropy mutual_information mano'
    ' density_ratios importance_weighted_risk deep_embedded_validation'
    ' mix_examples MixedExamples mixval',
    _model_selection,
  ),
  Case(
    'soft_neighborhood_density',
    lambda given: reversal.soft_neighborhood_density(given.x, given.mask),
  ),
  Case(
    'batch_norm batch_renorm ghost_batch_norm domain_batch_norm'
    ' batch_norm_inference fold_batch_norm Moments RunningMoments'
    ' flow.batch_norm_stats flow.BatchNormStats',
    differentiated(_batch_norms),
  ),
  Case(
    'harmony_weights BinnedDensity MMDetectionDensity WindowedDensity'
    ' ExactDensity RegionDensity DensityState',
    _densities,
  ),
  Case(
    'sigmoid_ghm_loss sigmoid_ghm_loss_with_integer_labels'
    ' softmax_ghm_loss_with_integer_labels smooth_l1_ghm_loss'
    ' authentic_smooth_l1_loss HarmonyWeighting',
    differentiated(_losses),
  ),
  Case(
    'sigmoid_ghm_loss_with_state smooth_l1_ghm_loss_with_state'
    ' sigmoid_ghm_loss_with_integer_labels_with_state'
    ' softmax_ghm_loss_with_integer_labels_with_state',
    differentiated(_losses_with_state),
  ),
  Case(
    'adjust_logits adjust_sigmoid_logits prior_bias ClassCounts',
    differentiated(_priors),
  ),
  Case('loss_per_positive RunningPositives', differentiated(_dense)),
  Case('fork', differentiated(_fork)),
  Case(' '.join(['gramian', 'of_unit_gradients', *METHODS]), _weights),
  Case(
    'reconciled_aggregate reconciled_value_and_grad Reconciliation'
    ' ReconciledAggregateState',
    _reconciled,
  ),
  Case(
    'uncertainty_weighted geometric_mean smooth_tchebycheff famo_loss'
    ' famo_logits_gradient',
    _scalarizers,
  ),
  Case('gradient_noise GradientNoise', _noise),
  Case('dot_product_attention_with_max_logits', differentiated(_attention)),
  # Flax's, too, makes NaN of logits that are larger.
  Case('linen.dot_product_attention', _linen_attention, largest=1e3),
  Case('nnx.dot_product_attention', _nnx_attention, largest=1e3),
  Case(
    'dann_reversal_schedule dann_learning_rate_schedule renorm_schedules',
    _schedules,
  ),
  Case(
    'reverse_gradient',
    differentiated(lambda given: ghm.reverse_gradient(given.x, 0.5)),
  ),
  Case(
    'harmonize overwrite_with_gradient',
    in_backward(
      lambda x, state: ghm.harmonize(x, state, weighting=published(DENSITY)),
      DENSITY.init(),
    ),
  ),
  Case(
    'in_backward InBackward InBackwardState',
    in_backward(CLIPPED, CLIPPED.init),
  ),
  Case('apply_gradients', _apply_gradients),
  Case('flow.tap flow.empty_tap flow.Taps flow.TapStats', _taps),
  Case(
    'learning_rate_range_test RangeTest', _range_test, on_host=True, largest=1.0
  ),
  Case(
    'linen.BatchNorm', _linen(ghm_linen.BatchNorm(use_running_average=False))
  ),
  Case(
    'linen.BatchRenorm',
    _linen(ghm_linen.BatchRenorm(use_running_average=False)),
  ),
  Case('linen.DomainBatchNorm', _linen_domains),
  Case('linen.GradientReversal', _linen(ghm_linen.GradientReversal())),
  Case('linen.Harmonize', _linen(ghm_linen.Harmonize(published(DENSITY)))),
  Case('linen.InBackward', _linen(ghm_linen.InBackward(ghm.clip_by_norm(1.0)))),
  Case('linen.Tapped', _linen_tapped),
  Case('linen.recalibrate', _linen_recalibrate, on_host=True),
  Case(
    'nnx.BatchNorm nnx.BatchNormStats',
    _nnx(lambda rngs: ghm_nnx.BatchNorm(2, rngs=rngs)),
  ),
  Case('nnx.BatchRenorm', _nnx(lambda rngs: ghm_nnx.BatchRenorm(2, rngs=rngs))),
  Case(
    'nnx.DomainBatchNorm',
    _nnx(
      lambda rngs: ghm_nnx.DomainBatchNorm(2, num_domains=2, rngs=rngs),
      'labels',
    ),
  ),
  Case('nnx.GradientReversal', _nnx(lambda rngs: ghm_nnx.GradientReversal())),
  Case(
    'nnx.Harmonize nnx.apply_gradients nnx.OverwriteWithGradient'
    ' nnx.differentiable nnx.value_and_grad',
    _nnx_harmonize,
  ),
  Case(
    'nnx.InBackward',
    _nnx(
      lambda rngs: ghm_nnx.InBackward(
        ghm.clip_by_norm(1.0), jnp.ones((4, 2), jnp.float32)
      )
    ),
  ),
  Case('nnx.Tapped', _nnx_tapped),
  Case('nnx.recalibrate', _nnx_recalibrate, on_host=True),
]
PROTOCOLS = {'DensityEstimator', 'PercentileEstimator'}
ON_HOST = {
  'flow.DepthProfile',
  'flow.Layer',
  'flow.Leaf',
  'flow.Record',
  'flow.Verdict',
  'flow.depth_profile',
  'flow.diagnose',
  'flow.figure',
  'flow.json_lines_writer',
  'flow.leaf_names',
  'flow.mlflow_writer',
  'flow.print_report',
  'flow.tensorboard_writer',
  'flow.wandb_writer',
  'flow.write_markdown',
  'flow.write_page',
}
"""These compute with NumPy alone."""
OF_TRANSFORMATIONS = {
  'CalibratedState',
  'ClipState',
  'GeometricQuantile',
  'Groups',
  'HarmonizedAggregateState',
  'NoiseScaleState',
  'NormAverage',
  'NormMoments',
  'NormalizeState',
  'PastNorms',
  'QKClipState',
  'QuantileEstimate',
  'RecentSteps',
  'SkipState',
  'SpikeWindow',
  'Units',
  'WindowPercentile',
  'flax_qk_powers',
  'flax_unit_axes',
  'flow.WatchState',
}
"""These come with the transformations of the registry."""
CASES += [Case(entry.name, transformed(entry)) for entry in ENTRIES[1:]]
ELSEWHERE = PROTOCOLS | ON_HOST | OF_TRANSFORMATIONS

# What stands for 'not known yet' in their states and results.
HOLDS_INF = (
  'calibrated',
  'clip',
  'gradient_noise',
  'harmony_weights',
  'in_backward',
  'linen.InBackward',
  'nnx.InBackward',
  'noise_scale',
  'skip_spikes',
)

each_case = pytest.mark.parametrize(
  'case', CASES, ids=lambda case: case.names.split()[-1]
)


def test_every_public_name_has_a_case():
  public = set()
  for path, value in public_names().items():
    _, *package, name = path.split('.')
    if not callable(value) or typing.get_origin(value):
      continue
    if package and package[0] in ('flow', 'linen', 'nnx'):
      name = f'{package[0]}.{name}'
    public.add(name)
  covered = {name for case in CASES for name in case.names.split()}
  assert not covered & ELSEWHERE
  covered = {name.replace('watch', 'flow.watch') for name in covered}
  assert public <= covered | ELSEWHERE
  assert covered - {entry.name for entry in ENTRIES} <= public | {'flow.watch'}


def assert_close(actual, expected, rtol=1e-5):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, one), other in zip(
    jax.tree_util.tree_leaves_with_path(actual),
    jax.tree.leaves(expected),
    strict=True,
  ):
    np.testing.assert_allclose(
      one, other, rtol=rtol, atol=rtol, err_msg=jax.tree_util.keystr(path)
    )


def every_type(jaxpr):
  """Of all that is computed, also within."""
  for equation in jaxpr.eqns:
    yield from (var.aval for var in equation.outvars)
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from every_type(inner)


@each_case
def test_64_bits_change_no_float32(case):
  """Nor does anything on the way become wider."""
  with jax.enable_x64(True):
    if case.on_host:
      actual = case.f(given())
      assert_close(actual, case.expected)
    else:
      jaxpr = jax.make_jaxpr(case.f)(given())
      wide = [
        kind
        for kind in every_type(jaxpr.jaxpr)
        if kind.dtype == np.float64 and kind.ndim
      ]
      assert not wide
      assert all(kind.dtype.itemsize < 8 for kind in jaxpr.out_avals)


IN_FLOAT64 = {
  'adjust_logits': lambda given: ghm.adjust_logits(given.x, jnp.arange(2)),
  'authentic_smooth_l1_loss': lambda given: ghm.authentic_smooth_l1_loss(
    given.x, jnp.zeros_like(given.x)
  ),
  'Moments.of': lambda given: ghm.Moments.of(given.x)[1:],
  'batch_norm': lambda given: ghm.batch_norm(given.x, epsilon=0.0)[0],
  'batch_norm_inference': lambda given: ghm.batch_norm_inference(
    given.x,
    ghm.RunningMoments(given.x[0], jnp.square(given.x[1]) + 1, given.x[0]),
  ),
  'gramian': lambda given: conflict.gramian(given.x),
  'upgrad_weights': lambda given: conflict.upgrad_weights(
    conflict.gramian(given.x * jnp.array([[1.0], [2.0], [1.0], [1.0]]))
  ),
  'domain_loss': lambda given: ghm.domain_loss(given.x, given.labels),
  'entropy_weights': lambda given: ghm.entropy_weights(given.x),
  'smooth_l1_ghm_loss': lambda given: ghm.smooth_l1_ghm_loss(
    given.x, jnp.zeros_like(given.x), weighting=ghm.GHM
  ),
}


@pytest.mark.parametrize('name', IN_FLOAT64)
def test_float64_is_computed_in_float64(name):
  """What float32 loses of numbers that it cannot hold is there."""
  f = jax.jit(IN_FLOAT64[name])
  with jax.enable_x64(True):
    one, other = f(given(1.0, np.float64)), f(given(1 + 1e-12, np.float64))
    for u, v in zip(*map(jax.tree.leaves, (one, other)), strict=True):
      assert u.dtype == np.float64
      np.testing.assert_allclose(u, v, rtol=1e-10)
      invariant = name == 'batch_norm'  # to scale
      assert invariant or (u != v).any()
  assert_close(one, f(given()))


@each_case
def test_results_of_finite_numbers_are_no_nan_and_not_infinite(case):
  known = not any(name.startswith(HOLDS_INF) for name in case.names.split())
  for scale in (1.0, 0.0, 1e-38, case.largest):
    for leaf in jax.tree.leaves(case.compiled(given(scale))):
      if np.issubdtype(leaf.dtype, np.inexact):
        assert not np.isnan(leaf).any()
        assert scale != 1 or not known or np.isfinite(leaf).all()


@pytest.mark.parametrize(
  'case',
  [case for case in CASES if not case.on_host],
  ids=lambda case: case.names.split()[-1],
)
def test_no_number_on_the_way_is_nan(case):
  """Nor where it is chosen away."""
  checked = jax.jit(checkify.checkify(case.f, errors=checkify.nan_checks))
  for scale in (1.0, 0.0):
    error, _ = checked(given(scale))
    error.throw()


@each_case
def test_no_tracer_leaks(case):
  with jax.checking_leaks():
    if case.on_host:
      assert_close(case.f(given()), case.expected)
    else:
      jax.jit(case.f).trace(given())


@pytest.mark.parametrize('partitionable', [False, True])
def test_keys_of_both_kinds_draw_the_same(partitionable):
  with jax.threefry_partitionable(partitionable):
    drawn, same = (
      reversal.multilinear_projections(make(0), 2, 2, 3)
      for make in (jax.random.key, jax.random.PRNGKey)
    )
  assert_close(drawn, same, rtol=0)
