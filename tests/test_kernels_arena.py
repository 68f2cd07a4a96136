"""Memory that is planned once: where arrays are put, on the host runtime and with CuPy's allocator."""

from __future__ import annotations

import contextlib
import itertools
import math
from types import SimpleNamespace

import numpy
import pytest

from gpucnn_kernels import relu_forward
from gpucnn_kernels.arena import ALIGNMENT, Arena, Lifetime, offsets_of
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.runtime import current, using
from tests.kernel_stand_ins import StandInArray, stand_in_cupy

__all__ = ["stand_in_cupy"]


# ---------------------------------------------------------------- the places


def least_size(lifetimes):
    """What lives at the busiest time, each rounded up: no plan is smaller."""
    moments = {lifetime.birth for lifetime in lifetimes}
    return max(
        sum(-(-one.size // ALIGNMENT) * ALIGNMENT for one in lifetimes if one.birth <= moment < one.death)
        for moment in moments
    )


def test_a_chain_takes_two_places_in_turns():
    chain = [Lifetime(1000, 2 * i, 2 * i + 3) for i in range(6)]
    offsets, size = offsets_of(chain)
    assert sorted(set(offsets)) == [0, 1024]
    assert all(one != other for one, other in itertools.pairwise(offsets))
    assert size == 2048 == least_size(chain)


def test_nothing_that_lives_at_the_same_time_overlaps():
    generator = numpy.random.default_rng(0)
    for _ in range(200):
        lifetimes = []
        for _ in range(int(generator.integers(1, 30))):
            birth = int(generator.integers(0, 40))
            death = math.inf if generator.random() < 0.1 else birth + int(generator.integers(1, 15))
            lifetimes.append(Lifetime(int(generator.integers(0, 5000)), birth, death))
        offsets, size = offsets_of(lifetimes)
        for (one, start), (other, begin) in itertools.combinations(zip(lifetimes, offsets, strict=True), 2):
            if one.birth < other.death and other.birth < one.death:
                assert start + one.size <= begin or begin + other.size <= start or 0 in (one.size, other.size)
        assert all(offset % ALIGNMENT == 0 for offset in offsets)
        assert all(offset + one.size <= size for one, offset in zip(lifetimes, offsets, strict=True))
        assert size <= 1.5 * least_size(lifetimes) + ALIGNMENT


def test_nothing_takes_nothing():
    assert offsets_of([]) == ([], 0)
    with using("host"):
        arena = Arena()
        with pytest.raises(ArgumentError, match="nothing was recorded"), arena.in_use():
            pass
        with arena.recorded():
            pass
        with arena.in_use():
            pass
        assert arena.size == 0


# ---------------------------------------------------------------- an arena


def test_arrays_lie_where_they_were_planned():
    x = numpy.linspace(-1, 1, 600, dtype="f4")

    def chain():
        y = relu_forward(x)
        for _ in range(3):
            y = relu_forward(y)
        return y

    with using("host"):
        arena = Arena()
        with arena.recorded():
            expected = chain()
        assert [lifetime.size for lifetime in arena.lifetimes] == [2400] * 4
        assert arena.size == 2 * 2560
        addresses = []
        for _ in range(2):
            with arena.in_use():
                y = chain()
            addresses.append(y.ctypes.data)
            assert y.ctypes.data % ALIGNMENT == 0
            numpy.testing.assert_array_equal(y, expected)
        assert addresses[0] == addresses[1]
        begin = current().address(arena.memory)
        assert begin <= addresses[0] < begin + arena.size
        outside = relu_forward(x)
        assert not begin <= outside.ctypes.data < begin + arena.size


def test_other_calls_than_those_recorded_are_refused():
    x, longer = numpy.ones(600, "f4"), numpy.ones(601, "f4")
    with using("host"):
        arena = Arena()
        with arena.recorded():
            y = relu_forward(relu_forward(x))
        with (
            pytest.raises(ArgumentError, match="2404 bytes is made where one of 2400 was recorded"),
            arena.in_use(),
        ):
            relu_forward(longer)
        with pytest.raises(ArgumentError, match="1 arrays were made where 2 were recorded"), arena.in_use():
            relu_forward(x)
        with pytest.raises(ArgumentError, match="is made where none was recorded"), arena.in_use():
            relu_forward(relu_forward(relu_forward(x)))
        with arena.in_use():
            again = relu_forward(relu_forward(x))
        numpy.testing.assert_array_equal(again, y)


def test_an_array_that_is_held_for_longer_is_noticed():
    x = numpy.ones(600, "f4")
    with using("host"):
        arena = Arena()
        with arena.recorded():
            relu_forward(relu_forward(relu_forward(x)))

        def hold():
            first = relu_forward(x)
            second = relu_forward(first)
            return first, second, relu_forward(second)

        with (
            pytest.raises(ArgumentError, match="array 0 of an arena is still held where array 2"),
            arena.in_use(),
        ):
            hold()


# ---------------------------------------------------------------- CuPy's allocator


class Memory:
    """What owns bytes from an address on; CuPy's UnownedMemory keeps an owner besides."""

    def __init__(self, ptr, size, owner=None, device=0):
        self.ptr, self.size, self.owner, self.device = ptr, size, owner, device


class MemoryPointer:
    def __init__(self, mem, offset):
        self.mem, self.ptr = mem, mem.ptr + offset


def test_every_array_that_cupy_makes_lies_in_the_arena(stand_in_cupy, monkeypatch):
    """Arrays hold their memory, and it its owner, as CuPy's do: views of an array keep its place taken."""
    allocators, blocks = [], itertools.count(1 << 20, 1 << 20)
    pool = lambda size: MemoryPointer(Memory(next(blocks), size), 0)  # noqa: E731

    @contextlib.contextmanager
    def using_allocator(allocator):
        allocators.append(allocator)
        yield
        allocators.pop()

    def empty(shape, dtype):
        array = numpy.empty(shape, dtype)
        made = StandInArray(array, stand_in_cupy.device_now)
        made.data = (allocators or [pool])[-1](array.nbytes)
        return made

    def get_allocator():
        return (allocators or [pool])[-1]

    names = {
        "alloc": lambda size: get_allocator()(size),  # by the allocator in force, as CuPy's
        "get_allocator": get_allocator,
        "MemoryPointer": MemoryPointer,
        "UnownedMemory": Memory,
        "using_allocator": using_allocator,
    }
    for name, value in names.items():
        setattr(stand_in_cupy.cuda, name, value)

    def chain():
        first = empty((300,), "f4")
        view = SimpleNamespace(data=first.data)  # outlives it
        del first
        second = empty((300,), "f4")
        del view
        return second, empty((100,), "f4")

    arena = Arena(1)
    assert current().name == "cuda"
    with arena.recorded():
        chain()
    assert stand_in_cupy.devices[-1] == 1, "memory of the arena's device"
    assert [lifetime.size for lifetime in arena.lifetimes] == [1200, 1200, 400]
    assert arena.lifetimes[0].meets(arena.lifetimes[1])
    assert not arena.lifetimes[0].meets(arena.lifetimes[2])
    assert arena.size == 2 * 1536
    start = arena.memory.ptr
    with arena.in_use():
        second, third = chain()
    assert sorted({second.data.ptr, third.data.ptr}) == [start, start + 1536]
    assert (second.data.mem.device, second.data.mem.size) == (1, 1200)
    assert not allocators, "CuPy's own allocator again"
