// Planes to places and back: a row of numbers from each of LANES channels becomes vectors over the channels.
#pragma once

#include "lanes.h"
#include "vector.h"

namespace gpucnn {

// row[i] lane j becomes row[j] lane i: each round deals the rows' first half out between those of the second, as
// one does with cards, and after log2(LANES) of them every card is in its place. LANES / 2 * log2(LANES) * 2
// shuffles.
GPUCNN_INLINE void transpose(Vector (&row)[LANES]) {
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
        Vector dealt[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; ++i) {
            dealt[2 * i] = zip_first(row[i], row[i + LANES / 2]);
            dealt[2 * i + 1] = zip_second(row[i], row[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) row[i] = dealt[i];
    }
}

// to[i][lane] = from[lane * stride + i] for i < count; zeros in lanes from `lanes` on.
inline void planes_to_places(const float *from, int64_t stride, int lanes, int64_t count, float *to) {
    for (int64_t begin = 0; begin < count; begin += LANES, to += LANES * LANES) {
        Vector row[LANES];
        if (lanes == LANES && begin + LANES <= count) {
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; ++lane) row[lane] = load(from + lane * stride + begin);
            transpose(row);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) store(to + i * LANES, row[i]);
            continue;
        }
        int rest = count - begin < LANES ? static_cast<int>(count - begin) : LANES;
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; ++lane)
            row[lane] = lane < lanes ? load_first(from + lane * stride + begin, rest) : Vector{};
        transpose(row);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i)
            if (i < rest) store(to + i * LANES, row[i]);
    }
}

// to[lane * stride + i] = from[i][lane] for i < count and lane < lanes; `from` is read in whole vectors up to a
// multiple of LANES.
inline void places_to_planes(const float *from, float *to, int64_t stride, int lanes, int64_t count) {
    for (int64_t begin = 0; begin < count; begin += LANES, from += LANES * LANES) {
        Vector row[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) row[i] = load(from + i * LANES);
        transpose(row);
        if (lanes == LANES && begin + LANES <= count) {
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; ++lane) store(to + lane * stride + begin, row[lane]);
            continue;
        }
        int rest = count - begin < LANES ? static_cast<int>(count - begin) : LANES;
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; ++lane)
            if (lane < lanes) store_first(to + lane * stride + begin, row[lane], rest);
    }
}

}  // namespace gpucnn
