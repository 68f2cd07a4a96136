// From contiguous images (N, C, H, W) to channels-last ones and back: for each image, a matrix of C x (H * W) is
// transposed. Limit: memory, every element read once and written once.
//
// A tile of 32 x 32 goes through shared memory, so that both its reads and its writes are of neighbouring
// elements. The tile's lines are one element longer than they need be, so that a column's elements lie in
// different banks. An image with few channels would leave most of such a tile empty; its elements are moved one by
// one, and the caches gather what the reads scatter.
//
// A thread of a tile moves four elements, all loaded before the first is stored, in some 160 instructions in float32
// by the compiled code for sm_90 (computed, not measured): 40 an element, where an H200's memory leaves time for 62,
// and for 31 in 16 bits.
#include "scalar.cuh"

// x: ``batch`` matrices of rows x columns; y: of columns x rows. A block moves one tile.
extern "C" __global__ void __launch_bounds__(256) transpose_matrices(
    const scalar_t *__restrict__ x, scalar_t *__restrict__ y, long long rows, long long columns
) {
    __shared__ scalar_t tile[32][33];
    // A grid's blocks are fewer than 2^31, and so are the tiles along either axis.
    const unsigned tiles_across = (unsigned)((columns + 31) / 32), tiles_down = (unsigned)((rows + 31) / 32);
    const unsigned line_of_tiles = blockIdx.x / tiles_across, matrix = line_of_tiles / tiles_down;
    const long long column = (long long)(blockIdx.x - line_of_tiles * tiles_across) * 32;
    const long long row = (long long)(line_of_tiles - matrix * tiles_down) * 32;
    const int rows_here = rows - row < 32 ? (int)(rows - row) : 32;
    const int columns_here = columns - column < 32 ? (int)(columns - column) : 32;
    const long long first = matrix * (rows * columns);
    const int x_lane = threadIdx.x, y_lane = threadIdx.y;
    const scalar_t *source = x + first + (row + y_lane) * columns + column + x_lane;
#pragma unroll
    for (int k = 0; k < 4; ++k, source += 8 * columns) {
        const int line = y_lane + 8 * k;
        if (line < rows_here && x_lane < columns_here) tile[line][x_lane] = *source;
    }
    __syncthreads();
    scalar_t *target = y + first + (column + y_lane) * rows + row + x_lane;
#pragma unroll
    for (int k = 0; k < 4; ++k, target += 8 * rows) {
        const int line = y_lane + 8 * k;
        if (line < columns_here && x_lane < rows_here) *target = tile[x_lane][line];
    }
}

// The same element by element, in the order of y; ``count`` is the number of elements of all matrices.
extern "C" __global__ void __launch_bounds__(256) transpose_elements(
    const scalar_t *__restrict__ x, scalar_t *__restrict__ y, long long rows, long long columns, long long count
) {
    const long long step = (long long)gridDim.x * blockDim.x, size = rows * columns;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const long long matrix = i / size, within = i - matrix * size;
        const long long column = within / rows, row = within - column * rows;
        y[i] = x[matrix * size + row * columns + column];
    }
}

// The same layout in and out.
extern "C" __global__ void __launch_bounds__(256) copy_elements(
    const scalar_t *__restrict__ x, scalar_t *__restrict__ y, long long count
) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) y[i] = x[i];
}
