"""A batch norm in evaluation, and its place in the layer before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import optax_ghm
from tests.support import strategies_arrays as arrays_of
from tests.support.oracles_batch_norm import EPSILON, assert_close, averages

inference, fold = (
  jax.jit(f, static_argnames='epsilon')
  for f in (optax_ghm.batch_norm_inference, optax_ghm.fold_batch_norm)
)


@given(
  shape=st.sampled_from([(3, 2), (2, 1, 3, 2), (0, 2)]),
  layout=st.sampled_from(arrays_of.LAYOUTS),
  with_bias=st.booleans(),
  affine=st.booleans(),
  data=st.data(),
)
def test_inference_is_its_formula_and_folds_into_the_layer_before(
  shape, layout, with_bias, affine, data
):
  ordinary = st.integers(-32, 32).map(lambda n: n / 16)

  def draw(*shape):
    return data.draw(arrays_of.arrays(np.float32, shape, ordinary))

  x, kernel = arrays_of.laid_out(draw(*shape), layout), draw(2, 3)
  kernel_bias, mean, bias, scale = (draw(3) for _ in range(4))
  running = averages(mean, np.square(draw(3)))
  wide = np.asarray(x, float) @ kernel + (kernel_bias if with_bias else 0)
  norm = running, *((scale, bias) if affine else (None, None))
  y = inference(wide.astype(np.float32), *norm, epsilon=EPSILON)
  wanted = (wide - mean) / np.sqrt(running.var + EPSILON)
  wanted = wanted * scale + bias if affine else wanted
  np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-3)
  kernel_bias = kernel_bias if with_bias else None
  folded, shift = fold(kernel, kernel_bias, *norm, epsilon=EPSILON)
  found = np.asarray(x, float) @ np.asarray(folded, float) + np.asarray(shift)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_folding_a_convolution(rng):
  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  kernel, x = normal(3, 3, 2, 5), normal(2, 6, 6, 2)
  running = averages(normal(5), np.exp(normal(5)))
  kernel_bias, scale, bias = normal(5), normal(5), normal(5)

  @jax.jit
  def program(x):
    def conv(kernel, bias):
      y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
      )
      return y + bias[None, None, None]

    wanted = optax_ghm.batch_norm_inference(
      conv(kernel, kernel_bias), running, scale, bias
    )
    folded = optax_ghm.fold_batch_norm(
      kernel, kernel_bias, running, scale, bias
    )
    return folded, conv(*folded), wanted

  folded, found, wanted = program(x)
  assert folded[0].shape == kernel.shape
  assert_close(found, wanted, 1e-5)


@pytest.mark.device
def test_kernels_of_16_bits_and_the_default_epsilon():
  ones = np.ones((3, 2), np.float32)
  running = averages(np.zeros(2), np.array([0, 1e-5]))
  kernel, bias = fold(ones.astype(jnp.bfloat16), None, running)
  assert kernel.dtype == bias.dtype == jnp.bfloat16
  kernel, _ = fold(ones, None, running)
  wanted = np.broadcast_to([1e5**0.5, 5e4**0.5], (3, 2))
  np.testing.assert_allclose(kernel, wanted, rtol=1e-5)


def test_a_kernel_that_does_not_fit():
  running = averages(np.ones(3), np.ones(3))
  with pytest.raises(ValueError, match=r'kernel, of shape \(3, 4\)'):
    jax.eval_shape(
      lambda: optax_ghm.fold_batch_norm(np.ones((3, 4)), None, running)
    )
