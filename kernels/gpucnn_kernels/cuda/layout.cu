// From contiguous images (N, C, H, W) to channels-last ones and back: for each image, a matrix of C x (H * W) is
// transposed. Limit: memory, every element read once and written once.
//
// A tile of 32 x 32 goes through shared memory, so that both its reads and its writes are of neighbouring
// elements. The tile's lines are one element longer than they need be, so that a column's elements lie in
// different banks. An image with few channels would leave most of such a tile empty; its elements are moved one by
// one, and the caches gather what the reads scatter.
#include "scalar.cuh"

// x: ``batch`` matrices of rows x columns; y: of columns x rows. A block moves one tile.
extern "C" __global__ void __launch_bounds__(256) transpose_matrices(
    const scalar_t *__restrict__ x, scalar_t *__restrict__ y, long long rows, long long columns
) {
    __shared__ scalar_t tile[32][33];
    const long long tiles_across = (columns + 31) / 32, tiles_down = (rows + 31) / 32;
    const long long line_of_tiles = blockIdx.x / tiles_across, matrix = line_of_tiles / tiles_down;
    const long long column = (blockIdx.x - line_of_tiles * tiles_across) * 32;
    const long long row = (line_of_tiles - matrix * tiles_down) * 32;
    const scalar_t *source = x + matrix * rows * columns;
    scalar_t *target = y + matrix * rows * columns;
    for (int line = threadIdx.y; line < 32; line += 8) {
        if (row + line < rows && column + threadIdx.x < columns) {
            tile[line][threadIdx.x] = source[(row + line) * columns + column + threadIdx.x];
        }
    }
    __syncthreads();
    for (int line = threadIdx.y; line < 32; line += 8) {
        if (column + line < columns && row + threadIdx.x < rows) {
            target[(column + line) * rows + row + threadIdx.x] = tile[threadIdx.x][line];
        }
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
