"""What the CUDA backend adds to the kernels: whose arrays, which dtypes, which strides; on the host runtime.

What the operations compute is in the tests of both backends.
"""

from __future__ import annotations

import os
import subprocess
import sys

import ml_dtypes
import numpy
import pytest

import gpucnn_kernels
from gpucnn.errors import ArgumentError, DeviceError, DtypeError, GpucnnError, ShapeError
from gpucnn.ops import cuda
from gpucnn.ops.cuda import arrays
from gpucnn_kernels.runtime import using
from gpucnn_kernels.runtime.host_array import HostArray, host_arrays
from tests.accuracy import awkward, channels_last, max_error
from tests.backends import CPU, CUDA


@pytest.fixture(autouse=True)
def host_runtime():
    with using("host"):
        yield


def numbers(*shape, dtype="float32", seed=0):
    return numpy.random.default_rng(seed).standard_normal(shape).astype(dtype)


def on_device(*shape, **options):
    return host_arrays.asarray(numbers(*shape, **options))


# ---------------------------------------------------------------- devices


MIXED = {
    "x": lambda plain, device: cuda.conv2d_forward(plain(2, 3, 6, 6), device(4, 3, 3, 3)),
    "weight": lambda plain, device: cuda.conv2d_forward(device(2, 3, 6, 6), plain(4, 3, 3, 3)),
    "bias": lambda plain, device: cuda.linear_forward(device(2, 3), device(4, 3), plain(4)),
    "out": lambda plain, device: cuda.relu_forward(device(3), out=plain(3)),
    "y": lambda plain, device: cuda.relu_backward(device(3), plain(3)),
    "running_var": lambda plain, device: cuda.batch_norm_forward(
        device(2, 3), running_mean=device(3), running_var=plain(3)
    ),
    "targets": lambda plain, device: cuda.softmax_cross_entropy_forward(device(2, 3), plain(2, 3)),
    "target": lambda plain, device: cuda.mean_squared_error_forward(device(3), plain(3)),
    "mask": lambda plain, device: cuda.dropout_backward(device(3), plain(3) > 0, probability=0.5),
    "argmax": lambda plain, device: cuda.max_pool2d_backward(
        device(1, 1, 1, 1), plain(1, 1, 1, 1), input_size=(2, 2), kernel_size=2
    ),
    "momentum_buffer": lambda plain, device: cuda.sgd_step(device(3), device(3), plain(3), lr=0.1, momentum=0.9),
    "images": lambda plain, device: cuda.images_to_float(plain(1, 2, 2, 1).astype("uint8"), mean=[0], std=[1]),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_numpy_array_is_named_with_what_to_do(name):
    with pytest.raises(DeviceError, match=rf"^{name} is a numpy\.ndarray, on the CPU.*\.to\('cuda'\)"):
        MIXED[name](numbers, on_device)


def test_arrays_of_two_gpus(monkeypatch):
    first, second = on_device(3), on_device(3)
    monkeypatch.setattr(arrays, "device_of", lambda array: "cuda:1" if array is second else "cuda:0")
    with pytest.raises(DeviceError, match="dy is on cuda:0, but y is on cuda:1"):
        cuda.relu_backward(first, second)


def test_what_is_no_array():
    with pytest.raises(DtypeError, match=r"weight must be a numpy\.ndarray \(on a GPU.*got list"):
        cuda.conv2d_forward(on_device(1, 1, 3, 3), [[1.0]])
    with pytest.raises(DtypeError, match=r"out must be a .*got list"):
        cuda.relu_forward(on_device(3), out=[0.0] * 3)


@pytest.mark.compiler
def test_neither_cupy_nor_a_gpu_is_needed():
    program = (
        "import sys; sys.modules['cupy'] = None\n"
        "from gpucnn.ops import cuda\n"
        "assert not [name for name in sys.modules if name.startswith('cupy') and sys.modules[name]]\n"
        "from gpucnn_kernels.runtime.host_array import host_arrays\n"
        "print(cuda.relu_forward(host_arrays.asarray([-1.0, 2.0])).tolist())\n"
    )
    environment = os.environ | {
        "GPUCNN_KERNELS_RUNTIME": "host",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[0.0,", "2.0]"]


# ---------------------------------------------------------------- errors of the kernels


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (gpucnn_kernels.DeviceError, DeviceError),
        (gpucnn_kernels.CompileError, DeviceError),
        (gpucnn_kernels.DtypeError, DtypeError),
        (gpucnn_kernels.LayoutError, ArgumentError),
        (gpucnn_kernels.ArgumentError, ArgumentError),
        (gpucnn_kernels.KernelError, GpucnnError),
    ],
)
def test_the_kernels_errors_come_as_ours(raised, expected):
    def fail(**options):
        raise raised(f"no such luck: {options}")

    with pytest.raises(expected, match=r"no such luck: \{'out': 1\}") as caught:
        arrays.call(fail, out=1)
    assert type(caught.value.__cause__) is raised


