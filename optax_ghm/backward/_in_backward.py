"""Optax transformations inside the backward pass, and state that rides it.

A ``jax.custom_vjp`` that learns from cotangents takes its state as an argument
and returns the next state as that argument's gradient. Flax calls this
overwrite-with-gradient and keeps such variables in a collection of that name,
which ``flax.training.train_state.TrainState`` overwrites instead of optimising.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ghm import norms as _norms

OVERWRITE_WITH_GRADIENT = '_overwrite_with_gradient'
"""The name of Flax's collection for variables that their gradient replaces."""


def overwrite_with_gradient(states: Any, gradients: Any) -> Any:
  """The next states, from the gradients with respect to the states.

  A state is any node with a field ``calls``, the number of backward passes
  whose next states were added up in its gradient. Where that is 0, because no
  gradient reached the state in this step, the state stays as it was, where
  taking the gradient itself would clear it. What has no such field, like Flax's
  own states of that kind, is its gradient.

  Args:
    states: pytree of states that rode the backward pass.
    gradients: their gradients, the same structure.

  Returns:
    The states to use in the next step.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_ghm
    >>> def loss(params, harmony):
    ...   logits = optax_ghm.harmonize(params * jnp.arange(3.0), harmony)
    ...   return jnp.mean(jnp.square(logits - 1))
    >>> harmony = optax_ghm.DEFAULT_DENSITY.init()
    >>> grads, harmony_grad = jax.grad(loss, argnums=(0, 1))(2.0, harmony)
    >>> harmony = optax_ghm.overwrite_with_gradient(harmony, harmony_grad)
    >>> float(harmony.histogram.sum())
    3.0
  """

  def overwrite(state, gradient):
    if not hasattr(state, 'calls'):
      return gradient
    reached = gradient.calls > 0  # one per state, where states are stacked

    def choose(old, new):
      each = jnp.expand_dims(reached, tuple(range(reached.ndim, new.ndim)))
      return jnp.where(each, new, old)

    return jax.tree.map(choose, state, gradient)

  return jax.tree.map(
    overwrite, states, gradients, is_leaf=lambda x: hasattr(x, 'calls')
  )


def apply_gradients(
  tx: optax.GradientTransformation,
  variables: dict[str, Any],
  gradients: dict[str, Any],
  opt_state: optax.OptState,
  **extra_args: Any,
) -> tuple[dict[str, Any], optax.OptState]:
  """One step of a plain Optax loop over Linen variables.

  What ``TrainState.apply_gradients`` does, for loops without one: the
  collection ``'params'`` is updated by ``tx``, the collection
  :data:`OVERWRITE_WITH_GRADIENT` is replaced by its gradient.

  Args:
    tx: optimizer, its state initialised on ``variables['params']``.
    variables: with a collection ``'params'`` and, if any state rides the
      backward pass, :data:`OVERWRITE_WITH_GRADIENT`.
    gradients: with respect to ``variables``, the same structure.
    opt_state: state of ``tx``.
    **extra_args: passed to ``tx.update``.

  Returns:
    The next variables and the next state of ``tx``.

  Raises:
    ValueError: if ``variables`` and ``gradients`` hold other collections.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> tx = optax.sgd(0.5)
    >>> variables = {'params': jnp.array(1.0)}
    >>> variables, _ = optax_ghm.apply_gradients(
    ...   tx,
    ...   variables,
    ...   {'params': jnp.array(2.0)},
    ...   tx.init(variables['params']),
    ... )
    >>> float(variables['params'])
    0.0
  """
  known = {'params', OVERWRITE_WITH_GRADIENT}
  for name, tree in (('variables', variables), ('gradients', gradients)):
    if not {'params'} <= set(tree) <= known:
      raise ValueError(
        f"{name} must hold 'params' and at most {OVERWRITE_WITH_GRADIENT!r}"
        f' beside it, got {sorted(tree)}: keep other collections out of what'
        ' is differentiated.'
      )
  if set(variables) != set(gradients):
    raise ValueError(
      'variables and gradients must hold the same collections, got'
      f' {sorted(variables)} and {sorted(gradients)}.'
    )
  updates, opt_state = optax.with_extra_args_support(tx).update(
    gradients['params'], opt_state, variables['params'], **extra_args
  )
  following = dict(variables)
  following['params'] = optax.apply_updates(variables['params'], updates)
  if OVERWRITE_WITH_GRADIENT in variables:
    following[OVERWRITE_WITH_GRADIENT] = overwrite_with_gradient(
      variables[OVERWRITE_WITH_GRADIENT], gradients[OVERWRITE_WITH_GRADIENT]
    )
  return following, opt_state


