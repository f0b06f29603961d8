"""The Flax faces train as the plain function does."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.training.train_state import TrainState

import optax_ghm
import optax_ghm.linen
import optax_ghm.nnx
from optax_ghm import harmonization
from optax_ghm.backward import OVERWRITE_WITH_GRADIENT

DENSITY = optax_ghm.WindowedDensity(width=0.2, cells=64, momentum=0.9)
REDUCTION = 16 / 2**0.5
TX = optax.sgd(0.5, momentum=0.9)


@pytest.fixture
def data(rng):
  x = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
  return x, jnp.asarray(rng.integers(0, 3, size=16))


def cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def plain_step(params, opt_state, harmony, x, y):
  def loss(params, harmony):
    logits = x @ params['kernel'] + params['bias'][None]
    logits = optax_ghm.harmonize(
      logits, harmony, density=DENSITY, reduction=REDUCTION
    )
    return cross_entropy(logits, y)

  grads, harmony = jax.grad(loss, argnums=(0, 1))(params, harmony)
  updates, opt_state = TX.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, harmony


def plain_training(params, x, y, steps=3):
  opt_state, harmony = TX.init(params), DENSITY.init()
  for _ in range(steps):
    params, opt_state, harmony = plain_step(params, opt_state, harmony, x, y)
  return params, harmony


def linen_model():
  return nn.Sequential(
    [
      nn.Dense(3),
      optax_ghm.linen.Harmonize(density=DENSITY, reduction=REDUCTION),
    ]
  )


def test_linen_train_state(data):
  x, y = data
  model = linen_model()
  state = TrainState.create(
    apply_fn=model.apply, params=model.init(jax.random.key(0), x), tx=TX
  )
  expected, harmony = plain_training(state.params['params']['layers_0'], x, y)

  @jax.jit
  def step(state):
    grads = jax.grad(lambda v: cross_entropy(state.apply_fn(v, x), y))(
      state.params
    )
    return state.apply_gradients(grads=grads)

  for _ in range(3):
    state = step(state)
  chex.assert_trees_all_close(
    state.params['params']['layers_0'], expected, rtol=1e-5, atol=1e-6
  )
  (learned,) = jax.tree.leaves(
    state.params[OVERWRITE_WITH_GRADIENT],
    is_leaf=lambda s: isinstance(s, harmonization.DensityState),
  )
  chex.assert_trees_all_close(learned, harmony, rtol=1e-5, atol=1e-5)


def test_linen_in_a_plain_optax_loop(data):
  x, y = data
  model = linen_model()
  variables = model.init(jax.random.key(0), x)
  expected, _ = plain_training(variables['params']['layers_0'], x, y)
  opt_state = TX.init(variables['params'])
  grad = jax.jit(jax.grad(lambda v: cross_entropy(model.apply(v, x), y)))
  for _ in range(3):
    variables, opt_state = optax_ghm.apply_gradients(
      TX, grad(variables), opt_state, variables
    )
  chex.assert_trees_all_close(
    variables['params']['layers_0'], expected, rtol=1e-5, atol=1e-6
  )


def test_linen_scanned_and_rematted_layers_keep_a_state_each(data):
  x, _ = data

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      x = optax_ghm.linen.Harmonize(density=DENSITY)(nn.Dense(4)(x))
      return x, None

  stack = nn.scan(
    nn.remat(Block),
    variable_axes={'params': 0, OVERWRITE_WITH_GRADIENT: 0},
    split_rngs={'params': True},
    length=3,
  )()
  variables = stack.init(jax.random.key(0), x, None)
  grads = jax.grad(lambda v: jnp.mean(stack.apply(v, x, None)[0] ** 2))(
    variables
  )
  (state,) = jax.tree.leaves(
    grads[OVERWRITE_WITH_GRADIENT],
    is_leaf=lambda s: isinstance(s, harmonization.DensityState),
  )
  np.testing.assert_array_equal(state.calls, [1, 1, 1])
  np.testing.assert_allclose(
    (state.histogram.sum(-1) / state.evidence), [16] * 3, rtol=1e-5
  )


def nnx_model():
  class Model(nnx.Module):
    def __init__(self):
      self.dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      self.harmonize = optax_ghm.nnx.Harmonize(
        density=DENSITY, reduction=REDUCTION
      )

    def __call__(self, x):
      return self.harmonize(self.dense(x))

  return Model()


def test_nnx_optimizer(data):
  x, y = data
  model = nnx_model()
  start = {
    'kernel': model.dense.kernel[...],
    'bias': model.dense.bias[...],
  }
  expected, harmony = plain_training(start, x, y)
  optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    grads = nnx.grad(
      lambda m: cross_entropy(m(x), y), argnums=optax_ghm.nnx.differentiable
    )(model)
    optax_ghm.nnx.apply_gradients(optimizer, model, grads)

  for _ in range(3):
    step(model, optimizer)
  chex.assert_trees_all_close(
    {'kernel': model.dense.kernel[...], 'bias': model.dense.bias[...]},
    expected,
    rtol=1e-5,
    atol=1e-6,
  )
  chex.assert_trees_all_close(
    model.harmonize.state.get_value(), harmony, rtol=1e-5, atol=1e-5
  )


def test_nnx_without_gradients_of_the_states_is_named(data):
  x, y = data
  model = nnx_model()
  optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
  grads = nnx.grad(lambda m: cross_entropy(m(x), y))(model)
  with pytest.raises(ValueError, match='differentiable'):
    optax_ghm.nnx.apply_gradients(optimizer, model, grads)


def test_linen_keeps_a_memory_that_no_gradient_reaches(data):
  x, y = data
  model = linen_model()
  variables = model.init(jax.random.key(0), x)
  opt_state = TX.init(variables['params'])
  for enabled in (True, False):
    grads = jax.grad(
      lambda v, e=enabled: (
        (x @ v['params']['layers_0']['kernel']).sum()
        if not e
        else cross_entropy(model.apply(v, x), y)
      )
    )(variables)
    before = variables
    variables, opt_state = optax_ghm.apply_gradients(
      TX, grads, opt_state, variables
    )
  chex.assert_trees_all_equal(
    variables[OVERWRITE_WITH_GRADIENT], before[OVERWRITE_WITH_GRADIENT]
  )


def test_evaluation_changes_no_state(data):
  x, _ = data
  model = linen_model()
  variables = model.init(jax.random.key(0), x)
  _, mutated = model.apply(variables, x, mutable=True)
  chex.assert_trees_all_equal(
    mutated[OVERWRITE_WITH_GRADIENT], variables[OVERWRITE_WITH_GRADIENT]
  )
  nnx_twin = nnx_model()
  before = jax.tree.map(jnp.copy, nnx_twin.harmonize.state.get_value())
  nnx_twin(x)
  chex.assert_trees_all_equal(nnx_twin.harmonize.state.get_value(), before)


# Any Optax transformation, as a module.


TX_BACKWARD = optax.chain(optax.scale(0.5), optax.trace(0.9))


def plain_momentum(params, x, y, steps=3):
  """Training with momentum in the backward pass, at the logits."""
  identity = optax_ghm.in_backward(TX_BACKWARD)
  opt_state, state = TX.init(params), identity.init(jnp.zeros((16, 3)))

  @jax.jit
  def grad(params, state):
    def loss(params, state):
      logits = x @ params['kernel'] + params['bias'][None]
      return cross_entropy(identity(logits, state), y)

    return jax.grad(loss, argnums=(0, 1))(params, state)

  for _ in range(steps):
    grads, state = grad(params, state)
    updates, opt_state = TX.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def test_linen_in_backward_trains_with_a_train_state(data):
  x, y = data
  model = nn.Sequential([nn.Dense(3), optax_ghm.linen.InBackward(TX_BACKWARD)])
  state = TrainState.create(
    apply_fn=model.apply, params=model.init(jax.random.key(0), x), tx=TX
  )
  expected, momentum = plain_momentum(state.params['params']['layers_0'], x, y)
  grad = jax.jit(jax.grad(lambda v: cross_entropy(model.apply(v, x), y)))
  for _ in range(3):
    state = state.apply_gradients(grads=grad(state.params))
  chex.assert_trees_all_close(
    state.params['params']['layers_0'], expected, rtol=1e-5, atol=1e-6
  )
  chex.assert_trees_all_close(
    state.params[OVERWRITE_WITH_GRADIENT]['layers_1']['in_backward'],
    momentum,
    rtol=1e-5,
    atol=1e-7,
  )


def test_nnx_in_backward_trains_with_an_optimizer(data):
  x, y = data
  model = nnx.Sequential(
    nnx.Linear(4, 3, rngs=nnx.Rngs(0)),
    optax_ghm.nnx.InBackward(
      TX_BACKWARD, jax.ShapeDtypeStruct((16, 3), x.dtype)
    ),
  )
  dense = model.layers[0]
  start = {'kernel': dense.kernel[...], 'bias': dense.bias[...]}
  expected, momentum = plain_momentum(start, x, y)
  optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
  grad = nnx.jit(
    nnx.grad(
      lambda m: cross_entropy(m(x), y), argnums=optax_ghm.nnx.differentiable
    )
  )
  for _ in range(3):
    optax_ghm.nnx.apply_gradients(optimizer, model, grad(model))
  chex.assert_trees_all_close(
    {'kernel': dense.kernel[...], 'bias': dense.bias[...]},
    expected,
    rtol=1e-5,
    atol=1e-6,
  )
  chex.assert_trees_all_close(
    model.layers[1].state.get_value(), momentum, rtol=1e-5, atol=1e-7
  )


def test_stateless_transformations_leave_no_variable(data):
  x, _ = data
  clip = optax.clip_by_global_norm(1.0)
  model = optax_ghm.linen.InBackward(clip)
  assert model.init(jax.random.key(0), x) == {}
  expected = jax.grad(lambda x: (optax_ghm.in_backward(clip)(x) ** 2).sum())(x)
  for module in (model.bind({}), optax_ghm.nnx.InBackward(clip)):
    actual = jax.grad(lambda x, m=module: (m(x) ** 2).sum())(x)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
