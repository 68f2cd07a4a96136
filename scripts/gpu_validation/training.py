"""A training run on the device beside the same one on the CPU: two networks, their loss at every step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy

Array = numpy.ndarray[Any, Any]

_ROOM = 10.0  # over what rounding to float32 does to the loss on the CPU
_AT_FIRST, _TENFOLD_STEPS, _AT_MOST = 1e-5, 10, 0.03  # of the first loss, see ``allowed``


@dataclass(frozen=True)
class Run:
    """A network, its images, and how long it is trained."""

    name: str
    image_size: int
    steps: int
    batch_size: int
    lr: float
    learns: bool  # whether that is long enough for the loss to fall


WHOLE = (Run("lenet5", 28, 100, 64, 0.02, True), Run("animalnet", 224, 40, 16, 0.005, True))
REHEARSED = (Run("lenet5", 28, 6, 8, 0.02, False), Run("animalnet", 64, 4, 4, 0.005, False))


def digits(run: Run, random: numpy.random.Generator) -> tuple[Array, Array]:
    """Batches of the handwritten digits that come with the package, 8x8 enlarged to 28x28, with some noise.

    Without it there would be many equal pixels, and which of equals max pooling takes is for rounding to say.
    """
    from gpucnn.data import load

    train = load("digits").train
    chosen = random.integers(0, len(train), run.steps * run.batch_size)
    images = train.images(chosen)[..., 0] / 255 - 0.2
    images = numpy.repeat(numpy.repeat(images, 4, axis=1), 4, axis=2)[:, 2:30, 2:30]
    images = images + 0.1 * random.standard_normal(images.shape)
    shape = (run.steps, run.batch_size, 1, 28, 28)
    return images.astype(numpy.float32).reshape(shape), train.labels[chosen].reshape(shape[:2])


def patterns(run: Run, random: numpy.random.Generator) -> tuple[Array, Array]:
    """Batches of noise with stripes whose direction is the class: upright, level, slanted."""
    count, size = run.steps * run.batch_size, run.image_size
    labels = random.integers(0, 3, count)
    rows, columns = numpy.mgrid[0:size, 0:size]
    along = numpy.stack([columns, rows, (rows + columns) / 1.4])[labels]
    shift, width = random.uniform(0, 6, (count, 1, 1)), random.uniform(5, 9, (count, 1, 1))
    stripes = numpy.sin(2 * numpy.pi * (along + shift) / width)
    images = stripes[:, None] + random.standard_normal((count, 3, size, size))
    shape = (run.steps, run.batch_size, 3, size, size)
    return images.astype(numpy.float32).reshape(shape), labels.reshape(shape[:2])


def losses(run: Run, batches: tuple[Array, Array], state: dict[str, Array], place: str, dtype: Any) -> list[float]:
    """The loss at each step, trained in ``dtype`` on the device ``place`` from the weights ``state`` on."""
    from gpucnn import device, optimizers
    from gpucnn.losses import CrossEntropyLoss

    model = create(run)
    model.load_state_dict(state)
    model.to(place, dtype=dtype)
    groups = optimizers.parameter_groups(model, 1e-4)
    optimizer = optimizers.make_optimizer("sgd", groups, run.lr, momentum=0.9)
    loss, curve = CrossEntropyLoss(), []
    for images, labels in zip(*batches, strict=True):
        optimizer.zero_grad()
        logits = model(device.to_device(images.astype(dtype), place))
        curve.append(float(loss(logits, device.to_device(labels, place))))
        model.backward(loss.backward())
        optimizer.step()
    return curve


def create(run: Run) -> Any:
    """The network, its initial weights those of the seed."""
    from gpucnn import models

    options = {} if run.name == "lenet5" else {"num_classes": 3, "image_size": run.image_size}
    return models.create(run.name, **options)


def allowed(cpu: Array, exact: Array) -> Array:
    """How far the device's loss may be from float64's at each step.

    The first steps show every wrong gradient: until the tenth the losses differ by rounding alone. Then a rounding
    that moves a number over zero before a ReLU, or picks another of two near pixels in a pool, makes a step a
    little different, and the next ones more so; when that first happens is chance. On the CPU, runs in float32
    whose weights began a rounding apart were up to 2e-6 from float64 after 4 steps, 3e-4 after 16 and 7e-3 after
    100. So: ten times the farthest that the CPU in float32 has been, and 1e-5 of the first loss, ten times more
    each 10 steps.
    """
    steps = numpy.arange(len(exact))
    growth = numpy.minimum(_AT_FIRST * 10 ** (steps / _TENFOLD_STEPS), _AT_MOST)
    return _ROOM * numpy.maximum.accumulate(numpy.abs(cpu - exact)) + abs(exact[0]) * growth


def compare(run: Run, seed: int) -> dict[str, Any]:
    """Train in float64 and float32 on the CPU and in float32 on the device, and compare the losses."""
    from gpucnn.random import manual_seed

    began = time.monotonic()
    random = numpy.random.default_rng([seed, *run.name.encode()])
    batches = digits(run, random) if run.name == "lenet5" else patterns(run, random)
    manual_seed(seed)
    state = {name: numpy.array(values) for name, values in create(run).state_dict().items()}
    exact = numpy.array(losses(run, batches, state, "cpu", numpy.float64))
    cpu = numpy.array(losses(run, batches, state, "cpu", numpy.float32))
    on_device_began = time.monotonic()
    found = numpy.array(losses(run, batches, state, "cuda", numpy.float32))
    ended = time.monotonic()
    bound = allowed(cpu, exact)
    error = numpy.abs(found - exact)
    fits = bool((error <= bound).all())
    over = error / bound
    at = int(numpy.nan_to_num(over, nan=numpy.inf).argmax())
    tail = max(1, run.steps // 4)
    learned = not run.learns or bool(found[-tail:].mean() < 0.9 * found[:tail].mean())
    return {
        "network": run.name, "image_size": run.image_size, "steps": run.steps, "batch_size": run.batch_size,
        "loss_first": float(found[0]), "loss_last": float(found[-1]),
        "error_over_bound": float(over[at]), "error": float(error[at]), "bound": float(bound[at]), "step": at + 1,
        "cpu_float32_error": float(numpy.abs(cpu - exact).max()),
        "losses": found.tolist(), "cpu_losses": cpu.tolist(),
        "device_seconds": ended - on_device_began, "seconds": ended - began,
        "passed": fits and learned,
        "failures": [
            *([] if fits else [f"step {at + 1}: loss {found[at]!r}, float64 on the CPU {exact[at]!r}"]),
            *([] if learned else ["the loss does not fall"]),
        ],
    }  # fmt: skip
