"""Scaling queries and keys whose attention logits grow too large: QK-clip."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_ghm._core import arrays, counters, stateful, trees


class QKClipState(NamedTuple):
  """State of :func:`~optax_ghm.calibration.qk_clip`.

  Attributes:
    max_logit: the largest finite logit of all heads in the last step; 0 before
      the first.
    heads_clipped: int32, number of heads that were scaled in the last step.
  """

  max_logit: jax.Array
  heads_clipped: jax.Array


def flax_qk_powers(path: tuple[Any, ...], leaf: Any) -> float | None:
  """The power of γ that scales a leaf, in Flax's names of attention.

  Kernels and biases of the modules ``query`` and ``key`` take ½ each. See
  ``powers`` of :func:`~optax_ghm.calibration.qk_clip`.

  Args:
    path: path of the leaf, as ``jax.tree_util.tree_map_with_path`` gives it.
    leaf: the array.

  Returns:
    ½, or None for any other leaf.

  Raises:
    ValueError: if a kernel has no axis of heads.

  Examples:
    >>> import jax
    >>> from optax_ghm import calibration
    >>> path = jax.tree_util.DictKey('query'), jax.tree_util.DictKey('kernel')
    >>> calibration.flax_qk_powers(path, jax.numpy.ones((8, 2, 4)))
    0.5
  """
  names = trees.names(path)[-2:]
  if not {'query', 'key'} & {*names}:
    return None
  if names[-1] == 'kernel' and leaf.ndim < 3:
    raise ValueError(
      'kernels of queries and keys must be (..., in, heads, features), got'
      f' {leaf.shape} at {trees.path_name(path)}: reshape it in the model.'
    )
  return 0.5


def qk_clip(
  threshold: ArrayLike = 100.0,
  *,
  powers: Callable[[tuple[Any, ...], Any], Any] = flax_qk_powers,
  axis_name: arrays.AxisName = None,
) -> stateful.StatefulTransformation[QKClipState]:
  r"""Scales the queries and keys of heads whose logits are too large: QK-clip.

  .. math::
    \gamma_h = \min\left(1, \frac{\tau}{S_{\max, h}}\right), \qquad
    W_{q, h} \leftarrow \sqrt{\gamma_h}\, W_{q, h}, \quad
    W_{k, h} \leftarrow \sqrt{\gamma_h}\, W_{k, h}

  S is the logit of attention without a bias, :math:`q^\top k / \sqrt d`, and
  its maximum is that of the last forward pass. After the step, all logits of
  the head are :math:`\gamma_h` times what they would be. The updates of all
  other heads and leaves are bit for bit what came in. It must be the last
  transformation of the chain: what comes in is what ``optax.apply_updates``
  would add.

  Where several heads of the query share one of the key, the key's takes the
  root of the smallest γ of its group, and each of the query's what is missing
  to its own γ. The paper does not say what to do there.

  Not for queries and keys that are normalized (Flax's ``normalize_qk``): their
  logits do not follow the kernels, which would shrink in every step. Not where
  only one of query and key is among the updates, as in ``optax.masked``: the
  logits would then be :math:`\sqrt{\gamma_h}` times what they were.

  Args:
    threshold: τ, the largest logit that is not clipped; the paper's is 100.
    powers: how leaves are scaled: a function from the path of a leaf and the
      leaf to the power of γ, one number or one for every feature, or None for
      leaves that stay. Leaves are (..., in, heads, features), and biases
      (..., heads, features). The default takes the modules ``query`` and
      ``key`` of Flax Linen and NNX. The example has the multi-head latent
      attention of the paper: √γ for what a head has of its own, in the query
      and in the key, γ for its rotary part of the query, and nothing for the
      rotary part of the key, which all heads share.
    axis_name: mapped axis, or axes, over which the heads are split.

  Returns:
    A ``GradientTransformationExtraArgs`` with a
    :class:`~optax_ghm.calibration.QKClipState`. Its ``update`` needs ``params``
    and the extra argument ``max_logits``: a tree with an array (..., heads) of
    the largest logits, at the path of every attention layer or under the name
    ``max_logits`` there, as ``dot_product_attention`` of ``optax_ghm.linen``
    and ``optax_ghm.nnx`` sows it; what else is in the tree does not matter.
    Axes in front of the heads, as ``nn.scan`` makes them, are the first axes of
    the leaves; the maximum over examples is taken before. With several
    micro-batches in one step, give their maximum, or put the clip behind:
    ``optax.chain(optax.MultiSteps(tx, 4).gradient_transformation(),
    qk_clip())``. A head whose largest logit is NaN or infinite is not clipped;
    bad numbers in the updates pass.

  Raises:
    ValueError: if ``threshold`` is negative; on update, if ``params`` or
      ``max_logits`` is missing, or does not fit the updates.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from optax_ghm import calibration
    >>> tx = optax.chain(optax.sgd(0.1), calibration.qk_clip(100.0))
    >>> kernel = {'kernel': jnp.ones((8, 2, 4))}  # two heads
    >>> params = {'attention': {'query': kernel, 'key': kernel}}
    >>> grads = optax.tree.zeros_like(params)
    >>> max_logits = {'attention': jnp.array([400.0, 50.0])}
    >>> updates, _ = tx.update(
    ...   grads, tx.init(params), params, max_logits=max_logits
    ... )
    >>> params = optax.apply_updates(params, updates)
    >>> print(params['attention']['query']['kernel'][0, :, 0])
    [0.5 1. ]

    Multi-head latent attention, 128 features of a head's own before 64 rotary
    ones, and the key's in one kernel with the value's:

    >>> def latent_powers(path, leaf):
    ...   own = jnp.arange(leaf.shape[-1]) < 128
    ...   match [getattr(key, 'key', None) for key in path]:
    ...     case [*_, 'wq_b', 'kernel']:
    ...       return jnp.where(own, 0.5, 1.0)
    ...     case [*_, 'wkv_b', 'kernel']:
    ...       return jnp.where(own, 0.5, 0.0)
    >>> tx = calibration.qk_clip(100.0, powers=latent_powers)

  References:
    Kimi Team, `Kimi K2: Open Agentic Intelligence
    <https://arxiv.org/abs/2507.20534>`_, 2025
  """
  counters.check_range('threshold', threshold, 0, np.inf)

  def init_fn(params):
    del params
    return QKClipState(jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32))

  def update_fn(updates, state, params=None, *, max_logits=None, **extra_args):
    del extra_args
    if max_logits is None and updates is not None:
      raise ValueError(f'max_logits must be given to update(). {_HOW}')
    if params is None and updates is not None:
      raise ValueError('params must be given to update(), and were None.')
    tau = jnp.asarray(threshold, jnp.float32)
    scales, clipped, largest = {}, jnp.int32(0), jnp.float32(-jnp.inf)
    for logits, leaves in _layers(updates, max_logits, powers):
      finite = jnp.isfinite(logits)
      above = finite & (logits > tau)
      gamma = jnp.where(above, tau / jnp.where(above, logits, 1), 1)
      # Not 0, whose negative powers are infinite.
      gamma = jnp.maximum(gamma, jnp.finfo(jnp.float32).tiny)
      kv_heads = min(leaf.shape[-2] for _, leaf, _ in leaves)
      for path, leaf, power in leaves:
        scales[path] = _scale(gamma, power, leaf, kv_heads)
      clipped += jnp.sum(above, dtype=jnp.int32)
      largest = jnp.maximum(
        largest, jnp.max(jnp.where(finite, logits, -jnp.inf))
      )
    if axis_name is not None:
      clipped = jax.lax.psum(clipped, axis_name)
      largest = jax.lax.pmax(largest, axis_name)

    before = dict(jax.tree_util.tree_leaves_with_path(params))

    def clip(path, update):
      if path not in scales:
        return update
      scale, old = scales[path], arrays.widen(update)
      new = old + arrays.widen(before[path]).astype(old.dtype)
      clipped = old - arrays.multiply(new, 1 - scale)
      return jnp.where(scale == 1, old, clipped).astype(update.dtype)

    updates = jax.tree_util.tree_map_with_path(clip, updates)
    return updates, QKClipState(
      jnp.where(jnp.isfinite(largest), largest, state.max_logit), clipped
    )

  return stateful.StatefulTransformation(init_fn, update_fn)


_HOW = (
  'Give a tree with the largest logits (heads,) of every attention layer at the'
  " layer's path. optax_ghm.linen.dot_product_attention and that of"
  ' optax_ghm.nnx, as attention_fn of a layer that is called with'
  ' sow_weights=True, sow them (in nn.scan with variable_axes for'
  " intermediates). Flax's TrainState.apply_gradients does not pass them on:"
  ' call state.tx.update.'
)


def _layers(updates, max_logits, powers):
  """The largest logits of every layer, and its leaves with their powers."""
  measured, found = {}, {}
  for path, logits in jax.tree_util.tree_leaves_with_path(max_logits):
    names = trees.names(path)
    names = names[:-1] if names[-1:] == ['max_logits'] else names
    measured[tuple(names)] = logits
  leaves = trees.counted_with_path(updates)
  for path, leaf in leaves:
    power = powers(path, leaf)
    if power is None:
      continue
    names = trees.names(path)
    layers = [tuple(names[:n]) for n in range(len(names), -1, -1)]
    layer = next((name for name in layers if name in measured), None)
    if layer is None:
      raise ValueError(
        f'max_logits must have every attention layer, and has none at or above'
        f' {trees.path_name(path)}; its paths are'
        f' {["/".join(name) for name in measured]}. {_HOW}'
      )
    logits = jnp.asarray(measured[layer], jnp.float32)
    stack, heads = logits.shape[:-1], logits.shape[-1:]
    # A kernel behind a stack of layers has an axis more than a bias.
    least = 3 if stack and names[-1] == 'kernel' else 2
    if (
      not heads
      or leaf.ndim < len(stack) + least
      or leaf.shape[: len(stack)] != stack
      or heads[0] % leaf.shape[-2]
    ):
      raise ValueError(
        'max_logits must be (..., heads), and leaves of queries and keys'
        f' (..., in, heads, features); got {logits.shape} and {leaf.shape} at'
        f' {trees.path_name(path)}.'
      )
    found.setdefault(layer, (logits, []))[1].append((path, leaf, power))
  for logits, scaled in found.values():
    heads = {leaf.shape[-2] for _, leaf, _ in scaled}
    if logits.shape[-1] not in heads:
      raise ValueError(
        f'max_logits has {logits.shape[-1]} heads where the leaves have'
        f' {sorted(heads)}: {[trees.path_name(path) for path, *_ in scaled]}.'
      )
  if measured and leaves and not found:
    raise ValueError(
      'max_logits was given, and no leaf of the updates is a query or a key:'
      f' {[trees.path_name(path) for path, _ in leaves]}. Give powers, which'
      ' says how leaves are scaled.'
    )
  return found.values()


def _scale(gamma, power, leaf, kv_heads):
  """What a leaf is multiplied by, broadcastable to it.

  A head of the key has the smallest γ of its group, to its power; one of the
  query what is missing to its own γ.
  """
  *stack, heads = gamma.shape
  group = jnp.min(gamma.reshape(*stack, kv_heads, -1), -1)[..., None]
  power = jnp.atleast_1d(jnp.asarray(power, jnp.float32))
  power = jnp.expand_dims(power, range(len(stack) + 1))
  if leaf.shape[-2] == kv_heads:
    scale = group**power
  else:
    group = jnp.repeat(group, heads // kv_heads, -2)
    scale = gamma[..., None] * group ** (power - 1)
  inner = leaf.ndim - len(stack) - 2
  return jnp.expand_dims(scale, range(len(stack), len(stack) + inner))
