"""Activations and their gradients in one pass: functions of a count, the arrays read and the array written.

The arithmetic is in ``source/activations.cpp`` and ``source/functions.h``.
"""

from gpucnn.ops.cpu.compiled.library import function

relu_forward = function("relu_forward", "ipp")
relu_backward = function("relu_backward", "ippp")
leaky_relu_forward = function("leaky_relu_forward", "ifpp")
leaky_relu_backward = function("leaky_relu_backward", "ifppp")
sigmoid_forward = function("sigmoid_forward", "ipp")
sigmoid_backward = function("sigmoid_backward", "ippp")
tanh_forward = function("tanh_forward", "ipp")
tanh_backward = function("tanh_backward", "ippp")
silu_forward = function("silu_forward", "ipp")
silu_backward = function("silu_backward", "ippp")
gelu_forward = function("gelu_forward", "ipp")
gelu_backward = function("gelu_backward", "ippp")
gelu_tanh_forward = function("gelu_tanh_forward", "ipp")
gelu_tanh_backward = function("gelu_tanh_backward", "ippp")
