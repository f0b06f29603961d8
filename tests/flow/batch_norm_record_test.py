"""Statistics of batch norms in records, reports and verdicts."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from flax import linen as nn, nnx

import optax_ghm.nnx
from optax_ghm import flow
from optax_ghm.linen import BatchNorm

HEALTHY = {'mean_to_std': 1.0, 'mean_drift': 0.1, 'std_drift': 0.1}


def stats(**numbers):
  columns = ('mean_to_std', 'mean_drift', 'std_drift', 'clipped', 'constant')
  values = {**dict.fromkeys(columns, 0.0), **HEALTHY, **numbers}
  return flow.BatchNormStats(
    jnp.stack([jnp.asarray(values[c], jnp.float32) for c in columns], axis=-1)
  )


def recorded(steps=12, **norms):
  record = flow.Record()
  for step in range(steps):
    record.add(step, batch_norm={n: {'stats': s} for n, s in norms.items()})
  return record


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


def test_steps_without_them_have_nan():
  record = flow.Record()
  record.add(0, loss=1.0)
  record.add(1, batch_norm={'a': stats()})
  assert np.isnan(record.batch_norm_stats['mean_drift'][0]).all()
  assert not np.isnan(record.batch_norm_stats['mean_drift'][1]).any()
  assert flow.Record().batch_norm_stats['clipped'].shape == (0, 0)


def test_a_stack_of_them_has_a_row_each():
  record = recorded(
    1, blocks=flow.BatchNormStats(jnp.arange(15.0).reshape(3, 5))
  )
  assert record.batch_norms == ('blocks[0]', 'blocks[1]', 'blocks[2]')
  assert record.batch_norm_stats['constant'].tolist() == [[4, 9, 14]]


def test_they_are_saved_and_loaded(tmp_path):
  record = recorded(a=stats(mean_drift=0.25))
  record.save(tmp_path / 'run.npz')
  loaded = flow.Record.load(tmp_path / 'run.npz')
  assert loaded.batch_norms == ('a',)
  for name, values in record.batch_norm_stats.items():
    np.testing.assert_array_equal(loaded.batch_norm_stats[name], values)


def test_anything_else_is_refused():
  with pytest.raises(ValueError, match='batch_norm must be a tree of'):
    flow.Record().add(0, batch_norm={'a': jnp.zeros(5)})


def test_what_a_linen_step_leaves_is_named_by_the_module():
  model = nn.Sequential([nn.Dense(3), BatchNorm(False)])
  x = jax.random.normal(jax.random.key(0), (8, 2))
  variables = model.init(jax.random.key(1), x)
  _, updated = model.apply(
    variables, x, mutable=['batch_stats', 'batch_norm_stats']
  )
  record = flow.Record()
  record.add(0, batch_norm=updated['batch_norm_stats'])
  assert record.batch_norms == ('layers_1',)
  single = BatchNorm(False)
  _, updated = single.apply(single.init(jax.random.key(1), x), x, mutable=True)
  record = flow.Record()
  record.add(0, batch_norm=updated['batch_norm_stats'])
  assert record.batch_norms == ('',)


def test_what_an_nnx_step_leaves_is_named_by_the_module():
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(
    nnx.Linear(2, 3, rngs=rngs),
    optax_ghm.nnx.BatchNorm(3, measure=True, rngs=rngs),
  )
  model(jax.random.normal(jax.random.key(0), (8, 2)))
  record = flow.Record()
  record.add(0, batch_norm=nnx.state(model, optax_ghm.nnx.BatchNormStats))
  assert record.batch_norms == ('layers/1',)
  assert record.batch_norm_stats['mean_to_std'][0, 0] > 0


def test_healthy_batches_get_no_verdict():
  assert flow.diagnose(recorded(a=stats(), b=stats())) == []


@pytest.mark.parametrize(
  ('column', 'value', 'kind'),
  [
    ('constant', 0.6, 'constant features'),
    ('mean_drift', 0.6, 'running averages'),
    ('std_drift', 0.6, 'running averages'),
  ],
)
def test_what_is_odd_is_said(column, value, kind):
  record = recorded(good=stats(), bad=stats(**{column: value}))
  (verdict,) = flow.diagnose(record)
  assert (verdict.kind, verdict.layers) == (kind, ('bad',))
  assert verdict.since == 0
  assert '{' not in verdict.evidence
  # Neither at the limit, nor of too few steps.
  assert flow.diagnose(recorded(bad=stats(**{column: 0.5}))) == []
  assert flow.diagnose(recorded(9, bad=stats(**{column: value}))) == []


def test_a_verdict_says_since_when():
  record = recorded(10, a=stats())
  for step in range(10, 40):
    record.add(step, batch_norm={'a': stats(constant=0.9)})
  (verdict,) = flow.diagnose(record)
  assert verdict.since == 10


def test_a_short_oddity_is_none():
  record = recorded(15, a=stats())
  for step in range(15, 20):
    record.add(step, batch_norm={'a': stats(constant=0.9)})
  assert flow.diagnose(record) == []


def test_the_report_has_a_table_of_them():
  console = rich.console.Console(file=io.StringIO(), width=100)
  flow.print_report(recorded(3, norm_of_a=stats(mean_to_std=123.0)), console)
  text = console.file.getvalue()
  assert 'batch normalization' in text
  assert 'norm_of_a' in text
  assert '1.2e+02' in text
