"""All of it in one training step, on one device, on many, on several processes.

A small network learns classes in one domain and has to know them in another:
its loss is harmonized, its domain classifier stands behind a reversed gradient,
its batch norms keep the domains apart under a mask, its optimizer is calibrated
and watched, and all layers are tapped. The step is written once, for one
device; the mesh decides where it runs. The script prints the losses, what is
sent between devices beside what plain training of the same network sends, and,
with --against, how far the numbers are from those of another run.

  python examples/data_parallel.py                        one device
  python examples/data_parallel.py --devices 8 --model 2  a mesh of 4 x 2
  python examples/data_parallel.py --processes 2 --devices 4 --model 2
  python examples/data_parallel.py --processes 2 --devices 4 --crash 10

--devices is the number for each process. --crash kills the last process at that
step; then all processes start again from the last checkpoint. On a cluster
there is nothing to spawn: call jax.distributed.initialize() and train() on
every host, with a folder that all of them see.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Any

CLASSES, FEATURES, WIDTH, BATCH = 10, 32, 64, 64
CHECKPOINT_EVERY = 5


def batch(step):
  """Examples of both domains; the labels of the second are not known."""
  import numpy as np  # noqa: PLC0415

  rng = np.random.default_rng(step)
  labels = rng.integers(0, CLASSES, BATCH) * rng.integers(0, 2, BATCH)  # rare
  domain = np.arange(BATCH, dtype=np.int32) % 2
  centers = np.random.default_rng(0).normal(size=(CLASSES, FEATURES))
  x = centers[labels] + rng.normal(size=(BATCH, FEATURES))
  x = np.where(domain[:, None] == 1, 1.5 * x + 1, x).astype(np.float32)
  mask = rng.random(BATCH) < 0.9  # the others are padding
  return x, labels.astype(np.int32), domain, mask


def make_steps():
  """The start, the whole step, and a plain one to compare with."""
  import jax.numpy as jnp  # noqa: PLC0415
  import optax  # noqa: PLC0415
  from flax import nnx  # noqa: PLC0415

  import optax_ghm as ghm  # noqa: PLC0415
  from optax_ghm import conflict, flow  # noqa: PLC0415
  from optax_ghm.nnx import (  # noqa: PLC0415
    DomainBatchNorm,
    GradientReversal,
    Harmonize,
    Tapped,
    apply_gradients,
    value_and_grad,
  )

  class Network(nnx.Module):
    def __init__(self, rngs, plain):
      self.plain = plain

      def norm() -> Any:
        if plain:
          return nnx.BatchNorm(WIDTH, rngs=rngs)
        return DomainBatchNorm(WIDTH, num_domains=2, rngs=rngs)

      self.dense = nnx.List(
        nnx.Linear(features, WIDTH, use_bias=False, rngs=rngs)
        for features in (FEATURES, WIDTH)
      )
      self.norms = nnx.List([norm(), norm()])
      self.classes = nnx.Linear(WIDTH, CLASSES, rngs=rngs)
      self.harmonize: Any = None if plain else Harmonize(reduction=BATCH)
      self.reverse = GradientReversal()
      self.hidden = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
      self.domains = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x, domain, mask):
      for dense, norm in zip(self.dense, self.norms, strict=True):
        x = dense(x)
        x = norm(x) if self.plain else norm(x, domain, mask=mask[:, None])
        x = nnx.relu(x)
      for_class = for_domain = x
      if not self.plain:
        for_class, for_domain = conflict.fork(x)
      logits = self.classes(for_class)
      if not self.plain:
        logits = self.harmonize(logits, mask=mask & (domain == 0))
        for_domain = self.reverse(for_domain, 0.5)
      return logits, self.domains(nnx.relu(self.hidden(for_domain)))

  def loss(model, x, labels, domain, mask):
    logits, domain_logits = model(x, domain, mask)
    known = mask & (domain == 0)
    of_class = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    of_domain = ghm.domain_loss(domain_logits, domain, mask=mask)
    return jnp.sum(of_class * known + of_domain) / BATCH

  def make(plain):
    model = Network(nnx.Rngs(0), plain)
    tx = optax.adamw(3e-3)
    tx = tx if plain else flow.watch(ghm.calibrated(tx))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

  def arrays(model, optimizer):
    return nnx.as_pure(nnx.state((model, optimizer)))

  def start():
    return arrays(*make(plain=False)), arrays(*make(plain=True))

  graph, plain_graph = (
    nnx.graphdef(nnx.eval_shape(functools.partial(make, plain)))
    for plain in (False, True)
  )

  def whole(state, *batch):
    model, optimizer = nnx.merge(graph, state)
    value, grads, taps = Tapped().value_and_grad(loss)(model, *batch)
    apply_gradients(optimizer, model, grads)
    return arrays(model, optimizer), value, taps

  def simple(state, *batch):
    model, optimizer = nnx.merge(plain_graph, state)
    value, grads = value_and_grad(loss)(model, *batch)
    optimizer.update(model, grads)
    return arrays(model, optimizer), value

  return start, whole, simple


def collectives(text):
  """What is sent between devices, (operation, bytes) and how often."""
  sizes = {'pred': 1, 'bf16': 2, 'f16': 2, 'f64': 8, 's64': 8, 'u64': 8}
  found = collections.Counter()
  pattern = (
    r'= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all'
    r'|collective-permute)(?:-start)?\('
  )
  for shapes, operation in re.findall(pattern, text):
    total = 0
    for dtype, shape in re.findall(r'(\w+)\[([\d,]*)\]', shapes):
      elements = 1
      for n in filter(None, shape.split(',')):
        elements *= int(n)
      total += elements * sizes.get(dtype, 4)
    found[operation, total] += 1
  return found


def train(args):
  """One process of the run; the numbers it ended with."""
  import jax  # noqa: PLC0415
  import numpy as np  # noqa: PLC0415
  import orbax.checkpoint as ocp  # noqa: PLC0415
  from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: PLC0415

  if args.processes > 1:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(args.coordinator, args.processes, args.process)
  shape = (len(jax.devices()) // args.model, args.model)
  mesh = jax.make_mesh(
    shape, ('data', 'model'), axis_types=(AxisType.Auto, AxisType.Auto)
  )
  start, whole, simple = make_steps()

  def placed(leaf):
    """Hidden features over the axis 'model', everything else replicated."""
    hidden = leaf.ndim > 0 and leaf.shape[-1] == WIDTH
    names = [None] * (leaf.ndim - 1) + ['model'] if hidden else []
    return NamedSharding(mesh, PartitionSpec(*names))

  # Made by all processes alike, each placing its part.
  like = jax.eval_shape(start)
  shardings = jax.tree.map(placed, like)
  state, plain_state = jax.jit(start, out_shardings=shardings)()
  shardings, plain_shardings = shardings
  over_data = NamedSharding(mesh, PartitionSpec('data'))

  def on_devices(arrays):
    return [
      jax.make_array_from_callback(u.shape, over_data, lambda i, u=u: u[i])
      for u in arrays
    ]

  step = (
    jax.jit(whole, donate_argnums=0, out_shardings=(shardings, None, None))
    .lower(state, *on_devices(batch(0)))
    .compile()
  )
  plain = (
    jax.jit(simple, out_shardings=(plain_shardings, None))
    .lower(plain_state, *on_devices(batch(0)))
    .compile()
  )

  checkpoints = ocp.CheckpointManager(
    pathlib.Path(args.folder).absolute() / 'checkpoints',
    options=ocp.CheckpointManagerOptions(
      max_to_keep=2, enable_async_checkpointing=False
    ),
  )
  first, losses, taps = checkpoints.latest_step() or 0, [], None
  if first:
    target = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      like[0],
      shardings,
    )
    state = checkpoints.restore(first, args=ocp.args.StandardRestore(target))
  for i in range(first, args.steps):
    if i == args.crash and args.process == args.processes - 1:
      os.kill(os.getpid(), signal.SIGKILL)
    state, value, taps = step(state, *on_devices(batch(i)))
    losses.append(float(value))
    if (i + 1) % CHECKPOINT_EVERY == 0:
      checkpoints.save(i + 1, args=ocp.args.StandardSave(state))
  checkpoints.wait_until_finished()

  replicate = jax.jit(
    lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec())
  )
  numbers = {
    jax.tree_util.keystr(path): np.asarray(leaf, np.float64).ravel().tolist()
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      replicate({'state': state, 'taps': taps})
    )
  }
  ours, theirs = (collectives(p.as_text()) for p in (step, plain))
  return {
    'mesh': shape,
    'processes': args.processes,
    'first': first,
    'losses': losses,
    'numbers': numbers,
    'collectives': [[*key, n] for key, n in sorted(ours.items())],
    'plain collectives': [[*key, n] for key, n in sorted(theirs.items())],
  }


def spawn(args, folder, crash):
  """Starts all processes, and waits; False if one of them was killed."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    coordinator = f'localhost:{free.getsockname()[1]}'
  environment = dict(os.environ)
  environment['XLA_FLAGS'] = ' '.join(
    [
      environment.get('XLA_FLAGS', ''),
      f'--xla_force_host_platform_device_count={args.devices}',
    ]
  )
  environment['JAX_PLATFORMS'] = 'cpu'
  command = [sys.executable, __file__, f'--folder={folder}']
  command += [f'--coordinator={coordinator}', f'--crash={crash}']
  for name in ('devices', 'model', 'processes', 'steps'):
    command.append(f'--{name}={getattr(args, name)}')
  children = [
    subprocess.Popen([*command, f'--process={i}'], env=environment)
    for i in range(args.processes)
  ]
  killed = children[-1].wait() == -signal.SIGKILL
  for child in children:
    if killed:
      child.kill()
    child.wait()
  if not killed and any(child.returncode for child in children):
    raise SystemExit('a process failed.')
  return not killed


