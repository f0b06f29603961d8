"""What is exported for any batch size computes what it does without."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export

import optax_ghm as ghm
from optax_ghm import calibration, flow, harmonization
from tests.laws.modes_test import CASES, Case, assert_close, given
from tests.support.oracles_harmonization import published
from tests.support.public import public_names
from tests.support.registry import ENTRIES

PROGRAMS = 110

OF_FIXED_SIZE = {entry.name for entry in ENTRIES} | {
  'harmony_weights',  # with ExactDensity among the densities
  'soft_neighborhood_density',  # which goes over blocks of examples
  'nnx.InBackward',  # whose state is made for so many examples
}


def any_batch(of):
  (size,) = export.symbolic_shape(of)
  return jax.tree.map(
    lambda u: jax.ShapeDtypeStruct((size, *u.shape[1:]), u.dtype), given()
  )


def exported(f, of='2 * b'):
  return export.export(jax.jit(f))(any_batch(of))


def _densities(given):
  g = jax.nn.sigmoid(given.x)
  return [
    ghm.harmony_weights(
      g, weighting=published(density), mask=given.mask[:, None]
    )
    for density in (
      ghm.BinnedDensity(bins=4, momentum=0.5),
      harmonization.MMDetectionDensity(),
      ghm.WindowedDensity(cells=16, width=0.2),
    )
  ]


def _cotangents(given):
  """The batch is in the state's norms and sizes, and in what is averaged."""

  def gradients(tx):
    rule = ghm.in_backward(tx)
    state = rule.init(given.x)
    return jax.grad(
      lambda x, state: jnp.sum(jnp.square(rule(x, state))), argnums=(0, 1)
    )(given.x, state)

  by_norm = ghm.harmonize(given.x, axis=0)
  return by_norm, [
    gradients(tx)
    for tx in (
      ghm.clip_by_zscore(scope='leaf', warmup_steps=1),
      ghm.clip_by_rms(0.5, scope=ghm.Groups('all')),
      ghm.clip_by_rms(0.5, scope='unit'),
      ghm.standardize(),
    )
  ]


def _of_examples(given):
  grads = {'kernel': given.x, 'bias': given.x[:, 0]}
  params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads)
  norms = jnp.abs(given.x[:, 0])
  return [
    tx.update(grads, tx.init(params), params, mask=given.mask)
    for tx in (ghm.harmonized_aggregate(), ghm.noise_scale_aggregate(2))
  ] + [calibration.gradient_noise(norms, norms[0], 2)]


def _step(given):
  """Of training, with all that a user may have in it."""
  tx = flow.watch(ghm.calibrated(optax.sgd(0.1, 0.9)))

  def loss(params):
    x, _ = ghm.batch_norm(given.x @ params['kernel'], mask=given.mask[:, None])
    return jnp.mean(ghm.softmax_ghm_loss_with_integer_labels(x, given.labels))

  params = {'kernel': jnp.eye(2, dtype=jnp.float32)}
  value, grads = jax.value_and_grad(loss)(params)
  updates, state = tx.update(grads, tx.init(params), params, value=value)
  return optax.apply_updates(params, updates), state


OWN = [
  Case('densities', _densities),
  Case('cotangents', _cotangents),
  Case('gradients of examples', _of_examples),
  Case('training step', _step),
]


@pytest.mark.parametrize(
  'case',
  OWN
  + [
    case
    for case in CASES
    if not case.on_host and not OF_FIXED_SIZE & set(case.names.split())
  ],
  ids=lambda case: case.names.split()[-1],
)
def test_exports_are_for_every_batch_size(case):
  assert_close(jax.jit(exported(case.f).call)(given()), case.expected)


@pytest.mark.parametrize(
  ('f', 'message'),
  [
    (
      lambda given: ghm.ghost_batch_norm(given.x, ghost_size=2),
      'ghost_size must divide the b examples',
    ),
    (
      lambda given: ghm.harmony_weights(
        given.x, weighting=published(harmonization.ExactDensity())
      ),
      'use WindowedDensity to export',
    ),
  ],
)
def test_what_needs_to_know_the_size_says_so(f, message):
  with pytest.raises(ValueError, match=message):
    exported(f, 'b')


def test_every_type_of_our_states_can_be_registered():
  """It is a named tuple that is public, so that exports keep the tree."""
  kinds = {
    name: value
    for name, value in public_names().items()
    if isinstance(value, type) and hasattr(value, '_fields')
  }
  for name, kind in {'optax.EmptyState': optax.EmptyState, **kinds}.items():
    export.register_namedtuple_serialization(kind, serialized_name=name)
  params = {'kernel': jnp.eye(2, dtype=jnp.float32)}
  wrappers = ghm.calibrated, ghm.skip_spikes, flow.watch
  states = [
    *(entry.tx.init(params) for entry in ENTRIES if entry.own),
    *(wrap(optax.identity()).init(params) for wrap in wrappers),
    ghm.in_backward(ghm.clip_by_zscore()).init(params),
    ghm.RunningMoments.init((2,)),
    ghm.BinnedDensity(bins=2).init(),
    flow.Taps.empty(['layer']).stats,
  ]
  saved = export.export(jax.jit(lambda states: states))(states).serialize()
  types = jax.tree.structure(((states,), {}))
  assert export.deserialize(saved).in_tree == types
