"""Dropout's masks, the very bits of :mod:`gpucnn.random`, and float32 multiplied with them."""

from gpucnn.ops.cpu.compiled.library import function

dropout_mask = function("dropout_mask", "iiiip")
"""count, seed, offset, threshold, mask (bytes): mask[i] = word offset + i of the seed's stream >= threshold."""

dropout_forward = function("dropout_forward", "iiiifppp")
"""count, seed, offset, threshold, scale, x, mask, out: the mask, and out = x * scale where it holds, else 0."""

dropout_multiply = function("dropout_multiply", "ifppp")
"""count, scale, x, mask, out."""

dropout_rows = function("dropout_rows", "iifppp")
"""rows, columns, scale, x, mask (one byte a row), out."""
