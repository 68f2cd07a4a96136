// Softmax cross-entropy of logits (N, C), in PyTorch's definition, and its gradient.
//
// A row of threads (a warp, or the block where there are many classes) takes a sample: its largest logit, the sum
// of its powers, then probabilities and loss together. The target of class c is (soft + hard * [c is the label])
// or (soft + hard * targets[c]), times weight[c], where soft = smoothing / C and hard = 1 - smoothing; it is
// worked out where it is needed and never stored. Losses and weights are summed in float64, in a fixed order: a
// number a block first, then those by one block.
//
// A label outside 0 .. C - 1 reads nothing: it makes its sample's loss and gradient NaN, and the lowest number of
// such a sample is reported. A label that is ignored makes both 0, whatever its logits are, and means are taken over
// the other samples.
//
// Rows' loops are not unrolled: a warp has few rounds to make, and ptxas spills what it unrolls.
//
// Memory is the limit: forward reads the logits and writes the probabilities, backward reads the probabilities and
// writes the gradient.
#include "activation.cuh"
#include "last_block.cuh"
#include "reduce.cuh"

// Labels are of one of three types; the pointers to the two others are null. With no labels at all, the targets
// are probabilities.
struct CrossEntropyTargets {
    long long samples, classes;
    bool labels, ignoring;
    long long ignored;  // the label whose samples do not count, where ``ignoring``
    accumulate_t soft, hard;
};

__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ accumulate_t not_a_number() { return __int_as_float(0x7fffffff); }

__device__ __forceinline__ long long label_of(
    const unsigned char *bytes, const int *words, const long long *longs, long long sample
) {
    return longs ? longs[sample] : words ? words[sample] : bytes ? bytes[sample] : -1;
}

__device__ __forceinline__ bool is_ignored(const CrossEntropyTargets &shape, long long label) {
    return shape.ignoring && label == shape.ignored;
}

__device__ __forceinline__ accumulate_t target_of(
    CrossEntropyTargets shape, long long label, const scalar_t *probabilities, const accumulate_t *weight,
    long long c
) {
    const accumulate_t given =
        shape.labels ? (c == label ? NUMBER(1) : NUMBER(0)) : load(probabilities[c]);
    const accumulate_t smooth = shape.soft + shape.hard * given;
    return weight ? smooth * weight[c] : smooth;
}

// losses, where not null, gets each sample's loss. Each block leaves the sums of its losses and of its labels'
// weights, and the first of its samples whose label is out of range (or their number, where none is).
extern "C" __global__ void __launch_bounds__(256, 3) cross_entropy_forward(
    const scalar_t *logits, const unsigned char *labels_uint8, const int *labels_int32,
    const long long *labels_int64, const scalar_t *targets, const accumulate_t *weight, scalar_t *probabilities,
    scalar_t *losses, double *block_losses, double *block_weights, long long *block_invalid,
    CrossEntropyTargets shape
) {
    __shared__ accumulate_t shared[32];
    __shared__ double shared_sums[32];
    __shared__ long long shared_places[32];
    double loss_sum = 0, weight_sum = 0;
    long long invalid = shape.samples;
    const long long step = (long long)gridDim.x * blockDim.y;
    for (long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y; n < shape.samples; n += step) {
        const scalar_t *row = logits + n * shape.classes;
        const long long label = shape.labels ? label_of(labels_uint8, labels_int32, labels_int64, n) : 0;
        const bool valid = label >= 0 && label < shape.classes, ignored = is_ignored(shape, label);
        const scalar_t *target_row = shape.labels ? targets : targets + n * shape.classes;
        accumulate_t largest = load(row[0]);
#pragma unroll 1
        for (long long c = threadIdx.x; c < shape.classes; c += blockDim.x) {
            const accumulate_t value = load(row[c]);
            largest = value > largest ? value : largest;
        }
        largest = row_maximum(largest, shared);
        accumulate_t total = NUMBER(0);
#pragma unroll 1
        for (long long c = threadIdx.x; c < shape.classes; c += blockDim.x) {
            total += exponential(load(row[c]) - largest);
        }
        total = row_sum(total, shared);
        const accumulate_t log_total = logarithm(total);
        accumulate_t loss = NUMBER(0);
#pragma unroll 1
        for (long long c = threadIdx.x; c < shape.classes; c += blockDim.x) {
            const accumulate_t shifted = load(row[c]) - largest;
            probabilities[n * shape.classes + c] = store(exponential(shifted) / total);
            const accumulate_t target = target_of(shape, label, target_row, weight, c);
            // A class that no label mentions must not matter, even where its logit is minus infinity.
            if (!shape.labels || target != NUMBER(0)) loss -= target * (shifted - log_total);
        }
        loss = row_sum(loss, shared);
        if (!valid) loss = not_a_number();
        if (ignored) loss = NUMBER(0);
        if (threadIdx.x == 0) {
            if (losses) losses[n] = store(loss);
            loss_sum += loss;
            if (ignored) continue;
            if (!valid) {
                invalid = n < invalid ? n : invalid;
            } else if (shape.labels) {
                weight_sum += weight ? weight[label] : NUMBER(1);
            }
        }
    }
    loss_sum = block_sum(loss_sum, shared_sums);
    weight_sum = block_sum(weight_sum, shared_sums);
    invalid = block_minimum(invalid, shared_places);
    if (thread_of_block() == 0) {
        block_losses[blockIdx.x] = loss_sum;
        block_weights[blockIdx.x] = weight_sum;
        block_invalid[blockIdx.x] = invalid;
    }
}

