// Numbers moved between the lanes of two vectors: strides taken apart and put together, many sums at once.
#pragma once

#include <utility>

#include "vector.h"

// Numbers of a and b, laid end to end, at the given places; GCC has Clang's function from version 12 on only.
#if defined(__clang__)
#define GPUCNN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GPUCNN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVector{__VA_ARGS__})
#endif

namespace gpucnn {
namespace lanes {

// Of 2 * LANES numbers in groups of `width`: the place of the i-th in the groups' lower halves.
constexpr int lower_half(int i, int width) { return i / (width / 2) * width + i % (width / 2); }

template <int width, int... I>
GPUCNN_INLINE Vector lower(Vector a, Vector b, std::integer_sequence<int, I...>) {
    return GPUCNN_SHUFFLE(a, b, lower_half(I, width)...);
}

template <int width, int... I>
GPUCNN_INLINE Vector upper(Vector a, Vector b, std::integer_sequence<int, I...>) {
    return GPUCNN_SHUFFLE(a, b, (lower_half(I, width) + width / 2)...);
}

template <int first, int... I>
GPUCNN_INLINE Vector zip(Vector a, Vector b, std::integer_sequence<int, I...>) {
    return GPUCNN_SHUFFLE(a, b, (first + I / 2 + I % 2 * LANES)...);
}

template <int... I>
GPUCNN_INLINE IntVector numbers(std::integer_sequence<int, I...>) {
    return IntVector{I...};
}

using All = std::make_integer_sequence<int, LANES>;

// Vectors of partial sums in groups of `width`, two and two added up until one vector has a sum a lane.
template <int width, int count>
GPUCNN_INLINE Vector sums(const Vector *part) {
    if constexpr (width == 1) {
        return *part;
    } else {
        constexpr int half = count > 1 ? (count + 1) / 2 : 1;
        Vector next[half];
#pragma GCC unroll 32
        for (int i = 0; i < half; ++i) {
            Vector a = part[2 * i], b = 2 * i + 1 < count ? part[2 * i + 1] : Vector{};
            next[i] = lower<width>(a, b, All{}) + upper<width>(a, b, All{});
        }
        return sums<width / 2, half>(next);
    }
}

}  // namespace lanes

// The lanes' numbers 0, 1, 2, ...
GPUCNN_INLINE IntVector lane_numbers() { return lanes::numbers(lanes::All{}); }

// Every second number of the 2 * LANES numbers of a and b, from the first or the second one on.
GPUCNN_INLINE Vector evens(Vector a, Vector b) { return lanes::lower<2>(a, b, lanes::All{}); }
GPUCNN_INLINE Vector odds(Vector a, Vector b) { return lanes::upper<2>(a, b, lanes::All{}); }

// a[0], b[0], a[1], b[1], ...: the first LANES of those, and the others.
GPUCNN_INLINE Vector zip_first(Vector a, Vector b) { return lanes::zip<0>(a, b, lanes::All{}); }
GPUCNN_INLINE Vector zip_second(Vector a, Vector b) { return lanes::zip<LANES / 2>(a, b, lanes::All{}); }

// The sums of the numbers of each of `count` vectors, at most LANES, in the lanes of one; the same order on every
// call. Summing each alone takes four times the instructions.
template <int count>
GPUCNN_INLINE Vector sums_of(const Vector *vectors) {
    return lanes::sums<LANES, count>(vectors);
}

}  // namespace gpucnn