def ride(next_state: Any, cotangent: Any) -> Any:
  """Ties every leaf of a next state to the cotangent it came with.

  Where ``jax.vmap`` shares one state among examples, JAX sums over these what
  of the state's gradient depends on the example, and takes the rest, such as a
  count, once. Tied, all of it is summed, and ``calls`` says how many there are.
  Compiles to nothing.
  """
  numbers = [u for u in jax.tree.leaves(cotangent) if u.size]
  if not numbers:
    return next_state
  total = jnp.sum(numbers[0].real)
  zero = jnp.where(jnp.isnan(total), 0, 0)

  def tie(leaf):
    # Shards that have agreed on a state must not be made to differ again.
    if not varying_axes(zero) <= varying_axes(leaf):
      return leaf
    return leaf + zero.astype(leaf.dtype)

  return jax.tree.map(tie, next_state)


def varying_axes(x: jax.Array) -> frozenset[str]:
  """The axes of a ``shard_map`` along which x differs; its name has moved."""
  kind = jax.typeof(x)
  return frozenset(kind.vma if hasattr(kind, 'vma') else kind.mat.varying)


class InBackwardState(NamedTuple):
  """An Optax state that rides the backward pass, through :func:`in_backward`.

  Attributes:
    carried: the state of the transformation, its integers (step counts, keys)
      as pairs of float32 along a last axis, since only floating numbers have a
      gradient. Summed over ``calls``. :meth:`InBackward.unpack` reads it.
      Keep them float32: no cast of all variables to 16 bits may touch them.
    calls: float32, how many backward passes were added up in ``carried``; 0 in
      a state that has seen none.
  """

  carried: Any
  calls: jax.Array


@dataclasses.dataclass(frozen=True)
class InBackward:
  """An Optax transformation mounted in the backward pass.

  What :func:`in_backward` returns, and explains.

  Attributes:
    tx: the transformation.
  """

  tx: optax.GradientTransformationExtraArgs

  def init(self, x: Any) -> InBackwardState:
    """The state to begin with, ``tx.init(x)`` made fit to be differentiated.

    Args:
      x: the activations that will pass, or arrays of their shapes and dtypes.

    Returns:
      The state.
    """
    state = jax.tree.map(_to_floats, self.tx.init(_inexact_part(x)))
    return InBackwardState(carried=state, calls=jnp.zeros([], jnp.float32))

  def keeps_state(self, x: Any) -> bool:
    """Whether ``tx`` keeps a state for such activations."""
    expected = jax.eval_shape(self.init, _inexact_part(x))
    return bool(jax.tree.leaves(expected.carried))

  def unpack(self, state: InBackwardState, x: Any) -> optax.OptState:
    """The state of ``tx`` itself, integers and all.

    Args:
      state: from :meth:`init`, or a gradient with respect to it; or several,
        stacked along first axes.
      x: as for :meth:`init`.

    Returns:
      What ``tx.update`` would have returned; the mean, where ``state.calls``
      backward passes were added up.
    """
    like = jax.eval_shape(self.tx.init, _inexact_part(x))
    calls = jnp.where(state.calls > 0, state.calls, 1)
    return jax.tree.map(
      lambda shape, leaf: _from_floats(leaf, shape, calls), like, state.carried
    )

  def __call__(
    self, x: Any, state: InBackwardState | None = None, *, enabled: bool = True
  ) -> Any:
    """Identity; backward, ``tx.update(cotangent, state, x)``.

    Args:
      x: array or pytree of arrays.
      state: from :meth:`init` of an ``x`` of the same shapes and dtypes; may be
        left out if ``tx`` keeps none.
      enabled: False is the plain identity, for forward mode, and for evaluating
        batches of another size than the state was made for.

    Returns:
      ``x``.

    Raises:
      ValueError: if ``tx`` keeps a state and none is given, or one that does
        not fit ``x``.
      ValueError: if ``tx`` changes the structure or the shapes of what it
        updates, or of its state.
    """
    if not enabled:
      return x
    leaves, structure = jax.tree.flatten(x)
    floats = _inexact_part(x)
    expected = jax.eval_shape(self.init, floats)
    if state is None:
      if self.keeps_state(x):
        raise ValueError(
          'tx keeps a state: give in_backward(tx)(x, state) one from'
          ' in_backward(tx).init(x), and take its gradient as the next one.'
        )
      state = self.init(floats)
    elif _types(state) != _types(expected):
      raise ValueError(
        'state must be one from in_backward(tx).init(x), of the structure,'
        f' shapes and dtypes {_types(expected)}, got {_types(state)}. For x of'
        ' another size in evaluation, pass enabled=False.'
      )

    def update(cotangent, state, floats):
      updates, next_state = self.tx.update(
        cotangent, self.unpack(state, floats), floats
      )
      next_state = InBackwardState(
        carried=jax.tree.map(_to_floats, next_state),
        calls=jnp.ones_like(state.calls),
      )
      return (
        _cast_like(updates, cotangent, 'updates'),
        _cast_like(ride(next_state, cotangent), state, 'state'),
      )

    update, closed_over = _open(update, floats, state, floats)
    passed = iter(
      jax.tree.leaves(_in_backward(update, floats, state, closed_over))
    )
    return structure.unflatten(
      next(passed) if _norms.is_inexact(leaf) else leaf for leaf in leaves
    )


