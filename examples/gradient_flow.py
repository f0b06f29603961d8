"""Why a deep network does not learn, seen in its gradients, and four cures.

The loss of a plain network of 30 layers with Flax's default initialization does
not fall on scikit-learn's digits. Taps at all layers and a watched optimizer
show why. The network is trained again with a clip, with the initialization for
ReLUs, with skip connections (whose branches are scaled down, lest gradients
explode) and with batch normalization. One HTML page shows all of them, and a
picture shows the norms over depth.

  python examples/gradient_flow.py         # two of the five
  python examples/gradient_flow.py --full  # all of them, more steps
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import optax_ghm as ghm
from optax_ghm import flow
from optax_ghm.nnx import Tapped

mpl.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

WIDTH, CLASSES, BATCH = 64, 10, 128
HERE = pathlib.Path(__file__).parent


class Network(nnx.Module):
  """Dense layers and ReLUs, with options that are cures."""

  def __init__(
    self,
    depth: int,
    rngs: nnx.Rngs,
    kernel_init: Any = nnx.nn.linear.default_kernel_init,
    skip: bool = False,
    normalized: bool = False,
  ):
    self.skip = skip
    self.dense = nnx.List(
      nnx.Linear(WIDTH, WIDTH, kernel_init=kernel_init, rngs=rngs)
      for _ in range(depth - 1)
    )
    self.norms = nnx.List(
      nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs) if normalized else None
      for _ in range(depth - 1)
    )
    self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

  def __call__(self, x):
    depth = len(self.dense) + 1
    for i, (dense, norm) in enumerate(zip(self.dense, self.norms, strict=True)):
      y = dense(x)
      y = nnx.relu(y if norm is None else norm(y))
      x = x + y / depth**0.5 if self.skip and i else y
    return self.head(x)


class Method(NamedTuple):
  """A network and what is put around its optimizer."""

  network: Callable[[int, nnx.Rngs], Network]
  around: Callable[..., optax.GradientTransformation] = lambda tx: tx


METHODS = {
  'plain': Method(Network),
  'clipped': Method(Network, ghm.calibrated),
  'He initialization': Method(
    functools.partial(Network, kernel_init=nnx.initializers.he_normal())
  ),
  'skip connections': Method(functools.partial(Network, skip=True)),
  'batch normalization': Method(functools.partial(Network, normalized=True)),
}


DEMO = 'plain', 'skip connections'


class Data(NamedTuple):
  """Standardized digits."""

  x: jax.Array
  labels: jax.Array
  x_test: jax.Array
  labels_test: jax.Array


def load(seed):
  """Loads the digits, with a third of them for testing."""
  x, labels = load_digits(return_X_y=True)
  x = (x - x.mean()) / x.std()
  order = np.random.default_rng(seed).permutation(len(x))
  test, train = np.split(order, [len(x) // 3])
  return Data(
    jnp.asarray(x[train], jnp.float32),
    jnp.asarray(labels[train]),
    jnp.asarray(x[test], jnp.float32),
    jnp.asarray(labels[test]),
  )


def train(method, data, depth, steps, seed):
  """Returns the test accuracy and a record of the gradients."""
  model = method.network(depth, nnx.Rngs(seed))
  tx = flow.watch(method.around(optax.sgd(0.01, momentum=0.9)))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  def loss_fn(model, x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(
      model(x), labels
    ).mean()

  @nnx.jit
  def step(model, optimizer, x, labels):
    loss, grads, taps = Tapped(histogram=True).value_and_grad(loss_fn)(
      model, x, labels
    )
    optimizer.update(model, grads)
    return loss, taps

  record = flow.Record(nnx.state(model, nnx.Param))
  rng = np.random.default_rng(seed)
  for i in range(steps):
    at = rng.integers(len(data.x), size=BATCH)
    loss, taps = step(model, optimizer, data.x[at], data.labels[at])
    record.add(i, taps=taps, opt_state=optimizer.opt_state, loss=loss)
  model.eval()
  logits = nnx.jit(Network.__call__)(model, data.x_test)
  return float((logits.argmax(-1) == data.labels_test).mean()), record


def plot(records, path):
  """Draws the norms over depth, at the first step and at the last."""
  figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
  for ax, t, title in ((axes[0], 0, 'first step'), (axes[1], -1, 'last step')):
    for name, record in records.items():
      ax.plot(flow.depth_profile(record).log_norms[t], label=name)
    ax.set(title=title, xlabel='layer, from the input')
  axes[0].set_ylabel('log10 of the gradient norm')
  axes[1].legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--full', action='store_true', help='the long version')
  parser.add_argument('--depth', type=int, default=30)
  parser.add_argument('--steps', type=int, help='300 or, in short, 60')
  parser.add_argument('--seed', type=int, default=0)
  output = HERE / 'output'
  parser.add_argument(
    '--picture', type=pathlib.Path, default=output / 'gradient_flow.png'
  )
  parser.add_argument(
    '--page', type=pathlib.Path, default=output / 'gradient_flow.html'
  )
  args = parser.parse_args()
  steps = args.steps or (300 if args.full else 60)
  data, console, records = load(args.seed), Console(), {}
  table = Table(title=f'{args.depth} layers, {steps} steps of SGD')
  for column in (
    '',
    'accuracy',
    'decades lost, first step',
    'last',
    'verdicts',
  ):
    table.add_column(column)
  for name in METHODS if args.full else DEMO:
    with console.status(f'training: {name}'):
      accuracy, record = train(
        METHODS[name], data, args.depth, steps, args.seed
      )
    records[name] = record
    decades = flow.depth_profile(record).decades
    table.add_row(
      name,
      f'{accuracy:.1%}',
      f'{decades[0]:.1f}',
      f'{decades[-1]:.1f}',
      ', '.join(verdict.kind for verdict in flow.diagnose(record)) or 'none',
    )
  flow.print_report({'plain': records['plain']}, console)
  console.print(table)
  for path in args.picture, args.page:
    path.parent.mkdir(parents=True, exist_ok=True)
  plot(records, args.picture)
  flow.write_page(args.page, records, 'A deep network that does not learn')
  console.print(f'written: {args.picture}, {args.page}')


if __name__ == '__main__':
  main()
