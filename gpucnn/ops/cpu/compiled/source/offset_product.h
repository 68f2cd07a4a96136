// The one product that all convolutions here are: sum[m][p] = sum over k of a[k][m] * b[offset[k] + p].
//
// With offset[k] = k * width it is a matrix product. With b an image whose rows lie `pitch` apart, and offset[(c, r,
// s)] = c * plane + r * pitch + s, it is a convolution of stride 1 over the flattened image, without any im2col.
// Rows of a (output channels) are kept ROWS side by side, columns of b (pixels) VECTORS registers wide: each number
// of b that is loaded serves ROWS products, each of a VECTORS * LANES.
#pragma once

#include "vector.h"

namespace gpucnn {

constexpr int ROWS = REGISTERS == 32 ? 8 : 4;
constexpr int VECTORS = 3;
constexpr int COLUMNS = VECTORS * LANES;

// sum[m][v] += ... over `depth` steps; a is packed [depth][M].
template <int M, int V>
GPUCNN_INLINE void add_product(
    int64_t depth, const float *a, const float *b, const int32_t *offset, Vector (&sum)[M][V]) {
    for (int64_t k = 0; k < depth; ++k, a += M) {
        Vector column[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) column[v] = load(b + offset[k] + v * LANES);
#pragma GCC unroll 32
        for (int m = 0; m < M; ++m) {
            Vector row = broadcast(a[m]);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[m][v] += row * column[v];
        }
    }
}

}  // namespace gpucnn
