"""How batch norm kernels are launched: how many of them, in packs or not, with the same bits in any order."""

from __future__ import annotations

import numpy
import pytest

import gpucnn_kernels as kernels
from gpucnn_kernels.launch import Call
from gpucnn_kernels.runtime import host
from tests.accuracy import channels_last, max_error
from tests.batch_norm_inputs import ending_inputs, inputs, layouts
from tests.kernel_accuracy import on_the_host, placed
from tests.kernel_arrays import DTYPES, EPSILON, accumulated, wide

__all__ = ["on_the_host"]


@pytest.mark.parametrize(
    ("shape", "layout", "count"),
    [
        ((16, 2, 20, 20), numpy.ascontiguousarray, 1),
        ((21, 2, 20, 20), numpy.ascontiguousarray, 3),
        ((4, 64, 16, 16), channels_last, 1),
        ((5, 64, 16, 16), channels_last, 3),
    ],
)
def test_few_numbers_a_channel_take_one_launch(monkeypatch, shape, layout, count):
    started = []
    launch = Call.launch
    monkeypatch.setattr(Call, "launch", lambda self, *given, **more: started.append(launch(self, *given, **more)))
    x = layout(numpy.zeros(shape, numpy.float32))
    y, *statistics = kernels.batch_norm_forward(x, activation="relu", residual=x)
    assert len(started) == count
    kernels.batch_norm_backward(x, x, None, *statistics, y=y, activation="relu")
    assert len(started) == 2 * count


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_off_the_boundaries_of_packs(monkeypatch, dtype):
    started = []
    launch = Call.launch

    def record(self, source, kernel, *given, **more):
        started.append((source, kernel.rpartition("_")[2]))
        return launch(self, source, kernel, *given, **more)

    monkeypatch.setattr(Call, "launch", record)
    acc = accumulated(dtype)
    for shape, layout, form in (
        ((31, 2, 20, 20), numpy.ascontiguousarray, "along"),
        ((150, 40, 3, 3), channels_last, "across"),
        ((2000, 16), numpy.ascontiguousarray, "across"),
    ):
        (x, residual, dy), (weight, bias) = ending_inputs(shape, layout, dtype)
        options = {"activation": "relu", "negative_slope": 0.3}
        results = []
        for where in range(5):  # none is off, or one of them
            at = [placed(array, int(where == number)) for number, array in enumerate((x, residual, dy), 1)]
            y, dx, passed = (placed(numpy.zeros_like(x), int(where == 4)) for _ in range(3))
            started.clear()
            _, *statistics = kernels.batch_norm_forward(at[0], weight, bias, residual=at[1], out=y, **options)
            packed = ("batch_norm_packs", form) in started
            assert packed == (where in (0, 3))
            started.clear()
            more = {"y": y, "out": dx, "out_residual": passed, **options}
            vectors = kernels.batch_norm_backward(at[2], at[0], weight, *statistics, **more)[1:]
            assert (("batch_norm_packs", form) in started) == (where in (0, 2))
            started.clear()
            inferred = kernels.batch_norm_inference(at[0], weight, bias, statistics[0], 1 / statistics[1] ** 2)
            assert (("batch_norm_packs", form) in started) == (where != 1)
            results.append([*statistics, *vectors, y, dx, passed, inferred])
        for other in results[1:]:
            for result, expected in zip(other, results[0], strict=True):
                scale = max(abs(wide(expected)).max(), 1)
                spare = 40 * EPSILON[acc] + (EPSILON[dtype] if result.dtype == x.dtype else 0)
                assert max_error(wide(result), wide(expected)) <= spare * scale


def test_the_order_of_threads_changes_nothing():
    for shape in [(300, 7), (9000, 3), (4, 3, 5, 7), (31, 2, 20, 20), (130, 20, 3, 3)]:
        x, weight, bias, dy = (array.astype(numpy.float32) for array in inputs(shape))
        for layout in layouts(x):

            def run(x=x, dy=dy, weight=weight, bias=bias, layout=layout):
                x, dy = layout(x), layout(dy)
                mean_kept, var_kept = numpy.zeros((2, len(weight)), numpy.float32)
                y, mean, inverse_std = kernels.batch_norm_forward(x, weight, bias, mean_kept, var_kept)
                gradients = kernels.batch_norm_backward(dy, x, weight, mean, inverse_std)
                ended = kernels.batch_norm_forward(x, weight, bias, residual=dy, activation="relu")[0]
                passed = numpy.empty_like(dy)
                more = {"y": ended, "activation": "relu", "out_residual": passed}
                gradients += kernels.batch_norm_backward(dy, x, weight, mean, inverse_std, **more)
                masked = kernels.batch_norm_forward(x, weight, bias, activation="relu", with_mask=True)
                more = {"y": masked[0], "mask": masked[3], "activation": "relu"}
                gradients += kernels.batch_norm_backward(dy, x, weight, mean, inverse_std, **more)
                gradients += (ended, passed, *(part for part in masked if part is not None))
                inference = kernels.batch_norm_inference(x, weight, bias, mean, abs(weight))
                return [y, mean, inverse_std, mean_kept, var_kept, *gradients, inference]

            assert host.order_independent(run, (0, -1, 5)), f"{shape} {layout.__name__}"
