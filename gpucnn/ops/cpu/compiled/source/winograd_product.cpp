// The products of Winograd's convolution: for each of a tile's elements, tiles by filters, or the sum over tiles.
//
// 6 x 4 sums of 16 lanes take 24 multiply-adds for 4 loads and 6 broadcasts, so that the two units that multiply are
// never short of operands; the sums wait in registers over a stretch of the depth, during which the panel of
// filters (DEPTH * 256 bytes) stays in the first-level cache.
#include "winograd.h"

namespace gpucnn {
namespace winograd {
namespace {

constexpr int64_t DEPTH = 128;   // input channels of a stretch, a multiple of LANES
constexpr int GRADIENT_ROWS = 4;  // outputs of a gradient's block: a divisor of LANES
static_assert(DEPTH % LANES == 0 && LANES % GRADIENT_ROWS == 0);

// sum[m][v] += over `depth` channels: tiles [depth / LANES][...][LANES], a block of channels `stride` apart, times a
// panel [depth][V * LANES].
template <int M, int V>
GPUCNN_INLINE void add_stretch(
    int64_t depth, const float *tiles, int64_t stride, const float *panel, Vector (&sum)[M][V]) {
    for (int64_t begin = 0; begin < depth; begin += LANES, tiles += stride) {
        int64_t lanes = least(LANES, depth - begin);
        for (int64_t lane = 0; lane < lanes; ++lane, panel += V * LANES) {
            Vector column[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) column[v] = load(panel + v * LANES);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                Vector row = broadcast(tiles[m * LANES + lane]);
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) sum[m][v] += row * column[v];
            }
        }
    }
}

template <int V>
void multiply_panel(const Tiles &from, const Filters &filters, const Tiles &to, int64_t e, int64_t panel) {
    const float *values = filters.at(e, panel);
    int64_t in = from.rows() * LANES, out = to.rows() * LANES;
    for (int64_t begin = 0; begin < filters.depth; begin += DEPTH) {
        int64_t depth = least(DEPTH, filters.depth - begin);
        for (int64_t tile = 0; tile < to.rows(); tile += TILE_ROWS) {
            float *sums = to.at(e, panel * PANEL) + tile * LANES;
            Vector sum[TILE_ROWS][V] = {};
            if (begin) {
#pragma GCC unroll 8
                for (int m = 0; m < TILE_ROWS; ++m)
#pragma GCC unroll 8
                    for (int v = 0; v < V; ++v) sum[m][v] = load(sums + v * out + m * LANES);
            }
            add_stretch(depth, from.at(e, begin / LANES) + tile * LANES, in, values + begin * V * LANES, sum);
#pragma GCC unroll 8
            for (int m = 0; m < TILE_ROWS; ++m)
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) store(sums + v * out + m * LANES, sum[m][v]);
        }
    }
}

template <int V>
void correlate_block(
    int64_t count, const float *rows, const float *columns, int64_t stride, float *sums, int64_t pitch, bool first) {
    constexpr int M = GRADIENT_ROWS;
    Vector sum[M][V] = {};
    if (!first) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[m][v] = load(sums + m * pitch + v * LANES);
    }
    for (int64_t tile = 0; tile < count; ++tile) {
        Vector column[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) column[v] = load(columns + v * stride + tile * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            Vector row = broadcast(rows[tile * LANES + m]);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[m][v] += row * column[v];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(sums + m * pitch + v * LANES, sum[m][v]);
}

}  // namespace

void multiply(const Tiles &from, const Filters &filters, const Tiles &to, int64_t e, int64_t panel) {
    switch (filters.vectors(panel)) {
        case 1: return multiply_panel<1>(from, filters, to, e, panel);
        case 2: return multiply_panel<2>(from, filters, to, e, panel);
        case 3: return multiply_panel<PANEL < 3 ? 2 : 3>(from, filters, to, e, panel);
        default: return multiply_panel<PANEL>(from, filters, to, e, panel);
    }
}

void correlate(const Tiles &dy, const Tiles &x, float *sums, bool first, int64_t e, int64_t block) {
    int64_t pitch = x.blocks * LANES, stride = x.rows() * LANES;
    float *target = sums + e * (dy.blocks * LANES * pitch + LANES) + block * LANES * pitch;
    for (int64_t c = 0; c < x.blocks; c += PANEL) {
        const float *columns = x.at(e, c);
        for (int row = 0; row < LANES; row += GRADIENT_ROWS) {
            const float *rows = dy.at(e, block) + row;
            float *to = target + row * pitch + c * LANES;
            switch (least(PANEL, x.blocks - c)) {
                case 1: correlate_block<1>(x.count, rows, columns, stride, to, pitch, first); break;
                case 2: correlate_block<2>(x.count, rows, columns, stride, to, pitch, first); break;
                case 3: correlate_block<PANEL < 3 ? 2 : 3>(x.count, rows, columns, stride, to, pitch, first); break;
                default: correlate_block<PANEL>(x.count, rows, columns, stride, to, pitch, first);
            }
        }
    }
}

}  // namespace winograd
}  // namespace gpucnn
