// Activations and their gradients, element by element. Limit: the inputs read and the result written, 4 bytes a number
// each, from beyond the cache; the arithmetic of the longest, GELU's gradient, some 40 operations a vector, takes
// about as long as its three trips.
#include "elementwise.h"
#include "functions.h"
#include "threads.h"
#include "vector.h"

namespace gpucnn {
namespace {

// Where x sigmoid(x) and its like would be infinity times 0, their limit is reached long before.
constexpr float FAR = 50.0f;
constexpr float FAR_FOR_NORMAL = 15.0f;  // x Phi(-x) is 0 in float32
constexpr float FAR_FOR_SIGMOID = 80.0f;
constexpr float INVERSE_SQRT_2_PI = 0.398942280401432678f;
constexpr float TWICE_SQRT_2_OVER_PI = 1.59576912160573071f;
constexpr float CUBIC = 0.044715f;

// s + slope s (1 - s) with s = 1 / (1 + power), the digits of 1 - s kept: (1 + power + slope power) / (1 + power)^2.
GPUCNN_INLINE Vector gated_slope(Vector slope, Vector power) {
    Vector s = 1.0f / (1.0f + power);
    return (slope * power * s + 1.0f) * s;
}

// 2 sqrt(2 / pi) (x + 0.044715 x^3): (1 + tanh(v / 2)) / 2 is sigmoid(v), which keeps its digits.
GPUCNN_INLINE Vector twice_the_argument(Vector x) {
    return (x * x * (TWICE_SQRT_2_OVER_PI * CUBIC) + TWICE_SQRT_2_OVER_PI) * x;
}

}  // namespace

GPUCNN_EXPORT int gpucnn_relu_forward(int threads, int64_t count, const float *x, float *out) {
    map(threads, count, out, [](Vector v) { return v <= 0 ? Vector{} : v; }, x);  // a NaN stays a NaN
    return 0;
}

GPUCNN_EXPORT int gpucnn_relu_backward(int threads, int64_t count, const float *dy, const float *y, float *out) {
    map(threads, count, out, [](Vector d, Vector v) { return v > 0 ? d : Vector{}; }, dy, y);
    return 0;
}

GPUCNN_EXPORT int gpucnn_leaky_relu_forward(int threads, int64_t count, float slope, const float *x, float *out) {
    if (slope == 0) return gpucnn_relu_forward(threads, count, x, out);  // 0 * -infinity would be a NaN
    map(threads, count, out, [slope](Vector v) { return v > 0 ? v : v * slope; }, x);
    return 0;
}

GPUCNN_EXPORT int gpucnn_leaky_relu_backward(int threads, int64_t count, float slope, const float *dy,
                                             const float *x, float *out) {
    map(threads, count, out, [slope](Vector d, Vector v) { return v > 0 ? d : d * slope; }, dy, x);
    return 0;
}

GPUCNN_EXPORT int gpucnn_sigmoid_forward(int threads, int64_t count, const float *x, float *out) {
    map(threads, count, out, [](Vector v) { return sigmoid(v); }, x);
    return 0;
}

GPUCNN_EXPORT int gpucnn_sigmoid_backward(int threads, int64_t count, const float *dy, const float *y, float *out) {
    map(threads, count, out, [](Vector d, Vector s) { return d * ((1.0f - s) * s); }, dy, y);
    return 0;
}

GPUCNN_EXPORT int gpucnn_tanh_forward(int threads, int64_t count, const float *x, float *out) {
    map(threads, count, out, [](Vector v) { return tanh(v); }, x);
    return 0;
}

GPUCNN_EXPORT int gpucnn_tanh_backward(int threads, int64_t count, const float *dy, const float *y, float *out) {
    // (1 - y)(1 + y) keeps its digits where y is near 1; 1 - y y does not.
    map(threads, count, out, [](Vector d, Vector t) { return d * ((1.0f - t) * (1.0f + t)); }, dy, y);
    return 0;
}

GPUCNN_EXPORT int gpucnn_silu_forward(int threads, int64_t count, const float *x, float *out) {
    map(threads, count, out, [](Vector v) {
        Vector near = at_least(v, -1000.0f);  // exp(1000) is infinite: -infinity itself would be divided by it
        return near / (1.0f + exp_of_minus(near));
    }, x);
    return 0;
}

GPUCNN_EXPORT int gpucnn_silu_backward(int threads, int64_t count, const float *dy, const float *x, float *out) {
    map(threads, count, out, [](Vector d, Vector v) {
        Vector near = at_most(at_least(v, -FAR_FOR_SIGMOID), FAR_FOR_SIGMOID);
        return d * gated_slope(near, exp_of_minus(near));
    }, dy, x);
    return 0;
}

GPUCNN_EXPORT int gpucnn_gelu_forward(int threads, int64_t count, const float *x, float *out) {
    // x Phi(x) is -|x| q for negative x and x - |x| q for positive, q = Phi(-|x|).
    map(threads, count, out, [](Vector v) {
        Vector size = at_most(absolute(v), FAR_FOR_NORMAL);
        return at_least(v, 0.0f) - size * normal_tail(size).tail;
    }, x);
    return 0;
}

GPUCNN_EXPORT int gpucnn_gelu_backward(int threads, int64_t count, const float *dy, const float *x, float *out) {
    // Phi(x) + x phi(x): 1/2 + (1/2 - q + |x| phi) for positive x, 1/2 - (the same) for negative.
    map(threads, count, out, [](Vector d, Vector v) {
        Vector size = at_most(absolute(v), FAR_FOR_NORMAL);
        NormalTail normal = normal_tail(size);
        Vector half = (size * normal.power * INVERSE_SQRT_2_PI - normal.tail) + 0.5f;
        return d * (from_bits(bits_of(half) ^ (bits_of(v) & broadcast_bits(SIGN))) + 0.5f);
    }, dy, x);
    return 0;
}

GPUCNN_EXPORT int gpucnn_gelu_tanh_forward(int threads, int64_t count, const float *x, float *out) {
    map(threads, count, out, [](Vector v) {
        Vector near = at_least(v, -FAR);
        return near / (1.0f + exp_of_minus(twice_the_argument(near)));
    }, x);
    return 0;
}

GPUCNN_EXPORT int gpucnn_gelu_tanh_backward(int threads, int64_t count, const float *dy, const float *x, float *out) {
    // y = x s with s = sigmoid(v), so dy/dx = s + x s (1 - s) v'.
    map(threads, count, out, [](Vector d, Vector v) {
        Vector near = at_most(at_least(v, -25.0f), 25.0f);
        Vector argument = at_most(at_least(twice_the_argument(near), -FAR_FOR_SIGMOID), FAR_FOR_SIGMOID);
        Vector slope = (near * near * (3 * TWICE_SQRT_2_OVER_PI * CUBIC) + TWICE_SQRT_2_OVER_PI) * near;
        return d * gated_slope(slope, exp_of_minus(argument));
    }, dy, x);
    return 0;
}

}  // namespace gpucnn
