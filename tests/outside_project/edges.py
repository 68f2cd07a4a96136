"""Edges of grey images, by three kernels: Sobel's filters, what rises of them, the strongest of each window."""

import gpucnn_kernels

SOBEL = [
    [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]],
    [[-1, -2, -1], [0, 0, 0], [1, 2, 1]],
]
"""(2, 3, 3): the slope to the right, the slope downwards."""


def strongest(images, filters, window=2):
    """The strongest rise of brightness to the right and downwards in each window.

    ``images`` are (N, 1, H, W), ``filters`` (2, 1, 3, 3), on one device; the answer is (N, 2, P, Q).
    """
    slopes = gpucnn_kernels.conv2d_forward(images, filters, padding=1)
    rises = gpucnn_kernels.relu_forward(slopes, out=slopes)
    largest, _ = gpucnn_kernels.max_pool2d_forward(rises, kernel_size=window)
    return largest
