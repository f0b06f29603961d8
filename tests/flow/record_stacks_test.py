"""The layers of stacks come in the order of depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ghm import flow
from optax_ghm.linen import Tapped
from tests.support import hand_made


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    x = nn.Dense(3, name='a')(x)
    return jnp.tanh(nn.Dense(3, name='b')(x)), None


def scanned(block, length, name):
  layers = nn.scan(
    block,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    length=length,
  )
  return layers(name=name)


class TwoStacks(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(3, name='first')(x)
    x, _ = scanned(Block, 3, 'one')(x, None)
    x = nn.Dense(3, name='between')(x)
    x, _ = scanned(Block, 2, 'two')(x, None)
    return nn.Dense(2, name='head')(x)


class Outer(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    x = nn.Dense(3, name='before')(x)
    x, _ = scanned(Block, 2, 'inner')(x, None)
    return nn.Dense(3, name='after')(x), None


class TwoLevels(nn.Module):
  @nn.compact
  def __call__(self, x):
    x, _ = scanned(Outer, 2, 'outer')(x, None)
    return nn.Dense(2, name='head')(x)


ROWS_OF_TWO_STACKS = [
  'first',
  *(f'one/{name}[{i}]' for i in range(3) for name in 'ab'),
  'between',
  *(f'two/{name}[{i}]' for i in range(2) for name in 'ab'),
  'head',
]
ROWS_OF_TWO_LEVELS = [
  *(
    name
    for i in range(2)
    for name in (
      f'outer/before[{i}]',
      *(f'outer/inner/{k}[{i}][{j}]' for j in range(2) for k in 'ab'),
      f'outer/after[{i}]',
    )
  ),
  'head',
]


def is_dense(name, module):
  del name
  return isinstance(module, nn.Dense)


@pytest.mark.parametrize(
  ('tapped', 'rows'),
  [
    (Tapped(TwoStacks()), ROWS_OF_TWO_STACKS),
    (Tapped(TwoStacks(), where=is_dense), ROWS_OF_TWO_STACKS),
    (Tapped(TwoLevels()), ROWS_OF_TWO_LEVELS),
  ],
)
def test_stacks_come_in_the_order_of_depth(tapped, rows):
  @jax.jit
  def measure(x):
    variables = tapped.model.init(jax.random.key(0), x)
    empty_taps = tapped.init(variables, x)
    return jax.grad(
      lambda taps: jnp.sum(jnp.sin(tapped.apply(variables, x, taps=taps)))
    )(empty_taps)

  x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  with jax.numpy_rank_promotion('allow'):
    found = measure(x)
  record = flow.Record()
  record.add(0, taps=found)
  dense = [layer.name for layer in record.layers if layer.kind == 'Dense']
  assert dense == rows
  norms = record.layer_stats['norm'][0]
  for layer, norm in zip(record.layers, norms, strict=True):
    name, *at = layer.name.replace(']', '').split('[')
    own = np.asarray(found[name].numbers)[tuple(map(int, at))]
    expected = flow.TapStats(own.astype(float)).norm
    np.testing.assert_allclose(norm, expected, rtol=1e-6)
  assert len(set(norms)) > 10


def test_names_that_begin_alike_are_different_stacks():
  layers = [flow.Layer(n) for n in ('lay', 'layer', 'layer/x', 'layers')]
  block = flow.TapStats(np.ones((2, len(hand_made.NUMBERS)), 'f'))
  record = flow.Record()
  record.add(
    0, taps=flow.Taps({layer.name: block for layer in layers}, tuple(layers))
  )
  assert ' '.join(layer.name for layer in record.layers) == (
    'lay[0] lay[1] layer[0] layer/x[0] layer[1] layer/x[1] layers[0] layers[1]'
  )
