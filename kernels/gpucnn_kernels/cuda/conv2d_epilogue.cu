// Scale, bias, residual and activation behind the convolutions that a library's matrix product makes, where they
// cannot be fused. Memory is the only limit: every element is read and written once more.
#include "conv2d.cuh"

// The sums are in ``wide`` where they have not been rounded to y's type yet, otherwise in y itself. The channel
// changes after ``run`` elements: P * Q in a contiguous array, 1 in a channels-last one.
extern "C" __global__ void __launch_bounds__(256) conv2d_finish(
    const accumulate_t *wide, scalar_t *y, const scalar_t *scale, const scalar_t *bias, const scalar_t *residual,
    int channels, long long run, long long count, Epilogue epilogue
) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const accumulate_t sum = wide != nullptr ? wide[i] : load(y[i]);
        y[i] = finished(sum, {scale, bias, residual}, (int)(i / run % channels), i, epilogue);
    }
}
