// Activations element by element: each reads and writes every element once, so memory is the only limit.
#include "activation.cuh"

extern "C" __global__ void __launch_bounds__(256) activation_forward(
    const scalar_t *x, scalar_t *y, long long count, int function, accumulate_t negative_slope
) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        y[i] = store(activate(function, load(x[i]), negative_slope));
    }
}

// No __restrict__: dx may be dy, and y may be x.
extern "C" __global__ void __launch_bounds__(256) activation_backward(
    const scalar_t *dy, const scalar_t *value, scalar_t *dx, long long count, int function,
    accumulate_t negative_slope
) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const accumulate_t gradient = load(dy[i]);
        const accumulate_t slope = activation_slope(function, load(value[i]), negative_slope);
        // Where ReLU lets nothing through, an infinite gradient times 0 would be a NaN.
        dx[i] = store(function == RELU && slope == NUMBER(0) ? NUMBER(0) : gradient * slope);
    }
}
