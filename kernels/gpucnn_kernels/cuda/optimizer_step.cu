// Optimizer steps on flat buffers: one launch for all parameters of a model, everything read once and written
// once. Limit: memory; SGD with momentum moves 5 elements a parameter, Adam 7.
//
// Arithmetic and state (momenta, moments) are accumulate_t: float32 for 16-bit parameters, whose second moments
// would vanish in their own format. What is the same for all parameters, bias corrections above all, the host
// works out in double precision. Options are uniform, so branches on them cost nothing.
//
// What is moved in packs and what is moved in single elements has the same bits: products are fused where it says so.
//
// A step that is captured once and started many times has in memory what changes from step to step: the numbers of
// ``schedule`` stand for those of the options that are named beside it, and where ``proceed`` points to 0, nothing
// is changed. Both are null elsewhere. One kernel for both, so that both have the same roundings.
//
// A thread moves 16 bytes of each state, and as many parameters and gradients, where all begin on boundaries of so
// many: 48 bytes a thread under way for SGD with momentum, 64 for Adam, in loads of 16 bytes where they were of 4. By
// the compiled code for sm_90, not measured, a parameter then takes fewer than 78 and 134 instructions, those of both
// sides of every choice counted, and an H200's memory leaves time for 155 and 217.
#include "fused.cuh"
#include "packs.cuh"

__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

// Elements of a state in 16 bytes.
constexpr int STATE_PACK = 16 / sizeof(accumulate_t);

__device__ __forceinline__ bool all_on_boundaries(const scalar_t *parameter, const scalar_t *gradient) {
    return on_pack_boundary<STATE_PACK>(parameter) && on_pack_boundary<STATE_PACK>(gradient);
}
template <typename... Rest>
__device__ __forceinline__ bool all_on_boundaries(
    const scalar_t *parameter, const scalar_t *gradient, const accumulate_t *state, Rest... rest
) {
    return on_pack_boundary<STATE_PACK>(state) && all_on_boundaries(parameter, gradient, rest...);
}

struct SgdOptions {
    accumulate_t lr, momentum, keep, weight_decay;  // keep is 1 - dampening
    int nesterov, maximize, first_step;
};

