// The activation functions, in registers: for the element-by-element kernels and for the convolution's epilogue.
// ``function`` is the same for all threads of a launch, so the switch does not diverge.
#include "scalar.cuh"

enum Activation { IDENTITY, RELU, LEAKY_RELU, SIGMOID, TANH, GELU, GELU_TANH, SILU };

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }
__device__ __forceinline__ float complementary_error(float x) { return erfcf(x); }
__device__ __forceinline__ double complementary_error(double x) { return erfc(x); }

// exp(-x) overflows to infinity for very negative x, and 1 / infinity is the right answer, 0.
__device__ __forceinline__ accumulate_t logistic(accumulate_t x) {
    return NUMBER(1) / (NUMBER(1) + exponential(-x));
}

// The normal distribution function; through erfc, because 1 + erf loses every digit for negative x.
__device__ __forceinline__ accumulate_t normal_distribution(accumulate_t x) {
    return NUMBER(0.5) * complementary_error(-x * NUMBER(0.70710678118654752440));
}

// Hendrycks and Gimpel's approximation: tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)).
__device__ __forceinline__ accumulate_t gelu_inner(accumulate_t x) {
    return hyperbolic_tangent(NUMBER(0.79788456080286535588) * (x + NUMBER(0.044715) * x * x * x));
}

__device__ __forceinline__ accumulate_t activate(int function, accumulate_t x, accumulate_t negative_slope) {
    switch (function) {
        case RELU: return x <= NUMBER(0) ? NUMBER(0) : x;  // a NaN compares false and stays
        case LEAKY_RELU: return x <= NUMBER(0) ? negative_slope * x : x;
        case SIGMOID: return logistic(x);
        case TANH: return hyperbolic_tangent(x);
        case GELU: return x * normal_distribution(x);
        case GELU_TANH: return NUMBER(0.5) * x * (NUMBER(1) + gelu_inner(x));
        case SILU: return x * logistic(x);
        default: return x;
    }
}

// The derivative at ``value``: of the output for ReLU, sigmoid and tanh, of the input for the others.
__device__ __forceinline__ accumulate_t activation_slope(
    int function, accumulate_t value, accumulate_t negative_slope
) {
    switch (function) {
        case RELU: return value > NUMBER(0) ? NUMBER(1) : NUMBER(0);
        case LEAKY_RELU: return value > NUMBER(0) ? NUMBER(1) : negative_slope;
        case SIGMOID: return value * (NUMBER(1) - value);
        case TANH: return NUMBER(1) - value * value;
        case GELU: {
            const accumulate_t density = NUMBER(0.39894228040143267794) * exponential(NUMBER(-0.5) * value * value);
            return normal_distribution(value) + value * density;
        }
        case GELU_TANH: {
            const accumulate_t inner = gelu_inner(value);
            const accumulate_t growth =
                NUMBER(0.79788456080286535588) * (NUMBER(1) + NUMBER(3 * 0.044715) * value * value);
            return NUMBER(0.5) * (NUMBER(1) + inner + value * (NUMBER(1) - inner * inner) * growth);
        }
        case SILU: {
            const accumulate_t gate = logistic(value);
            return gate * (NUMBER(1) + value * (NUMBER(1) - gate));
        }
        default: return NUMBER(1);
    }
}
