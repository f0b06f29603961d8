"""What a record accepts: a refusal at once, instead of a history lost later."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optax_ghm import flow
from tests.support.hand_made import watched


@pytest.mark.parametrize(
  ('value', 'error'),
  [
    (np.ones(1), ValueError),
    (np.ones((2, 1), np.float32), ValueError),
    (np.array(1j), TypeError),
    (np.array('0.5'), TypeError),
    (None, TypeError),
    ('0.5', TypeError),
    ([0.5], TypeError),
    ({'loss': 0.5}, TypeError),
    (1j, TypeError),
  ],
  ids=str,
)
def test_what_is_no_scalar_is_refused_by_name(value, error):
  """As netket#1967 and Automodel#1871 have it."""
  record = flow.Record()
  record.add(0, loss=1.0)
  with pytest.raises(error, match='accuracy'):
    record.add(1, loss=1.0, accuracy=value)
  assert record.steps.tolist() == [0]
  record.add(1, loss=2.0)
  assert record.scalars['loss'].tolist() == [1.0, 2.0]


def test_every_real_scalar_is_accepted():
  values = 1, 0.5, True, np.float16(1), np.int64(2), np.array(3, bool)
  values += jnp.zeros([], jnp.bfloat16), jnp.ones([], jnp.int32)
  record = flow.Record()
  for step, value in enumerate(values):
    record.add(step, loss=value)
  assert record.scalars['loss'].tolist() == [float(v) for v in values]


@pytest.mark.parametrize('step', ['0', 0.0, None])
def test_a_step_is_an_integer(step):
  with pytest.raises(TypeError):
    flow.Record().add(step, loss=1.0)


def test_a_restart_goes_on_from_an_older_step():
  written = []
  record = flow.Record(writers=[lambda step, numbers: written.append(step)])
  for step in range(5):
    record.add(step, loss=step)
  again = record.until(3)
  again.add(3, loss=-1.0)
  assert again.scalars['loss'].tolist() == [0, 1, 2, -1]
  assert record.steps.tolist() == [0, 1, 2, 3, 4]
  assert written == [0, 1, 2, 3, 4, 3]


def test_a_pickled_record_leaves_its_writers_behind():
  record = flow.Record({'w': np.ones(2)}, writers=[lambda step, numbers: None])
  record.add(0, loss=0.5)
  copy = pickle.loads(pickle.dumps(record))
  copy.add(1, loss=0.25)
  assert copy.scalars['loss'].tolist() == [0.5, 0.25]
  assert copy.leaves == record.leaves


PARAMS = {'a': np.ones(2, np.float32), 'b': np.ones((2, 2), np.float32)}


def replicated(tree, count=2):
  """As from ``pmap`` or ``vmap``; here as many as there are parameters."""
  return jax.tree.map(lambda u: np.stack([u] * count), tree)


def test_one_of_several_optimizer_states_is_asked_for():
  record, state = flow.Record(PARAMS), watched({}, {})
  with pytest.raises(ValueError, match=r'\(2,\).*lambda x: x\[0\], opt_state'):
    record.add(0, opt_state=replicated(state))
  one = jax.tree.map(lambda x: x[0], replicated(state))
  record.add(0, opt_state=one)
  assert record.leaf_stats['gradient_norm'].tolist() == [[1, 1]]
  with pytest.raises(ValueError, match='nnx.Optimizer'):
    record.add(1, opt_state=[])


def test_members_of_an_ensemble_are_no_layers():
  """A vmapped step would be read as a stack of layers."""
  every = replicated(flow.Taps.empty(['first', 'second']), 3)
  with pytest.raises(ValueError, match=r'first has leading axes \(3,\)'):
    flow.Record().add(0, taps=every)
  record = flow.Record()
  record.add(0, taps=jax.tree.map(lambda x: x[0], every))
  assert [layer.name for layer in record.layers] == ['first', 'second']


def test_the_parameters_of_an_nnx_model_are_asked_for():
  model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
  with pytest.raises(TypeError, match=r'nnx.state\(model, nnx.Param\)'):
    flow.Record(model)
  record = flow.Record(nnx.state(model, nnx.Param))
  assert [leaf.name for leaf in record.leaves] == ['bias', 'scale']
