"""PyTorch, run eagerly, against JAX on the same numbers in the same process.

Losses with their gradients, a clip in front of AdamW, batch norm, and TorchJD's
weights of several losses and training steps. Both use all cores. PyTorch's
batch norm gets its input channels last, as JAX's does. TorchJD's Nash-MTL
starts where its last call ended, and so solves one problem, not a sequence.
"""

import functools
import math

import batch_norm
import clipping
import conflict
import harness
import jax
import losses
import numpy as np
import optax
import torch
from torch.nn import functional
from torchjd import aggregation, autojac

import optax_ghm

DEVICE = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'


def tensor(x):
  return torch.from_numpy(np.array(x)).to(DEVICE)


def done(result):
  """The result, once the device has it."""
  if DEVICE == 'cuda':
    torch.cuda.synchronize()
  return result


def of_loss(loss):
  """Value and gradient of the mean of a loss of PyTorch's."""

  def prepare(logits, labels):
    logits, labels = tensor(logits).requires_grad_(), tensor(labels)

    def call():
      value = loss(logits, labels)
      return done((value, torch.autograd.grad(value, logits)))

    return call

  return harness.Eager(prepare)


def focal(logits, labels):
  """Lin et al. 2017, as torchvision has it, without its class weights."""
  p = torch.sigmoid(logits)
  cross_entropy = functional.binary_cross_entropy_with_logits(
    logits, labels, reduction='none'
  )
  correct = p * labels + (1 - p) * (1 - labels)
  return (cross_entropy * (1 - correct) ** 2).mean()


def adamw(clipped):
  """A step of fused AdamW on given gradients."""

  def prepare(grads):
    leaves = [tensor(g) for g in jax.tree.leaves(grads)]
    params = [torch.nn.Parameter(10 * g) for g in leaves]
    optimizer = torch.optim.AdamW(params, 1e-4, fused=True)
    for param, g in zip(params, leaves, strict=True):
      param.grad = g.clone()

    def call():
      if clipped:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
      return done(optimizer.step())

    return call

  return harness.Eager(prepare)


def normalized(x, scale, bias, cotangent):
  """Forward and backward of batch norm, with running averages."""
  x, cotangent = (
    tensor(u).permute(0, 3, 1, 2).to(memory_format=torch.channels_last)
    for u in (x, cotangent)
  )
  inputs = [u.requires_grad_() for u in (x, tensor(scale), tensor(bias))]
  mean, var = torch.zeros_like(inputs[1]), torch.ones_like(inputs[1])

  def call():
    y = functional.batch_norm(
      inputs[0], mean.detach(), var.detach(), *inputs[1:], training=True
    )
    return done((y, torch.autograd.grad(y, inputs, cotangent)))

  return call


def optimizers():
  chained = functools.partial(optax.chain, optax_ghm.clip_by_norm(1.0))
  return {
    'clip_by_norm, AdamW': chained(optax.adamw(1e-4)),
    'optax.clip_by_global_norm, AdamW': optax.chain(
      optax.clip_by_global_norm(1.0), optax.adamw(1e-4)
    ),
    'calibrated, AdamW': optax_ghm.calibrated(optax.adamw(1e-4)),
  }


def loss_case(size):
  ours = losses.with_gradient(losses.SIGMOID)
  names = (
    'optax.sigmoid_binary_cross_entropy',
    'optax.losses.sigmoid_focal_loss',
    'sigmoid_ghm_loss, windowed',
  )
  return harness.Case(
    {
      'torch.binary_cross_entropy_with_logits': of_loss(
        functional.binary_cross_entropy_with_logits
      ),
      'torch, focal loss': of_loss(focal),
      **{name: ours[name] for name in names},
    },
    functools.partial(losses.sigmoid_data, size),
    size,
    quick=size == 10**6,
  )


def clip_case(tree):
  every = optimizers()
  return harness.Case(
    {
      'torch.clip_grad_norm_, fused AdamW': adamw(True),
      'torch, fused AdamW alone': adamw(False),
      **{
        name: functools.partial(clipping.train_step, optimizer)
        for name, optimizer in every.items()
      },
    },
    functools.partial(clipping.gradients, tree),
    sum(math.prod(shape) for shape in clipping.shapes(tree)),
    init=functools.partial(clipping.initial, every),
  )


