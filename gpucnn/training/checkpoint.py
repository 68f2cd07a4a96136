"""Checkpoints: everything that a run needs to go on, in one safetensors file.

The tensors are named "model.<key>", "ema.<key>" and "optimizer.<key>"; all that is not a tensor is one JSON text
in the file's metadata. Any safetensors reader opens the file, and "model.<key>" are PyTorch's state_dict keys.

The file is written here rather than through the library because the library wants all bytes in memory twice
before the first is written; reading, where a damaged file must be recognised, is the library's.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from gpucnn.device import to_cpu
from gpucnn.errors import CheckpointError
from gpucnn.training.history import EpochRecord, records_from
from gpucnn.training.storage import atomic_file

FORMAT = "gpucnn-checkpoint"
VERSION = 1
_CHUNK_BYTES = 1 << 24

_DTYPE_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}


@dataclass(slots=True)
class Position:
    """Where a run is, and what the epoch under way has added up so far.

    Attributes:
        epoch: epochs that are finished.
        batch: batches of the next epoch that are done.
        step: optimizer steps since the start.
        loss_sum: the sum of the losses of the epoch's images so far.
        correct: how many of them were classified rightly.
        images: how many there were.
        skipped: steps of the epoch that loss scaling left out.
        train_seconds: the time that the steps took.
        seconds: the wall-clock time of the epoch so far.
        finished: whether the run has ended, by its last epoch or by early stopping.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    images: int = 0
    skipped: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    finished: bool = False

    def next_epoch(self) -> None:
        """Begin the next epoch with empty sums."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sum, self.correct, self.images, self.skipped = 0.0, 0, 0, 0
        self.train_seconds, self.seconds = 0.0, 0.0


@dataclass(slots=True)
class Checkpoint:
    """A run at one moment.

    Attributes:
        model: the model's ``state_dict``.
        architecture: what ``gpucnn.models.create(**architecture)`` takes to build the model, or None.
        ema: the averaged weights, where the run averages them.
        optimizer: the optimizer's ``state_dict``: arrays and numbers.
        options: the run's :class:`~gpucnn.training.TrainingOptions` as a dictionary.
        data: the data set's name, size, classes and label checksum, and the preprocessing of its images.
        position: where the run is.
        generators: where the random generators are, by name.
        history: the finished epochs.
        stopped_early: whether early stopping ended the run.
        loss_scaling: the loss scaler's ``state_dict``, where the run has one.
    """

    model: dict[str, NDArray[Any]]
    architecture: dict[str, Any] | None = None
    ema: dict[str, NDArray[Any]] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    position: Position = field(default_factory=Position)
    generators: dict[str, dict[str, int]] = field(default_factory=dict)
    history: list[EpochRecord] = field(default_factory=list)
    stopped_early: bool = False
    loss_scaling: dict[str, Any] = field(default_factory=dict)

    @property
    def evaluation_state(self) -> dict[str, NDArray[Any]]:
        """The weights to evaluate and predict with: the averaged ones where there are any."""
        return {**self.model, **self.ema}

    @property
    def classes(self) -> list[str]:
        """The names of the classes, empty where the run did not know them."""
        return list(self.data.get("classes", []))


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` to ``path``, whole or not at all. Raises StorageError where the disk refuses."""
    tensors: dict[str, Any] = {f"model.{key}": value for key, value in checkpoint.model.items()}
    tensors |= {f"ema.{key}": value for key, value in checkpoint.ema.items()}
    numbers: dict[str, Any] = {}
    for key, value in checkpoint.optimizer.items():
        if hasattr(value, "dtype") and getattr(value, "shape", ()) != ():
            tensors[f"optimizer.{key}"] = value
        else:
            numbers[key] = value.item() if hasattr(value, "item") else value
    position, history = checkpoint.position, checkpoint.history
    metadata = {
        "architecture": checkpoint.architecture,
        "optimizer": numbers,
        "options": checkpoint.options,
        "data": checkpoint.data,
        "position": {name: getattr(position, name) for name in Position.__slots__},
        "generators": checkpoint.generators,
        "history": [{name: getattr(record, name) for name in EpochRecord.__slots__} for record in history],
        "stopped_early": checkpoint.stopped_early,
        "loss_scaling": checkpoint.loss_scaling,
    }
    write_tensors(path, tensors, {"format": FORMAT, "version": str(VERSION), "gpucnn": _to_json(metadata)})


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in ``path``.

    Raises CheckpointError where the file is missing, truncated, not a safetensors file, one of another program,
    or one of a later version of gpucnn.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file but not a gpucnn checkpoint; load plain weights with "
            "model.load_state_dict(gpucnn.training.read_tensors(path)[0])"
        )
    if metadata.get("version") != str(VERSION):
        raise CheckpointError(
            f"{path} is a checkpoint of format version {metadata.get('version')}, this gpucnn reads version "
            f"{VERSION}; use the version of gpucnn that wrote it"
        )
    parts: dict[str, dict[str, Any]] = {"model": {}, "ema": {}, "optimizer": {}}
    try:
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        stored = json.loads(metadata["gpucnn"])
        return Checkpoint(
            model=parts["model"],
            architecture=stored["architecture"],
            ema=parts["ema"],
            optimizer=parts["optimizer"] | stored["optimizer"],
            options=stored["options"],
            data=stored["data"],
            position=Position(**stored["position"]),
            generators=stored["generators"],
            history=records_from(stored["history"]),
            stopped_early=stored["stopped_early"],
            loss_scaling=stored.get("loss_scaling", {}),  # earlier versions had none
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is a damaged gpucnn checkpoint ({error!r}); use an earlier one") from error


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays, from whatever device, to a safetensors file, whole or not at all.

    The format: the header's length (little-endian uint64), the header (JSON: dtype, shape and byte range of each
    tensor), then the bytes of all tensors end to end, in C order.
    Raises StorageError where the disk refuses.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    arrays: list[NDArray[Any]] = []
    start = 0
    # The widest first, as the library writes them: every tensor is then aligned to its own item size.
    on_cpu = {name: to_cpu(value) for name, value in tensors.items()}
    for name, value in sorted(on_cpu.items(), key=lambda item: -item[1].dtype.itemsize):
        array = numpy.asarray(value, order="C")
        if array.dtype.name not in _DTYPE_NAMES:
            raise CheckpointError(f"tensor '{name}' has dtype {array.dtype}, which a checkpoint cannot hold")
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        stop = start + array.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, stop],
        }
        arrays.append(array)
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays:
            octets = array.reshape(-1).view(numpy.uint8)
            for first in range(0, len(octets), _CHUNK_BYTES):
                file.write(octets[first : first + _CHUNK_BYTES].data)


def read_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """(arrays by name, metadata) of a safetensors file.

    Raises CheckpointError where the file is missing, cannot be read, is truncated or is of another kind.
    """
    import safetensors

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint {path}" + (" (it is a folder)" if path.is_dir() else "") + "; check the path"
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint, or it is truncated ({path.stat().st_size} bytes; {error}); "
            "use an earlier one"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error


def _to_json(value: Any) -> str:
    """Exact JSON: Python writes a float with the digits that give back the same float."""
    return json.dumps(value, allow_nan=False)
