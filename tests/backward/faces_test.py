"""The Flax faces train as the plain function does."""

import functools

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
from tests.support.oracles_harmonization import published

DENSITY = optax_ghm.WindowedDensity(width=0.2, cells=64, momentum=0.9)
REDUCTION = 16 / 2**0.5
TX = optax.sgd(0.5, momentum=0.9)
TX_BACKWARD = optax.chain(optax.scale(0.5), optax.trace(0.9))
MOMENTUM = optax_ghm.in_backward(TX_BACKWARD)
STEPS = 3

_rng = np.random.default_rng(0)
X = _rng.normal(size=(16, 4)).astype(np.float32)
Y = _rng.integers(0, 3, size=16)


def cross_entropy(logits):
  return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def harmonize(logits, state):
  return optax_ghm.harmonize(
    logits, state, weighting=published(DENSITY), reduction=REDUCTION
  )


@functools.partial(jax.jit, static_argnames='face')
def plain_training(params, face):
  """The parameters and the state of the backward pass after a few steps."""
  f = {'harmonize': harmonize, 'in_backward': MOMENTUM}[face]
  state = DENSITY.init()
  if face == 'in_backward':
    state = MOMENTUM.init(jnp.zeros((16, 3)))

  def loss(params, state):
    logits = X @ params['kernel'] + params['bias'][None]
    return cross_entropy(f(logits, state))

  opt_state = TX.init(params)
  for _ in range(STEPS):
    grads, state = jax.grad(loss, argnums=(0, 1))(params, state)
    updates, opt_state = TX.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
  return params, state


FACES = {
  'harmonize': (
    functools.partial(
      optax_ghm.linen.Harmonize,
      weighting=published(DENSITY),
      reduction=REDUCTION,
    ),
    functools.partial(
      optax_ghm.nnx.Harmonize, weighting=published(DENSITY), reduction=REDUCTION
    ),
  ),
  'in_backward': (
    functools.partial(optax_ghm.linen.InBackward, TX_BACKWARD),
    functools.partial(
      optax_ghm.nnx.InBackward,
      TX_BACKWARD,
      jax.ShapeDtypeStruct((16, 3), jnp.float32),
    ),
  ),
}
each_face = pytest.mark.parametrize('face', FACES)


def assert_as_plain(start, params, state, face):
  expected, expected_state = plain_training(start, face)
  chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(state, expected_state, rtol=1e-5, atol=1e-5)


@functools.cache
def linen_model(face):
  """The model and its first variables."""
  model = nn.Sequential([nn.Dense(3), FACES[face][0]()])
  return model, jax.jit(model.init)(jax.random.key(0), X)


def state_of(tree, face):
  """The state of the one module with a state."""
  kind = harmonization.DensityState
  if face == 'in_backward':
    kind = optax_ghm.backward.InBackwardState
  (state,) = jax.tree.leaves(
    tree[OVERWRITE_WITH_GRADIENT], is_leaf=lambda s: isinstance(s, kind)
  )
  return state


@each_face
def test_linen_trains_with_a_train_state_and_in_a_plain_loop(face):
  model, start = linen_model(face)

  @jax.jit
  def trainings(variables):
    def grad(variables):
      return jax.grad(lambda v: cross_entropy(model.apply(v, X)))(variables)

    state = TrainState.create(apply_fn=model.apply, params=variables, tx=TX)
    opt_state = TX.init(variables['params'])
    for _ in range(STEPS):
      state = state.apply_gradients(grads=grad(state.params))
      variables, opt_state = optax_ghm.apply_gradients(
        TX, grad(variables), opt_state, variables
      )
    return state.params, variables

  dense = 'layers_0'
  for variables in trainings(start):
    found = variables['params'][dense], state_of(variables, face)
    assert_as_plain(start['params'][dense], *found, face)


@each_face
def test_nnx_trains_with_an_optimizer(face):
  @nnx.jit
  def training():
    dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    model = nnx.Sequential(dense, FACES[face][1]())
    start = {'kernel': dense.kernel[...], 'bias': dense.bias[...]}
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    grad = optax_ghm.nnx.value_and_grad(lambda m: cross_entropy(m(X)))
    for _ in range(STEPS):
      _, grads = grad(model)
      optax_ghm.nnx.apply_gradients(optimizer, model, grads)
    after = {'kernel': dense.kernel[...], 'bias': dense.bias[...]}
    return start, after, model.layers[1].state.get_value()

  assert_as_plain(*training(), face)


