"""A batch that is split over devices is one batch.

Every public primitive that sees a batch is in one table.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import optax_ghm as ghm
from optax_ghm import conflict, flow, reversal
from tests.support.oracles_harmonization import published
from tests.support.sharded import Case, check, mesh_of, parametrize

PROGRAMS = 75

N, CLASSES = 64, 6
BINNED = ghm.BinnedDensity(bins=30, momentum=0.9)  # sends 34 numbers: also
WINDOWED = ghm.WindowedDensity(width=0.1, cells=512, momentum=0.9)  # counts
BATCH = P('d')
RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


LOGITS, OTHERS = 3 * normal(N, CLASSES), normal(N, CLASSES)
LABELS = (RNG.uniform(size=(N, CLASSES)) < 0.3).astype(np.float32)
CLASS = RNG.integers(CLASSES, size=N).astype(np.int32)
MASK = np.ones((N, CLASSES), bool)
MASK[:8] = False  # the whole first shard
MASK[9:14] = False
DOMAIN = (np.arange(N) % 3).astype(np.int32)


def slope(loss, x):
  """Of a sum over the batch, and what comes beside the losses."""

  def total(x):
    losses, *others = loss(x)
    return jnp.sum(losses), others

  return jax.grad(total, has_aux=True)(x)


def together(pairs):
  """What is split as the batch is, and what is not."""
  first = {name: one for name, (one, _) in pairs.items()}
  return first, {name: other for name, (_, other) in pairs.items()}


def sigmoid(density):
  def f(x, labels, mask, axis_name=None):
    return slope(
      lambda x: ghm.sigmoid_ghm_loss_with_state(
        *(x, labels, density.init()),
        weighting=published(density),
        mask=mask,
        axis_name=axis_name,
      ),
      x,
    )

  return f


def other_ghm_losses(x, labels, classes, mask, axis_name=None):
  def result(loss, density, labels, mask):
    return slope(
      lambda x: loss(
        *(x, labels, density.init()),
        weighting=published(density),
        mask=mask,
        axis_name=axis_name,
      ),
      x,
    )

  of_labels = ghm.sigmoid_ghm_loss_with_integer_labels_with_state
  softmax = ghm.softmax_ghm_loss_with_integer_labels_with_state
  return together(
    {
      'sigmoid': result(of_labels, BINNED, classes, mask),
      'softmax': result(softmax, WINDOWED, classes, mask[:, 0]),
      'smooth l1': result(
        ghm.smooth_l1_ghm_loss_with_state, WINDOWED, labels, mask
      ),
    }
  )


def of_classes(x, labels, classes, mask, axis_name=None):
  """Every device has the loss of all, so that its gradient is of all."""
  state, options = ghm.ClassCounts.init(CLASSES), {'axis_name': axis_name}
  state = state.update(classes, mask=mask[:, 0], **options)
  state = state.update(labels, mask=mask[:, 0], decay=0.9, **options)
  counts, examples = state.counts, state.examples

  def loss(x):
    logits = ghm.adjust_logits(x, counts)
    logits = logits + ghm.adjust_sigmoid_logits(x, counts, examples)
    losses = jnp.where(mask, jnp.square(logits), 0.0)
    return ghm.loss_per_positive(
      losses, labels > 0, ghm.RunningPositives.init(), **options
    )

  (value, positives), gradient = jax.value_and_grad(loss, has_aux=True)(x)
  return gradient, (state, value, positives)


def harmonized(x, labels, mask, axis_name=None):
  def loss(x, state):
    x = ghm.harmonize(
      *(x, state),
      weighting=published(WINDOWED),
      axis=(),
      mask=mask,
      reduction=float(N),
      axis_name=axis_name,
    )
    losses = optax.sigmoid_binary_cross_entropy(x, labels)
    return jnp.where(mask, losses, 0.0).sum() / N

  return jax.grad(loss, argnums=(0, 1))(x, WINDOWED.init())


def batch_norms(x, mask, domain, axis_name=None):
  scale, options = 1 + jnp.arange(6.0), {'axis_name': axis_name}
  every = {
    'batch_norm': lambda x: ghm.batch_norm(x, scale, mask=mask, **options),
    'batch_renorm': lambda x: ghm.batch_renorm(
      x, ghm.RunningMoments.init((6,)), mask=mask, **options
    ),
    'domain_batch_norm': lambda x: ghm.domain_batch_norm(
      x, domain, num_domains=3, **options
    ),
  }
  results = {}
  for name, normalized in every.items():

    def loss(x, normalized=normalized):
      y, moments = normalized(x)
      return y * jnp.sin(x), moments

    results[name] = slope(loss, x)
  return together(results)


def ghosts(x, mask, axis_name=None):
  def loss(x, scale):
    y, moments = ghm.ghost_batch_norm(
      x, scale, ghost_size=4, mask=mask, axis_name=axis_name
    )
    return jnp.sum(y * jnp.sin(x)), moments

  scale = 1 + jnp.arange(6.0)
  return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, scale)


def domains(x, domain, weights, axis_name=None):
  return slope(
    lambda x: (
      ghm.domain_loss(x, domain, weights=weights, axis_name=axis_name),
    ),
    x,
  )


def predictions(x, mask, axis_name=None):
  sums = reversal.prediction_sums(x, mask, axis_name=axis_name)
  scores = reversal.prediction_entropy, reversal.mutual_information
  return sums, tuple(score(sums) for score in (*scores, reversal.mano))


def several_losses(x, y, axis_name=None):
  def fork(x):
    one, other, third = conflict.fork(x, 3, axis_name=axis_name)
    return (jnp.square(one - 1) + jnp.sin(2 * other) - third,)

  gramian = conflict.gramian(jnp.stack([x, y]), axis_name=axis_name)
  return together({'gramian': ((), gramian), 'fork': slope(fork, x)})


def reversed_gradient(x, scale, axis_name=None):
  """Nothing is sent."""
  del axis_name
  reverse = ghm.reverse_gradient
  return slope(lambda x: (jnp.square(reverse(x, scale)) * jnp.sin(x),), x)


def tapped(x, axis_name=None):
  """Statistics of the whole batch, as the gradient of what is not split."""
  empty = flow.empty_tap()
  if axis_name:
    empty = jax.lax.pcast(empty, axis_name, to='varying')

  def loss(x, stats):
    return jnp.sum(jnp.square(flow.tap(x, stats)) * jnp.sin(x))

  gradient, stats = jax.grad(loss, argnums=(0, 1))(x, empty)
  if axis_name:
    stats = jax.lax.psum(stats, axis_name)
  return gradient, (stats.norm, stats.elements, stats.sum, stats.zeros)


def tapped_examples(x, axis_name=None):
  del axis_name

  def loss(x, stats):
    return jnp.sum(jnp.square(flow.tap(x, stats)) * jnp.sin(x))

  gradient, stats = jax.grad(loss, argnums=(0, 1))(
    x, flow.empty_tap(histogram=True, examples=N)
  )
  return gradient, (stats.example_norms, stats.histogram)


def clipped(x, axis_name=None):
  """The state, too, has the layout that it was made with."""
  del axis_name
  rule = ghm.in_backward(ghm.clip_by_norm_ema(warmup_steps=1))
  state = rule.init(x)
  return jax.grad(
    lambda x, state: jnp.sum(jnp.square(rule(x, state))), argnums=(0, 1)
  )(x, state)


OF_BATCH = (P('d'), P())
CASES = {
  'sigmoid_ghm_loss': Case(
    *(sigmoid(BINNED), (LOGITS, LABELS, MASK), BATCH, OF_BATCH, [34])
  ),
  'sigmoid_ghm_loss, batch x model': Case(
    *(sigmoid(WINDOWED), (LOGITS, LABELS, MASK), P('d', 'model')),
    out=(P('d', 'model'), P()),
    sent=[516, 516],  # for each axis of the mesh
    shape=(4, 2),
  ),
  'other ghm losses': Case(
    *(other_ghm_losses, (LOGITS, LABELS, CLASS, MASK), BATCH, OF_BATCH),
    sent=[516, 516, 34],
  ),
  'other ghm losses, of split logits alone': Case(
    *(other_ghm_losses, (LOGITS, LABELS, CLASS, MASK)),
    *((BATCH, P(), P(), P()), OF_BATCH, [516, 516, 34]),
    modes=('explicit',),
  ),
  'ClassCounts, adjust_logits, loss_per_positive': Case(
    *(of_classes, (LOGITS, LABELS, CLASS, MASK), BATCH, OF_BATCH),
    sent=[CLASSES + 2],
  ),
  'ClassCounts, classes split': Case(
    *(of_classes, (LOGITS, LABELS, CLASS, MASK)),
    specs=(P('d', 'model'), P('d', 'model'), BATCH, BATCH),
    out=(P('d', 'model'), P()),
    shape=(4, 2),
    modes=('explicit',),
    also=('all-gather',),  # of the sums, since the state is whole
  ),
  'harmonize': Case(
    *(harmonized, (LOGITS, LABELS, MASK), BATCH, OF_BATCH, [516])
  ),
  'batch norms': Case(
    *(batch_norms, (LOGITS, MASK[:, :1], DOMAIN), BATCH, OF_BATCH)
  ),
  'ghost_batch_norm': Case(
    *(ghosts, (LOGITS, MASK), BATCH, ((P('d'), P()), P()))
  ),
  'domain_loss': Case(
    domains, (LOGITS, DOMAIN, np.abs(OTHERS[:, 0])), BATCH, OF_BATCH, 384
  ),
  'prediction_sums': Case(
    predictions, (LOGITS, MASK[:, 0]), BATCH, (P(), P()), sent=10
  ),
  'gramian, fork': Case(several_losses, (LOGITS, OTHERS), BATCH, OF_BATCH, 9),
  'reverse_gradient': Case(
    *(reversed_gradient, (LOGITS, np.abs(OTHERS[:, 0])), BATCH, OF_BATCH, 0)
  ),
  'tap': Case(tapped, (LOGITS,), BATCH, OF_BATCH),
  'tap of examples': Case(
    *(tapped_examples, (LOGITS,), BATCH, OF_BATCH, 3 * N),
    modes=('explicit',),
    also=('all-gather',),  # an empty tap that is whole is filled whole
  ),
  'in_backward': Case(
    *(clipped, (LOGITS,), BATCH, OF_BATCH), modes=('explicit',)
  ),
}


@parametrize(CASES)
def test_devices_do_together_what_one_does(case, mode):
  """Nothing is sent but sums, and these are small."""
  check(case, mode)


def test_sixteen_small_batches_differ_but_sixteen_shards_do_not():
  """The reference weighs every shard by itself and is off by half."""
  rng = np.random.default_rng(1)
  logits = np.sort(rng.normal(size=256).astype(np.float32) * 3)
  labels = (rng.uniform(size=256) < 0.1).astype(np.float32)

  def grad(x, y, axis_name=None):
    def loss(x):
      return ghm.sigmoid_ghm_loss(
        x,
        y,
        weighting=published(ghm.BinnedDensity(bins=10)),
        axis_name=axis_name,
      ).sum()

    return jax.grad(loss)(x)

  @jax.jit
  def gradients(x, y):
    shards = x.reshape(16, 16), y.reshape(16, 16)
    joined = functools.partial(grad, axis_name='shard')
    return (
      grad(x, y),
      jax.vmap(grad)(*shards).reshape(-1),
      jax.vmap(joined, axis_name='shard')(*shards).reshape(-1),
    )

  whole, alone, joined = gradients(logits, labels)
  np.testing.assert_allclose(joined, whole, rtol=1e-5)
  assert np.linalg.norm(alone - whole) > 0.5 * np.linalg.norm(whole)


def test_shards_that_mean_their_own_examples_say_so_by_the_reduction():
  def grad(x, y, reduction='mean', axis_name=None):
    def loss(x):
      x = ghm.harmonize(
        *(x, BINNED.init()),
        weighting=published(BINNED),
        axis=(),
        reduction=reduction,
        axis_name=axis_name,
      )
      return optax.sigmoid_binary_cross_entropy(x, y).mean()

    return jax.grad(loss)(x)

  @jax.jit
  def gradients(x, y):
    own = functools.partial(grad, reduction=x.size / 8, axis_name='i')
    parts = jax.vmap(own, axis_name='i')(x.reshape(8, -1), y.reshape(8, -1))
    return grad(x, y), parts.reshape(x.shape) / 8

  whole, parts = gradients(LOGITS, LABELS)
  np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-8)


def test_a_varying_state_inside_shard_map_sums_to_the_mean():
  """Without axis_name every shard learns alone; the states add up."""

  def local(x, y, state):
    def loss(x, state):
      state = jax.lax.pcast(state, 'd', to='varying')
      x = ghm.harmonize(
        x, state, weighting=published(BINNED), axis=(), reduction=float(N)
      )
      losses = optax.sigmoid_binary_cross_entropy(x, y)
      return jax.lax.psum(losses.sum(), 'd') / N

    return jax.grad(loss, argnums=1)(x, state)

  @jax.jit
  def states(x, y):
    summed = jax.shard_map(
      local,
      mesh=mesh_of('auto'),
      in_specs=(BATCH, BATCH, P()),
      out_specs=P(),
    )(x, y, BINNED.init())
    norms = jnp.abs(jax.nn.sigmoid(x) - y)
    return summed, ghm.harmony_weights(norms, weighting=published(BINNED))[1]

  summed, expected = states(LOGITS, LABELS)
  assert summed.calls == 8
  np.testing.assert_allclose(
    summed.histogram / summed.evidence,
    expected.histogram / expected.evidence / 8,
    rtol=1e-4,
    atol=0.2,  # norms on an edge, by rounding
  )