def difference(a, b):
  """The largest difference of two runs, relative to what is compared."""
  import numpy as np  # noqa: PLC0415

  worst, where = 0.0, ''
  for name, values in a['numbers'].items():
    x, y = np.array(values), np.array(b['numbers'][name])
    scale = np.abs(y[np.isfinite(y)]).max(initial=1e-6)
    differ = x != y  # not so of infinities, where both have them
    off = np.abs(x[differ] - y[differ]).max(initial=0) / scale
    if off > worst:
      worst, where = float(off), name
  return worst, where


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--devices', type=int, default=1, help='per process')
  parser.add_argument('--model', type=int, default=1, help='of the mesh')
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--steps', type=int, default=20)
  parser.add_argument('--crash', type=int, default=-1, help='at this step')
  parser.add_argument('--against', help='the folder of another run')
  parser.add_argument('--folder', help='for checkpoints and the result')
  parser.add_argument('--coordinator', help=argparse.SUPPRESS)
  parser.add_argument('--process', type=int, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.process is not None:
    result = train(args)
    if args.process == 0:
      path = pathlib.Path(args.folder) / 'result.json'
      path.write_text(json.dumps(result))
    return
  folder = pathlib.Path(args.folder or tempfile.mkdtemp())
  folder.mkdir(parents=True, exist_ok=True)
  if not spawn(args, folder, args.crash):
    print(f'process {args.processes - 1} was killed at step {args.crash}')
    spawn(args, folder, crash=-1)
  result = json.loads((folder / 'result.json').read_text())
  print(
    f'mesh of {result["mesh"][0]} x {result["mesh"][1]} on'
    f' {args.processes} process(es), from step {result["first"]}'
  )
  print('losses', ' '.join(f'{u:.4f}' for u in result['losses']))
  for name in ('collectives', 'plain collectives'):
    print(name, *(f'{n} x {op} of {size} B' for op, size, n in result[name]))
  if args.against:
    other = json.loads((pathlib.Path(args.against) / 'result.json').read_text())
    print(
      'largest relative difference: {:.1e} at {}'.format(
        *difference(result, other)
      )
    )
  print(f'results: {folder}')


if __name__ == '__main__':
  main()
