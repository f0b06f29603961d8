"""What counts on an accelerator, in one command of a few minutes.

  python benchmarks/device.py [--quick] [--only NAME] [--save NAME]

It needs JAX, Flax, Optax and ``rich``; with matplotlib, it draws a picture.
First come the laws of laws.py. Then, at the sizes of an accelerator: the losses
with up to 10 million examples, crowded in one region of the norms or spread
over all of them, and ways to count them beside the one that the library takes;
optimizer steps of 50 and 500 million parameters; batch norm; taps and a watched
optimizer on a transformer of 100 million parameters in bfloat16; a record that
must not stall the device. The quick run is small enough for a processor. See
__main__.py for the columns.
"""

import functools
import itertools
import math
from typing import Any

import batch_norm
import clipping
import flow as flow_cases
import harness
import jax
import jax.numpy as jnp
import laws
import losses
import optax
import run

from optax_ghm import flow
from optax_ghm.harmonization import _density


def crowded(size):
  """As a detector's: nearly all easy negatives, most in one region."""
  one, two = jax.random.split(jax.random.key(0))
  labels = jax.random.uniform(one, (size,)) < 0.02
  logits = jax.random.normal(two, (size,)) + jnp.where(labels, 1.0, -9.0)
  return logits, labels.astype(jnp.float32)


def spread(size):
  """Norms equally frequent over all of [0, 1]."""
  p = jax.random.uniform(jax.random.key(0), (size,), minval=1e-3, maxval=0.999)
  return jnp.log(p / (1 - p)), jnp.zeros(size)


SIGMOID = {
  name: losses.SIGMOID[name]
  for name in (
    'optax.sigmoid_binary_cross_entropy',
    losses.LIMIT,
    'optax.losses.sigmoid_focal_loss',
    'sigmoid_ghm_loss, windowed',
    'sigmoid_ghm_loss, 30 bins',
    'harmonize before optax cross-entropy',
  )
}


def sorted_and_searched(cell, cells):
  edges = jnp.searchsorted(jnp.sort(cell), jnp.arange(cells + 1))
  return jnp.diff(edges)


def counted(cells, data, size):
  """Ways to count norms of such data in so many cells."""

  def cell(size):
    logits, labels = data(size)
    norm = jnp.abs(jax.nn.sigmoid(logits) - labels)
    return ((cells * norm).astype(jnp.int32),)

  one = jnp.ones((), jnp.int32)
  programs = {
    'scatter-add': functools.partial(_density._add, amounts=one, cells=cells),
    'scatter-add to copies': functools.partial(
      _density._add_to_copies, amounts=one, cells=cells
    ),
    'sort and search': functools.partial(sorted_and_searched, cells=cells),
  }
  if cells <= 1000:
    programs['compare with each cell'] = functools.partial(
      _density._compare, amounts=one, cells=cells
    )
  return harness.Case(
    programs, functools.partial(cell, size), size, quick=size == 10**5
  )


def by_size(programs, data, sizes, limit=None):
  return harness.Growth(
    'examples',
    {
      n: harness.Case(
        programs, functools.partial(data, n), n, limit, quick=n == 10**5
      )
      for n in sizes
    },
  )


EXAMPLES = 10**5, 10**6, 10**7
OPTIMIZERS = {
  name: clipping.optimizers()[name]
  for name in (
    'optax.clip_by_global_norm',
    clipping.LIMIT,
    'the norm is taken, nothing done',
    'clip_by_norm',
    'clip_by_percentile',
    'clip_by_norm_ema of leaves',
    'clip_by_parameter_norm',
    'calibrated',
    'skip_spikes',
    'optax.apply_if_finite',
  )
}


def transformer_step(depth, width, sequences, length, quick):
  """Attention heads of 64, in bfloat16; the parameters are float32."""
  model = flow_cases.Transformer(depth, heads=width // 64, dtype=jnp.bfloat16)
  shape = sequences, length, width
  return flow_cases.case(model, shape, ('taps', 'watch'), quick)


def recording(steps, width):
  """So many training steps, after which the host waits for the device."""
  model, tx = flow_cases.Dense(20, width), optax.adamw(1e-3)
  watched = flow.watch(tx)

  def data():
    x = jax.random.normal(jax.random.key(0), (256, width))
    return x, jax.jit(model.init)(jax.random.key(1), x)

  def stepping(optimizer, every, x, params):
    def mean_square(params):
      y: Any = model.apply(params, x)
      return jnp.mean(y**2)

    @jax.jit
    def step(params, state):
      loss, grads = jax.value_and_grad(mean_square)(params)
      updates, state = optimizer.update(grads, state, params)
      return optax.apply_updates(params, updates), state, loss

    record, count = flow.Record(params), itertools.count()
    start = params, jax.jit(optimizer.init)(params)

    def call():
      carried = start
      for i in range(steps):
        *carried, loss = step(*carried)
        if every and i % every == 0:
          record.add(next(count), opt_state=carried[1], loss=loss)
      return carried

    return call

  return harness.Case(
    {
      name: harness.Eager(functools.partial(stepping, optimizer, every))
      for name, optimizer, every in (
        ('plain', tx, 0),
        ('watch', watched, 0),
        ('watch, Record.add after every 10th step', watched, 10),
        ('watch, Record.add after every step', watched, 1),
      )
    },
    data,
    elements=steps,
    limit='plain',
    quick=width < 100,
  )


def normalization(shape, dtype, quick=False):
  return batch_norm.alone(shape, jnp.dtype(dtype), reused=True, quick=quick)


def step_of(parameters, tree, quick=False):
  case = clipping.case(tree, OPTIMIZERS, quick)
  assert 0.8 < case.elements / parameters < 1.2
  return case


SUITES = {
  'count': {
    f'{name} in {cells:,} cells': harness.Growth(
      'examples', {n: counted(cells, data, n) for n in EXAMPLES}
    )
    for name, data in (('crowded', crowded), ('spread', spread))
    for cells in (35, 300, 4100)
  },
  'sigmoid': {
    name: by_size(losses.with_gradient(SIGMOID), data, EXAMPLES, losses.LIMIT)
    for name, data in (('crowded', crowded), ('spread', spread))
  },
  'softmax': {
    f'{n:,} examples, {classes} classes': harness.Case(
      losses.with_gradient(losses.SOFTMAX),
      functools.partial(losses.softmax_data, n, classes),
      n * classes,
      quick=n == 10**4,
    )
    for n, classes in ((10**4, 100), (10**5, 1000), (10**6, 100))
  },
  'optimizer': {
    '2M parameters': clipping.case(
      clipping.equal_leaves(16), OPTIMIZERS, quick=True
    ),
    '50M parameters': step_of(5e7, clipping.transformer()),
    '500M parameters': step_of(
      5e8, clipping.transformer(layers=24, width=1280, vocabulary=24_000)
    ),
  },
  'batch norm': {
    f'{dtype} {shape}': normalization(shape, dtype, math.prod(shape) < 10**6)
    for dtype in ('float32', 'bfloat16')
    for shape in ((256, 1024), (64, 56, 56, 64), (256, 56, 56, 256))
  },
  'flow': {
    'transformer, 0.2M parameters': transformer_step(2, 128, 2, 32, True),
    'transformer, 100M parameters': transformer_step(14, 768, 16, 512, False),
    '20 steps recorded, 64 wide': recording(20, 64),
    '20 steps recorded, 4,096 wide': recording(20, 4096),
  },
}

if __name__ == '__main__':
  run.main(SUITES, __doc__ or '', jax.default_backend(), laws.LAWS)
