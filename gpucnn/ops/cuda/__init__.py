"""The CUDA backend: every operation of :class:`gpucnn.ops.contract.Operations`, by the kernels of gpucnn_kernels.

Arrays are CuPy's, or HostArrays where the kernels run on the host runtime. Nothing here imports CuPy: who
has one of its arrays has done so.
"""

from __future__ import annotations

from gpucnn.ops.cuda.activations import (
    gelu_backward,
    gelu_forward,
    leaky_relu_backward,
    leaky_relu_forward,
    relu6_backward,
    relu6_forward,
    relu_backward,
    relu_forward,
    sigmoid_backward,
    sigmoid_forward,
    silu_backward,
    silu_forward,
    softmax_backward,
    softmax_forward,
    tanh_backward,
    tanh_forward,
)
from gpucnn.ops.cuda.augmentation import (
    augment_images,
)
from gpucnn.ops.cuda.convolution import (
    col2im,
    conv2d_algorithms,
    conv2d_backward_bias,
    conv2d_backward_data,
    conv2d_backward_filter,
    conv2d_choose,
    conv2d_forward,
    conv_transpose2d_backward_data,
    conv_transpose2d_backward_filter,
    conv_transpose2d_forward,
    im2col,
)
from gpucnn.ops.cuda.dropout import (
    dropout_backward,
    dropout_forward,
)
from gpucnn.ops.cuda.images import (
    images_to_float,
)
from gpucnn.ops.cuda.inference import (
    conv2d_inference,
    conv2d_max_pool2d_forward,
    conv2d_max_pool2d_inference,
)
from gpucnn.ops.cuda.linear import (
    linear_backward,
    linear_backward_bias,
    linear_backward_data,
    linear_backward_weight,
    linear_forward,
)
from gpucnn.ops.cuda.losses import (
    binary_cross_entropy_with_logits_backward,
    binary_cross_entropy_with_logits_forward,
    mean_squared_error_backward,
    mean_squared_error_forward,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from gpucnn.ops.cuda.normalization import (
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_inference,
    batch_norm_inference_backward,
)
from gpucnn.ops.cuda.optimizers import (
    adam_step,
    rmsprop_step,
    scale,
    sgd_step,
    sum_of_squares,
)
from gpucnn.ops.cuda.pooling import (
    adaptive_avg_pool2d_backward,
    adaptive_avg_pool2d_forward,
    avg_pool2d_backward,
    avg_pool2d_forward,
    max_pool2d_backward,
    max_pool2d_forward,
)

__all__ = [
    "adam_step",
    "adaptive_avg_pool2d_backward",
    "adaptive_avg_pool2d_forward",
    "augment_images",
    "avg_pool2d_backward",
    "avg_pool2d_forward",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
    "binary_cross_entropy_with_logits_backward",
    "binary_cross_entropy_with_logits_forward",
    "col2im",
    "conv2d_algorithms",
    "conv2d_backward_bias",
    "conv2d_backward_data",
    "conv2d_backward_filter",
    "conv2d_choose",
    "conv2d_forward",
    "conv2d_inference",
    "conv2d_max_pool2d_forward",
    "conv2d_max_pool2d_inference",
    "conv_transpose2d_backward_data",
    "conv_transpose2d_backward_filter",
    "conv_transpose2d_forward",
    "dropout_backward",
    "dropout_forward",
    "gelu_backward",
    "gelu_forward",
    "im2col",
    "images_to_float",
    "leaky_relu_backward",
    "leaky_relu_forward",
    "linear_backward",
    "linear_backward_bias",
    "linear_backward_data",
    "linear_backward_weight",
    "linear_forward",
    "max_pool2d_backward",
    "max_pool2d_forward",
    "mean_squared_error_backward",
    "mean_squared_error_forward",
    "relu6_backward",
    "relu6_forward",
    "relu_backward",
    "relu_forward",
    "rmsprop_step",
    "scale",
    "sgd_step",
    "sigmoid_backward",
    "sigmoid_forward",
    "silu_backward",
    "silu_forward",
    "softmax_backward",
    "softmax_cross_entropy_backward",
    "softmax_cross_entropy_forward",
    "softmax_forward",
    "sum_of_squares",
    "tanh_backward",
    "tanh_forward",
]