def in_backward(tx: optax.GradientTransformation) -> InBackward:
  r"""Mounts an Optax transformation in the backward pass, at any activation.

  .. math::
    y = x, \qquad (\bar x, s') = \text{tx.update}(\bar y, s, x)

  A cotangent is an update: whatever reshapes the gradients of parameters can
  reshape those of activations. ``in_backward(tx)(x)`` is ``x``, and its law is
  that the cotangent behind it is what ``tx.update`` makes of the one before it,
  cast back to its dtype. The activations stand where an optimizer has its
  parameters: ``optax.add_decayed_weights`` then decays activations.

  With a state, ``in_backward(tx)(x, state)``, the gradient with respect to the
  state is the next state, to be passed on by :func:`overwrite_with_gradient`.
  Where one state serves several calls in a step, or micro-batches whose
  gradients are summed, the mean of their next states is carried on.

  The transformation sees the cotangent of the whole array: under ``jax.vmap``
  that of one example (with a state each, or one for all), under ``jit`` of a
  sharded array that of all shards, under ``shard_map`` that of a shard alone,
  unless ``tx`` itself joins them over the mapped axis. There, a state that
  every shard changes on its own must vary too: ``jax.lax.pcast(state,
  axis_name, to='varying')``; the shards' next states are then averaged.

  The rule need not be linear in the cotangent, so forward mode (``jax.jvp``,
  ``jax.hessian``) raises: switch it off there with ``enabled=False``.

  Args:
    tx: any ``optax.GradientTransformation`` that keeps the shapes of what it
      updates and needs no extra argument (a loss is not known here): a chain,
      ``inject_hyperparams``, one that closes over traced numbers.

  Returns:
    An :class:`InBackward`: a function of ``(x, state=None)`` with ``init`` and
    ``unpack``. ``x`` is an array or a pytree; ``tx`` sees None in the place of
    leaves that are not floating or complex arrays.

  Raises:
    TypeError: if ``tx`` is not a ``GradientTransformation``.

  Examples:
    Without a state:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_ghm
    >>> clip = optax_ghm.in_backward(optax.clip_by_global_norm(1.0))
    >>> jax.grad(lambda x: jnp.sum(clip(x) ** 2))(jnp.array([3.0, 4.0]))
    Array([0.6, 0.8], dtype=float32)

    With one:

    >>> mounted = optax_ghm.in_backward(optax.trace(0.9))
    >>> x = jnp.ones(2)
    >>> state = mounted.init(x)
    >>> def loss(x, state):
    ...   return jnp.sum(mounted(x, state))
    >>> for _ in range(2):
    ...   grad, state_grad = jax.grad(loss, argnums=(0, 1))(x, state)
    ...   state = optax_ghm.overwrite_with_gradient(state, state_grad)
    >>> grad
    Array([1.9, 1.9], dtype=float32)
    >>> mounted.unpack(state, x).trace
    Array([1.9, 1.9], dtype=float32)
  """
  if not isinstance(tx, optax.GradientTransformation):
    raise TypeError(f'tx must be an optax.GradientTransformation, got {tx!r}.')
  return InBackward(optax.with_extra_args_support(tx))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_backward(update, x, state, closed_over):
  del update, state, closed_over
  return x


