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

// Vectors of a tile of M rows: few rows that are all there are take more, so that there are enough sums under way to
// hide an addition's latency.
constexpr int widest_tile(int rows, bool alone) {
    if (!alone || rows == ROWS) return VECTORS;
    if (REGISTERS == 32) return rows == 6 ? 4 : rows == 4 ? 6 : 8;
    return rows == 3 ? 3 : rows == 2 ? 5 : 8;
}

constexpr int WIDEST = 8;  // vectors of a tile: a buffer's rows and staged pixels have as many behind their end
static_assert(STAGING_END >= (WIDEST + 1) * LANES, "vectors may begin in the last planes' zeros on the right");

struct TileOf {
    int64_t depth;
    const float *weights;   // [depth][M]
    const float *pixels;
    const int32_t *offset;  // [depth]
    const float *start;     // [M], or null where `to` has sums to add to
    float *to;
    int64_t pitch;          // of `to`, from row to row
};

// to[m][0 .. V * LANES) = start[m] + product, or += product where there is no start.
template <int M, int V>
__attribute__((noinline)) void tile(const TileOf &t) {
    Vector sum[M][V] = {};
    add_product<M, V>(t.depth, t.weights, t.pixels, t.offset, sum);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            float *at = t.to + m * t.pitch + v * LANES;
            store(at, sum[m][v] + (t.start ? broadcast(t.start[m]) : load(at)));
        }
    }
}

template <int M>
void tile_of(int vectors, const TileOf &t) {
    constexpr int alone = widest_tile(M, true);
    if (M == ROWS && vectors == 1) tile<M, 1>(t);
    else if (M == ROWS && vectors == 2) tile<M, 2>(t);
    else if (vectors <= VECTORS) tile<M, VECTORS>(t);
    else tile<M, alone>(t);
}

// A tile of at most widest_tile() vectors; more may be written.
inline void any_tile(int rows, int vectors, const TileOf &t) {
    switch (rows) {
    case 1: return tile_of<1>(vectors, t);
    case 2: return tile_of<2>(vectors, t);
    case 3: return tile_of<3>(vectors, t);
    case 4: return tile_of<4>(vectors, t);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 6: return tile_of<6>(vectors, t);
    case 8: return tile_of<8>(vectors, t);
#endif
    }
}

}  // namespace gpucnn
