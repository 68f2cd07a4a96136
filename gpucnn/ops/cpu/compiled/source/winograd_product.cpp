// The products of Winograd's convolution: for each of a tile's elements, tiles by filters, or the sum over tiles.
//
// 6 x 4 sums of 16 lanes take 24 multiply-adds for 4 loads and 6 broadcasts, so that the two units that multiply are
// never short of operands; the sums wait in registers over a stretch of the depth, during which the panel of
// filters (DEPTH * 256 bytes) stays in the first-level cache.
#include "winograd.h"

namespace gpucnn {
namespace winograd {
namespace {

constexpr int GRADIENT_ROWS = 4;  // outputs of a gradient's block: a divisor of LANES
static_assert(DEPTH % LANES == 0 && LANES % GRADIENT_ROWS == 0);

// A stretch's sum begins at zero and is added to what there is in the end: a long sum made of short ones is rounded
// less.
GPUCNN_INLINE void put(float *to, Vector sum, bool first) { store(to, first ? sum : load(to) + sum); }

// sum[m][v] += over `depth` channels: tiles [depth / LANES][...][LANES], a block of channels `stride` apart, times a
// panel [depth][V * LANES].
template <int M, int V>
GPUCNN_INLINE void add_stretch(
    int64_t depth, const float *tiles, int64_t stride, const float *panel, Vector (&sum)[M][V]) {
    for (int64_t begin = 0; begin < depth; begin += LANES, tiles += stride) {
        int64_t lanes = least(LANES, depth - begin);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) __builtin_prefetch(tiles + (M + m) * LANES);
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
void multiply_panel(int64_t rows, int64_t depth, const float *tiles, int64_t in, const float *panel, float *sums,
                    int64_t out, bool first) {
    for (int64_t row = 0; row < rows; row += TILE_ROWS, tiles += TILE_ROWS * LANES, sums += TILE_ROWS * LANES) {
        Vector sum[TILE_ROWS][V] = {};
        add_stretch(depth, tiles, in, panel, sum);
#pragma GCC unroll 8
        for (int m = 0; m < TILE_ROWS; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) put(sums + v * out + m * LANES, sum[m][v], first);
    }
}

template <int V>
void correlate_block(
    int64_t count, const float *rows, const float *columns, int64_t stride, float *sums, int64_t pitch, bool first) {
    constexpr int M = GRADIENT_ROWS;
    Vector sum[M][V] = {};
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
        for (int v = 0; v < V; ++v) put(sums + m * pitch + v * LANES, sum[m][v], first);
}

}  // namespace

void multiply(const Tiles &from, int64_t begin, const Panel &panel, int64_t input, int64_t depth, const Tiles &to,
              int64_t block, int64_t e, bool first) {
    auto with = [&](auto function) {
        function(to.rows(), depth, from.at(e, begin / LANES), from.rows() * LANES, panel.at(e, input),
                 to.at(e, block), to.rows() * LANES, first);
    };
    switch (panel.vectors) {
        case 1: return with(multiply_panel<1>);
        case 2: return with(multiply_panel<2>);
        case 3: return with(multiply_panel<PANEL < 3 ? 2 : 3>);
        default: return with(multiply_panel<PANEL>);
    }
}

void correlate(const Tiles &dy, const Tiles &x, const Sums &sums, int64_t e, bool first) {
    for (int64_t c = 0; c < sums.columns; c += PANEL) {
        for (int64_t row = 0; row < sums.rows * LANES; row += GRADIENT_ROWS) {
            const float *rows = dy.at(e, sums.row + row / LANES) + row % LANES;
            float *to = sums.values + e * sums.element() + row * sums.pitch() + c * LANES;
            auto with = [&](auto function) {
                function(x.count, rows, x.at(e, sums.column + c), x.rows() * LANES, to, sums.pitch(), first);
            };
            switch (least(PANEL, sums.columns - c)) {
                case 1: with(correlate_block<1>); break;
                case 2: with(correlate_block<2>); break;
                case 3: with(correlate_block<PANEL < 3 ? 2 : 3>); break;
                default: with(correlate_block<PANEL>);
            }
        }
    }
}

}  // namespace winograd
}  // namespace gpucnn
