// Rows of outputs as panels: ROWS weights side by side, times staged pixels, into a buffer.
#pragma once

#include "direct.h"
#include "offset_product.h"

namespace gpucnn {

// How many rows the panel has that starts `left` rows before the last: those not there are zeros.
inline int panel_rows(int64_t left) {
    if (left >= ROWS) return ROWS;
    if (ROWS == 8 && left > 6) return 8;
    if (ROWS == 8 && left > 4) return 6;
    return static_cast<int>(left);
}

// Few rows take more vectors, so that there are enough sums under way to hide an addition's latency.
template <int M>
constexpr int vectors_of = REGISTERS == 32 ? (M == 8 ? 3 : M == 6 ? 4 : M == 4 ? 6 : 8)
                                           : (M == 4 ? 3 : M == 3 ? 3 : M == 2 ? 5 : 8);

constexpr int WIDEST = 8;  // vectors of a tile: a buffer's rows and staged pixels have as many behind their end
static_assert(STAGING_END >= (WIDEST + 1) * LANES, "vectors may begin in the last planes' zeros on the right");

// One tile: to[m][0 .. V * LANES) = start[m] + product, or += product where there is no start.
template <int M, int V>
GPUCNN_INLINE void tile(
    int64_t depth, const float *a, const float *b, const int32_t *offset, const float *start, float *to,
    int64_t pitch) {
    Vector sum[M][V] = {};
    add_product<M, V>(depth, a, b, offset, sum);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            float *at = to + m * pitch + v * LANES;
            store(at, sum[m][v] + (start ? broadcast(start[m]) : load(at)));
        }
    }
}

// A panel of M rows times `vectors` vectors of pixels.
template <int M>
void panel(
    int64_t depth, const float *a, const float *b, const int32_t *offset, const float *start, float *to,
    int64_t pitch, int64_t vectors) {
    constexpr int V = vectors_of<M>;
    int64_t v = 0;
    for (; v + V <= vectors; v += V) tile<M, V>(depth, a, b + v * LANES, offset, start, to + v * LANES, pitch);
    if (v == vectors) return;
    if (M == ROWS && vectors - v == 1) tile<M, 1>(depth, a, b + v * LANES, offset, start, to + v * LANES, pitch);
    else if (M == ROWS && vectors - v == 2)
        tile<M, 2>(depth, a, b + v * LANES, offset, start, to + v * LANES, pitch);
    else tile<M, V>(depth, a, b + v * LANES, offset, start, to + v * LANES, pitch);
}

inline void any_panel(
    int rows, int64_t depth, const float *a, const float *b, const int32_t *offset, const float *start, float *to,
    int64_t pitch, int64_t vectors) {
    switch (rows) {
    case 1: return panel<1>(depth, a, b, offset, start, to, pitch, vectors);
    case 2: return panel<2>(depth, a, b, offset, start, to, pitch, vectors);
    case 3: return panel<3>(depth, a, b, offset, start, to, pitch, vectors);
    case 4: return panel<4>(depth, a, b, offset, start, to, pitch, vectors);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 6: return panel<6>(depth, a, b, offset, start, to, pitch, vectors);
    case 8: return panel<8>(depth, a, b, offset, start, to, pitch, vectors);
#endif
    }
}

}  // namespace gpucnn
