// Optimizer steps on flat buffers: one launch for all parameters of a model, everything read once and written
// once. Limit: memory; SGD with momentum moves 5 elements a parameter, Adam 7.
//
// Arithmetic and state (momenta, moments) are accumulate_t: float32 for 16-bit parameters, whose second moments
// would vanish in their own format. What is the same for all parameters, bias corrections above all, the host
// works out in double precision. Options are uniform, so branches on them cost nothing.
//
// A step that is captured once and started many times has in memory what changes from step to step: the numbers of
// ``schedule`` stand for those of the options that are named beside it, and where ``proceed`` points to 0, nothing
// is changed. Both are null elsewhere. One kernel for both, so that both have the same roundings.
#include "scalar.cuh"

__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

struct SgdOptions {
    accumulate_t lr, momentum, keep, weight_decay;  // keep is 1 - dampening
    int nesterov, maximize, first_step;
};

// PyTorch's SGD. ``velocity`` is null without momentum.
extern "C" __global__ void __launch_bounds__(256) sgd_step(
    scalar_t *parameter, const scalar_t *gradient, accumulate_t *velocity, long long count, SgdOptions options,
    const double *schedule, const double *proceed
) {
    if (proceed && *proceed == 0) return;
    if (schedule) {
        options.lr = (accumulate_t)schedule[0];
        options.first_step = schedule[1] != 0;
    }
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        const accumulate_t value = load(parameter[i]);
        accumulate_t step = load(gradient[i]);
        if (options.maximize) step = -step;
        if (options.weight_decay != NUMBER(0)) step += options.weight_decay * value;
        if (velocity) {
            // At the first step the buffer holds nothing: it is not read.
            const accumulate_t moved =
                options.first_step ? step : options.momentum * velocity[i] + options.keep * step;
            velocity[i] = moved;
            step = options.nesterov ? step + options.momentum * moved : moved;
        }
        parameter[i] = store(value - options.lr * step);
    }
}

struct AdamOptions {
    accumulate_t step_size;        // lr / (1 - beta1^t)
    accumulate_t root_correction;  // 1 / sqrt(1 - beta2^t)
    accumulate_t rest_1;           // 1 - beta1
    accumulate_t beta2, rest_2;    // rest_2 is 1 - beta2
    accumulate_t epsilon;
    accumulate_t weight_decay;     // decoupled: lr * weight_decay
    int decoupled;
};

// Adam (Kingma and Ba, 2015); decoupled: AdamW (Loshchilov and Hutter, 2019).
extern "C" __global__ void __launch_bounds__(256) adam_step(
    scalar_t *parameter, const scalar_t *gradient, accumulate_t *first_moment, accumulate_t *second_moment,
    long long count, AdamOptions options, const double *schedule, const double *proceed
) {
    if (proceed && *proceed == 0) return;
    if (schedule) {
        options.step_size = (accumulate_t)schedule[0];
        options.root_correction = (accumulate_t)schedule[1];
        options.weight_decay = (accumulate_t)schedule[2];
    }
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        accumulate_t value = load(parameter[i]), slope = load(gradient[i]);
        if (options.weight_decay != NUMBER(0)) {
            // Not value * (1 - decay): that factor, so near 1, would keep few of the decay's digits.
            if (options.decoupled) {
                value -= options.weight_decay * value;
            } else {
                slope += options.weight_decay * value;
            }
        }
        accumulate_t first = first_moment[i], second = second_moment[i];
        first += options.rest_1 * (slope - first);
        second = options.beta2 * second + options.rest_2 * (slope * slope);
        first_moment[i] = first;
        second_moment[i] = second;
        const accumulate_t root = square_root(second) * options.root_correction + options.epsilon;
        parameter[i] = store(value - options.step_size * (first / root));
    }
}

struct RmspropOptions {
    accumulate_t lr, alpha, rest, epsilon, weight_decay, momentum;  // rest is 1 - alpha
};

// PyTorch's RMSprop: with momentum where ``velocity`` is given, centered where ``gradient_average`` is.
extern "C" __global__ void __launch_bounds__(256) rmsprop_step(
    scalar_t *parameter, const scalar_t *gradient, accumulate_t *square_average, accumulate_t *velocity,
    accumulate_t *gradient_average, long long count, RmspropOptions options, const double *schedule,
    const double *proceed
) {
    if (proceed && *proceed == 0) return;
    if (schedule) options.lr = (accumulate_t)schedule[0];
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        const accumulate_t value = load(parameter[i]);
        accumulate_t slope = load(gradient[i]);
        if (options.weight_decay != NUMBER(0)) slope += options.weight_decay * value;
        accumulate_t variance = options.alpha * square_average[i] + options.rest * (slope * slope);
        square_average[i] = variance;
        if (gradient_average) {
            accumulate_t average = gradient_average[i];
            average += options.rest * (slope - average);
            gradient_average[i] = average;
            // Rounding may leave a variance just below 0 where the gradient hardly changes; a NaN stays.
            variance -= average * average;
            if (variance < NUMBER(0)) variance = NUMBER(0);
        }
        accumulate_t change = slope / (square_root(variance) + options.epsilon);
        if (velocity) {
            change += options.momentum * velocity[i];
            velocity[i] = change;
        }
        parameter[i] = store(value - options.lr * change);
    }
}