def test_problems_that_do_not_fit_stay_problem_errors():
    with pytest.raises(gpucnn_kernels.ProblemError, match="larger than the padded input"):
        cuda.max_pool2d_forward(on_device(1, 1, 2, 2), kernel_size=3)


# ---------------------------------------------------------------- dtypes


def test_bfloat16_goes_through():
    x = on_device(2, 3, 6, 6).astype(ml_dtypes.bfloat16)
    weight = on_device(4, 3, 3, 3, seed=1).astype(ml_dtypes.bfloat16)
    y = cuda.conv2d_forward(x, weight)
    assert y.dtype == ml_dtypes.bfloat16
    wide = CPU.conv2d_forward(x.get().astype("f4"), weight.get().astype("f4"))
    assert max_error(y.get().astype("f4"), wide) <= 2.0**-8 * abs(wide).max()
    assert cuda.relu_forward(y).dtype == ml_dtypes.bfloat16
    loss, _ = cuda.softmax_cross_entropy_forward(y[:, :, 0, 0], host_arrays.asarray([0, 3]))
    assert loss.dtype == ml_dtypes.bfloat16
    assert loss.shape == ()


@pytest.mark.parametrize(
    ("first", "second"), [("float32", "float64"), ("float16", "float32"), ("float64", "float16")]
)
def test_mixed_dtypes_are_computed_in_the_wider_and_answered_in_the_first(first, second):
    x, weight, bias = numbers(2, 3, 6, 6, dtype=first), numbers(4, 3, 3, 3, dtype=second), numbers(4, dtype=first)
    for name, given in {
        "conv2d_forward": (x, weight, bias),
        "conv_transpose2d_forward": (x, weight[:3], None),
        "linear_forward": (x[0, 0], weight[:, 0, 0, :1].repeat(6, 1), bias),
        "relu_backward": (x, numbers(*x.shape, dtype=second)),
        "mean_squared_error_forward": (x, numbers(*x.shape, dtype=second)),
    }.items():
        expected = getattr(CPU, name)(*given)
        found = getattr(CUDA, name)(*given)
        assert found.dtype == expected.dtype == x.dtype
        # Both round the same sum, of numbers of order 1, to the first array's dtype.
        bound = 4 * max(numpy.finfo(first).eps, numpy.finfo("f4" if second != "float64" else "f8").eps * 8)
        assert max_error(found, expected.astype("f8")) <= bound * (1 + abs(expected).max()), name


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "uint32"])
def test_labels_of_any_integer_dtype(dtype):
    logits, labels = numbers(4, 3), numpy.array([2, 0, 1, 1])
    loss, _ = CUDA.softmax_cross_entropy_forward(logits, labels.astype(dtype))
    assert max_error(loss, CPU.softmax_cross_entropy_forward(logits, labels)[0]) <= 1e-6


def test_batch_norm_keeps_running_statistics_of_half_precision_in_place():
    x = numbers(6, 2, 3, 3, dtype="float16")
    means, variances = numpy.zeros((2, 2), "float16"), numpy.ones((2, 2), "float16")
    for backend, mean, variance in ((CPU, means[0], variances[0]), (CUDA, means[1], variances[1])):
        backend.batch_norm_forward(x, None, None, mean, variance, momentum=0.5)
        assert mean.any()
    assert max_error(means[1], means[0].astype("f8")) <= 1e-3
    assert max_error(variances[1], variances[0].astype("f8")) <= 1e-3


# ---------------------------------------------------------------- layouts