// One block: the loss of all, divided by the sum of the labels' weights or by ``divisor``, and the first sample
// whose label is out of range, or ``samples``.
extern "C" __global__ void __launch_bounds__(256) cross_entropy_finish(
    const double *block_losses, const double *block_weights, const long long *block_invalid, scalar_t *loss,
    long long *invalid, int block_count, long long samples, bool divide_by_weights, double divisor
) {
    __shared__ double shared_sums[32];
    __shared__ long long shared_places[32];
    double loss_sum = 0, weight_sum = 0;
    long long first = samples;
    for (int block = threadIdx.x; block < block_count; block += blockDim.x) {
        loss_sum += block_losses[block];
        weight_sum += block_weights[block];
        first = block_invalid[block] < first ? block_invalid[block] : first;
    }
    loss_sum = block_sum(loss_sum, shared_sums);
    weight_sum = block_sum(weight_sum, shared_sums);
    first = block_minimum(first, shared_places);
    if (threadIdx.x == 0) {
        if (loss) loss[0] = store(loss_sum / (divide_by_weights ? weight_sum : divisor));
        invalid[0] = first;
    }
}

// The sum of the labels' weights, or their number where ``weight`` is null, without those that are ignored: what the
// gradient of a mean divides by. A number a block, then the sum of those by one block, with the same kernel (labels
// null, ``sums`` summed instead).
extern "C" __global__ void __launch_bounds__(256) cross_entropy_divisor(
    const unsigned char *labels_uint8, const int *labels_int32, const long long *labels_int64,
    const accumulate_t *weight, const double *sums, double *block_sums, long long count, CrossEntropyTargets shape
) {
    __shared__ double shared[32];
    double sum = 0;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x; n < count; n += step) {
        if (sums) {
            sum += sums[n];
        } else {
            const long long label = label_of(labels_uint8, labels_int32, labels_int64, n);
            if (label < 0 || label >= shape.classes || is_ignored(shape, label)) continue;
            sum += weight ? weight[label] : NUMBER(1);
        }
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) block_sums[blockIdx.x] = sum;
}

// Whether the label's logit is the first of the largest; a NaN is larger than any number, and the first one counts.
// ``outdone`` says so of one class against the label's.
__device__ __forceinline__ bool outdone(
    accumulate_t value, long long c, accumulate_t labelled, long long label
) {
    if (labelled != labelled) return value != value && c < label;
    return value != value || value > labelled || (value == labelled && c < label);
}

// A number as it would be read from memory, in which it would be rounded unless it is ``wide`` there.
__device__ __forceinline__ accumulate_t stored(accumulate_t value, const accumulate_t *wide) {
    return wide ? value : load(store(value));
}

