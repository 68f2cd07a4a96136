"""Every operation that a backend supplies, with its signature, shapes and formula.

A backend is a module: :mod:`gpucnn.ops.cpu` is NumPy, the CUDA one calls the kernels of ``gpucnn_kernels``.
Each implements all of :class:`Operations`; mypy and a test hold their signatures to it. Operations are pure:
arrays in, new arrays out, or into ``out`` where one is given (it must have the result's shape and dtype).
Exceptions are named in the docstring: optimizer steps and running statistics change their arrays in place.

Arrays are N, C, H, W with any strides. Weights are O, I / groups, kH, kW; linear weights are (out, in). The
result has the dtype of the input. ``stride``, ``dilation`` and ``kernel_size`` are an integer or (height,
width); convolution padding is an integer, (height, width), (top, bottom, left, right), "same" or "valid".

Shapes that do not fit raise :class:`gpucnn_kernels.ProblemError` or :class:`gpucnn.errors.ShapeError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gpucnn_kernels.problem import IntOrPair, Padding

Array = Any
"""A numpy.ndarray or a cupy.ndarray."""


class Operations(Protocol):
    """The operations of a backend."""

    # ---------------------------------------------------------------- convolution

    def conv2d_forward(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        algorithm: str = "auto",
        out: Array | None = None,
    ) -> Array:
        """Cross-correlation of x (N, C, H, W) with weight (K, C / groups, R, S), plus bias (K,): (N, K, P, Q).

        ``algorithm`` names how; the backend's ``conv2d_algorithms`` lists the names.
        """

    def conv2d_backward_data(
        self,
        dy: Array,
        weight: Array,
        *,
        input_size: Sequence[int],
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        algorithm: str = "auto",
        residual: Array | None = None,
        out: Array | None = None,
    ) -> Array:
        """The gradient for x, (N, C, H, W), from dy (N, K, P, Q), plus ``residual``; ``input_size`` is (H, W).

        A residual, of the gradient's shape, is added before the sums are rounded; it may be ``out`` itself.
        """

    def conv2d_backward_filter(
        self,
        dy: Array,
        x: Array,
        *,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        algorithm: str = "auto",
        out: Array | None = None,
        out_bias: Array | None = None,
    ) -> Array:
        """The gradient for the weight, (K, C / groups, R, S), summed over the batch.

        The gradient for the bias, (K,), goes to ``out_bias``, in C order and of dy's dtype, where it is given. On
        a GPU both may also be float32 where dy has 16 bits: the sums as they are, not rounded.
        """

    def conv2d_backward_bias(self, dy: Array, *, out: Array | None = None) -> Array:
        """The gradient for the bias, (K,): the sum of dy (N, K, P, Q) over N, P and Q."""

    def conv2d_algorithms(self, direction: str) -> tuple[str, ...]:
        """Names that ``algorithm`` takes for "forward", "backward_data" or "backward_filter", without "auto"."""

    def conv2d_choose(self, direction: str, problem: Any, dtype: Any) -> str:
        """The name that "auto" stands for, for this Conv2dProblem and dtype."""

    def conv2d_inference(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        residual: Array | None = None,
        *,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        algorithm: str = "auto",
        activation: str = "identity",
        negative_slope: float = 0.01,
        out: Array | None = None,
    ) -> Array:
        """activation(convolution + bias + residual), with residual (N, K, P, Q) or None.

        ``activation`` is one of identity, relu, relu6, leaky_relu (of ``negative_slope``), sigmoid, tanh, gelu,
        gelu_tanh and silu; the rest is :meth:`conv2d_forward`'s.
        """

    def conv2d_max_pool2d_inference(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        pool_size: IntOrPair,
        pool_stride: IntOrPair | None = None,
        pool_padding: IntOrPair = 0,
        pool_dilation: IntOrPair = 1,
        ceil_mode: bool = False,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        activation: str = "identity",
        negative_slope: float = 0.01,
        out: Array | None = None,
    ) -> Array:
        """The largest value of each window of activation(convolution + bias), (N, K, P', Q').

        What begins with ``pool_``, and ``ceil_mode``, are :meth:`max_pool2d_forward`'s, the rest
        :meth:`conv2d_inference`'s.
        """

    def conv2d_max_pool2d_forward(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        pool_size: IntOrPair,
        pool_stride: IntOrPair | None = None,
        pool_padding: IntOrPair = 0,
        pool_dilation: IntOrPair = 1,
        ceil_mode: bool = False,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        activation: str = "identity",
        negative_slope: float = 0.01,
        out: Array | None = None,
    ) -> tuple[Array, Array]:
        """(y, argmax) of :meth:`conv2d_max_pool2d_inference`'s y, as :meth:`max_pool2d_forward` gives them."""

    def conv_transpose2d_forward(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        output_padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        algorithm: str = "auto",
        out: Array | None = None,
    ) -> Array:
        """Transposed convolution of x (N, C_in, H, W) with weight (C_in, C_out / groups, R, S).

        It is the input gradient of a convolution from C_out to C_in channels, plus bias (C_out,);
        ``algorithm`` is one of "backward_data"'s.
        """

    def conv_transpose2d_backward_data(
        self,
        dy: Array,
        weight: Array,
        *,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        algorithm: str = "auto",
        out: Array | None = None,
    ) -> Array:
        """The gradient for x of a transposed convolution: a plain convolution of dy."""

    def conv_transpose2d_backward_filter(
        self,
        dy: Array,
        x: Array,
        *,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        groups: int = 1,
        algorithm: str = "auto",
        out: Array | None = None,
    ) -> Array:
        """The gradient for the weight of a transposed convolution, (C_in, C_out / groups, R, S)."""

    def im2col(
        self,
        x: Array,
        *,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        out: Array | None = None,
    ) -> Array:
        """Every window of x (N, C, H, W) as a column: (N, C * R * S, P * Q), rows ordered c, r, s."""

    def col2im(
        self,
        columns: Array,
        *,
        input_size: Sequence[int],
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: Padding = 0,
        dilation: IntOrPair = 1,
        out: Array | None = None,
    ) -> Array:
        """The adjoint of im2col: columns (N, C * R * S, P * Q) added up where windows overlap: (N, C, H, W)."""

    # ---------------------------------------------------------------- pooling

    def max_pool2d_forward(
        self,
        x: Array,
        *,
        kernel_size: IntOrPair,
        stride: IntOrPair | None = None,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        ceil_mode: bool = False,
        out: Array | None = None,
    ) -> tuple[Array, Array]:
        """(y, argmax), both (N, C, P, Q): the largest value of each window and its place r * S + s in it.

        Padding never wins. On ties the first place in row order wins; a NaN in the window wins. argmax is
        uint8 where the window has at most 256 places, otherwise int32.
        """

    def max_pool2d_backward(
        self,
        dy: Array,
        argmax: Array,
        *,
        input_size: Sequence[int],
        kernel_size: IntOrPair,
        stride: IntOrPair | None = None,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        ceil_mode: bool = False,
        y: Array | None = None,
        activation: str = "identity",
        negative_slope: float = 0.01,
        out: Array | None = None,
    ) -> Array:
        """The gradient for x, (N, C, H, W): each dy added at its window's argmax.

        With ``y``, the pooled result, and the ``activation`` that x was the result of ("relu", "sigmoid", "tanh",
        or "leaky_relu" with a ``negative_slope`` above 0), it is the gradient for what the activation read.
        """

    def avg_pool2d_forward(
        self,
        x: Array,
        *,
        kernel_size: IntOrPair,
        stride: IntOrPair | None = None,
        padding: IntOrPair = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        out: Array | None = None,
    ) -> Array:
        """The mean of each window, (N, C, P, Q).

        The divisor counts the window's places inside the padded input (``count_include_pad``) or inside the
        input only, as in PyTorch.
        """

    def avg_pool2d_backward(
        self,
        dy: Array,
        *,
        input_size: Sequence[int],
        kernel_size: IntOrPair,
        stride: IntOrPair | None = None,
        padding: IntOrPair = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        out: Array | None = None,
    ) -> Array:
        """The gradient for x, (N, C, H, W): dy over the divisor, added to each place of its window."""

    def adaptive_avg_pool2d_forward(self, x: Array, *, output_size: IntOrPair, out: Array | None = None) -> Array:
        """Means over windows floor(i * H / P) .. ceil((i + 1) * H / P): (N, C, P, Q) for any input size."""

    def adaptive_avg_pool2d_backward(
        self, dy: Array, *, input_size: Sequence[int], out: Array | None = None
    ) -> Array:
        """The gradient for x, (N, C, H, W)."""

    # ---------------------------------------------------------------- normalization

    def batch_norm_forward(
        self,
        x: Array,
        weight: Array | None = None,
        bias: Array | None = None,
        running_mean: Array | None = None,
        running_var: Array | None = None,
        *,
        momentum: float = 0.1,
        epsilon: float = 1e-5,
        residual: Array | None = None,
        activation: str = "identity",
        negative_slope: float = 0.01,
        with_mask: bool = False,
        out: Array | None = None,
    ) -> tuple[Array, ...]:
        """(y, mean, inverse_std) with statistics over all axes but 1 of x (N, C) or (N, C, H, W).

        y = activation((x - mean) * inverse_std * weight + bias + residual), with residual of x's shape or None,
        inverse_std = 1 / sqrt(biased variance + epsilon). The running statistics, where given, move in place by
        ``momentum`` towards the mean and the *unbiased* variance. ``activation`` is "identity", "relu",
        "leaky_relu" or "relu6". Raises ShapeError with fewer than two values a channel.

        ``with_mask`` adds a fourth result: None, or an array for backward, in a form of the backend's own, that
        says at which numbers of y a gradient passes the activation as it is.
        """

    def batch_norm_backward(
        self,
        dy: Array,
        x: Array,
        weight: Array | None,
        mean: Array,
        inverse_std: Array,
        *,
        y: Array | None = None,
        mask: Array | None = None,
        activation: str = "identity",
        negative_slope: float = 0.01,
        out: Array | None = None,
        out_weight: Array | None = None,
        out_bias: Array | None = None,
        out_residual: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """(dx, dweight, dbias) of the training-time batch norm, of dy of y, its result after the activation.

        ``activation`` is as forward's, with a ``negative_slope`` above 0; without one y is not needed. ``mask`` is
        what forward gave with y: a backend may read it instead, and gives the same results without it. dweight and
        dbias go to ``out_weight`` and ``out_bias``, arrays in C order, where they are given; to ``out_residual``
        the gradient for the residual, which is dy through the activation.
        """

    def batch_norm_inference(
        self,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        running_mean: Array,
        running_var: Array,
        *,
        epsilon: float = 1e-5,
        out: Array | None = None,
    ) -> Array:
        """(x - running_mean) / sqrt(running_var + epsilon) * weight + bias."""

    def batch_norm_inference_backward(
        self,
        dy: Array,
        x: Array | None,
        weight: Array | None,
        running_mean: Array,
        running_var: Array,
        *,
        epsilon: float = 1e-5,
        out: Array | None = None,
        out_weight: Array | None = None,
        out_bias: Array | None = None,
    ) -> tuple[Array, Array | None, Array | None]:
        """(dx, dweight, dbias) of :meth:`batch_norm_inference`, whose statistics are constants.

        dx = dy * weight / sqrt(running_var + epsilon) takes no x: where that is None, dweight and dbias are, too.
        They go to ``out_weight`` and ``out_bias``, arrays in C order, where these are given.
        """

    # ---------------------------------------------------------------- activations; out may be the input itself

    def relu_forward(self, x: Array, *, out: Array | None = None) -> Array:
        """max(x, 0); a NaN stays a NaN."""

    def relu_backward(self, dy: Array, y: Array, *, out: Array | None = None) -> Array:
        """Dy where the output y > 0, else 0."""

    def relu6_forward(self, x: Array, *, out: Array | None = None) -> Array:
        """min(max(x, 0), 6); a NaN stays a NaN."""

    def relu6_backward(self, dy: Array, y: Array, *, out: Array | None = None) -> Array:
        """Dy where the output 0 < y < 6, else 0."""

    def leaky_relu_forward(self, x: Array, *, negative_slope: float = 0.01, out: Array | None = None) -> Array:
        """X where x > 0, else negative_slope * x."""

    def leaky_relu_backward(
        self, dy: Array, x: Array, *, negative_slope: float = 0.01, out: Array | None = None
    ) -> Array:
        """Dy where x > 0, else negative_slope * dy."""

    def sigmoid_forward(self, x: Array, *, out: Array | None = None) -> Array:
        """1 / (1 + exp(-x)), without overflow at any x."""

    def sigmoid_backward(self, dy: Array, y: Array, *, out: Array | None = None) -> Array:
        """Dy * y * (1 - y)."""

    def tanh_forward(self, x: Array, *, out: Array | None = None) -> Array:
        """tanh(x)."""

    def tanh_backward(self, dy: Array, y: Array, *, out: Array | None = None) -> Array:
        """Dy * (1 - y * y)."""

    def gelu_forward(self, x: Array, *, approximate: str = "none", out: Array | None = None) -> Array:
        """X * Phi(x), Phi the normal distribution function; "tanh" takes Hendrycks and Gimpel's approximation."""

    def gelu_backward(self, dy: Array, x: Array, *, approximate: str = "none", out: Array | None = None) -> Array:
        """Dy * (Phi(x) + x * phi(x)), or the tanh form's derivative."""

    def silu_forward(self, x: Array, *, out: Array | None = None) -> Array:
        """X * sigmoid(x)."""

    def silu_backward(self, dy: Array, x: Array, *, out: Array | None = None) -> Array:
        """Dy * s * (1 + x * (1 - s)) with s = sigmoid(x)."""

    def softmax_forward(self, x: Array, *, axis: int = -1, out: Array | None = None) -> Array:
        """exp(x - max) / sum, along ``axis``."""

    def softmax_backward(self, dy: Array, y: Array, *, axis: int = -1, out: Array | None = None) -> Array:
        """Y * (dy - sum(dy * y)), along ``axis``."""

    # ---------------------------------------------------------------- dropout

    def dropout_forward(
        self,
        x: Array,
        *,
        probability: float,
        seed: int,
        offset: int,
        per_channel: bool = False,
        out: Array | None = None,
    ) -> tuple[Array, Array]:
        """(y, mask): x / (1 - probability) where the boolean mask holds, 0 elsewhere.

        Element i, in C order of the logical array (of (N, C) with ``per_channel``; the mask is then
        (N, C, 1, 1)), is kept where word i of the Philox stream (seed, from offset on) has
        ``word >= probability * 2**32``: the same mask on every backend. See :mod:`gpucnn.random`.
        """

    def dropout_backward(self, dy: Array, mask: Array, *, probability: float, out: Array | None = None) -> Array:
        """Dy / (1 - probability) where the mask holds, 0 elsewhere."""

    # ---------------------------------------------------------------- linear

    def linear_forward(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        activation: str = "identity",
        negative_slope: float = 0.01,
        out: Array | None = None,
    ) -> Array:
        """activation(x (N, in) @ weight.T (weight is (out, in)) + bias (out,)): (N, out).

        ``activation`` is one of those of :meth:`conv2d_inference`.
        """

    def linear_backward(
        self,
        dy: Array,
        x: Array,
        weight: Array,
        *,
        y: Array | None = None,
        activation: str = "identity",
        negative_slope: float = 0.01,
        with_input: bool = True,
        with_bias: bool = True,
        weight_gradient: Array | None = None,
        bias_gradient: Array | None = None,
    ) -> tuple[Array | None, Array, Array | None]:
        """(dx, dweight, dbias) of y = activation(x @ weight.T + bias), what the three operations below give.

        dx is None unless ``with_input``, dbias unless ``with_bias``. dweight and dbias, which
        ``weight_gradient`` and ``bias_gradient`` take, are float32 where dy has 16 bits. ``activation`` is
        "identity", or one that the gradient goes back through by its result ``y``: "relu", "leaky_relu" with a
        slope above 0, "sigmoid" or "tanh".
        """

    def linear_backward_data(self, dy: Array, weight: Array, *, out: Array | None = None) -> Array:
        """Dy (N, out) @ weight: (N, in)."""

    def linear_backward_weight(self, dy: Array, x: Array, *, out: Array | None = None) -> Array:
        """dy.T @ x: (out, in)."""

    def linear_backward_bias(self, dy: Array, *, out: Array | None = None) -> Array:
        """The sum of dy over the batch: (out,)."""

    # ---------------------------------------------------------------- losses

    def softmax_cross_entropy_forward(
        self,
        logits: Array,
        targets: Array,
        *,
        weight: Array | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        reduction: str = "mean",
        check_targets: bool = True,
    ) -> tuple[Array, Array]:
        """(loss, probabilities) for logits (N, C) and targets (N,) of class numbers or (N, C) of probabilities.

        PyTorch's definition: with smoothing e, the target is (1 - e) * one_hot + e / C; a class weight
        multiplies each class's term, and for class numbers "mean" divides by the sum of the targets' weights.
        Samples of the class number ``ignore_index``, which may be any integer, have a loss of 0, and "mean" does
        not count them: over nothing but such it is NaN. With probabilities it must be negative or None.
        ``reduction`` is "mean", "sum" or "none" (loss then (N,)). Raises ArgumentError for another class number
        outside 0 .. C - 1; without ``check_targets``, which a GPU has to be waited for, it may make the loss NaN
        instead.
        """

    def softmax_cross_entropy_backward(
        self,
        probabilities: Array,
        targets: Array,
        *,
        weight: Array | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        reduction: str = "mean",
        out: Array | None = None,
    ) -> Array:
        """The gradient for the logits of the loss ("none": of the sum of the losses); 0 for ignored samples."""

    def binary_cross_entropy_with_logits_forward(
        self,
        logits: Array,
        targets: Array,
        *,
        weight: Array | None = None,
        positive_weight: Array | None = None,
        reduction: str = "mean",
    ) -> Array:
        """-(p * t * log(s) + (1 - t) * log(1 - s)) * w with s = sigmoid(logits), without overflow."""

    def binary_cross_entropy_with_logits_backward(
        self,
        logits: Array,
        targets: Array,
        *,
        weight: Array | None = None,
        positive_weight: Array | None = None,
        reduction: str = "mean",
        out: Array | None = None,
    ) -> Array:
        """The gradient for the logits."""

    def mean_squared_error_forward(self, prediction: Array, target: Array, *, reduction: str = "mean") -> Array:
        """(prediction - target) ** 2, its mean or sum."""

    def mean_squared_error_backward(
        self, prediction: Array, target: Array, *, reduction: str = "mean", out: Array | None = None
    ) -> Array:
        """2 * (prediction - target), over the element count for "mean"."""

    # ---------------------------------------------------------------- optimizers: in place, on flat buffers

    def sgd_step(
        self,
        parameter: Array,
        gradient: Array,
        momentum_buffer: Array | None,
        *,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        first_step: bool = False,
    ) -> None:
        """PyTorch's SGD on 1-d arrays, in place; ``first_step`` starts the momentum at the gradient itself."""

    def adam_step(
        self,
        parameter: Array,
        gradient: Array,
        first_moment: Array,
        second_moment: Array,
        *,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        step: int = 1,
    ) -> None:
        """Adam (Kingma and Ba), or AdamW (Loshchilov and Hutter) where ``decoupled``; ``step`` counts from 1."""

    def rmsprop_step(
        self,
        parameter: Array,
        gradient: Array,
        square_average: Array,
        momentum_buffer: Array | None,
        gradient_average: Array | None,
        *,
        lr: float,
        alpha: float = 0.99,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        """PyTorch's RMSprop, centered where ``gradient_average`` is given."""

    def sum_of_squares(self, x: Array) -> float:
        """The sum of x * x over all elements, accumulated in float64 or pairwise; inf or NaN pass through."""

    def scale(self, x: Array, factor: float) -> None:
        """X *= factor, in place."""

    # ---------------------------------------------------------------- images

    def images_to_float(
        self,
        images: Array,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        flip: Array | None = None,
        crop_offset: Array | None = None,
        crop_size: Sequence[int] | None = None,
        dtype: Any = "float32",
        out: Array | None = None,
    ) -> Array:
        """uint8 images (N, H, W, C) as normalized floats (N, C, h, w): (pixel / 255 - mean[c]) / std[c].

        ``flip`` (N,) booleans mirrors left to right; ``crop_offset`` (N, 2) integers and ``crop_size`` (h, w)
        cut a window first, whose places outside the image are 0 *after* normalization (the mean colour).
        """

    def augment_images(
        self,
        images: Array,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        index: Array | None = None,
        flip: Array | None = None,
        rows: tuple[Any, Any] | None = None,
        columns: tuple[Any, Any] | None = None,
        rotation: Array | None = None,
        shift: Array | None = None,
        colour: Array | None = None,
        cutout: Array | None = None,
        cutout_size: int = 0,
        dtype: Any = "float32",
        out: Array | None = None,
    ) -> Array:
        """uint8 images (N, H, W, C) changed one after the other as asked, and normalized: floats (N, C, h, w).

        1. ``columns``, then ``rows``, each (first, weights), resample: first (M, w) integers and weights
           (M, taps, w), where pixel x of a row is the sum over k of weights[k, x] times pixel first[x] + k, or the
           last pixel where that is beyond it; rows likewise, (M, h) and (M, taps, h), along the height. M is 1,
           for all images, or N. first is 0 or more.
        2. ``flip`` (N,) booleans mirrors left to right.
        3. ``rotation`` (N, 2), cosine and sine, turns counter-clockwise about the centre: bilinear, repeating the
           edge. h and w are at least 2.
        4. ``shift`` (N, 2) integers moves down and right, over zeros.
        5. ``colour`` (N, 3), brightness b, contrast c, saturation s: a value v becomes
           b c s v + b c (1 - s) g + b (1 - c) m, with the pixel's grey g (the luma of ITU-R BT.601) and m, the
           image's mean of it. Of images that are not of three channels, g is the first one, and s is 1.
        6. Normalization: (v / 255 - mean[c]) / std[c].
        7. ``cutout`` (N, 2) integers, row and column of the upper left corner of a square of ``cutout_size``
           pixels, which may reach outside: there the result is 0, the mean colour.

        With ``index`` (N,) integers the images are (M, H, W, C), and each is made of the one of that number,
        0 .. M - 1; on a GPU a number out of range is not noticed.

        Worked out in float32, every product and sum rounded by itself, whatever the ``dtype``: so all backends
        give the same bits, but for m, a sum of doubles in any order, which is exact where pixels are neither
        resampled nor turned and there are no more than 2**18 of them.
        """
