import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ghm
from tests.batch_normalization.batch_norm_test import assert_close, running


@pytest.mark.parametrize(
  ('with_bias', 'affine'), [(False, True), (True, False), (True, True)]
)
def test_folding_a_convolution_or_a_dense_layer(with_bias, affine, rng):
  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  kernel, x = normal(3, 3, 2, 5), normal(2, 6, 6, 2)
  mean, var = normal(5), jnp.exp(normal(5))
  kernel_bias = normal(5) if with_bias else None
  scale, bias = (normal(5), normal(5)) if affine else (None, None)
  averages = running(mean, var)

  def conv(x, kernel, bias):
    y = jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return y if bias is None else y + bias[None, None, None]

  def dense(x, kernel, bias):
    y = x[:, 0, 0] @ kernel[0, 0]
    return y if bias is None else y + bias[None]

  for layer, weights in ((conv, kernel), (dense, kernel[:1, :1])):
    expected = optax_ghm.batch_norm_inference(
      layer(x, weights, kernel_bias), averages, scale, bias, epsilon=0.1
    )
    folded = optax_ghm.fold_batch_norm(
      weights, kernel_bias, averages, scale, bias, epsilon=0.1
    )
    assert folded[0].shape == weights.shape
    assert_close(layer(x, *folded), expected, 1e-5)
  folded = optax_ghm.fold_batch_norm(kernel, kernel_bias, averages)
  assert_close(
    folded[0], np.asarray(kernel) / np.sqrt(np.asarray(var) + 1e-5), 1e-6
  )


def test_kernels_of_16_bits():
  kernel, bias = optax_ghm.fold_batch_norm(
    jnp.ones((3, 2), jnp.bfloat16),
    None,
    running(jnp.zeros(2), jnp.ones(2)),
  )
  assert kernel.dtype == bias.dtype == jnp.bfloat16


def test_a_kernel_that_does_not_fit():
  with pytest.raises(ValueError, match=r'kernel, of shape \(3, 4\)'):
    optax_ghm.fold_batch_norm(
      jnp.ones((3, 4)), None, running(jnp.ones(3), jnp.ones(3))
    )
