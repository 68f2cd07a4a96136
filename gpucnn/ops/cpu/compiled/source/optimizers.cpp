// Optimizer steps in place, in one trip: 5 numbers moved a parameter for SGD with momentum, 7 for Adam. The arithmetic
// hides behind that, and so do the tests of what the step is made of, which have one outcome in the whole loop.
#include <cmath>

#include "elementwise.h"
#include "rows.h"
#include "threads.h"
#include "vector.h"

namespace gpucnn {
namespace {

// update(access, i) for the vectors of 0 .. count, the last one in part.
template <class Update>
void update_all(int threads, int64_t count, Update &&update) {
    over_ranges(threads, count, [&](int64_t i, int64_t end) {
        for (; i + LANES <= end; i += LANES) update(Whole{}, i);
        if (i < end) update(Part{static_cast<int>(end - i)}, i);
    });
}

GPUCNN_INLINE Vector square_root(Vector v) {
#if defined(__AVX512F__)
    return _mm512_maskz_sqrt_ps((__mmask16)-1, v);
#else
    for (int lane = 0; lane < LANES; ++lane) v[lane] = std::sqrt(v[lane]);  // one instruction a vector
    return v;
#endif
}

}  // namespace

// g = sign gradient + decay parameter; velocity = momentum velocity + share g, at first g itself; the parameter moves
// by lr times the velocity (with Nesterov, momentum velocity + g). velocity may be null: by lr g.
GPUCNN_EXPORT int gpucnn_sgd_step(int threads, int64_t count, float *parameter, const float *gradient,
                                  float *velocity, float lr, float momentum, float share, float decay, float sign,
                                  int64_t nesterov, int64_t first_step) {
    update_all(threads, count, [=](auto access, int64_t i) GPUCNN_BODY {
        Vector p = access.load(parameter + i), g = access.load(gradient + i) * sign;
        if (decay != 0) g += p * decay;
        Vector step = g;
        if (velocity) {
            Vector v = first_step ? g : access.load(velocity + i) * momentum + g * share;
            access.store(velocity + i, v);
            step = nesterov ? v * momentum + g : v;
        }
        access.store(parameter + i, p - step * lr);
    });
    return 0;
}

// The moments move by 1 - beta towards the gradient and its square; the parameter by step_size times
// first / (sqrt(second) + epsilon), both corrected for the bias of the first steps by who calls. shrink, what AdamW
// multiplies the parameter with before, is 1 otherwise.
GPUCNN_EXPORT int gpucnn_adam_step(int threads, int64_t count, float *parameter, const float *gradient, float *first,
                                   float *second, float step_size, float beta2, float rest1, float rest2,
                                   float epsilon, float decay, float shrink) {
    update_all(threads, count, [=](auto access, int64_t i) GPUCNN_BODY {
        Vector p = access.load(parameter + i) * shrink, g = access.load(gradient + i);
        if (decay != 0) g += p * decay;
        Vector m = access.load(first + i), v = access.load(second + i);
        m += (g - m) * rest1;
        v = v * beta2 + g * g * rest2;
        access.store(first + i, m);
        access.store(second + i, v);
        access.store(parameter + i, p - m / (square_root(v) + epsilon) * step_size);
    });
    return 0;
}

// PyTorch's RMSprop; velocity and average may be null.
GPUCNN_EXPORT int gpucnn_rmsprop_step(int threads, int64_t count, float *parameter, const float *gradient,
                                      float *square, float *velocity, float *average, float lr, float alpha,
                                      float rest, float epsilon, float decay, float momentum) {
    update_all(threads, count, [=](auto access, int64_t i) GPUCNN_BODY {
        Vector p = access.load(parameter + i), g = access.load(gradient + i);
        if (decay != 0) g += p * decay;
        Vector s = access.load(square + i) * alpha + g * g * rest, variance = s;
        access.store(square + i, s);
        if (average) {
            Vector a = access.load(average + i);
            a += (g - a) * rest;
            access.store(average + i, a);
            variance = s - a * a;
            variance = variance < 0 ? Vector{} : variance;  // by rounding, where the gradient hardly changes
        }
        Vector step = g / (square_root(variance) + epsilon);
        if (velocity) {
            step = access.load(velocity + i) * momentum + step;
            access.store(velocity + i, step);
        }
        access.store(parameter + i, p - step * lr);
    });
    return 0;
}

GPUCNN_EXPORT int gpucnn_scale(int threads, int64_t count, float factor, float *x) {
    map(threads, count, x, [factor](Vector v) GPUCNN_BODY { return v * factor; }, x);
    return 0;
}

}  // namespace gpucnn
