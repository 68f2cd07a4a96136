// Numbers of two vectors dealt out to even and odd, and back: what a stride of 2 needs.
#pragma once

#include <utility>

#include "vector.h"

namespace gpucnn {

#if defined(__clang__)
#define GPUCNN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GPUCNN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVector{__VA_ARGS__})
#endif

typedef std::make_integer_sequence<int, LANES> Lanes;

template <int... I>
GPUCNN_INLINE Vector even(Vector a, Vector b, std::integer_sequence<int, I...>) {
    return GPUCNN_SHUFFLE(a, b, (2 * I)...);
}

template <int... I>
GPUCNN_INLINE Vector odd(Vector a, Vector b, std::integer_sequence<int, I...>) {
    return GPUCNN_SHUFFLE(a, b, (2 * I + 1)...);
}

// Numbers FIRST / 2 .. of a and b, in turns.
template <int FIRST, int... I>
GPUCNN_INLINE Vector in_turns(Vector a, Vector b, std::integer_sequence<int, I...>) {
    return GPUCNN_SHUFFLE(a, b, ((FIRST + I) / 2 + (I % 2) * LANES)...);
}

// 0, 2, 4, ... of a and b laid end to end.
GPUCNN_INLINE Vector even(Vector a, Vector b) { return even(a, b, Lanes()); }
// 1, 3, 5, ... of them.
GPUCNN_INLINE Vector odd(Vector a, Vector b) { return odd(a, b, Lanes()); }
// a0 b0 a1 b1 ...: the first LANES of them, and the others.
GPUCNN_INLINE Vector in_turns_low(Vector a, Vector b) { return in_turns<0>(a, b, Lanes()); }
GPUCNN_INLINE Vector in_turns_high(Vector a, Vector b) { return in_turns<LANES>(a, b, Lanes()); }

template <int... I>
GPUCNN_INLINE IntVector counting(std::integer_sequence<int, I...>) {
    return IntVector{I...};
}
// 0, 1, 2, ...
GPUCNN_INLINE IntVector counting() { return counting(Lanes()); }

}  // namespace gpucnn
