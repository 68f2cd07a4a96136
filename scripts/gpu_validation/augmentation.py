"""Random changes to pictures: within rounding of loops in float64, and with the bits of the NumPy backend."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy

import gpucnn_kernels as kernels
from gpucnn.ops import cpu
from gpucnn_kernels.arrays import numpy_dtype
from scripts.gpu_validation.bench import Bench, rounding
from tests.augmentation_cases import NAMES, changes_of, size_of_terms
from tests.oracles import augmentation as oracle

_INTERPOLATING = {"rows", "columns", "rotation"}
_EACH = [(), *((name,) for name in NAMES), NAMES, tuple(name for name in NAMES if name not in _INTERPOLATING)]


def check_augmentation(bench: Bench) -> None:
    """Each change by itself, all of them, and all that take whole bytes; images by pixels and by planes."""
    for numbers, channels, names in product(bench.numbers(), (1, 3, 6), _EACH):
        random = numbers.random
        images = random.integers(0, 256, (4, 21, 37, channels), numpy.uint8)
        options: dict[str, Any] = {
            "mean": random.uniform(0.2, 0.8, channels).tolist(),
            "std": random.uniform(0.2, 0.5, channels).tolist(),
        }
        options |= changes_of(random, names, *images.shape[:3])
        if len(names) > 1:  # as of a data set that lies on the GPU whole
            options["index"] = random.integers(0, 4, 4)
        expected = oracle.augment_images(images, **options)
        on_cpu = cpu.augment_images(images, **options)
        exact = "colour" not in names or not _INTERPOLATING & set(names)
        size = size_of_terms(options, expected.shape)
        for dtype, planes in product(numbers.dtypes, (False, True)):

            def run(
                dtype: str = dtype,
                planes: bool = planes,
                images: Any = images,
                options: dict[str, Any] = options,
            ) -> Any:
                order, back = ((0, 3, 1, 2), (0, 2, 3, 1)) if planes else ((0, 1, 2, 3), (0, 1, 2, 3))
                pixels = bench.put(images.transpose(order)).transpose(back)
                placed = {name: _placed(bench, value) for name, value in options.items()}
                return kernels.augment_images(pixels, **placed, dtype=dtype, channels_last=planes)

            problem = (
                f"{channels} channels, {' and '.join(names) or 'nothing'}, {'planes' if planes else 'pixels'}"
            )
            # The arithmetic is float32's in every dtype.
            bound = rounding(dtype, expected, 0.0) + rounding("float32", expected, size, 8)
            bench.check("augment_images", problem, dtype, run, [expected], [bound])
            if exact:
                bits = on_cpu.astype(numpy_dtype(dtype)).astype(numpy.float64)
                bench.check("augment_images, the CPU's bits", problem, dtype, run, [bits], [0.0])


def _placed(bench: Bench, value: Any) -> Any:
    if isinstance(value, tuple) and all(isinstance(part, numpy.ndarray) for part in value):
        return tuple(map(bench.put, value))
    return bench.put(value) if isinstance(value, numpy.ndarray) else value


CHECKS = {"augmentation": check_augmentation}
