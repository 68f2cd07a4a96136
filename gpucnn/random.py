"""One counter-based random generator, the same on every device: Philox4x32-10.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A stream is named by a
64-bit seed; word i of it is word i % 4 of the Philox block with counter i // 4. So any part of a stream can be
computed alone, in any order and on any device, and "where the generator is" is one integer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
from numpy.typing import DTypeLike, NDArray

from gpucnn.errors import ArgumentError

_MULTIPLIER_0, _MULTIPLIER_1 = numpy.uint64(0xD2511F53), numpy.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW_WORD, _WORD_BITS = numpy.uint64(0xFFFFFFFF), numpy.uint64(32)
_BLOCKS_AT_A_TIME = 1 << 14  # the working set of one round stays in the second-level cache
_PAIRS_AT_A_TIME = 1 << 13


def philox4x32(counter: NDArray[numpy.uint64], key: int, high: int = 0) -> NDArray[numpy.uint32]:
    """Philox4x32-10 of 128-bit counters (``counter`` the low 64 bits, ``high`` the high) under a 64-bit key.

    Returns uint32 of shape (len(counter), 4).
    """
    blocks = numpy.empty((counter.size, 4), numpy.uint32)
    for start in range(0, counter.size, _BLOCKS_AT_A_TIME):
        part = slice(start, start + _BLOCKS_AT_A_TIME)
        _philox_blocks(counter[part], key, high, blocks[part])
    return blocks


def _philox_blocks(counter: NDArray[numpy.uint64], key: int, high: int, out: NDArray[numpy.uint32]) -> None:
    c0, c1 = counter & _LOW_WORD, counter >> _WORD_BITS
    c2 = numpy.full_like(counter, high & 0xFFFFFFFF)
    c3 = numpy.full_like(counter, high >> 32 & 0xFFFFFFFF)
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = (product_1 >> _WORD_BITS) ^ c1 ^ numpy.uint64(k0)
        c2 = (product_0 >> _WORD_BITS) ^ c3 ^ numpy.uint64(k1)
        c1, c3 = product_1 & _LOW_WORD, product_0 & _LOW_WORD
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    for column, word in enumerate((c0, c1, c2, c3)):
        out[:, column] = word


def words(seed: int, offset: int, count: int, stream: int = 0) -> NDArray[numpy.uint32]:
    """``count`` 32-bit words of stream (seed, stream), from word ``offset`` on."""
    first, last = offset // 4, -(-(offset + count) // 4)
    counter = numpy.arange(first, max(last, first), dtype=numpy.uint64)
    start = offset - 4 * first
    return philox4x32(counter, seed, stream).reshape(-1)[start : start + count]


def uniform_from_words(word: NDArray[numpy.uint32]) -> Any:
    """Words as float64 in the open interval (0, 1): (word + 1/2) / 2**32."""
    return (word + 0.5) * 2.0**-32


def sample_uniform(seed: int, stream: int, samples: NDArray[Any] | Sequence[int], count: int) -> Any:
    """``count`` uniforms for each sample number, (len(samples), count): a function of the numbers alone.

    Sample i owns the words from i * 4 * ceil(count / 4) on, so what a sample gets does not depend on the batch
    that it comes in, or on which thread prepares it.
    """
    blocks = -(-count // 4)
    sample_numbers = numpy.asarray(samples, numpy.uint64)
    counter: Any = sample_numbers[:, None] * numpy.uint64(blocks) + numpy.arange(blocks, dtype=numpy.uint64)
    drawn = philox4x32(counter.reshape(-1), seed, stream).reshape(len(sample_numbers), 4 * blocks)
    return uniform_from_words(drawn[:, :count])


def permutation(seed: int, stream: int, count: int) -> NDArray[numpy.int64]:
    """A random order of 0 .. count - 1, the same for the same seed and stream."""
    return numpy.argsort(words(seed, 0, 2 * count, stream).view(numpy.uint64), kind="stable")


class Generator:
    """A place in a Philox stream: ``seed`` names the stream, ``offset`` counts the words used so far."""

    def __init__(self, seed: int = 0) -> None:
        self.manual_seed(seed)
        self._scheduled: tuple[int, Any] | None = None

    def manual_seed(self, seed: int) -> None:
        """Start again at the beginning of the stream that ``seed`` (0 .. 2**64 - 1) names."""
        if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= int(seed) < 1 << 64:
            raise ArgumentError(f"seed must be an integer from 0 to 2**64 - 1, got {seed!r}")
        self.seed, self.offset = int(seed), 0

    def reserve(self, count: int) -> int:
        """Set ``count`` words aside and return the offset of the first, always a multiple of 4."""
        offset = self.offset
        self.offset += -(-count // 4) * 4
        return offset

    def place(self, count: int) -> tuple[int, Any]:
        """Where the next ``count`` words, set aside as by :meth:`reserve`, are: (offset, start).

        Start is None; or, inside :meth:`counted_from`, its array, to whose number the offset is to be added.
        """
        offset = self.reserve(count)
        if self._scheduled is None:
            return offset, None
        first, start = self._scheduled
        return offset - first, start

    @contextlib.contextmanager
    def counted_from(self, start: Any) -> Iterator[None]:
        """Inside, :meth:`place` counts from here, and ``start``, an array on a device, says where here is.

        What is captured inside can be started again with another number in ``start``: it draws other words.
        """
        self._scheduled = self.offset, start
        try:
            yield
        finally:
            self._scheduled = None

    def uniform(
        self, shape: Sequence[int], low: float = 0.0, high: float = 1.0, dtype: DTypeLike = numpy.float32
    ) -> Any:
        """Uniform numbers in (low, high)."""
        count = int(numpy.prod(shape, dtype=numpy.int64))
        fraction = uniform_from_words(words(self.seed, self.reserve(count), count))
        return (low + (high - low) * fraction).astype(dtype).reshape(shape)

    def normal(
        self, shape: Sequence[int], mean: float = 0.0, std: float = 1.0, dtype: DTypeLike = numpy.float32
    ) -> Any:
        """Normal numbers, by Box and Muller's transform: two uniforms make two of them."""
        count = int(numpy.prod(shape, dtype=numpy.int64))
        pairs = -(-count // 2)
        offset = self.reserve(2 * pairs)
        standard = numpy.empty((pairs, 2), dtype)
        for start in range(0, pairs, _PAIRS_AT_A_TIME):
            part = standard[start : start + _PAIRS_AT_A_TIME]
            fraction = uniform_from_words(words(self.seed, offset + 2 * start, 2 * len(part))).reshape(-1, 2)
            radius, angle = numpy.sqrt(-2.0 * numpy.log(fraction[:, 0])), 2.0 * numpy.pi * fraction[:, 1]
            part[:, 0], part[:, 1] = mean + std * radius * numpy.cos(angle), mean + std * radius * numpy.sin(angle)
        return standard.reshape(-1)[:count].reshape(shape)

    @property
    def state(self) -> dict[str, int]:
        """What :meth:`restore` takes to continue from here."""
        return {"seed": self.seed, "offset": self.offset}

    def restore(self, state: dict[str, int]) -> None:
        """Continue from a :attr:`state`."""
        self.manual_seed(state["seed"])
        self.offset = int(state["offset"])


default_generator = Generator()
"""What initial weights and dropout draw from unless they are given a generator of their own."""


def manual_seed(seed: int) -> Generator:
    """Restart the default generator at ``seed`` and return it."""
    default_generator.manual_seed(seed)
    return default_generator
