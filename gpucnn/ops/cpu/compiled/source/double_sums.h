// Sums of floats in double precision, several at a time.
#pragma once

#include "vector.h"

namespace gpucnn {

typedef float HalfVector __attribute__((vector_size(LANES * 2)));
typedef double DoubleVector __attribute__((vector_size(LANES * 4)));

struct DoubleSums {
    DoubleVector low = {}, high = {};

    GPUCNN_INLINE void add(Vector value) {
        HalfVector half[2];
        std::memcpy(half, &value, sizeof value);
        low += __builtin_convertvector(half[0], DoubleVector);
        high += __builtin_convertvector(half[1], DoubleVector);
    }
    GPUCNN_INLINE void add_squares(Vector value) {  // exact, as the square of a float is a double
        HalfVector half[2];
        std::memcpy(half, &value, sizeof value);
        DoubleVector a = __builtin_convertvector(half[0], DoubleVector);
        DoubleVector b = __builtin_convertvector(half[1], DoubleVector);
        low += a * a;
        high += b * b;
    }
    // What was added from this lane of the vectors.
    GPUCNN_INLINE double operator[](int64_t lane) const {
        return lane < LANES / 2 ? low[lane] : high[lane - LANES / 2];
    }
    GPUCNN_INLINE double total() const {
        DoubleVector both = low + high;
        double sum = 0;
        for (int lane = 0; lane < LANES / 2; ++lane) sum += both[lane];
        return sum;
    }
};

}  // namespace gpucnn
