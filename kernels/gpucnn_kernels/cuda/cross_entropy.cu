// Softmax cross-entropy of logits (N, C), in PyTorch's definition, and its gradient.
//
// A row of threads (a warp, or the block where there are many classes) takes a sample: its largest logit, the sum
// of its powers, then probabilities and loss. The target of class c is (soft + hard * [c is the label]) or (soft +
// hard * targets[c]), times weight[c], where soft = smoothing / C and hard = 1 - smoothing; it is worked out where it
// is needed and never stored. Losses and weights are summed in float64, in a fixed order: a number a block first,
// then those by one block.
//
// A label outside 0 .. C - 1 reads nothing: it makes its sample's loss and gradient NaN, and the lowest number of
// such a sample is reported. A label that is ignored makes both 0, whatever its logits are, and means are taken over
// the other samples.
//
// What a step makes in one launch has the bits of the kernels that make it one by one, on a GPU too: they share
// their functions, and where a compiler might fuse a product with one of two sums, or none, ``fused`` says with which.
//
// Memory is the limit: forward reads the logits and writes the probabilities, backward reads the probabilities and
// writes the gradient. By the compiled code for sm_90, not measured, a number takes about these instructions where the
// classes are whole fours, on boundaries of fours, without weights or smoothing; before, one number at a time:
//
//                             float32  bfloat16    one at a time    time for
//   cross_entropy_forward          31        37               91    62 and 31
//   cross_entropy_backward         11        13               49    62 and 31
//   cross_entropy_step             40        50              145    62 and 31
//
// "Time for" is what an H200 can start while its memory moves the number's bytes. A warp has 2 KiB of a row of
// float32 under way, where it had 128 bytes.
#include "fused.cuh"
#include "last_block.cuh"
#include "rows.cuh"

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
    const CrossEntropyTargets &shape, accumulate_t given, const accumulate_t *weight, long long c
) {
    const accumulate_t smooth = fused(shape.hard, given, shape.soft);
    return weight ? smooth * weight[c] : smooth;
}

// Of class numbers: ``labelled`` says whether c is the label.
__device__ __forceinline__ accumulate_t target_at(
    const CrossEntropyTargets &shape, bool labelled, const accumulate_t *weight, long long c
) {
    return target_of(shape, labelled ? NUMBER(1) : NUMBER(0), weight, c);
}

// The logarithm of a class's probability, times minus its target, onto ``sum``.
__device__ __forceinline__ accumulate_t with_loss(
    accumulate_t sum, accumulate_t target, accumulate_t logit, const Powers &powers, accumulate_t log_total
) {
    return fused(-target, (logit - powers.largest) - log_total, sum);
}

// The loss of a sample with a label that is ``valid``, or NaN. A class that the target leaves out must not matter,
// even where its logit is minus infinity.
__device__ __forceinline__ accumulate_t loss_of_label(
    const CrossEntropyTargets &shape, const scalar_t *row, long long label, bool valid, const accumulate_t *weight,
    const Powers &powers, accumulate_t *shared
) {
    const accumulate_t log_total = logarithm(powers.total);
    accumulate_t loss = NUMBER(0);
    if (shape.soft == NUMBER(0)) {
        const accumulate_t target = valid ? target_at(shape, true, weight, label) : NUMBER(0);
        if (target != NUMBER(0)) loss = with_loss(loss, target, load(row[label]), powers, log_total);
    } else {
#pragma unroll 1
        for (long long c = threadIdx.x; c < shape.classes; c += blockDim.x) {
            const accumulate_t target = target_at(shape, c == label, weight, c);
            if (target != NUMBER(0)) loss = with_loss(loss, target, load(row[c]), powers, log_total);
        }
        loss = row_sum(loss, shared);
    }
    return valid ? loss : not_a_number();
}

