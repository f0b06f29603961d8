"""Counts of classes: the same however the examples are split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import optax_ghm as ghm

pytestmark = pytest.mark.device
N, CLASSES = 12, 3
WEIGHTS = st.sampled_from([0.0, 0.25, 1.0, 3.0, -1.0, np.nan])


@jax.jit
def updated(old, labels, mask, weights, decay):
  """At once, in two batches of which the first decays, and on devices."""
  state = ghm.ClassCounts.init(CLASSES).update(old)
  whole = state.update(labels, mask=mask, weights=weights, decay=decay)
  first, second = (
    functools.partial(
      ghm.ClassCounts.update,
      labels=labels[part],
      mask=mask[part],
      weights=weights[part],
    )
    for part in (np.s_[:5], np.s_[5:])
  )
  halves = second(first(state, decay=decay))
  on_devices = jax.vmap(
    lambda labels, mask, weights: state.update(
      labels, mask=mask, weights=weights, decay=decay, axis_name='d'
    ),
    axis_name='d',
  )(*(u.reshape(4, 3, *u.shape[1:]) for u in (labels, mask, weights)))
  return whole, halves, jax.tree.map(lambda u: u[1], on_devices), state


SOFT = st.sampled_from([0.0, 1.0, 0.3, -1.0, np.nan, np.inf])


@pytest.mark.parametrize('kind', ['integers', 'soft'])
@given(
  data=st.data(),
  mask=hnp.arrays(bool, N),
  weights=hnp.arrays(np.float32, N, elements=WEIGHTS),
  decay=st.sampled_from([1.0, 0.9, 0.0]),
)
def test_counts_are_sums_however_split(kind, data, mask, weights, decay):
  integers = st.integers(-2, CLASSES + 1)
  old = data.draw(hnp.arrays(np.int32, N, elements=integers))
  if kind == 'integers':
    labels = data.draw(hnp.arrays(np.int32, N, elements=integers))
    soft = (labels[:, None] == np.arange(CLASSES)).astype(float)
  else:
    labels = data.draw(hnp.arrays(np.float32, (N, CLASSES), elements=SOFT))
    soft = np.where((labels > 0) & np.isfinite(labels), labels, 0)
  *found, start = jax.device_get(updated(old, labels, mask, weights, decay))
  amounts = np.where(mask & (weights > 0), weights, 0).astype(float)
  keep = decay if amounts.sum() > 0 else 1.0  # an empty batch changes nothing
  counts = keep * np.bincount(old[old >= 0], minlength=9)[:CLASSES]
  counts = counts + amounts @ soft
  np.testing.assert_allclose(start.examples, N)
  for way, state in zip(('whole', 'halves', 'devices'), found, strict=True):
    if way == 'halves' and amounts[:5].sum() == 0:
      continue  # then the batch that was to decay the counts was empty
    np.testing.assert_allclose(
      state.examples, keep * N + amounts.sum(), 1e-5, err_msg=way
    )
    np.testing.assert_allclose(
      state.counts, counts, 1e-5, atol=1e-5, err_msg=way
    )
    assert {u.dtype for u in state} == {np.dtype('float32')}


def test_counts_stay_right_where_float32_counts_no_further():
  """After a billion examples, 64,000 of a class that was never seen."""
  start = ghm.ClassCounts(np.float32([0.5, 0.5, 0]), np.float32(2**30))

  @jax.jit
  def run(state, decay):
    labels = jnp.full((64,), 2)
    return jax.lax.fori_loop(
      *(0, 1000), lambda _, state: state.update(labels, decay=decay), state
    )

  state = run(start, 1.0)
  np.testing.assert_allclose(state.counts, [2**29, 2**29, 64_000], rtol=1e-3)
  bounded = run(start, 0.9)
  np.testing.assert_allclose(bounded.examples, 640, rtol=1e-5)
  np.testing.assert_allclose(bounded.frequencies, [0, 0, 1], atol=1e-6)


def test_labels_of_other_kinds():
  state = ghm.ClassCounts.init(CLASSES)

  @jax.jit
  def counts():
    return (
      state.update(np.uint8([[0, 255], [2, 2]])).counts,
      state.update(np.array([[True, True, False]])).counts,
      state.update(np.zeros((0,), np.int32)).examples,
      state.update(np.int32([1]), weights=np.float32([np.inf])).examples,
    )

  of_bytes, of_bools, of_none, of_infinity = counts()
  np.testing.assert_allclose(of_bytes, [1, 0, 2], rtol=1e-6)
  np.testing.assert_allclose(of_bools, [1, 1, 0])
  assert of_none == of_infinity == 0
  with pytest.raises(ValueError, match='3 classes along the last axis'):
    state.update(np.zeros((4, 2), np.float32))
  with pytest.raises(ValueError, match='decay must be from 0 to 1'):
    state.update(np.zeros(4, np.int32), decay=1.5)
  with pytest.raises(TypeError, match='labels must be real'):
    state.update(np.zeros(3, np.complex64))
  with pytest.raises(ValueError, match='num_classes must be a positive int'):
    ghm.ClassCounts.init(0)
