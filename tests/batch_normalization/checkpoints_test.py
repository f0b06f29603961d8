"""Modules whose checkpoint is one of Flax, which keeps mean and var alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import optax_ghm.linen
import optax_ghm.nnx
from tests.support.faces_batch_norm import both, face_of, widening

KINDS = {
  'debias': ('BatchNorm', {'debias': True}),
  'schedule': ('BatchRenorm', {'r_max': widening, 'd_max': 1.0}),
}
MEAN, VAR = np.float32([1.0, 2.0, 3.0]), np.float32([4.0, 9.0, 0.25])
CHECKPOINT = {
  'params': {'scale': np.ones(3, 'f'), 'bias': np.zeros(3, 'f')},
  'batch_stats': {'mean': MEAN, 'var': VAR},
}


@pytest.mark.parametrize('kind', KINDS)
def test_linen_evaluates_and_goes_on_where_flax_was(kind, x):
  module, options = KINDS[kind]
  norm = getattr(optax_ghm.linen, module)(momentum=0.9, **options)

  @jax.jit
  def program(x):
    _, updated = norm.apply(CHECKPOINT, x, False, mutable=['batch_stats'])
    return (
      norm.apply(CHECKPOINT, x, True),
      norm.apply(CHECKPOINT, x, False, update_running_average=False),
      updated['batch_stats'],
      nn.BatchNorm().apply(CHECKPOINT, x, True),
      nn.BatchNorm(momentum=0.9).apply(
        CHECKPOINT, x, False, mutable=['batch_stats']
      )[1]['batch_stats'],
    )

  y, by_batch, stats, expected, of_flax = program(x)
  np.testing.assert_allclose(y, expected, rtol=1e-5)
  assert np.isfinite(by_batch).all()
  if kind == 'debias':  # the averages of a checkpoint are of batches alone
    np.testing.assert_array_equal(stats.pop('weight'), np.ones(3))
  else:
    assert stats.pop('steps') == 1
  chex.assert_trees_all_close(stats, of_flax, rtol=1e-5)


@both
@pytest.mark.parametrize('train', [True, False])
def test_averages_of_no_domain_are_named_and_can_be_repeated(name, train, x):
  face = face_of(name, 'DomainBatchNorm', num_domains=2)
  call = {'use_running_average': not train}
  domain = np.arange(len(x)) % 2
  match = r'mean .*\(3,\).* 2 domains .*\(2, 3\): repeat'
  with pytest.raises(ValueError, match=match):
    jax.eval_shape(lambda x: face(CHECKPOINT, x, domain, **call), x)
  repeated = jax.tree.map(
    lambda u: jnp.stack([u] * 2), CHECKPOINT['batch_stats']
  )
  y, _ = jax.jit(lambda v, x: face(v, x, domain, **call))(
    CHECKPOINT | {'batch_stats': repeated}, x
  )
  if not train:
    expected = (x - MEAN) / np.sqrt(VAR + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_nnx_goes_on_once_the_weight_is_1(x):
  @jax.jit
  def program(x):
    plain, norm = (
      optax_ghm.nnx.BatchNorm(3, debias=debias, rngs=nnx.Rngs(0))
      for debias in (False, True)
    )
    plain.mean.set_value(MEAN)
    nnx.update(norm, nnx.state(plain))  # it has no weight
    norm.weight.set_value(jnp.ones(3))
    plain(x), norm(x)
    return plain.mean.get_value(), norm.mean.get_value()

  np.testing.assert_array_equal(*program(x))