template <int width>
__device__ __forceinline__ accumulate_t loss_of_probabilities(
    const CrossEntropyTargets &shape, const scalar_t *row, const scalar_t *targets, const accumulate_t *weight,
    const Powers &powers, bool aligned, accumulate_t *shared
) {
    const accumulate_t log_total = logarithm(powers.total);
    accumulate_t loss = NUMBER(0);
    over_rows<width>(
        row, targets, shape.classes, aligned,
        [&](long long c, const accumulate_t (&logits)[width], const accumulate_t (&given)[width]) {
#pragma unroll
            for (int k = 0; k < width; ++k) {
                const accumulate_t target = target_of(shape, given[k], weight, c + k);
                loss = with_loss(loss, target, logits[k], powers, log_total);
            }
        }
    );
    return row_sum(loss, shared);
}

// What all samples of a thread add up to: losses, their labels' weights, and the first whose label is out of range.
struct ForwardSums {
    double loss, weight;
    long long invalid;
};

template <int width>
__device__ __forceinline__ ForwardSums forward_rows(
    const scalar_t *logits, const unsigned char *labels_uint8, const int *labels_int32,
    const long long *labels_int64, const scalar_t *targets, const accumulate_t *weight, scalar_t *probabilities,
    scalar_t *losses, const CrossEntropyTargets &shape, accumulate_t *shared
) {
    const bool aligned =
        on_pack_boundary<width>(logits) && on_pack_boundary<width>(probabilities) && on_pack_boundary<width>(targets);
    ForwardSums sums = {0, 0, shape.samples};
    const long long step = (long long)gridDim.x * blockDim.y;
    for (long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y; n < shape.samples; n += step) {
        const scalar_t *row = logits + n * shape.classes;
        const long long label = shape.labels ? label_of(labels_uint8, labels_int32, labels_int64, n) : 0;
        const bool valid = label >= 0 && label < shape.classes, ignored = is_ignored(shape, label);
        const Powers powers = powers_of_row<width>(row, shape.classes, aligned, shared);
        scalar_t *made = probabilities + n * shape.classes;
        const accumulate_t share = NUMBER(1) / powers.total;
        over_row<width>(row, shape.classes, aligned, [&](long long c, const accumulate_t (&values)[width]) {
            accumulate_t shares[width];
#pragma unroll
            for (int k = 0; k < width; ++k) shares[k] = exponential(values[k] - powers.largest) * share;
            put_in_row<width>(made, c, aligned, shares);
        });
        accumulate_t loss =
            shape.labels
                ? loss_of_label(shape, row, label, valid, weight, powers, shared)
                : loss_of_probabilities<width>(
                      shape, row, targets + n * shape.classes, weight, powers, aligned, shared
                  );
        if (ignored) loss = NUMBER(0);
        if (threadIdx.x == 0) {
            if (losses) losses[n] = store(loss);
            sums.loss += loss;
            if (ignored) continue;
            if (!valid) {
                sums.invalid = n < sums.invalid ? n : sums.invalid;
            } else if (shape.labels) {
                sums.weight += weight ? weight[label] : NUMBER(1);
            }
        }
    }
    return sums;
}