def _in_backward_fwd(update, x, state, closed_over):
  # Calling the primitive again keeps its rule in a gradient of a gradient.
  y = _in_backward(update, x, state, closed_over)
  return y, (x, state, closed_over)


def _in_backward_bwd(update, residuals, cotangent):
  x, state, closed_over = residuals
  return *update(cotangent, state, x, closed_over), None


_in_backward.defvjp(_in_backward_fwd, _in_backward_bwd)


def _inexact_part(x):
  """None in the place of leaves that have no gradient."""
  return jax.tree.map(lambda leaf: leaf if _norms.is_inexact(leaf) else None, x)


def _types(tree):
  """Structure, shapes and dtypes, to compare and to print."""
  return jax.tree.map(lambda u: f'{u.dtype}{list(u.shape)}', tree)


def _open(f, *args):
  """``f`` as a function of what it closes over too, and that.

  A traced value of the loop, say, that a transformation closes over would be
  gone when the backward pass runs: it has to come in as an argument.
  """
  closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
  structure = jax.tree.structure(shape)

  def opened(*args_and_consts):
    *args, consts = args_and_consts
    leaves = jax.tree.leaves(args)
    return structure.unflatten(
      jax.core.eval_jaxpr(closed.jaxpr, consts, *leaves)
    )

  return opened, list(closed.consts)


def _cast_like(tree, like, name):
  """Casts and reshards to ``like``, which must have the same shapes."""
  shapes = [jax.tree.map(jnp.shape, t) for t in (tree, like)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f'tx must keep the structure and shapes of its {name}: got {shapes[0]}'
      f' for {shapes[1]}.'
    )

  def cast(leaf, old):
    leaf = jnp.asarray(leaf).astype(old.dtype)
    sharding = jax.typeof(old).sharding
    if jax.typeof(leaf).sharding == sharding:
      return leaf
    return jax.sharding.reshard(leaf, sharding)

  return jax.tree.map(cast, tree, like)


def _to_floats(leaf):
  """A leaf of a state as floating numbers: an integer n as n = 2**16 a + b."""
  leaf = jnp.asarray(leaf)
  if _norms.is_inexact(leaf):
    return leaf
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if leaf.dtype.itemsize < 4:
    leaf = leaf.astype(jnp.int32)
  words = jax.lax.bitcast_convert_type(leaf, jnp.int32)
  return jnp.stack([words >> 16, words & 0xFFFF], axis=-1).astype(jnp.float32)


def _from_floats(leaf, like, calls):
  """The mean of ``calls`` leaves that were added up, of the dtype of ``like``.

  Exact for integers that are equal in all calls, up to 512, also where the sum
  was averaged since, to rounding.
  """
  calls = jnp.expand_dims(calls, tuple(range(calls.ndim, leaf.ndim)))
  mean = leaf / calls.astype(leaf.dtype)
  if _norms.is_inexact(like):
    return mean
  high, low = mean[..., 0], mean[..., 1]
  whole = jnp.round(high)
  whole = jnp.where(jnp.abs(high - whole) < 0.01, whole, jnp.floor(high))
  rest = jnp.where(jnp.abs(high - whole) < 0.01, 0, high - whole)
  low = jnp.round(rest * 2**16 + low)
  words = whole.astype(jnp.int32) * 2**16 + low.astype(jnp.int32)
  if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
    data = jax.lax.bitcast_convert_type(words, jnp.uint32)
    impl = jax.random.key_impl(jnp.empty((), like.dtype))
    return jax.random.wrap_key_data(data, impl=impl)
  if like.dtype.itemsize < 4:
    return words.astype(like.dtype)
  return jax.lax.bitcast_convert_type(words, like.dtype)
