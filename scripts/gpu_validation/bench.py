"""What the checks of scripts/validate_gpu.py stand on: numbers, arrays on the device, comparing, keeping count."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from gpucnn_kernels import runtime as runtimes
from gpucnn_kernels.arrays import numpy_dtype
from gpucnn_kernels.errors import DeviceError

DTYPES = ("float32", "float16", "bfloat16", "float64")
LAYOUTS = ("contiguous", "channels_last")
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-52}
"""From 1 to the next number."""
_SMALLEST_HALF = 2.0**-14  # below, float16 has fewer digits
_SHOWN_FAILURES = 5


class OutOfTimeError(Exception):
    """The time that --minutes allows is over."""


class ContextLostError(Exception):
    """After a failure no call of CUDA works any more in this process."""


@dataclass(frozen=True)
class Numbers:
    """Random numbers for dtypes that hold them exactly, so that one expectation serves both."""

    dtypes: tuple[str, ...]
    random: numpy.random.Generator
    half: bool

    def normal(self, *shape: int, scale: float = 1.0) -> numpy.ndarray[Any, Any]:
        """Standard normal numbers times ``scale``, in float64."""
        return self.rounded(self.random.standard_normal(shape) * scale)

    def uniform(self, low: float, high: float, *shape: int) -> numpy.ndarray[Any, Any]:
        """Numbers from low to high, in float64."""
        return self.rounded(self.random.uniform(low, high, shape))

    def rounded(self, values: Any) -> numpy.ndarray[Any, Any]:
        """The nearest numbers that all of the dtypes have."""
        if not self.half:
            return numpy.asarray(values).astype(numpy.float32).astype(numpy.float64)
        # bfloat16's 8 bits, by rounding what frexp gives; float16 has them all above its smallest normal number.
        mantissa, exponent = numpy.frexp(numpy.asarray(values, numpy.float64))
        rounded = numpy.ldexp(numpy.round(mantissa * 256) / 256, exponent)
        return numpy.where(numpy.abs(rounded) < _SMALLEST_HALF, 0.0, rounded)


@dataclass
class Outcome:
    """What became of one operation in one dtype by one algorithm, over all its problems."""

    family: str
    operation: str
    dtype: str
    algorithm: str
    runs: int = 0
    problems: set[str] = field(default_factory=set)
    worst: float = 0.0  # error over bound
    error: float = 0.0
    bound: float = 0.0
    where: str = ""
    repeated: int = 0  # runs that gave the same bits twice
    refused: int = 0  # runs that this GPU is too old for, as the package says
    failures: list[str] = field(default_factory=list)
    failed: int = 0

    def fail(self, message: str) -> None:
        """Count a failure, and keep the first few messages."""
        self.failed += 1
        if len(self.failures) < _SHOWN_FAILURES:
            self.failures.append(message)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "family": self.family, "operation": self.operation, "dtype": self.dtype, "algorithm": self.algorithm,
            "runs": self.runs, "problems": len(self.problems), "error": self.error, "bound": self.bound,
            "error_over_bound": self.worst, "worst_at": self.where, "same_bits_twice": self.repeated,
            "too_new_for_this_gpu": self.refused, "failed": self.failed, "failures": self.failures,
        }  # fmt: skip


def accumulated(dtype: str) -> str:
    """The dtype in which kernels compute with arrays of ``dtype``."""
    return "float64" if dtype == "float64" else "float32"


def rounding(dtype: str, expected: Any, scale: Any, steps: float = 4.0) -> Any:
    """A bound by element: one rounding of the stored result, and ``steps`` of the arithmetic at size ``scale``."""
    storage = EPSILON[dtype] / 2 * numpy.abs(expected) if numpy.dtype(numpy_dtype(dtype)).itemsize == 2 else 0.0
    least = 2.0**-24 if dtype == "float16" else 2.0**-120 if dtype != "float64" else 0.0
    return storage + steps * EPSILON[accumulated(dtype)] * numpy.abs(scale) + least


def by_comparison(dtype: str, expected: Any, plain: Any, terms: float) -> float:
    """A bound for all elements: twice the error of ``plain``, a plain sum in the accumulating dtype, stored.

    It may be small by luck, as the numbers are new each time: so a rounding of the largest result, and on top what
    rounding does to a random sum of ``terms`` products of about 1.
    """
    stored = numpy.asarray(plain).astype(numpy_dtype(dtype)).astype(numpy.float64)
    largest = float(numpy.abs(expected).max(initial=0.0))
    arithmetic = EPSILON[accumulated(dtype)] * (2 + math.sqrt(terms) / 2) * max(largest, math.sqrt(terms))
    return 2 * float(numpy.abs(stored - expected).max(initial=0.0)) + EPSILON[dtype] / 2 * largest + arithmetic


class Bench:
    """A device, fresh random numbers, and what the operations did."""

    def __init__(self, runtime: str, seed: int, dtypes: Sequence[str], whole: bool, deadline: float) -> None:
        self.name, self.seed, self.dtypes, self.whole, self.deadline = (
            runtime,
            seed,
            tuple(dtypes),
            whole,
            deadline,
        )
        self.outcomes: dict[tuple[str, str, str, str], Outcome] = {}
        self.family = ""
        self.tell: Callable[[dict[str, Any]], None] = lambda what: None
        """Hears where the checks are, "at", and what became of each, "record"."""
        self.without: set[tuple[str, ...]] = set()
        """The keys of outcomes that are not to be checked."""
        self._runtime = runtimes.current()
        if runtime == "cuda":
            import cupy

            self._cupy = cupy

    # ------------------------------------------------------------ numbers and arrays

    def numbers(self) -> Iterator[Numbers]:
        """A source of numbers for the wide dtypes and one for the 16-bit ones, new in each family."""
        for half, dtypes in ((False, ("float32", "float64")), (True, ("float16", "bfloat16"))):
            wanted = tuple(dtype for dtype in dtypes if dtype in self.dtypes)
            if wanted:
                key = [self.seed, half, *self.family.encode()]
                yield Numbers(wanted, numpy.random.default_rng(key), half)

    def put(self, values: Any, dtype: str | None = None, layout: str = "contiguous") -> Any:
        """``values`` on the device, of this dtype, laid out so."""
        array = numpy.asarray(values)
        array = array if dtype is None else array.astype(numpy_dtype(dtype))
        last = layout == "channels_last" and array.ndim == 4
        array = numpy.ascontiguousarray(array.transpose(0, 2, 3, 1) if last else array)
        moved = self._cupy.asarray(array) if self.name == "cuda" else array.copy()
        return moved.transpose(0, 3, 1, 2) if last else moved

    def poisoned(self, shape: Sequence[int], dtype: str) -> Any:
        """A new array of the device whose every byte is 0xFF: a NaN, where it is a floating-point number."""
        return poison(self._runtime.empty(tuple(shape), dtype, None))

    def get(self, value: Any) -> numpy.ndarray[Any, Any]:
        """A result as a NumPy array of its own dtype."""
        return numpy.asarray(value.get() if hasattr(value, "get") else value)

    # ------------------------------------------------------------ comparing

    def check(
        self,
        operation: str,
        problem: str,
        dtype: str,
        run: Callable[[], Any],
        expected: Sequence[Any],
        bounds: Sequence[Any],
        *,
        algorithm: str = "",
        repeatable: bool = True,
    ) -> None:
        """Run an operation twice, and hold what it gives to ``expected`` within ``bounds``.

        ``run`` makes its arguments anew, and gives an array or several. An expected None is not looked at. Raises
        OutOfTimeError where the time is over, ContextLostError where a failure is the end of all others.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTimeError
        key = self.family, operation, dtype, algorithm
        if key in self.without:
            return
        outcome = self.outcomes.setdefault(key, Outcome(*key))
        outcome.runs += 1
        outcome.problems.add(problem)
        failed = outcome.failed
        self.tell({"at": [*key, problem]})
        self._check(outcome, problem, run, expected, bounds, repeatable)
        self.tell({"record": outcome.record()})
        if outcome.failed > failed and not self.works():
            raise ContextLostError

    def works(self) -> bool:
        """Whether CUDA still answers: after a bad access it fails in every call to the end of the process."""
        if self.name != "cuda":
            return True
        try:
            self._cupy.cuda.runtime.deviceSynchronize()
        except Exception:  # of CuPy's kinds, whose names would have to be imported
            return False
        return True

    def _check(
        self,
        outcome: Outcome,
        problem: str,
        run: Callable[[], Any],
        expected: Sequence[Any],
        bounds: Sequence[Any],
        repeatable: bool,
    ) -> None:
        try:
            results = self._run(run)
            again = self._run(run) if repeatable else results
        except DeviceError as error:
            if "compute capability" in str(error):
                outcome.refused += 1
            else:
                outcome.fail(f"{problem}: {error}")
            return
        except Exception as error:  # whatever goes wrong with one operation, the others are checked
            outcome.fail(f"{problem}: {type(error).__name__}: {error}")
            return
        if len(results) != len(expected):
            outcome.fail(f"{problem}: {len(results)} results, not {len(expected)}")
            return
        for number, (result, wanted, bound) in enumerate(zip(results, expected, bounds, strict=True)):
            if wanted is not None:
                self._compare(outcome, f"{problem}, result {number}" if number else problem, result, wanted, bound)
        if repeatable:
            if all(one.tobytes() == other.tobytes() for one, other in zip(results, again, strict=True)):
                outcome.repeated += 1
            else:
                outcome.fail(f"{problem}: run twice, it gave different bits")

    def _run(self, run: Callable[[], Any]) -> list[numpy.ndarray[Any, Any]]:
        results = run()
        return [self.get(result) for result in (results if isinstance(results, tuple) else (results,))]

    def _compare(self, outcome: Outcome, where: str, result: Any, wanted: Any, bound: Any) -> None:
        wanted = numpy.asarray(wanted)
        if result.shape != wanted.shape:
            outcome.fail(f"{where}: shape {result.shape}, not {wanted.shape}")
            return
        result = result.astype(numpy.float64)
        same = (result == wanted) | (numpy.isnan(result) & numpy.isnan(wanted))
        with numpy.errstate(invalid="ignore"):
            error = numpy.where(same, 0.0, numpy.abs(result - wanted))
        bound = numpy.broadcast_to(numpy.asarray(bound, numpy.float64), error.shape)
        with numpy.errstate(divide="ignore", invalid="ignore"):
            over = numpy.where(error == 0, 0.0, error / bound)
        over = numpy.where(numpy.isnan(over), math.inf, over)  # a NaN where there should be none
        if not over.size:
            return
        at = int(over.argmax())
        if over.flat[at] >= outcome.worst:
            outcome.worst, outcome.where = float(over.flat[at]), where
            outcome.error, outcome.bound = float(error.flat[at]), float(bound.flat[at])
        if not bool((over <= 1).all()):
            place = tuple(int(index) for index in numpy.unravel_index(at, over.shape))
            outcome.fail(
                f"{where}: at {place} {float(result.flat[at])!r}, expected {float(wanted.flat[at])!r}; "
                f"{int((over > 1).sum())} of {over.size} numbers are over the bound"
            )


def poison(array: Any) -> Any:
    """Fill every byte of a new, contiguous array with 0xFF."""
    if not isinstance(array, numpy.ndarray):
        if array.nbytes:
            array.data.memset_async(0xFF, array.nbytes)  # on the stream of the call
    else:
        array.reshape(-1).view(numpy.uint8).fill(0xFF)
    return array


def poison_all(runtime: Any) -> None:
    """From now on every result and workspace that the package makes is poisoned before a kernel sees it."""
    plain = runtime.empty
    runtime.empty = lambda shape, dtype, like: poison(plain(shape, dtype, like))
