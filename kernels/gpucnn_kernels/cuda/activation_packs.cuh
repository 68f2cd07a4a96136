// Activation functions of several numbers at a time: the switch is taken once for all of them.
#include "activation.cuh"

template <int function, int count>
__device__ __forceinline__ void activate_each(accumulate_t (&values)[count], accumulate_t negative_slope) {
#pragma unroll
    for (int k = 0; k < count; ++k) values[k] = activate(function, values[k], negative_slope);
}

template <int count>
__device__ __forceinline__ void activate_all(
    int function, accumulate_t (&values)[count], accumulate_t negative_slope
) {
    switch (function) {
        case RELU: activate_each<RELU>(values, negative_slope); break;
        case LEAKY_RELU: activate_each<LEAKY_RELU>(values, negative_slope); break;
        case SIGMOID: activate_each<SIGMOID>(values, negative_slope); break;
        case TANH: activate_each<TANH>(values, negative_slope); break;
        case GELU: activate_each<GELU>(values, negative_slope); break;
        case GELU_TANH: activate_each<GELU_TANH>(values, negative_slope); break;
        case SILU: activate_each<SILU>(values, negative_slope); break;
        case RELU6: activate_each<RELU6>(values, negative_slope); break;
        default: break;
    }
}

// Whether a function is straight lines, a comparison or two a number. Of these a kernel may take all numbers of a
// tile in registers at once; a copy of any other for each of many registers would be thousands of instructions.
__device__ __forceinline__ bool straight(int function) {
    return function <= LEAKY_RELU || function == RELU6;
}

// activate_all() of a straight function.
template <int count>
__device__ __forceinline__ void activate_straight(
    int function, accumulate_t (&values)[count], accumulate_t negative_slope
) {
    switch (function) {
        case RELU: activate_each<RELU>(values, negative_slope); break;
        case LEAKY_RELU: activate_each<LEAKY_RELU>(values, negative_slope); break;
        case RELU6: activate_each<RELU6>(values, negative_slope); break;
        default: break;
    }
}

// gradient *= the derivative at value. Where a ReLU lets nothing through, an infinite gradient times 0 would be NaN.
template <int function, int count>
__device__ __forceinline__ void slope_each(
    accumulate_t (&gradients)[count], const accumulate_t (&values)[count], accumulate_t negative_slope
) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
        const accumulate_t slope = activation_slope(function, values[k], negative_slope);
        const bool closed = (function == RELU || function == RELU6) && slope == NUMBER(0);
        gradients[k] = closed ? NUMBER(0) : gradients[k] * slope;
    }
}

template <int count>
__device__ __forceinline__ void slope_all(
    int function, accumulate_t (&gradients)[count], const accumulate_t (&values)[count],
    accumulate_t negative_slope
) {
    switch (function) {
        case RELU: slope_each<RELU>(gradients, values, negative_slope); break;
        case LEAKY_RELU: slope_each<LEAKY_RELU>(gradients, values, negative_slope); break;
        case SIGMOID: slope_each<SIGMOID>(gradients, values, negative_slope); break;
        case TANH: slope_each<TANH>(gradients, values, negative_slope); break;
        case GELU: slope_each<GELU>(gradients, values, negative_slope); break;
        case GELU_TANH: slope_each<GELU_TANH>(gradients, values, negative_slope); break;
        case SILU: slope_each<SILU>(gradients, values, negative_slope); break;
        case RELU6: slope_each<RELU6>(gradients, values, negative_slope); break;
        default: break;
    }
}
