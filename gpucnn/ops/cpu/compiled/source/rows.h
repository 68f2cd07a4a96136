// A row of numbers walked a vector at a time, its last vector used in part: the body is written once for both.
#pragma once

#include "lanes.h"
#include "vector.h"

namespace gpucnn {

// How a vector's place in memory is read and written: all of it, or its first `count` numbers.
struct Whole {
    GPUCNN_INLINE Vector load(const float *from) const { return gpucnn::load(from); }
    GPUCNN_INLINE void store(float *to, Vector value) const { gpucnn::store(to, value); }
    GPUCNN_INLINE Vector keep(Vector value, float) const { return value; }
};
struct Part {
    int count;
    GPUCNN_INLINE Vector load(const float *from) const { return load_first(from, count); }
    GPUCNN_INLINE void store(float *to, Vector value) const { store_first(to, value, count); }
    // `other` in the lanes beyond the row, so that they change no sum or maximum.
    GPUCNN_INLINE Vector keep(Vector value, float other) const {
        return lane_numbers() < count ? value : broadcast(other);
    }
};

// body(i, slot, access) for the vectors of 0 .. count. The slots 0 .. 3 take turns: sums kept a slot do not wait for
// one another, an addition taking four times as long as its turn.
template <class Body>
GPUCNN_INLINE void over_row(int64_t count, Body &&body) {
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
        body(i, 0, Whole{});
        body(i + LANES, 1, Whole{});
        body(i + 2 * LANES, 2, Whole{});
        body(i + 3 * LANES, 3, Whole{});
    }
    for (; i + LANES <= count; i += LANES) body(i, 0, Whole{});
    if (i < count) body(i, 1, Part{static_cast<int>(count - i)});
}

// Four vectors of sums, and their total in a fixed order.
struct Sums {
    Vector slot[4] = {};
    GPUCNN_INLINE float total() const { return sum_of((slot[0] + slot[1]) + (slot[2] + slot[3])); }
};

#define GPUCNN_BODY __attribute__((always_inline))  // of the lambdas above, so that sums stay in registers

}  // namespace gpucnn
