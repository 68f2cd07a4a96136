// The activation functions, in registers: for the element-by-element kernels and for the convolution's epilogue.
// ``function`` is the same for all threads of a launch, so the switch does not diverge.
#include "scalar.cuh"

enum Activation { IDENTITY, RELU, LEAKY_RELU, SIGMOID, TANH, GELU, GELU_TANH, SILU, RELU6 };

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

// x cut to -limit .. limit; a NaN compares false and stays.
__device__ __forceinline__ accumulate_t clamped(accumulate_t x, accumulate_t limit) {
    return x < -limit ? -limit : (x > limit ? limit : x);
}

// The derivative s (1 + v (1 - s)) of a gate x s, s = logistic(of), where v is x times the derivative of ``of``.
// 1 - s is exp(-of) s, which keeps its digits where s is near 1; where exp would overflow, s is 0 or 1 to rounding.
__device__ __forceinline__ accumulate_t gate_slope(accumulate_t of, accumulate_t v) {
    const accumulate_t power = exponential(-clamped(of, sizeof(accumulate_t) == 4 ? NUMBER(80) : NUMBER(700)));
    const accumulate_t gate = NUMBER(1) / (NUMBER(1) + power);
    return gate * (NUMBER(1) + v * (power * gate));
}

// The normal distribution function; through erfc, because 1 + erf loses every digit for negative x.
__device__ __forceinline__ accumulate_t normal_distribution(accumulate_t x) {
    return NUMBER(0.5) * complementary_error(-x * NUMBER(0.70710678118654752440));
}

// Hendrycks and Gimpel's approximation of it is (1 + tanh(u)) / 2 = logistic(2 u); this is 2 u:
// 2 sqrt(2 / pi) (x + 0.044715 x^3).
__device__ __forceinline__ accumulate_t gelu_inner(accumulate_t x) {
    return NUMBER(1.59576912160573071176) * x * (NUMBER(1) + NUMBER(0.044715) * x * x);
}

// Beyond these, below zero, the gates of GELU and SiLU are 0 in every dtype: x is not multiplied by them there, as
// minus infinity times 0 is no number.
#define GELU_FAR NUMBER(50)
#define SILU_FAR NUMBER(1000)

__device__ __forceinline__ accumulate_t activate(int function, accumulate_t x, accumulate_t negative_slope) {
    switch (function) {
        case RELU: return x <= NUMBER(0) ? NUMBER(0) : x;  // a NaN compares false and stays
        case LEAKY_RELU: return x <= NUMBER(0) ? negative_slope * x : x;
        case RELU6: return x <= NUMBER(0) ? NUMBER(0) : (x >= NUMBER(6) ? NUMBER(6) : x);
        case SIGMOID: return logistic(x);
        case TANH: return hyperbolic_tangent(x);
        case GELU: return x < -GELU_FAR ? NUMBER(0) : x * normal_distribution(x);
        case GELU_TANH: return x < -GELU_FAR ? NUMBER(0) : x * logistic(gelu_inner(x));
        case SILU: return x < -SILU_FAR ? NUMBER(0) : x * logistic(x);
        default: return x;
    }
}

// The derivative at ``value``: of the output for ReLU, ReLU6, sigmoid and tanh, of the input for the others.
__device__ __forceinline__ accumulate_t activation_slope(
    int function, accumulate_t value, accumulate_t negative_slope
) {
    switch (function) {
        case RELU: return value > NUMBER(0) ? NUMBER(1) : NUMBER(0);
        case LEAKY_RELU: return value > NUMBER(0) ? NUMBER(1) : negative_slope;
        case RELU6: return value > NUMBER(0) && value < NUMBER(6) ? NUMBER(1) : NUMBER(0);
        case SIGMOID: return value * (NUMBER(1) - value);
        case TANH: return (NUMBER(1) - value) * (NUMBER(1) + value);  // 1 - y * y loses the digits near 1
        case GELU: {
            const accumulate_t x = clamped(value, GELU_FAR);
            const accumulate_t density = NUMBER(0.39894228040143267794) * exponential(NUMBER(-0.5) * x * x);
            return normal_distribution(x) + x * density;
        }
        case GELU_TANH: {
            const accumulate_t x = clamped(value, GELU_FAR);
            const accumulate_t growth = NUMBER(1.59576912160573071176) * (NUMBER(1) + NUMBER(3 * 0.044715) * x * x);
            return gate_slope(gelu_inner(x), x * growth);
        }
        case SILU: {
            const accumulate_t x = clamped(value, SILU_FAR);
            return gate_slope(x, x);
        }
        default: return NUMBER(1);
    }
}
