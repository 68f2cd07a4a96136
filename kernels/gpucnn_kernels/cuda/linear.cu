// A row written into every row of a matrix: the bias that a matrix product is then added to, in the accumulating
// type, so that a result is rounded once. Limit: memory, every element written once.
#include "scalar.cuh"

struct Rows {
    long long rows, columns;
    long long down, across;  // strides of the matrix, in elements
};

extern "C" __global__ void __launch_bounds__(256) fill_rows(const scalar_t *row, scalar_t *matrix, Rows shape) {
    const long long column = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= shape.columns) return;
    const scalar_t value = row[column];
    for (long long i = (long long)blockIdx.y * blockDim.y + threadIdx.y; i < shape.rows;
         i += (long long)gridDim.y * blockDim.y) {
        matrix[i * shape.down + column * shape.across] = value;
    }
}
