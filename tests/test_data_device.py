"""Batches made on the device, of bytes and what is drawn for each image: the CPU's, bit for bit."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import types

import numpy
import pytest

import gpucnn
from gpucnn.data import ArrayDataset, Augmentation, Batch, Dataset, Loader, Preprocessing, Subset, TensorDataset
from gpucnn.data import device_preprocessing as device_module
from gpucnn.data import resident as resident_module
from gpucnn.device import is_device_array, to_cpu
from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.layers import Conv2d, Flatten, Linear, ReLU
from gpucnn.training import Callback, TrainingInterrupted
from gpucnn_kernels import runtime

EPSILON = float(numpy.finfo(numpy.float32).eps)


@pytest.fixture(autouse=True)
def host_runtime(monkeypatch):
    monkeypatch.setenv(runtime.VARIABLE, "host")


def pictures(*shape: int, seed: int = 0):
    return numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)


class Planes(Dataset):
    """As a folder of images has them: (N, H, W, C), with planes in memory."""

    def __init__(self, images, labels) -> None:
        self.name, self.classes, self.labels = "planes", ["a", "b"], labels
        self.image_shape = images.shape[1:]
        self._planes = numpy.ascontiguousarray(images.transpose(0, 3, 1, 2))

    def images(self, indices):
        return self._planes[indices].transpose(0, 2, 3, 1)


IMAGES, LABELS = pictures(23, 20, 26, 3), numpy.arange(23) % 2
COLOUR = ArrayDataset(IMAGES, LABELS)
GREY = ArrayDataset(IMAGES[..., 0], LABELS)
GEOMETRY = Augmentation(horizontal_flip=True, shift=3, resized_crop=0.3, rotation=20.0, cutout=5)
CASES = {
    "plain": (COLOUR, (20, 26), None),
    "flip and shift": (COLOUR, (20, 26), Augmentation(horizontal_flip=True, shift=4)),
    "grey": (GREY, (20, 26), Augmentation(horizontal_flip=True, shift=4, brightness=0.3, saturation=0.5)),
    "colour": (COLOUR, (20, 26), Augmentation(brightness=0.3, contrast=0.4, saturation=0.5, cutout=7)),
    "all but resizing": (COLOUR, (20, 26), Augmentation(True, 3, None, 0.0, 0.3, 0.3, 0.3, 5)),
    "resized": (COLOUR, (9, 9), None),
    "enlarged and mirrored": (COLOUR, (31, 40), Augmentation(horizontal_flip=True)),
    "cut but not resized": (COLOUR, (20, 20), Augmentation(horizontal_flip=True)),
    "resized crop": (COLOUR, (16, 18), Augmentation(horizontal_flip=True, resized_crop=0.2)),
    "geometry": (COLOUR, (16, 18), GEOMETRY),
    "planes": (Planes(IMAGES, LABELS), (16, 18), GEOMETRY),
    "one row": (ArrayDataset(IMAGES[:, :1], LABELS), (1, 26), Augmentation(rotation=20.0)),
}


def loaders(name: str, prepared: str = "float32", **options):
    data, size, augmentation = CASES[name]
    channels = data.image_shape[2]
    preprocessing = Preprocessing(size, (0.5, 0.4, 0.3)[:channels], (0.2, 0.3, 0.4)[:channels], prepared)
    for device in ("cpu", "cuda"):
        yield Loader(
            data, 5, preprocessing=preprocessing, augmentation=augmentation, shuffle=True, device=device, **options
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("keep", [False, True], ids=["sent", "kept"])
def test_batches_are_those_of_the_cpu_bit_for_bit(name, workers, keep):
    ours, theirs = loaders(name, workers=workers, keep_on_device=keep)
    for epoch, start in ((0, 0), (3, 2)):  # the second as in a run that is resumed
        pairs = list(zip(ours.epoch(epoch, start), theirs.epoch(epoch, start), strict=True))
        assert len(pairs) == 5 - start
        for mine, other in pairs:
            assert is_device_array(other.images)
            assert is_device_array(other.labels)
            assert other.images.flags.c_contiguous
            assert other.images.dtype == numpy.float32
            numpy.testing.assert_array_equal(to_cpu(other.images), mine.images)
            numpy.testing.assert_array_equal(to_cpu(other.labels), mine.labels)
            numpy.testing.assert_array_equal(other.indices, mine.indices)


def test_a_mean_over_pixels_that_are_no_bytes_may_differ_in_its_last_bit():
    data, size, _ = CASES["geometry"]
    strong = Augmentation(True, 3, 0.3, 20.0, 0.3, 0.3, 0.3, 5)
    preprocessing = Preprocessing(size, (0.5,) * 3, (0.25,) * 3)
    options = {"preprocessing": preprocessing, "augmentation": strong, "workers": 0}
    for mine, other in zip(Loader(data, 8, **options), Loader(data, 8, device="cuda", **options), strict=True):
        assert numpy.abs(to_cpu(other.images) - mine.images).max() <= 4 * EPSILON * numpy.abs(mine.images).max()


@pytest.mark.parametrize("dtypes", [("float64", None), ("float32", "float64"), ("float64", "float32")])
def test_either_dtype_has_the_same_numbers(dtypes):
    ours, theirs = loaders("geometry", dtypes[0], dtype=dtypes[1], workers=0)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.images.dtype == mine.images.dtype == (dtypes[1] or dtypes[0])
        numpy.testing.assert_array_equal(to_cpu(other.images), mine.images)


def test_nothing_is_computed_of_pixels_on_the_cpu(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("preprocessed on the CPU")

    monkeypatch.setattr(Preprocessing, "apply", refuse)
    sent = []
    plain = device_module.to_send

    def watched(*arguments):
        arrays, work = plain(*arguments)
        sent.append(arrays)
        return arrays, work

    monkeypatch.setattr("gpucnn.data.loader.to_send", watched)
    for name in ("flip and shift", "planes"):
        _, loader = loaders(name, workers=0, keep_on_device=False)
        assert len(list(loader)) == 5
        pixels = sent[0][0]
        assert pixels.dtype == numpy.uint8
        assert pixels.size == 5 * IMAGES[0].size
        assert pixels.flags.c_contiguous, "a copy that goes through memory in order"
        sent.clear()


def test_a_data_set_in_memory_goes_to_the_device_once(monkeypatch):
    copied = []
    plain = resident_module.to_device
    monkeypatch.setattr(
        resident_module, "to_device", lambda array, device: copied.append(array.shape) or plain(array, device)
    )
    images = pictures(40, 6, 7, seed=3)
    data = ArrayDataset(images, numpy.arange(40) % 4)
    parts = [data, Subset(data, [7, 3, 30, 31, 2]), Subset(Subset(data, numpy.arange(39, 4, -1)), [0, 9, 20])]
    preprocessing = Preprocessing((6, 7), (0.5,), (0.25,))
    for part in parts:
        ours, theirs = (
            Loader(part, 2, preprocessing=preprocessing, shuffle=True, device=device) for device in ("cpu", "cuda")
        )
        for mine, other in zip(ours, theirs, strict=True):
            numpy.testing.assert_array_equal(to_cpu(other.images), mine.images)
            numpy.testing.assert_array_equal(to_cpu(other.labels), mine.labels)
    assert copied == [(40, 6, 7, 1)]
    kept = len(resident_module._kept)
    del data, parts, part, ours, theirs, mine, other
    gc.collect()
    assert len(resident_module._kept) == kept - 1, "it goes with the data set"


def test_what_is_larger_than_an_eighth_of_the_free_memory_is_sent(monkeypatch):
    monkeypatch.setattr(resident_module, "_fits", lambda images, device: False)
    data = ArrayDataset(IMAGES.copy(), LABELS)
    assert resident_module.resident(data, "cuda") is None
    preprocessing = Preprocessing((20, 26), (0.5,) * 3, (0.25,) * 3)
    ours, theirs = (Loader(data, 5, preprocessing=preprocessing, device=device) for device in ("cpu", "cuda"))
    for mine, other in zip(ours, theirs, strict=True):
        numpy.testing.assert_array_equal(to_cpu(other.images), mine.images)


@pytest.mark.parametrize(("free", "idle", "fits"), [(8000, 0, True), (7999, 0, False), (7000, 1000, True)])
def test_the_share_of_the_free_memory(free, idle, fits, monkeypatch):
    pool = types.SimpleNamespace(free_bytes=lambda: idle)
    device = types.SimpleNamespace(mem_info=(free, 1 << 40))
    cuda = types.SimpleNamespace(Device=lambda index: device)
    stand_in = types.SimpleNamespace(cuda=cuda, get_default_memory_pool=lambda: pool)
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(resident_module, "is_host_runtime", lambda: False)
    monkeypatch.setattr(resident_module, "on_device", lambda device: contextlib.nullcontext())
    assert resident_module._fits(numpy.zeros((10, 10, 10, 1), numpy.uint8), "cuda:1") is fits


def test_data_sets_that_make_their_images_are_asked_for_them():
    class Inverted(ArrayDataset):
        def images(self, indices):
            return 255 - super().images(indices)

    class Rotated(Subset):
        def images(self, indices):
            return super().images(indices)[:, ::-1]

    preprocessing = Preprocessing((20, 26), (0.5,) * 3, (0.25,) * 3)
    for data in (Inverted(IMAGES, LABELS), Rotated(COLOUR, [1, 2]), Subset(Inverted(IMAGES, LABELS), [4])):
        assert data.in_memory() is None
        ours, theirs = (Loader(data, 5, preprocessing=preprocessing, device=device) for device in ("cpu", "cuda"))
        for mine, other in zip(ours, theirs, strict=True):
            numpy.testing.assert_array_equal(to_cpu(other.images), mine.images)


def test_a_batch_stays_what_it_is_while_others_come():
    _, loader = loaders("geometry", workers=2)
    batches = list(loader)
    copies = [to_cpu(batch.images).copy() for batch in batches]
    again = list(loader)
    for batch, copy, other in zip(batches, copies, again, strict=True):
        numpy.testing.assert_array_equal(to_cpu(batch.images), copy)
        numpy.testing.assert_array_equal(to_cpu(other.images), copy)


def test_ready_inputs_are_sent_as_they_are():
    inputs = numpy.random.default_rng(0).standard_normal((6, 2, 3, 4)).astype(numpy.float32)
    data = TensorDataset(inputs, numpy.arange(6.0))
    found = numpy.concatenate([to_cpu(batch.images) for batch in Loader(data, 4, device="cuda")])
    numpy.testing.assert_array_equal(found, inputs)


def test_what_does_not_fit_is_said_as_on_the_cpu():
    class Floats(ArrayDataset):
        def images(self, indices):
            return super().images(indices) / 255

    preprocessing = Preprocessing((20, 26), (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(DtypeError, match="images to preprocess must be a uint8 array, got float64"):
        list(Loader(Floats(IMAGES, LABELS), 5, preprocessing=preprocessing, device="cuda"))
    with pytest.raises(ShapeError, match=r"\(count, height, width, 1\), one channel for each mean"):
        list(Loader(COLOUR, 5, preprocessing=Preprocessing((20, 26), (0.5,), (0.25,)), device="cuda"))
    with pytest.raises(ArgumentError, match="shift=20 leaves nothing"):
        list(
            Loader(
                COLOUR,
                5,
                preprocessing=preprocessing,
                augmentation=Augmentation(shift=20),
                workers=0,
                device="cuda",
            )
        )


def trained(augmentation, **options):
    """The weights after two epochs of a small network on the device."""
    gpucnn.manual_seed(0)
    model = gpucnn.Sequential(Conv2d(3, 4, 3, stride=2), ReLU(), Flatten(), Linear(4 * 7 * 8, 2))
    model.fit(
        Planes(IMAGES[:, :16, :18], LABELS), batch_size=6, augmentation=augmentation, device="cuda", verbose=False,
        **{"epochs": 2, "lr": 0.05, "seed": 3, **options},
    )  # fmt: skip
    return [to_cpu(value) for value in model.state_dict().values()]


@pytest.mark.parametrize("augmentation", ["flip,shift=3,cutout=4,color=0.3", "flip,resized-crop=0.3,rotate=15"])
def test_training_ends_with_the_weights_that_preprocessing_on_the_cpu_gives(augmentation, monkeypatch):
    on_device = trained(augmentation)

    def sent(self, transfer, there, epoch, indices):
        images, labels, _ = self._prepared(epoch, indices)
        return Batch(transfer.start([images, labels]), None, indices)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "_sent", sent)
        on_cpu = trained(augmentation)
    for mine, other in zip(on_device, on_cpu, strict=True):
        numpy.testing.assert_array_equal(mine, other)
    others = trained("none")
    assert any((mine != other).any() for mine, other in zip(on_device, others, strict=True))


class Stop(Callback):
    steps = 0

    def on_step_end(self, trainer, loss):
        self.steps += 1
        if self.steps == 6:  # in the middle of the second epoch
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_that_is_stopped_and_resumed_sees_the_same_batches(tmp_path):
    augmentation = "flip,shift=3,cutout=4,color=0.3"
    whole = trained(augmentation)
    with pytest.raises(TrainingInterrupted):
        trained(augmentation, output=tmp_path, callbacks=[Stop()])
    resumed = trained(augmentation, output=tmp_path, resume=True)
    for mine, other in zip(resumed, whole, strict=True):
        numpy.testing.assert_array_equal(mine, other)
