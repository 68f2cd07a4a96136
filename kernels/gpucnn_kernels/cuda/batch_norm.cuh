// What the kernels of batch normalization share: the walk's numbers, moments, and what is done to a number.
#include "activation.cuh"
#include "fused.cuh"

struct BatchNormWalk {
    int channels, width, parts;
    long long count, per_part;                       // numbers a channel, and in each part of it
    long long inner;                                 // numbers a channel that follow each other evenly
    long long inner_step, outer_step, channel_step;  // distances between numbers, rows of them, channels
};

// count numbers, their mean, and the sum of (number - mean)^2: of a thread's numbers less its first, and of a block's.
struct Moments {
    accumulate_t count, mean, squares;
};
struct BlockMoments {
    double mean;
    accumulate_t count, squares;
};

__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

template <typename T>
__device__ __forceinline__ T combined(T a, T b) {
    T result;
    result.count = a.count + b.count;
    const accumulate_t share = result.count > NUMBER(0) ? b.count / result.count : NUMBER(0);
    const auto difference = b.mean - a.mean;
    const accumulate_t distance = difference;
    result.mean = a.mean + difference * share;
    result.squares = a.squares + b.squares + distance * distance * a.count * share;
    return result;
}

// What is done to each number of a channel: ((x - middle) - rest) * factor + offset + residual, and the activation.
struct Line {
    accumulate_t middle, rest, factor, offset;
};

// Whether a function is a comparison or two a number, so that the numbers of several loads go through it together.
__device__ __forceinline__ bool compared(int function) { return function <= LEAKY_RELU || function == RELU6; }

// It, of one number; a NaN compares false and stays.
__device__ __forceinline__ accumulate_t activate_compared(
    int function, accumulate_t value, accumulate_t negative_slope
) {
    if (value <= NUMBER(0)) {
        if (function != IDENTITY) value = function == LEAKY_RELU ? negative_slope * value : NUMBER(0);
    } else if (function == RELU6 && value >= NUMBER(6)) {
        value = NUMBER(6);
    }
    return value;
}

// The gradient before the activation (ReLU, ReLU6, or leaky ReLU, whose slope above 0 keeps signs) at a number: as
// activation_backward makes it of dy and y. What ReLU6 cuts off above was made 0 before, of all loaded numbers at
// once: to look here at each would cost the other activations two instructions a number.
__device__ __forceinline__ accumulate_t gradient_before(
    int function, accumulate_t gradient, accumulate_t value, accumulate_t negative_slope
) {
    if (value > NUMBER(0)) return gradient;
    return function == LEAKY_RELU ? gradient * negative_slope : NUMBER(0);
}

struct GradientSums {
    accumulate_t gradients, products, distances;  // the sums of dy, of dy * (x - mean), and of x - mean
};

// dx = dy * factor + (x - mean) * slant + offset.
struct Slope {
    accumulate_t factor, slant, offset;

    // Which product is fused with which sum is said here: left to the compiler, it might be another one in each form
    // of the kernels, and a batch norm with its activation have other bits than the two by themselves.
    __device__ __forceinline__ accumulate_t of(accumulate_t gradient, accumulate_t distance) const {
        return fused(gradient, factor, fused(distance, slant, offset));
    }
};