def test_arrays_that_kernels_take_are_not_copied(monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("a copy was made")

    x, weight, dy = on_device(2, 3, 6, 6), on_device(4, 3, 3, 3), on_device(2, 4, 4, 4)
    last = channels_last(numbers(2, 3, 6, 6)).view(HostArray)
    matrix, factor = on_device(5, 6), on_device(6, 4).T
    monkeypatch.setattr(HostArray, "astype", fail)
    monkeypatch.setattr(host_arrays, "ascontiguousarray", fail, raising=False)
    monkeypatch.setattr(host_arrays, "empty_like", fail, raising=False)
    for images in (x, last):
        cuda.conv2d_forward(images, weight)
        cuda.conv2d_backward_filter(dy, images, kernel_size=3)
        y, argmax = cuda.max_pool2d_forward(images, kernel_size=2)
        cuda.max_pool2d_backward(y, argmax, input_size=(6, 6), kernel_size=2)
        cuda.relu_backward(images, images, out=images)
        cuda.batch_norm_forward(images, out=images)
        cuda.dropout_forward(images, probability=0.5, seed=0, offset=0, out=images)
    cuda.linear_forward(matrix, factor)
    cuda.softmax_forward(matrix.T, axis=0)
    with pytest.raises(AssertionError, match="a copy was made"):
        cuda.relu_forward(matrix[:, ::2])


def test_results_follow_the_layout_of_the_input():
    x, weight = channels_last(numbers(2, 3, 6, 6)), numbers(4, 3, 3, 3)
    for y in (
        CUDA.conv2d_forward(x, weight),
        CUDA.avg_pool2d_forward(x, kernel_size=2),
        CUDA.relu_forward(x),
        CUDA.batch_norm_forward(x)[0],
        CUDA.relu_backward(numpy.ascontiguousarray(x), x),  # of the forward's image: a gradient's is its own
        CUDA.batch_norm_backward(numpy.ascontiguousarray(x), x, None, *numbers(2, 3))[0],
    ):
        assert y.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize("shift", [1, 6])
def test_out_that_overlaps_an_input_elsewhere(shift):
    memory = numbers(100 + shift)
    x, expected = memory[:100], CPU.tanh_forward(memory[:100].copy())
    out = memory[shift:]
    assert CUDA.tanh_forward(x, out=out) is out
    assert max_error(out, expected.astype("f8")) <= 1e-6


def test_out_of_any_strides_and_dtype_of_the_first():
    x, weight = numbers(2, 3, 6, 6), numbers(4, 3, 3, 3, dtype="float64")
    expected = CPU.conv2d_forward(x, weight)
    for out in (awkward(numpy.zeros_like(expected)), channels_last(numpy.zeros_like(expected))):
        assert CUDA.conv2d_forward(x, weight, out=out) is out
        assert max_error(out, expected.astype("f8")) <= 1e-5
    with pytest.raises(ShapeError, match="out must have the result's shape"):
        CUDA.conv2d_forward(x, weight, out=expected[:1])


def test_a_mask_that_broadcasts_otherwise():
    dy, mask = numbers(2, 3, 4, 5), numpy.array([True, False, True]).reshape(1, 3, 1, 1)
    found = CUDA.dropout_backward(dy, mask, probability=0.5)
    numpy.testing.assert_array_equal(found, CPU.dropout_backward(dy, mask, probability=0.5))


def test_weights_of_a_loss_along_many_axes():
    shape = (2, 3, 2, 3, 2, 3)
    logits, targets = numbers(*shape, dtype="float64"), numbers(*shape, dtype="float64", seed=1) ** 2
    options = {
        "weight": abs(numbers(2, 1, 2, 1, 2, 1, dtype="float64", seed=2)),
        "positive_weight": abs(numbers(1, 3, 1, 3, 1, 3, dtype="float64", seed=3)),
    }
    for name in ("forward", "backward"):
        expected = getattr(CPU, f"binary_cross_entropy_with_logits_{name}")(logits, targets, **options)
        found = getattr(CUDA, f"binary_cross_entropy_with_logits_{name}")(logits, targets, **options)
        assert max_error(found, expected) <= 1e-14


def test_strided_optimizer_buffers_step_in_place():
    values, gradient, state = numbers(20), numbers(20, seed=1), numpy.zeros((2, 20))
    expected = values[::2].copy()
    CPU.adam_step(expected, gradient[::2].copy(), *numpy.zeros((2, 10), "f4"), lr=0.1)
    untouched = values[1::2].copy()
    CUDA.adam_step(values[::2], gradient[::2], state[0, ::2], state[1, ::2], lr=0.1)
    assert max_error(values[::2], expected.astype("f8")) <= 1e-6
    numpy.testing.assert_array_equal(values[1::2], untouched)
    assert state[:, ::2].all()
    assert not state[:, 1::2].any()
