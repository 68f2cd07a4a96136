"""The Philox generator against published test vectors and plain-integer arithmetic."""

import numpy
import pytest

from gpucnn import random
from gpucnn.errors import ArgumentError


def philox_reference(counter, key):
    """Philox4x32-10 in Python integers, straight from the paper's definition."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        product_0, product_1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (product_1 >> 32) ^ c[1] ^ k0,
            product_1 & 0xFFFFFFFF,
            (product_0 >> 32) ^ c[3] ^ k1,
            product_0 & 0xFFFFFFFF,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_matches_the_known_answers_of_its_authors(counter, key, expected):
    low = numpy.array([counter[0] | counter[1] << 32], numpy.uint64)
    got = random.philox4x32(low, key[0] | key[1] << 32, counter[2] | counter[3] << 32)
    assert got[0].tolist() == list(expected)
    assert philox_reference(counter, key) == list(expected)


def test_words_can_be_computed_from_anywhere():
    seed, stream = 0x123456789ABCDEF0, 7
    expected = []
    for block in range(60000, 60010):
        key = (seed & 0xFFFFFFFF, seed >> 32)
        expected += philox_reference((block & 0xFFFFFFFF, block >> 32, stream, 0), key)
    for offset, count in [(0, 40), (1, 39), (3, 1), (5, 20), (7, 0)]:
        got = random.words(seed, 4 * 60000 + offset, count, stream)
        assert got.tolist() == expected[offset : offset + count]


def test_many_words_equal_the_pieces():
    whole = random.words(3, 0, 200_000)
    pieces = [random.words(3, start, 50_000) for start in range(0, 200_000, 50_000)]
    assert numpy.array_equal(whole, numpy.concatenate(pieces))


def test_sample_uniform_depends_on_the_sample_alone():
    whole = random.sample_uniform(5, 2, range(100), 6)
    assert whole.shape == (100, 6)
    chosen = random.sample_uniform(5, 2, [17, 3, 99], 6)
    assert numpy.array_equal(chosen, whole[[17, 3, 99]])
    assert numpy.all((whole > 0) & (whole < 1))
    assert len(numpy.unique(whole)) == whole.size
    assert not numpy.array_equal(whole, random.sample_uniform(5, 3, range(100), 6))


def test_permutation_holds_every_number_once_and_follows_seed_and_stream():
    order = random.permutation(1, 0, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert numpy.array_equal(order, random.permutation(1, 0, 1000))
    assert not numpy.array_equal(order, random.permutation(1, 1, 1000))
    assert not numpy.array_equal(order, random.permutation(2, 0, 1000))
    assert random.permutation(1, 0, 0).size == 0


def test_generator_distributions():
    generator = random.Generator(11)
    uniform = generator.uniform((200, 500), -2.0, 3.0, numpy.float64)
    assert uniform.shape == (200, 500)
    assert -2 < uniform.min() < -1.99
    assert 2.99 < uniform.max() < 3
    assert abs(uniform.mean() - 0.5) < 4 * 5 / numpy.sqrt(12 * 1e5)
    normal = generator.normal((100_000,), 1.0, 2.0)
    assert normal.dtype == numpy.float32
    assert abs(normal.mean() - 1) < 4 * 2 / numpy.sqrt(1e5)
    assert abs(normal.std() - 2) < 0.03
    # the share within one standard deviation, which a uniform or triangular distribution misses by far
    assert abs(numpy.mean(abs(normal - 1) < 2) - 0.6827) < 0.01


def test_generator_state_and_reserve():
    generator = random.Generator(4)
    assert generator.reserve(5) == 0
    assert generator.reserve(1) == 8
    state = generator.state
    assert state == {"seed": 4, "offset": 12}
    expected = generator.uniform((10,))
    other = random.Generator(99)
    other.restore(state)
    assert numpy.array_equal(other.uniform((10,)), expected)
    assert not numpy.array_equal(other.uniform((10,)), expected)


def test_manual_seed_rewinds_the_default_generator():
    generator = random.manual_seed(123)
    assert generator is random.default_generator
    first = generator.uniform((4,))
    random.manual_seed(123)
    assert numpy.array_equal(generator.uniform((4,)), first)


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1.5, "1", True, None])
def test_a_bad_seed_is_named(seed):
    with pytest.raises(ArgumentError, match=r"seed must be an integer from 0 to 2\*\*64 - 1"):
        random.Generator(seed)