def norm_case(shape):
  ours = batch_norm.programs()
  del ours[batch_norm.LIMIT]
  return harness.Case(
    {'torch.batch_norm': harness.Eager(normalized), **ours},
    functools.partial(batch_norm.array_data, shape, np.dtype('float32')),
    batch_norm.array_size(shape),
    quick=shape == batch_norm.SHAPES[1],
  )


def weighting(make):
  """Weights of the Gramian, by TorchJD."""

  def prepare(_, gramian):
    method, gramian = make(), tensor(gramian)
    return lambda: done(method(gramian))

  return harness.Eager(prepare)


def aggregator(make):
  """The weighted sum of gradients, by what of TorchJD takes no Gramian."""

  def prepare(rows, _):
    method, rows = make(len(rows)), tensor(rows)
    return lambda: done(method(rows))

  return harness.Eager(prepare)


TORCHJD = {
  'upgrad': weighting(aggregation.UPGradWeighting),
  'dualproj': weighting(aggregation.DualProjWeighting),
  'mgda': weighting(aggregation.MGDAWeighting),
  'cagrad': weighting(lambda: aggregation.CAGradWeighting(c=0.5)),
  'nash_mtl': aggregator(aggregation.NashMTL),
  'imtl_g': weighting(aggregation.IMTLGWeighting),
  'config': aggregator(lambda _: aggregation.ConFIG()),
  'aligned_mtl': weighting(aggregation.AlignedMTLWeighting),
  'pcgrad': weighting(aggregation.PCGradWeighting),
}


def trained(reconciled):
  """A step of Adam on the network of heads of the benchmark of conflicts."""

  def prepare(params, x, labels):
    trunk, *heads = (
      [torch.nn.Parameter(tensor(w)) for w in layers]
      for layers in (params['trunk'], *params['heads'])
    )
    x, labels = tensor(x), tensor(labels).long()
    optimizer = torch.optim.Adam(
      [w for layers in (trunk, *heads) for w in layers], 1e-3, fused=True
    )
    upgrad = aggregation.UPGrad()

    def mlp(layers, x):
      for w in layers[:-1]:
        x = torch.relu(x @ w)
      return x @ layers[-1]

    def call():
      optimizer.zero_grad()
      features = torch.relu(mlp(trunk, x))
      losses = [
        functional.cross_entropy(mlp(head, features), of_head)
        for head, of_head in zip(heads, labels, strict=True)
      ]
      if reconciled:
        autojac.mtl_backward(losses, features)
        autojac.jac_to_grad(trunk, upgrad)
      else:
        torch.stack(losses).sum().backward()
      return done(optimizer.step())

    return call

  return harness.Eager(prepare)


def rows_and_gramian(losses):
  return conflict.rows(losses), *conflict.one_gramian(losses)


def weights_case(method, losses):
  ours = f'{method}_weights'
  return harness.Case(
    {
      f'torchjd, {method}': TORCHJD[method],
      ours: lambda _, gramian: conflict.WEIGHTS[ours](gramian),
    },
    functools.partial(rows_and_gramian, losses),
    losses**2,
    limit=ours,
    quick=losses == 8 and method == 'upgrad',
  )


def conflict_case(heads):
  """The trunk alone is reconciled by TorchJD and by the fork."""
  programs = conflict.step_programs(heads)
  ours = (conflict.SUM, 'conflict.fork', 'reconciled_value_and_grad')
  return harness.Case(
    {
      'torch, the sum of the losses': trained(False),
      'torchjd.autojac.mtl_backward, UPGrad': trained(True),
      **{
        name: functools.partial(conflict.step, *programs[name]) for name in ours
      },
    },
    functools.partial(conflict.network_data, heads),
    conflict.BATCH * heads,
    init=functools.partial(conflict.start, programs),
    quick=heads == 2,
  )


CASES = (
  {
    'losses': harness.Growth(
      'examples', {n: loss_case(n) for n in (10**5, 10**6, 10**7)}
    ),
    'transformer, 196 leaves': clip_case(clipping.transformer()),
  }
  | {
    f'batch norm, {shape}': norm_case(shape) for shape in batch_norm.SHAPES[1:]
  }
  | {
    f'{method} of a Gramian': harness.Growth(
      'losses',
      # TorchJD's Nash-MTL of 64 losses takes minutes.
      {
        m: weights_case(method, m)
        for m in ((2, 8) if method == 'nash_mtl' else (2, 8, 64))
      },
    )
    for method in TORCHJD
  }
  | {
    'training step, batch 256': harness.Growth(
      'heads', {m: conflict_case(m) for m in (2, 8)}
    )
  }
)