// All that a training step wants of class numbers, in one launch: the loss, divided as by cross_entropy_finish, the
// gradient of cross_entropy_backward, and how many labels have the largest logit. Each with the bits of the kernel
// that makes it alone: the sums have the same order, the probabilities are rounded where they would be stored, and
// the gradient before it is multiplied by the number that ``scaling`` points to, where it is not null. ``weights``
// is as for cross_entropy_backward. Where ``wide_loss`` is not null it takes the loss, and nothing is rounded but the
// gradient, at the end: as if the logits were first converted to the accumulating type, and the gradient at last to
// theirs.
//
// Limit: memory, which is read and written once; for a training step's few thousand numbers the launch itself.
extern "C" __global__ void __launch_bounds__(256, 3) cross_entropy_step(
    const scalar_t *logits, const unsigned char *labels_uint8, const int *labels_int32,
    const long long *labels_int64, const accumulate_t *weight, const double *weights, const double *scaling,
    scalar_t *gradient, scalar_t *loss, accumulate_t *wide_loss, long long *correct, double *block_losses,
    double *block_weights, long long *block_correct, int *done, CrossEntropyTargets shape, double divisor
) {
    __shared__ accumulate_t shared[32];
    __shared__ double shared_sums[32];
    __shared__ long long shared_counts[32];
    __shared__ int last;
    const accumulate_t divided_by = weights ? (accumulate_t)weights[0] : (accumulate_t)divisor;
    double loss_sum = 0, weight_sum = 0;
    long long right = 0;
    const long long step = (long long)gridDim.x * blockDim.y;
    for (long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y; n < shape.samples; n += step) {
        const scalar_t *row = logits + n * shape.classes;
        const long long label = label_of(labels_uint8, labels_int32, labels_int64, n);
        const bool valid = label >= 0 && label < shape.classes, ignored = is_ignored(shape, label);
        const accumulate_t labelled = valid ? load(row[label]) : NUMBER(0);
        accumulate_t largest = load(row[0]), wrong = NUMBER(0), targets = NUMBER(0);
#pragma unroll 1
        for (long long c = threadIdx.x; c < shape.classes; c += blockDim.x) {
            const accumulate_t value = load(row[c]);
            largest = value > largest ? value : largest;
            if (outdone(value, c, labelled, label)) wrong = NUMBER(1);
            targets += target_of(shape, label, nullptr, weight, c);
        }
        largest = row_maximum(largest, shared);
        wrong = row_maximum(wrong, shared);
        targets = row_sum(targets, shared);
        accumulate_t total = NUMBER(0);
#pragma unroll 1
        for (long long c = threadIdx.x; c < shape.classes; c += blockDim.x) {
            total += exponential(load(row[c]) - largest);
        }
        total = row_sum(total, shared);
        const accumulate_t log_total = logarithm(total);
        accumulate_t sum = NUMBER(0);
#pragma unroll 1
        for (long long c = threadIdx.x; c < shape.classes; c += blockDim.x) {
            const accumulate_t shifted = load(row[c]) - largest;
            const accumulate_t probability = stored(exponential(shifted) / total, wide_loss);
            const accumulate_t target = target_of(shape, label, nullptr, weight, c);
            if (target != NUMBER(0)) sum -= target * (shifted - log_total);
            const accumulate_t value = (probability * targets - target) / divided_by;
            accumulate_t made = stored(valid ? value : not_a_number(), wide_loss);
            if (scaling) made *= (accumulate_t)*scaling;
            gradient[n * shape.classes + c] = store(ignored ? NUMBER(0) : made);
        }
        sum = row_sum(sum, shared);
        if (threadIdx.x == 0) {
            if (valid && wrong == NUMBER(0)) ++right;
            if (ignored) continue;
            loss_sum += valid ? sum : not_a_number();
            if (valid) weight_sum += weight ? weight[label] : NUMBER(1);
        }
    }
    loss_sum = block_sum(loss_sum, shared_sums);
    weight_sum = block_sum(weight_sum, shared_sums);
    right = block_sum(right, shared_counts);
    const int thread = thread_of_block();
    if (thread == 0) {
        block_losses[blockIdx.x] = loss_sum;
        block_weights[blockIdx.x] = weight_sum;
        block_correct[blockIdx.x] = right;
    }
    if (!is_last_block(done, &last)) return;
    loss_sum = weight_sum = 0;
    right = 0;
    for (int block = thread; block < (int)gridDim.x; block += blockDim.x * blockDim.y) {
        loss_sum += __ldcg(block_losses + block);
        weight_sum += __ldcg(block_weights + block);
        right += __ldcg(block_correct + block);
    }
    loss_sum = block_sum(loss_sum, shared_sums);
    weight_sum = block_sum(weight_sum, shared_sums);
    right = block_sum(right, shared_counts);
    if (thread == 0) {
        const double value = loss_sum / (weights ? weight_sum : divisor);
        if (wide_loss) {
            wide_loss[0] = (accumulate_t)value;
        } else {
            loss[0] = store(value);
        }
        correct[0] = right;
    }
}

// (p * sum of the targets - target) / divisor; ``weights`` (device memory) is the divisor where not null. The
// gradient may take the probabilities' place.
extern "C" __global__ void __launch_bounds__(256, 4) cross_entropy_backward(
    const scalar_t *probabilities, const unsigned char *labels_uint8, const int *labels_int32,
    const long long *labels_int64, const scalar_t *targets, const accumulate_t *weight, const double *weights,
    scalar_t *gradient, CrossEntropyTargets shape, accumulate_t divisor
) {
    __shared__ accumulate_t shared[32];
    const accumulate_t divided_by = weights ? (accumulate_t)weights[0] : divisor;
    const long long step = (long long)gridDim.x * blockDim.y;
    for (long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y; n < shape.samples; n += step) {
        const long long start = n * shape.classes;
        const long long label = shape.labels ? label_of(labels_uint8, labels_int32, labels_int64, n) : 0;
        const bool valid = label >= 0 && label < shape.classes, ignored = is_ignored(shape, label);
        const scalar_t *target_row = shape.labels ? targets : targets + start;
        accumulate_t total = NUMBER(0);
#pragma unroll 1
        for (long long c = threadIdx.x; c < shape.classes; c += blockDim.x) {
            total += target_of(shape, label, target_row, weight, c);
        }
        total = row_sum(total, shared);
#pragma unroll 1
        for (long long c = threadIdx.x; c < shape.classes; c += blockDim.x) {
            const accumulate_t target = target_of(shape, label, target_row, weight, c);
            const accumulate_t value = load(probabilities[start + c]) * total - target;
            gradient[start + c] = store(ignored ? NUMBER(0) : valid ? value / divided_by : not_a_number());
        }
    }
}