def test_nnx_gradients_by_several_arguments():
  """Two models, of which one changes, an array, and keywords."""

  @jax.jit
  def program(x):
    rngs = nnx.Rngs(0)
    normed = nnx.Sequential(
      nnx.Linear(4, 3, rngs=rngs),
      nnx.BatchNorm(3, rngs=rngs),
      nnx.Dropout(0.5, rngs=rngs),
    )
    head = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), FACES['harmonize'][1]())

    def loss_fn(head, x, normed, *, scale):
      logits = head(normed(scale * x))
      return cross_entropy(logits), logits

    graphs, learning, others = zip(
      *(
        nnx.split(nnx.clone(model), optax_ghm.nnx.differentiable, ...)
        for model in (head, normed)
      ),
      strict=True,
    )

    def by_hand(head, x, normed):
      models = [
        nnx.merge(*parts, copy=True)
        for parts in zip(graphs, (head, normed), others, strict=True)
      ]
      loss, logits = loss_fn(models[0], x, models[1], scale=2.0)
      return loss, (logits, nnx.as_pure(nnx.state(models[1])))

    expected = jax.value_and_grad(by_hand, (0, 1, 2), has_aux=True)(
      learning[0], x, learning[1]
    )
    found = optax_ghm.nnx.value_and_grad(
      loss_fn, argnums=(2, 0, 1), has_aux=True
    )(head, x, normed, scale=2.0)
    return nnx.as_pure((expected, found, nnx.state(normed)))

  ((loss, (logits, after)), by), (value, grads), changed = program(X)
  chex.assert_trees_all_equal(value, (loss, logits))
  chex.assert_trees_all_equal(grads, (by[2], by[0], by[1]))
  chex.assert_trees_all_equal(changed, after)


@pytest.mark.parametrize('argnums', [nnx.DiffState(0, nnx.Param), (0, -1)])
def test_nnx_argnums_are_positions_and_filters_are_given_as_wrt(argnums):
  with pytest.raises(TypeError, match=r'counted from 0, got .* given as wrt'):
    optax_ghm.nnx.value_and_grad(cross_entropy, argnums=argnums)


def test_nnx_without_gradients_of_the_states_is_named():
  @nnx.jit
  def step():
    model = nnx.Sequential(
      nnx.Linear(4, 3, rngs=nnx.Rngs(0)), FACES['harmonize'][1]()
    )
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    _, grads = optax_ghm.nnx.value_and_grad(
      lambda m: cross_entropy(m(X)), wrt=nnx.Param
    )(model)
    optax_ghm.nnx.apply_gradients(optimizer, model, grads)

  with pytest.raises(ValueError, match='value_and_grad'):
    step()


def test_linen_scanned_and_rematted_layers_keep_a_state_each():
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      x = optax_ghm.linen.Harmonize(weighting=published(DENSITY))(
        nn.Dense(4)(x)
      )
      return x, None

  stack = nn.scan(
    nn.remat(Block),
    variable_axes={'params': 0, OVERWRITE_WITH_GRADIENT: 0},
    split_rngs={'params': True},
    length=3,
  )()

  @jax.jit
  def grads(key):
    variables = stack.init(key, X, None)
    return jax.grad(lambda v: jnp.mean(stack.apply(v, X, None)[0] ** 2))(
      variables
    )

  state = state_of(jax.device_get(grads(jax.random.key(0))), 'harmonize')
  np.testing.assert_array_equal(state.calls, [1, 1, 1])
  np.testing.assert_allclose(
    state.histogram.sum(-1) / state.evidence, [16] * 3, rtol=1e-5
  )


@each_face
def test_evaluation_and_a_step_without_gradient_keep_the_state(face):
  """The memory is no longer that of the start."""
  model, start = linen_model(face)

  @jax.jit
  def states(variables):
    def step(variables, loss):
      grads = jax.grad(loss)(variables)
      opt_state = TX.init(variables['params'])
      return optax_ghm.apply_gradients(TX, grads, opt_state, variables)[0]

    before = step(variables, lambda v: cross_entropy(model.apply(v, X)))
    after = step(
      before, lambda v: (X @ v['params']['layers_0']['kernel']).sum()
    )
    _, mutated = model.apply(before, X, mutable=True)
    kept = [state_of(tree, face) for tree in (before, after, mutated)]
    return state_of(variables, face), kept

  @nnx.jit
  def states_of_nnx():
    module = FACES[face][1]()
    before = jax.tree.map(jnp.copy, module.state.get_value())
    module(jnp.ones((16, 3)))
    return before, module.state.get_value()

  first, (before, *others) = jax.device_get(states(start))
  assert any(
    np.any(a != b)
    for a, b in zip(
      jax.tree.leaves(first), jax.tree.leaves(before), strict=True
    )
  )
  for other in others:
    chex.assert_trees_all_equal(other, before)
  chex.assert_trees_all_equal(*states_of_nnx())


def test_stateless_transformations_leave_no_variable():
  clip = optax.clip_by_global_norm(1.0)
  model = optax_ghm.linen.InBackward(clip)
  assert jax.eval_shape(model.init, jax.random.key(0), X) == {}

  @jax.jit
  def grads(x):
    modules = (
      optax_ghm.in_backward(clip),
      model.bind({}),
      optax_ghm.nnx.InBackward(clip),
    )
    return [
      jax.grad(lambda x, m=module: (m(x) ** 2).sum())(x) for module in modules
    ]

  expected, *found = grads(X)
  for actual in found:
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(
  'module',
  [
    optax_ghm.linen.Harmonize(axis_name='i'),
    optax_ghm.linen.InBackward(optax_ghm.clip_by_norm(1.0, axis_name='i')),
  ],
  ids=lambda module: type(module).__name__,
)
def test_linen_initializes_outside_of_the_axis_of_its_batch(module):
  init = functools.partial(module.init, jax.random.key(0))
  inside = jax.vmap(init, out_axes=None, axis_name='i')
  assert jax.eval_shape(init, X) == jax.eval_shape(inside, X[None])
