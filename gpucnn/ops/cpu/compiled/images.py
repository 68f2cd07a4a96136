"""Pictures from bytes to normalized floats."""

from gpucnn.ops.cpu.compiled.library import function

images_to_float = function("images_to_float", "iiiiiipppppo")
"""n, height, width, channels, h, w, images, factor, shift, flip (bytes) or None, offsets (int64) or None, out."""
