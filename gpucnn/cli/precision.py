"""The precision that a run computes in."""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import ArrayLike, NDArray

from gpucnn.data import Augmentation, Preprocessing
from gpucnn.device import Device
from gpucnn.errors import ArgumentError

ON_CPU = {"float32": numpy.float32, "float64": numpy.float64}


def choose_dtype(precision: str, device: Device) -> Any:
    """The dtype for ``precision``; ArgumentError, with the reason, where the device cannot compute in it."""
    if precision not in ON_CPU:
        raise ArgumentError(
            f"precision '{precision}' is arithmetic of a GPU's tensor cores, and the device is '{device.name}' "
            f"({device.reason}), which computes in {' or '.join(ON_CPU)}; choose one of these with --precision"
        )
    return ON_CPU[precision]


class Float64Preprocessing(Preprocessing):
    """Preprocessing whose results are float64, for models whose parameters are."""

    def apply(
        self,
        images: NDArray[numpy.uint8],
        augmentation: Augmentation | None = None,
        *,
        seed: int = 0,
        epoch: int = 0,
        indices: ArrayLike | None = None,
    ) -> NDArray[Any]:
        """As :meth:`Preprocessing.apply`, in float64."""
        return super().apply(images, augmentation, seed=seed, epoch=epoch, indices=indices).astype(numpy.float64)


def make_preprocessing(dtype: Any, values: dict[str, Any]) -> Preprocessing:
    """The preprocessing with these fields, giving arrays of ``dtype``."""
    kind = Float64Preprocessing if numpy.dtype(dtype) == numpy.float64 else Preprocessing
    return kind(**values)
