"""Under ``pmap`` and ``shard_map``, spikes are left out by all or by none."""

import jax
import numpy as np
import optax
import pytest

import optax_ghm

PARAMS = {'w': np.ones((2, 2), np.float32), 'none': None}
DIRECTION = np.array([[0.6, -0.8], [0.0, 0.0]], np.float32)


@pytest.mark.parametrize('mapped', ['pmap', 'unchecked', 'checked'])
def test_devices_with_losses_of_their_own_decide_together(mapped):
  """One device meets bad losses: all of them leave out these steps."""
  tx = optax_ghm.skip_spikes(
    optax.sgd(0.5),
    window=optax_ghm.SpikeWindow(length=16),
    axis_name='batch',
  )
  losses = np.random.default_rng(0).normal(2.0, 0.1, (24, 4))
  losses[[17, 20], 3] = 1e3, np.nan

  def run(losses):
    def step(state, loss):
      grads = {'w': DIRECTION, 'none': None}
      updates, state = tx.update(grads, state, PARAMS, value=loss)
      return state, updates['w']

    return jax.lax.scan(step, tx.init(PARAMS), losses.reshape(24))

  if mapped == 'pmap':
    run = jax.pmap(run, 'batch', in_axes=1, devices=jax.devices()[:4])
    state, updates = jax.tree.map(lambda u: u[0], run(np.float32(losses)))
  else:
    state, updates = jax.jit(
      jax.shard_map(
        run,
        mesh=jax.sharding.Mesh(jax.devices()[:4], ('batch',)),
        in_specs=jax.P(None, 'batch'),
        out_specs=jax.P(),
        check_vma=mapped == 'checked',
      )
    )(np.float32(losses))
  state, updates = jax.device_get((state, updates))
  left_out = ~updates.any((1, 2))
  assert np.flatnonzero(left_out).tolist() == [17, 20] and state.skipped == 2
  means = losses[~left_out].mean(1)
  np.testing.assert_allclose(
    np.sort(state.recent_values.values), np.sort(means[-16:]), rtol=1e-5
  )


def test_a_loss_that_differs_between_devices_is_named():
  tx = optax_ghm.skip_spikes(optax.sgd(0.5))

  def run(losses):
    grads = {'w': DIRECTION, 'none': None}
    return tx.update(grads, tx.init(PARAMS), PARAMS, value=losses[0])

  mesh = jax.sharding.Mesh(jax.devices()[:2], ('batch',))
  specs = dict(in_specs=jax.P('batch'), out_specs=jax.P())
  with pytest.raises(ValueError, match="'batch'.*give skip_spikes"):
    jax.shard_map(run, mesh=mesh, **specs)(np.ones(2, np.float32))
