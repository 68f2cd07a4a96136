"""Two more peers on a GPU: what a CuPy user writes since CuPy has no cuDNN, and JAX, which calls cuDNN by XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy

from benchmarking.gpu_clock import Clock, WallClock
from benchmarking.gpu_ours import OursOnGpu

_NARROW = ("bfloat16", "float16")


class CupyColumns(OursOnGpu):
    """Convolution by CuPy alone: windows as strided views, copied to columns, and one product of matrices.

    float32 only: cupy.matmul has no switch for tf32 within a process, and sums 16-bit products as it likes.
    """

    variants = ("",)

    def versions(self) -> dict[str, str]:
        """What ran."""
        return {"numpy": numpy.__version__} if self._host else {"cupy": self._cupy.__version__}

    def prepare_in(self, row: dict[str, Any], precision: str, variant: str) -> Callable[[], Any] | None:
        """The work of ``row`` as a function; None for what is no dense convolution in float32."""
        if row["kind"] != "convolution" or precision != "float32" or row["sizes"]["groups"] > 1:
            return None
        self._precision, self._variant = precision, variant
        return self.prepare(row)

    def _convolution(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        # On the host runtime arrays are plain NumPy's here: none of our kernels runs.
        library: Any = numpy if self._host else self._cupy
        x, weight = (library.asarray(values.get() if self._host else values) for values in self._pair(s))
        padding, stride, kernel = s["padding"], s["stride"], s["kernel"]
        n, c, size = x.shape[:3]
        out = (size + 2 * padding - kernel) // stride + 1
        flat = weight.reshape(s["k"], -1)

        def windows() -> Any:
            padded = library.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding))) if padding else x
            down, across = padded.strides[2:]
            strides = (*padded.strides[:2], down, across, stride * down, stride * across)
            view = library.lib.stride_tricks.as_strided(padded, (n, c, kernel, kernel, out, out), strides)
            return view.reshape(n, c * kernel * kernel, out * out)

        if direction == "forward":
            return lambda: library.matmul(flat, windows())
        dy = library.ascontiguousarray(library.matmul(flat, windows()))
        if direction == "filter gradient":
            return lambda: library.matmul(dy, windows().transpose(0, 2, 1)).sum(axis=0)

        def input_gradient() -> Any:
            columns = library.matmul(flat.T, dy).reshape(n, c, kernel, kernel, out, out)
            dx = library.zeros((n, c, size + 2 * padding, size + 2 * padding), x.dtype)
            reach = stride * out
            for r in range(kernel):
                for column in range(kernel):
                    part = dx[:, :, r : r + reach : stride, column : column + reach : stride]
                    part += columns[:, :, r, column]
            return dx[:, :, padding : padding + size, padding : padding + size]

        return input_gradient

    def _pair(self, s: dict[str, Any]) -> tuple[Any, Any]:
        x = self._normal(s["n"], s["c"], s["size"], s["size"])
        return x, self._normal(s["k"], s["c"], s["kernel"], s["kernel"], scale=0.1)

    def proof(self, x: Any, weight: Any, precision: str) -> Any:
        """None: what cupy.matmul rounds depends on the environment, which is the user's."""
        return None


class Jax:
    """JAX, in either layout: XLA lays arrays out as it likes, and takes cuDNN's algorithms by measuring."""

    variants = ("",)

    def __init__(self) -> None:
        import jax

        self._jax = jax
        self._numbers = numpy.random.default_rng(0).standard_normal(1 << 20, numpy.float32)

    def versions(self) -> dict[str, str]:
        """What ran."""
        return {"jax": self._jax.__version__, "jax's backend": self._jax.default_backend()}

    @property
    def clock(self) -> Clock:
        """The wall clock: JAX shows no events. Its cache is warm and Python's time counts, which both are said."""
        return WallClock(self._jax.block_until_ready)

    def forget(self) -> None:
        """Nothing: arrays are freed with their names, and programs take little."""

    def synchronize(self) -> None:
        """Do a little on the GPU. Raises where it can do no more work for this process."""
        self._jax.block_until_ready(self._jax.numpy.zeros(1) + 1)

    def facts(self) -> dict[str, Any]:
        """Nothing that others do not know better."""
        return {}

    def _normal(self, precision: str, *shape: int) -> Any:
        # The same numbers again and again, from the host: a program that draws them would be one a shape.
        numbers = self._jax.numpy.asarray(self._numbers, precision if precision in _NARROW else "float32")
        return self._jax.device_put(numpy.resize(numpy.asarray(numbers), shape))

    def _convolve(self, precision: str, **options: Any) -> Callable[..., Any]:
        """lax's convolution of (N, C, H, W), its float32 products exact or rounded to tf32."""
        level = "tensorfloat32" if precision == "tf32" else "highest"

        def convolve(x: Any, weight: Any) -> Any:
            with self._jax.default_matmul_precision(level):
                return self._jax.lax.conv_general_dilated(
                    x, weight, dimension_numbers=("NCHW", "OIHW", "NCHW"), **options
                )

        return convolve

    def prepare_in(self, row: dict[str, Any], precision: str, variant: str) -> Callable[[], Any] | None:
        """A convolution's work as a function; None for other rows."""
        del variant
        if row["kind"] != "convolution":
            return None
        jax, s = self._jax, row["sizes"]
        x = self._normal(precision, s["n"], s["c"], s["size"], s["size"])
        weight = self._normal(precision, s["k"], s["c"] // s["groups"], s["kernel"], s["kernel"])
        pads, strides = [(s["padding"],) * 2] * 2, (s["stride"],) * 2
        convolve = self._convolve(precision, window_strides=strides, padding=pads, feature_group_count=s["groups"])
        if row["direction"] == "forward":
            forward = jax.jit(convolve)
            return lambda: forward(x, weight)
        dy = self._normal(precision, *jax.eval_shape(convolve, x, weight).shape)
        of_input = row["direction"] == "input gradient"

        def gradient(x: Any, weight: Any, dy: Any) -> Any:
            # The convolution is linear in either factor: its transposed map is the gradient alone.
            if of_input:
                return jax.linear_transpose(lambda x: convolve(x, weight), x)(dy)[0]
            return jax.linear_transpose(lambda weight: convolve(x, weight), weight)(dy)[0]

        compiled = jax.jit(gradient)
        return lambda: compiled(x, weight, dy)

    def proof(self, x: Any, weight: Any, precision: str) -> Any:
        """A convolution of given numbers with padding 1, for the error of this precision."""
        dtype = precision if precision in _NARROW else "float32"
        given = [self._jax.numpy.asarray(values, dtype) for values in (x, weight)]
        convolve = self._convolve(precision, window_strides=(1, 1), padding=[(1, 1), (1, 1)])
        return numpy.asarray(self._jax.jit(convolve)(*given), numpy.float64)