struct SgdStep {
    scalar_t *parameter;
    const scalar_t *gradient;
    accumulate_t *velocity;
    SgdOptions options;
    template <typename Tile>
    __device__ __forceinline__ void operator()(const Tile &tile) const {
        accumulate_t values[Tile::elements], steps[Tile::elements], velocities[Tile::elements];
        tile.fetch(parameter, values);
        tile.fetch(gradient, steps);
        // At the first step the buffer holds nothing: it is not read.
        if (velocity && !options.first_step) tile.fetch(velocity, velocities);
#pragma unroll
        for (int k = 0; k < Tile::elements; ++k) {
            accumulate_t step = steps[k];
            if (options.maximize) step = -step;
            if (options.weight_decay != NUMBER(0)) step = fused(options.weight_decay, values[k], step);
            if (velocity) {
                const accumulate_t moved =
                    options.first_step ? step : fused(options.momentum, velocities[k], options.keep * step);
                velocities[k] = moved;
                step = options.nesterov ? fused(options.momentum, moved, step) : moved;
            }
            values[k] = fused(-options.lr, step, values[k]);
        }
        if (velocity) tile.put(velocity, velocities);
        tile.put(parameter, values);
    }
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
    const bool aligned = all_on_boundaries(parameter, gradient, velocity);
    over_tiles<STATE_PACK, 1>(count, aligned, SgdStep{parameter, gradient, velocity, options});
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

struct AdamStep {
    scalar_t *parameter;
    const scalar_t *gradient;
    accumulate_t *first_moment, *second_moment;
    AdamOptions options;
    template <typename Tile>
    __device__ __forceinline__ void operator()(const Tile &tile) const {
        accumulate_t values[Tile::elements], slopes[Tile::elements];
        accumulate_t firsts[Tile::elements], seconds[Tile::elements];
        tile.fetch(parameter, values);
        tile.fetch(gradient, slopes);
        tile.fetch(first_moment, firsts);
        tile.fetch(second_moment, seconds);
#pragma unroll
        for (int k = 0; k < Tile::elements; ++k) {
            accumulate_t value = values[k], slope = slopes[k];
            if (options.weight_decay != NUMBER(0)) {
                // Not value * (1 - decay): that factor, so near 1, would keep few of the decay's digits.
                if (options.decoupled) {
                    value = fused(-options.weight_decay, value, value);
                } else {
                    slope = fused(options.weight_decay, value, slope);
                }
            }
            firsts[k] = fused(options.rest_1, slope - firsts[k], firsts[k]);
            seconds[k] = fused(options.beta2, seconds[k], options.rest_2 * (slope * slope));
            const accumulate_t root = fused(square_root(seconds[k]), options.root_correction, options.epsilon);
            values[k] = fused(-options.step_size, firsts[k] / root, value);
        }
        tile.put(first_moment, firsts);
        tile.put(second_moment, seconds);
        tile.put(parameter, values);
    }
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
    const bool aligned = all_on_boundaries(parameter, gradient, first_moment, second_moment);
    over_tiles<STATE_PACK, 1>(count, aligned, AdamStep{parameter, gradient, first_moment, second_moment, options});
}

struct RmspropOptions {
    accumulate_t lr, alpha, rest, epsilon, weight_decay, momentum;  // rest is 1 - alpha
};

struct RmspropStep {
    scalar_t *parameter;
    const scalar_t *gradient;
    accumulate_t *square_average, *velocity, *gradient_average;
    RmspropOptions options;
    template <typename Tile>
    __device__ __forceinline__ void operator()(const Tile &tile) const {
        accumulate_t values[Tile::elements], slopes[Tile::elements], squares[Tile::elements];
        accumulate_t velocities[Tile::elements], averages[Tile::elements];
        tile.fetch(parameter, values);
        tile.fetch(gradient, slopes);
        tile.fetch(square_average, squares);
        if (velocity) tile.fetch(velocity, velocities);
        if (gradient_average) tile.fetch(gradient_average, averages);
#pragma unroll
        for (int k = 0; k < Tile::elements; ++k) {
            accumulate_t slope = slopes[k];
            if (options.weight_decay != NUMBER(0)) slope = fused(options.weight_decay, values[k], slope);
            squares[k] = fused(options.alpha, squares[k], options.rest * (slope * slope));
            accumulate_t variance = squares[k];
            if (gradient_average) {
                averages[k] = fused(options.rest, slope - averages[k], averages[k]);
                // Rounding may leave a variance just below 0 where the gradient hardly changes; a NaN stays.
                variance = fused(-averages[k], averages[k], variance);
                if (variance < NUMBER(0)) variance = NUMBER(0);
            }
            accumulate_t change = slope / (square_root(variance) + options.epsilon);
            if (velocity) {
                change = fused(options.momentum, velocities[k], change);
                velocities[k] = change;
            }
            values[k] = fused(-options.lr, change, values[k]);
        }
        tile.put(square_average, squares);
        if (velocity) tile.put(velocity, velocities);
        if (gradient_average) tile.put(gradient_average, averages);
        tile.put(parameter, values);
    }
};

// PyTorch's RMSprop: with momentum where ``velocity`` is given, centered where ``gradient_average`` is.
extern "C" __global__ void __launch_bounds__(256) rmsprop_step(
    scalar_t *parameter, const scalar_t *gradient, accumulate_t *square_average, accumulate_t *velocity,
    accumulate_t *gradient_average, long long count, RmspropOptions options, const double *schedule,
    const double *proceed
) {
    if (proceed && *proceed == 0) return;
    if (schedule) options.lr = (accumulate_t)schedule[0];
    const bool aligned = all_on_boundaries(parameter, gradient, square_average, velocity, gradient_average);
    const RmspropStep step = {parameter, gradient, square_average, velocity, gradient_average, options};
    over_tiles<STATE_PACK, 1>(count, aligned, step);
}
