"""Statistics of batch norms in records, reports and verdicts."""

import jax
import numpy as np
import pytest
from flax import linen as nn, nnx

import optax_ghm.nnx
from optax_ghm import flow
from optax_ghm.linen import BatchNorm
from tests.support.hand_made import record_of

X = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
HEALTHY = {'mean_to_std': 1.0, 'mean_drift': 0.1, 'std_drift': 0.1}


def stats(**numbers):
  columns = ('mean_to_std', 'mean_drift', 'std_drift', 'clipped', 'constant')
  values = {**dict.fromkeys(columns, 0.0), **HEALTHY, **numbers}
  return flow.BatchNormStats(np.array([values[c] for c in columns], 'f'))


def recorded(steps, **norms):
  step = {'batch_norm': {n: {'stats': s} for n, s in norms.items()}}
  return record_of(*[step] * steps)


def test_statistics_are_kept_by_name_and_column():
  record = recorded(3, a=stats(mean_drift=0.25), b=stats(constant=0.5))
  assert record.batch_norms == ('a', 'b')
  np.testing.assert_array_equal(
    record.batch_norm_stats['mean_drift'], np.float32([[0.25, 0.1]] * 3)
  )
  np.testing.assert_array_equal(
    record.batch_norm_stats['constant'], [[0, 0.5]] * 3
  )
  assert record.scalars['batch_norm/constant/b'].tolist() == [0.5] * 3


def test_a_step_without_them_has_nan_and_a_stack_has_a_row_each():
  stack = flow.BatchNormStats(np.arange(15, dtype='f').reshape(3, 5))
  record = record_of({'loss': 1.0}, {'batch_norm': {'blocks': stack}})
  assert record.batch_norms == ('blocks[0]', 'blocks[1]', 'blocks[2]')
  np.testing.assert_array_equal(
    record.batch_norm_stats['constant'], [[np.nan] * 3, [4, 9, 14]]
  )


def test_anything_else_is_refused():
  with pytest.raises(ValueError, match='batch_norm must be a tree of'):
    flow.Record().add(0, batch_norm={'a': np.zeros(5)})


def test_what_a_linen_step_leaves_is_named_by_the_module():
  models = nn.Sequential([nn.Dense(3), BatchNorm(False)]), BatchNorm(False)

  @jax.jit
  def stats(x):
    each = []
    for model in models:
      variables = model.init(jax.random.key(1), x)
      _, updated = model.apply(variables, x, mutable=True)
      each.append(updated['batch_norm_stats'])
    return each

  with_path, alone = stats(X)
  record = flow.Record()
  record.add(0, batch_norm=with_path)
  assert record.batch_norms == ('layers_1',)
  assert record_of({'batch_norm': alone}).batch_norms == ('',)


def test_what_an_nnx_step_leaves_is_named_by_the_module():
  @nnx.jit
  def stats(x):
    rngs = nnx.Rngs(0)
    norm = optax_ghm.nnx.BatchNorm(3, measure=True, rngs=rngs)
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), norm)
    model(x)
    return nnx.state(model, optax_ghm.nnx.BatchNormStats)

  record = flow.Record()
  record.add(0, batch_norm=stats(X))
  assert record.batch_norms == ('layers/1',)
  assert record.batch_norm_stats['mean_to_std'][0, 0] > 0


@pytest.mark.parametrize(
  ('column', 'kind', 'said'),
  [
    ('constant', 'constant features', 'at bad, more than half of the features'),
    ('mean_drift', 'running averages', 'at bad, the means of the batches'),
    ('std_drift', 'running averages', 'at bad, the standard deviations of'),
  ],
)
def test_what_is_odd_is_said(column, kind, said):
  odd = stats(**{column: 0.6})
  (verdict,) = flow.diagnose(recorded(12, good=stats(), bad=odd))
  assert (verdict.kind, verdict.layers) == (kind, ('bad',))
  assert verdict.since == 0
  assert verdict.evidence.startswith(said) and ' and ' not in verdict.evidence
  # Neither at the limit, nor of too few steps.
  assert flow.diagnose(recorded(12, a=stats(), b=stats(**{column: 0.5}))) == []
  assert flow.diagnose(recorded(9, bad=odd)) == []


@pytest.mark.parametrize(
  ('before', 'odd', 'since'), [(10, 30, 10), (15, 5, None)]
)
def test_a_verdict_says_since_when_and_a_short_oddity_is_none(
  before, odd, since
):
  good, bad = ({'batch_norm': {'a': stats(constant=u)}} for u in (0.0, 0.9))
  verdicts = flow.diagnose(record_of(*[good] * before, *[bad] * odd))
  assert [v.since for v in verdicts] == ([] if since is None else [since])