// losses, where not null, gets each sample's loss. Each block leaves the sums of its losses and of its labels'
// weights, and the first of its samples whose label is out of range (or their number, where none is).
extern "C" __global__ void __launch_bounds__(256, 2) cross_entropy_forward(
    const scalar_t *logits, const unsigned char *labels_uint8, const int *labels_int32,
    const long long *labels_int64, const scalar_t *targets, const accumulate_t *weight, scalar_t *probabilities,
    scalar_t *losses, double *block_losses, double *block_weights, long long *block_invalid,
    CrossEntropyTargets shape
) {
    __shared__ accumulate_t shared[32];
    __shared__ double shared_sums[32];
    __shared__ long long shared_places[32];
    ForwardSums sums;
    if (shape.classes % FOUR == 0) {
        sums = forward_rows<FOUR>(
            logits, labels_uint8, labels_int32, labels_int64, targets, weight, probabilities, losses, shape, shared
        );
    } else {
        sums = forward_rows<1>(
            logits, labels_uint8, labels_int32, labels_int64, targets, weight, probabilities, losses, shape, shared
        );
    }
    sums.loss = block_sum(sums.loss, shared_sums);
    sums.weight = block_sum(sums.weight, shared_sums);
    sums.invalid = block_minimum(sums.invalid, shared_places);
    if (thread_of_block() == 0) {
        block_losses[blockIdx.x] = sums.loss;
        block_weights[blockIdx.x] = sums.weight;
        block_invalid[blockIdx.x] = sums.invalid;
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

// Whether a logit beats the label's: it is larger, or as large and ``before`` it. A NaN is larger than any number.
__device__ __forceinline__ bool outdone(accumulate_t value, bool before, accumulate_t labelled) {
    if (labelled != labelled) return value != value && before;
    return before ? !(value < labelled) : !(value <= labelled);
}

// A number as it would be read from memory, in which it would be rounded unless it is ``wide`` there.
__device__ __forceinline__ accumulate_t stored(accumulate_t value, const accumulate_t *wide) {
    return wide ? value : load(store(value));
}

// The gradient of a row, (p * sum of the targets - target) / divisor, as slope * p - target * share.
struct RowGradient {
    accumulate_t slope;         // NaN where the label is out of range
    accumulate_t own, another;  // what is taken away at the label, and elsewhere, where there are no weights
    bool ignored;               // of a sample that does not count: 0, whatever its probabilities are
    const accumulate_t *weight;

    // ``labelled``: whether c is the label.
    __device__ __forceinline__ accumulate_t at(long long c, bool labelled, accumulate_t probability) const {
        const accumulate_t share = labelled ? own : another;
        const accumulate_t gradient = fused(slope, probability, -(weight ? share * weight[c] : share));
        return ignored ? NUMBER(0) : gradient;
    }
};

// ``weight_sum`` is that of all classes, wanted where labels are smoothed and weighted.
__device__ __forceinline__ RowGradient gradient_of_label(
    const CrossEntropyTargets &shape, long long label, bool valid, const accumulate_t *weight,
    accumulate_t weight_sum, accumulate_t divisor
) {
    accumulate_t targets = fused(shape.soft, NUMBER(shape.classes), shape.hard);
    if (weight) targets = fused(shape.soft, weight_sum, shape.hard * (valid ? weight[label] : NUMBER(0)));
    const accumulate_t share = NUMBER(1) / divisor;
    const accumulate_t slope = valid ? targets * share : not_a_number();
    return {slope, (shape.soft + shape.hard) * share, shape.soft * share, is_ignored(shape, label), weight};
}

// The sum of all classes' weights, by every row of threads for itself.
__device__ __forceinline__ accumulate_t sum_of_weights(
    const CrossEntropyTargets &shape, const accumulate_t *weight, accumulate_t *shared
) {
    accumulate_t sum = NUMBER(0);
    if (!weight || shape.soft == NUMBER(0)) return sum;
#pragma unroll 1
    for (long long c = threadIdx.x; c < shape.classes; c += blockDim.x) sum += weight[c];
    return row_sum(sum, shared);
}

// Whether the label's logit is the first of the row's largest. If it is one of them, those before it are looked at,
// and where a NaN may be among the others, those too.
__device__ __forceinline__ bool is_right(
    const CrossEntropyTargets &shape, const scalar_t *row, long long label, const Powers &powers, accumulate_t *shared
) {
    const accumulate_t labelled = load(row[label]);
    if (labelled < powers.largest) return false;
    accumulate_t wrong = NUMBER(0);
    if (powers.total == powers.total) {
#pragma unroll 1
        for (long long c = threadIdx.x; c < label; c += blockDim.x) {
            if (load(row[c]) == labelled) wrong = NUMBER(1);
        }
    } else {
#pragma unroll 1
        for (long long c = threadIdx.x; c < shape.classes; c += blockDim.x) {
            if (outdone(load(row[c]), c < label, labelled)) wrong = NUMBER(1);
        }
    }
    return row_maximum(wrong, shared) == NUMBER(0);
}

struct StepSums {
    double loss, weight;
    long long right;
};

template <int width>
__device__ __forceinline__ StepSums step_rows(
    const scalar_t *logits, const unsigned char *labels_uint8, const int *labels_int32,
    const long long *labels_int64, const accumulate_t *weight, accumulate_t divisor, const double *scaling,
    scalar_t *gradient, const accumulate_t *wide_loss, const CrossEntropyTargets &shape, accumulate_t *shared
) {
    const bool aligned = on_pack_boundary<width>(logits) && on_pack_boundary<width>(gradient);
    const accumulate_t weight_sum = sum_of_weights(shape, weight, shared);
    const accumulate_t scale = scaling ? (accumulate_t)*scaling : NUMBER(1);
    StepSums sums = {0, 0, 0};
    const long long step = (long long)gridDim.x * blockDim.y;
    for (long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y; n < shape.samples; n += step) {
        const scalar_t *row = logits + n * shape.classes;
        const long long label = label_of(labels_uint8, labels_int32, labels_int64, n);
        const bool valid = label >= 0 && label < shape.classes, ignored = is_ignored(shape, label);
        const Powers powers = powers_of_row<width>(row, shape.classes, aligned, shared);
        const RowGradient line = gradient_of_label(shape, label, valid, weight, weight_sum, divisor);
        scalar_t *made = gradient + n * shape.classes;
        const accumulate_t share = NUMBER(1) / powers.total;
        over_row<width>(row, shape.classes, aligned, [&](long long c, const accumulate_t (&values)[width]) {
            const int own = among<width>(label, c);
            accumulate_t slopes[width];
#pragma unroll
            for (int k = 0; k < width; ++k) {
                const accumulate_t probability = exponential(values[k] - powers.largest) * share;
                const accumulate_t slope = line.at(c + k, k == own, stored(probability, wide_loss));
                slopes[k] = ignored ? NUMBER(0) : stored(slope, wide_loss) * scale;
            }
            put_in_row<width>(made, c, aligned, slopes);
        });
        const accumulate_t loss = loss_of_label(shape, row, label, valid, weight, powers, shared);
        const bool right = valid && is_right(shape, row, label, powers, shared);
        if (threadIdx.x == 0) {
            if (right) ++sums.right;
            if (ignored) continue;
            sums.loss += loss;
            if (valid) sums.weight += weight ? weight[label] : NUMBER(1);
        }
    }
    return sums;
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
extern "C" __global__ void __launch_bounds__(256, 2) cross_entropy_step(
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
    StepSums sums;
    if (shape.classes % FOUR == 0) {
        sums = step_rows<FOUR>(
            logits, labels_uint8, labels_int32, labels_int64, weight, divided_by, scaling, gradient, wide_loss, shape,
            shared
        );
    } else {
        sums = step_rows<1>(
            logits, labels_uint8, labels_int32, labels_int64, weight, divided_by, scaling, gradient, wide_loss, shape,
            shared
        );
    }
    const int thread = thread_of_block();
    // First this block's sums, then, by the last block, those of all.
    for (int round = 0; round < 2; ++round) {
        sums.loss = block_sum(sums.loss, shared_sums);
        sums.weight = block_sum(sums.weight, shared_sums);
        sums.right = block_sum(sums.right, shared_counts);
        if (round == 1) break;
        if (thread == 0) {
            block_losses[blockIdx.x] = sums.loss;
            block_weights[blockIdx.x] = sums.weight;
            block_correct[blockIdx.x] = sums.right;
        }
        if (!is_last_block(done, &last)) return;
        sums = {0, 0, 0};
        for (int block = thread; block < (int)gridDim.x; block += blockDim.x * blockDim.y) {
            sums.loss += __ldcg(block_losses + block);
            sums.weight += __ldcg(block_weights + block);
            sums.right += __ldcg(block_correct + block);
        }
    }
    if (thread == 0) {
        const double value = sums.loss / (weights ? sums.weight : divisor);
        if (wide_loss) {
            wide_loss[0] = (accumulate_t)value;
        } else {
            loss[0] = store(value);
        }
        correct[0] = sums.right;
    }
}

template <int width>
__device__ __forceinline__ void backward_rows(
    const scalar_t *probabilities, const unsigned char *labels_uint8, const int *labels_int32,
    const long long *labels_int64, const scalar_t *targets, const accumulate_t *weight, accumulate_t divisor,
    scalar_t *gradient, const CrossEntropyTargets &shape, accumulate_t *shared
) {
    const bool aligned =
        on_pack_boundary<width>(probabilities) && on_pack_boundary<width>(gradient) && on_pack_boundary<width>(targets);
    const accumulate_t weight_sum = shape.labels ? sum_of_weights(shape, weight, shared) : NUMBER(0);
    const long long step = (long long)gridDim.x * blockDim.y;
    for (long long n = (long long)blockIdx.x * blockDim.y + threadIdx.y; n < shape.samples; n += step) {
        const scalar_t *row = probabilities + n * shape.classes;
        scalar_t *made = gradient + n * shape.classes;
        if (shape.labels) {
            const long long label = label_of(labels_uint8, labels_int32, labels_int64, n);
            const bool valid = label >= 0 && label < shape.classes;
            const RowGradient line = gradient_of_label(shape, label, valid, weight, weight_sum, divisor);
            over_row<width>(row, shape.classes, aligned, [&](long long c, const accumulate_t (&shares)[width]) {
                const int own = among<width>(label, c);
                accumulate_t slopes[width];
#pragma unroll
                for (int k = 0; k < width; ++k) slopes[k] = line.at(c + k, k == own, shares[k]);
                put_in_row<width>(made, c, aligned, slopes);
            });
            continue;
        }
        const scalar_t *given = targets + n * shape.classes;
        accumulate_t total = NUMBER(0);
        over_row<width>(given, shape.classes, aligned, [&](long long c, const accumulate_t (&values)[width]) {
#pragma unroll
            for (int k = 0; k < width; ++k) total += target_of(shape, values[k], weight, c + k);
        });
        total = row_sum(total, shared);
        const accumulate_t share = NUMBER(1) / divisor;
        over_rows<width>(
            row, given, shape.classes, aligned,
            [&](long long c, const accumulate_t (&shares)[width], const accumulate_t (&values)[width]) {
                accumulate_t slopes[width];
#pragma unroll
                for (int k = 0; k < width; ++k) {
                    slopes[k] = fused(shares[k], total, -target_of(shape, values[k], weight, c + k)) * share;
                }
                put_in_row<width>(made, c, aligned, slopes);
            }
        );
    }
}

// (p * sum of the targets - target) / divisor; ``weights`` (device memory) is the divisor where not null. The
// gradient may take the probabilities' place.
extern "C" __global__ void __launch_bounds__(256, 2) cross_entropy_backward(
    const scalar_t *probabilities, const unsigned char *labels_uint8, const int *labels_int32,
    const long long *labels_int64, const scalar_t *targets, const accumulate_t *weight, const double *weights,
    scalar_t *gradient, CrossEntropyTargets shape, accumulate_t divisor
) {
    __shared__ accumulate_t shared[32];
    const accumulate_t divided_by = weights ? (accumulate_t)weights[0] : divisor;
    if (shape.classes % FOUR == 0) {
        backward_rows<FOUR>(
            probabilities, labels_uint8, labels_int32, labels_int64, targets, weight, divided_by, gradient, shape,
            shared
        );
    } else {
        backward_rows<1>(
            probabilities, labels_uint8, labels_int32, labels_int64, targets, weight, divided_by, gradient, shape,
            shared
        );
    }
}
