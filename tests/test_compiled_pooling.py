"""Pooling in compiled loops, where vectors, bands of rows and pages end, against the definition."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpucnn.ops import cpu
from gpucnn.ops.cpu import compiled
from gpucnn.ops.cpu.compiled import pooling
from gpucnn_kernels.problem import Pool2dProblem
from tests.accuracy import awkward, error_bound, max_error
from tests.guarded import guarded, guarded_empty
from tests.oracles import pooling as oracle
from tests.pool_problems import PoolCase

pytestmark = pytest.mark.compiler


def case(
    shape: tuple[int, int, int, int],
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> Any:
    """One case, named by what it is."""

    def pair(value: int | tuple[int, int]) -> tuple[int, int]:
        return value if isinstance(value, tuple) else (value, value)

    made = PoolCase("", shape, pair(kernel), pair(stride), pair(padding), pair(dilation), ceil_mode)
    name = f"{shape} k{kernel} s{stride} p{padding} d{dilation}{' ceil' * ceil_mode}"
    return pytest.param(made, id=name)


# Output widths about the vectors of 4, 8 and 16 numbers and twice those; planes of more than a band of rows.
CASES = [
    *(case((1, 2, 5, width), 2, 2) for width in (8, 15, 16, 17, 31, 32, 33, 63, 64, 66, 97)),
    *(case((1, 2, 6, width), 3, 2) for width in (9, 17, 19, 32, 33, 35, 65, 67)),
    *(case((1, 2, 7, width), 3, 2, 1) for width in (7, 15, 16, 18, 32, 33, 63, 64, 65)),
    *(case((1, 2, 5, width), 3, 1, 1) for width in (4, 8, 15, 16, 17, 32, 33)),
    *(case((1, 1, 6, width), 3, 2, 1, 1, True) for width in (16, 32, 34)),
    case((1, 2, 9, 50), 4, 2, 1),
    case((1, 2, 9, 50), 5, 2, 2),
    case((1, 1, 11, 40), 5, 3, 2),
    case((1, 1, 12, 70), 3, 4, 1),
    case((1, 1, 14, 53), (2, 3), (1, 2), 1, (3, 2)),
    case((1, 1, 12, 41), 3, (2, 1), 1, 2),
    case((1, 1, 9, 20), 16, (1, 2), (8, 8)),
    case((2, 2, 403, 30), 2, 2),
    case((1, 1, 500, 37), 3, 2, 1),
    case((1, 1, 260, 37), 3, 1, 1),
    case((1, 1, 3, 6001), 3, 2, 1),
]
ALL = pytest.mark.parametrize("case", CASES)
UNDILATED = pytest.mark.parametrize("case", [each for each in CASES if each.values[0].dilation == (1, 1)])


def few_numbers(shape: tuple[int, ...], seed: int = 0) -> NDArray[Any]:
    """Numbers of which many are equal, so that ties are everywhere."""
    return numpy.random.default_rng(seed).integers(-3, 4, shape).astype(numpy.float32)


def numbers(shape: tuple[int, ...], seed: int = 0) -> NDArray[Any]:
    return numpy.random.default_rng(seed).standard_normal(shape).astype(numpy.float32)


def windows(case: PoolCase) -> tuple[Any, ...]:
    return case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode


def check_max(case: PoolCase, x: NDArray[Any]) -> None:
    """Forward on x, and backward: both exact, with numbers as small as these."""
    assert compiled.usable(x)
    expected, expected_place = oracle.max_pool(x, *windows(case))
    y, place = cpu.max_pool2d_forward(x, dilation=case.dilation, **case.options)
    numpy.testing.assert_array_equal(y, expected)
    numpy.testing.assert_array_equal(place, expected_place)
    dy = few_numbers(y.shape, 1)
    dx = cpu.max_pool2d_backward(dy, place, input_size=x.shape[2:], dilation=case.dilation, **case.options)
    numpy.testing.assert_array_equal(dx, oracle.max_pool_backward(dy, expected_place, x.shape, *windows(case)))


@ALL
def test_max(case: PoolCase) -> None:
    check_max(case, few_numbers(case.shape))


@ALL
def test_max_of_nan_and_infinities(case: PoolCase) -> None:
    values = [-numpy.inf, numpy.inf, numpy.nan, -numpy.nan, -1, 0, -0.0]
    x = numpy.random.default_rng(2).choice(values, case.shape, p=[0.4, 0.1, 0.05, 0.05, 0.2, 0.1, 0.1])
    check_max(case, x.astype(numpy.float32))


@pytest.mark.parametrize("place", [0, 16 * 33 - 1, 5 * 33 + 16])
def test_one_nan_is_found_wherever_it_is(place: int) -> None:
    x = numbers((1, 1, 16, 33))
    x.reshape(-1)[place] = numpy.nan
    y, _ = cpu.max_pool2d_forward(x, kernel_size=3, stride=2, padding=1)
    expected, _ = oracle.max_pool(x, (3, 3), (2, 2), (1, 1))
    assert numpy.isnan(expected).any()
    numpy.testing.assert_array_equal(y, expected)


def check_average(case: PoolCase, count_include_pad: bool) -> None:
    """Forward and backward, within the bound for sums in any order."""
    x = numbers(case.shape, 3)
    where = (case.kernel, case.stride, case.padding, case.ceil_mode, count_include_pad)
    truth = oracle.avg_pool(x, *where)
    y = cpu.avg_pool2d_forward(x, **case.options, count_include_pad=count_include_pad)
    # Each of a window's numbers is rounded as it is added to those before it, and once more in the mean.
    terms = oracle.avg_pool(abs(x), *where)
    places = case.kernel[0] * case.kernel[1]
    assert (abs(y - truth) <= (places + 2) * numpy.finfo(numpy.float32).eps / 2 * terms).all()
    dy = numbers(y.shape, 4)
    dx = cpu.avg_pool2d_backward(
        dy, input_size=case.shape[2:], **case.options, count_include_pad=count_include_pad
    )
    truth = oracle.avg_pool_backward(dy, case.shape, *where)
    terms = oracle.avg_pool_backward(abs(dy), case.shape, *where)
    assert (abs(dx - truth) <= (places + 2) * numpy.finfo(numpy.float32).eps / 2 * terms).all()


@UNDILATED
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_average(case: PoolCase, count_include_pad: bool) -> None:
    check_average(case, count_include_pad)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_problems(data: st.DataObject) -> None:
    draw = data.draw
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 3)))
    padding = draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    height, width = least[0] + draw(st.integers(0, 8)), least[1] + draw(st.integers(0, 60))
    shape = draw(st.integers(1, 2)), draw(st.integers(1, 2)), height, width
    drawn = PoolCase("", shape, kernel, stride, padding, dilation, draw(st.booleans()))
    check_max(drawn, few_numbers(shape, draw(st.integers(0, 99))))
    if dilation == (1, 1):
        check_average(drawn, draw(st.booleans()))


@pytest.mark.parametrize(
    ("size", "output"), [((7, 7), 1), ((1, 1), 1), ((5, 13), 1), ((40, 33), 1), ((8, 12), (4, 3)), ((9, 9), 4)]
)
def test_adaptive_average(size: tuple[int, int], output: Any) -> None:
    x = numbers((3, 5, *size), 5)
    shape = output if isinstance(output, tuple) else (output, output)
    truth = oracle.adaptive_avg_pool(x, shape)
    y = cpu.adaptive_avg_pool2d_forward(x, output_size=output)
    with compiled.switched(False):
        plain = cpu.adaptive_avg_pool2d_forward(x, output_size=output)
    assert max_error(y, truth) <= error_bound(plain, truth, abs(x).max())
    dy = numbers(y.shape, 6)
    truth = oracle.adaptive_avg_pool_backward(dy, size)
    with compiled.switched(False):
        plain = cpu.adaptive_avg_pool2d_backward(dy, input_size=size)
    dx = cpu.adaptive_avg_pool2d_backward(dy, input_size=size)
    assert max_error(dx, truth) <= error_bound(plain, truth)


def test_a_large_mean_is_as_good_as_numpys() -> None:
    x = numpy.random.default_rng(7).uniform(0, 1, (2, 2, 500, 300)).astype(numpy.float32)
    truth = x.mean(axis=(2, 3), dtype=numpy.float64, keepdims=True)
    with compiled.switched(False):
        plain = cpu.adaptive_avg_pool2d_forward(x, output_size=1)
    assert max_error(cpu.adaptive_avg_pool2d_forward(x, output_size=1), truth) <= error_bound(plain, truth)


def every_result(x: NDArray[Any], dy: NDArray[Any], place: NDArray[Any], case: PoolCase) -> list[NDArray[Any]]:
    """Max and average, forward and backward."""
    size = case.shape[2:]
    return [
        *cpu.max_pool2d_forward(x, **case.options),
        cpu.max_pool2d_backward(dy, place, input_size=size, **case.options),
        cpu.avg_pool2d_forward(x, **case.options),
        cpu.avg_pool2d_backward(dy, input_size=size, **case.options),
    ]


@UNDILATED
@pytest.mark.parametrize("end", [True, False])
def test_nothing_beyond_the_arrays_is_touched(case: PoolCase, end: bool) -> None:
    x = guarded(numbers(case.shape, 8), end)
    y, place = cpu.max_pool2d_forward(x, **case.options)
    dy, place = guarded(y, end), guarded(place, end)
    expected = every_result(x, dy, place, case)
    outs = [guarded_empty(each.shape, each.dtype, end) for each in expected]
    size = case.shape[2:]
    cpu.max_pool2d_forward(x, **case.options, out=outs[0])
    cpu.max_pool2d_backward(dy, place, input_size=size, **case.options, out=outs[2])
    cpu.avg_pool2d_forward(x, **case.options, out=outs[3])
    cpu.avg_pool2d_backward(dy, input_size=size, **case.options, out=outs[4])
    for out, result in zip([outs[0], *outs[2:]], [expected[0], *expected[2:]], strict=True):
        numpy.testing.assert_array_equal(out, result)
    mean = guarded_empty((*case.shape[:2], 1, 1), numpy.float32, end)
    cpu.adaptive_avg_pool2d_forward(x, output_size=1, out=mean)
    cpu.adaptive_avg_pool2d_backward(mean, input_size=size, out=guarded_empty(case.shape, numpy.float32, end))


@pytest.mark.parametrize("end", [True, False])
def test_places_of_guarded_memory(end: bool) -> None:
    # The operation makes the array of places itself, so the loops are called as it calls them.
    for width in range(4, 70):
        problem = Pool2dProblem.from_shapes((1, 1, 3, width), 2, stride=2)
        x = numbers((1, 1, 3, width), 9)
        y, place = cpu.max_pool2d_forward(x, kernel_size=2)
        memory = guarded_empty(place.shape, numpy.uint8, end)
        pooling.max_forward(problem, x, y, memory)
        numpy.testing.assert_array_equal(memory, place)


@pytest.mark.parametrize(
    "case",
    [
        case((20, 8, 32, 32), 2, 2),
        case((20, 8, 32, 32), 3, 2, 1),
        case((3, 2, 300, 200), 3, 1, 1),
        case((40, 40, 7, 7), 7, 7),
    ],
)
def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch, case: PoolCase) -> None:
    x = numbers(case.shape, 10)
    y, place = cpu.max_pool2d_forward(x, **case.options)
    dy = numbers(y.shape, 11)
    found = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
        found.append([result.tobytes() for result in every_result(x, dy, place, case)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("case", [case((2, 3, 9, 21), 3, 2, 1), case((2, 3, 8, 20), 2, 2)])
def test_strides_of_out_change_nothing(case: PoolCase) -> None:
    x = numbers(case.shape, 12)
    y, place = cpu.max_pool2d_forward(x, **case.options)
    for expected, operation in zip(
        every_result(x, y, place, case)[2:],
        [
            lambda out: cpu.max_pool2d_backward(y, place, input_size=x.shape[2:], **case.options, out=out),
            lambda out: cpu.avg_pool2d_forward(x, **case.options, out=out),
            lambda out: cpu.avg_pool2d_backward(y, input_size=x.shape[2:], **case.options, out=out),
        ],
        strict=True,
    ):
        out = awkward(numpy.zeros(expected.shape, numpy.float32))
        assert operation(out) is out
        numpy.testing.assert_array_equal(out, expected)
