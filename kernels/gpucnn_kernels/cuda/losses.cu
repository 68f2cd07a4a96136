// Binary cross-entropy with logits and mean squared error, element by element, and their gradients.
//
// A loss that is summed is summed in float64 and in a fixed order: each thread its own elements, the block's
// threads, and the blocks' sums by one block of a second kernel. Memory is the limit: forward reads two arrays,
// backward reads two and writes one, once each.
#include "activation.cuh"
#include "reduce.cuh"

// Where the weights of element i of the logits' memory are: i is taken apart into four axes, the last one fastest,
// and ``first`` has no length because nothing lies beyond it. A step of 0 repeats a weight along its axis.
struct WeightPlaces {
    long long second, third, fourth;  // lengths
    long long weight_first, weight_second, weight_third, weight_fourth;          // steps
    long long positive_first, positive_second, positive_third, positive_fourth;
    bool axes;  // false: one axis, the last
};

struct Weights {
    accumulate_t weight, positive;
};

__device__ __forceinline__ float log_one_plus(float x) { return log1pf(x); }
__device__ __forceinline__ double log_one_plus(double x) { return log1p(x); }

__device__ __forceinline__ Weights weights_of(
    const accumulate_t *weight, const accumulate_t *positive_weight, WeightPlaces places, long long i
) {
    long long weight_place = i * places.weight_fourth, positive_place = i * places.positive_fourth;
    if (places.axes) {
        const long long d = i % places.fourth, abc = i / places.fourth;
        const long long c = abc % places.third, ab = abc / places.third;
        const long long b = ab % places.second, a = ab / places.second;
        weight_place = a * places.weight_first + b * places.weight_second + c * places.weight_third
            + d * places.weight_fourth;
        positive_place = a * places.positive_first + b * places.positive_second + c * places.positive_third
            + d * places.positive_fourth;
    }
    Weights found;
    found.weight = weight ? weight[weight_place] : NUMBER(1);
    found.positive = positive_weight ? positive_weight[positive_place] : NUMBER(1);
    return found;
}

// terms, where not null, gets each element's loss; otherwise block_sums gets a sum a block.
extern "C" __global__ void __launch_bounds__(256) binary_cross_entropy_forward(
    const scalar_t *logits, const scalar_t *targets, const accumulate_t *weight,
    const accumulate_t *positive_weight,
    scalar_t *terms, double *block_sums, long long count, WeightPlaces places
) {
    __shared__ double shared[32];
    double sum = 0;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const accumulate_t x = load(logits[i]), target = load(targets[i]);
        const Weights w = weights_of(weight, positive_weight, places, i);
        // -log s and -log(1 - s) share log(1 + exp(-|x|)). Each is a sum of positive numbers; one from the other,
        // by adding x, would lose the digits of the smaller. A NaN goes through tail.
        const accumulate_t negative = x < NUMBER(0) ? -x : NUMBER(0), positive = x > NUMBER(0) ? x : NUMBER(0);
        const accumulate_t tail = log_one_plus(exponential(x < NUMBER(0) ? x : -x));
        const accumulate_t term =
            (w.positive * target * (tail + negative) + (NUMBER(1) - target) * (tail + positive)) * w.weight;
        if (terms) terms[i] = store(term);
        sum += term;
    }
    if (block_sums) {
        sum = block_sum(sum, shared);
        if (threadIdx.x == 0) block_sums[blockIdx.x] = sum;
    }
}

// No __restrict__ here and below: the gradient may be one of the inputs.
extern "C" __global__ void __launch_bounds__(256) binary_cross_entropy_backward(
    const scalar_t *logits, const scalar_t *targets, const accumulate_t *weight,
    const accumulate_t *positive_weight,
    scalar_t *gradient, long long count, WeightPlaces places, accumulate_t divisor
) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const accumulate_t x = load(logits[i]), target = load(targets[i]);
        const Weights w = weights_of(weight, positive_weight, places, i);
        // sigmoid(x) and 1 - sigmoid(x) = sigmoid(-x), each with all its digits at either end.
        const accumulate_t value =
            ((NUMBER(1) - target) * logistic(x) - w.positive * target * logistic(-x)) * w.weight;
        gradient[i] = store(value / divisor);
    }
}

extern "C" __global__ void __launch_bounds__(256) squared_error_forward(
    const scalar_t *prediction, const scalar_t *target, scalar_t *terms, double *block_sums, long long count
) {
    __shared__ double shared[32];
    double sum = 0;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const accumulate_t difference = load(prediction[i]) - load(target[i]);
        const accumulate_t term = difference * difference;
        if (terms) terms[i] = store(term);
        sum += term;
    }
    if (block_sums) {
        sum = block_sum(sum, shared);
        if (threadIdx.x == 0) block_sums[blockIdx.x] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(256) squared_error_backward(
    const scalar_t *prediction, const scalar_t *target, scalar_t *gradient, long long count, accumulate_t factor
) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        gradient[i] = store((load(prediction[i]) - load(target[i])) * factor);
    }
}

// One block: the sum of the blocks' sums over ``divisor``.
extern "C" __global__ void __launch_bounds__(256) loss_finish(
    const double *block_sums, scalar_t *loss, int block_count, double divisor
) {
    __shared__ double shared[32];
    double sum = 0;
    for (int block = threadIdx.x; block < block_count; block += blockDim.x) sum += block_sums[block];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) loss[0] = store(sum / divisor);
}
