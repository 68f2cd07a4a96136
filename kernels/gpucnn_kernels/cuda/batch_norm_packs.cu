// Batch normalization in packs of 16 bytes: the passes over the images of batch_norm.cu, for arrays that begin on
// boundaries of packs. Its kernels combine the parts.
//
// Along: of a contiguous image, where a plane is whole packs, a pack is neighbouring pixels of a channel, and a block
// has one channel. Across: of a channels-last image, where the channels are whole packs, a pack is neighbouring
// channels of a pixel; a block has ``width`` of them, a thread one, and so as many channels as a pack has numbers.
// Statistics are taken as in batch_norm.cu, by groups of four packs, all of whose loads are under way at once.
//
// The passes that write go through the parts from the last to the first: of an image larger than the second-level
// cache, they then begin with what the statistics have read last and the cache still has.
//
// Of a result that an activation ended, backward needs to know one bit a number. Forward leaves them in a mask, which
// is a sixteenth of y's bytes to write, and to read each time, where reading y would be a third of what the sums read,
// and a quarter of what the gradients move.
//
// Instructions a number in the main loops by the compiled code for sm_90, those of both sides of a choice counted,
// and what an H200's memory leaves time for while it moves the number's bytes; computed, not measured:
//
//                        along: float32  bfloat16    across: float32  bfloat16    time for: float32  bfloat16
//   statistics                       8         8                   8         8                   31        15
//   normalization                   26        27                  25        26                   62        31
//   sums of gradients               27        33                  25        32                   62        31
//   gradients                       25        30                  23        28                   93        46
//
// Through ReLU by a mask the sums across execute 12 of the 32 in bfloat16: the others are those by y, those of leaky
// ReLU, and those that store the residual's gradient.
//
// Number by number they are 38 for the statistics and about 30 for the others, with loads of 4 and 2 bytes.
#include "activation_packs.cuh"
#include "batch_norm.cuh"
#include "packs.cuh"
#include "reduce.cuh"

struct BatchNormPacks {
    int channels, width, parts;         // channels, or packs of them; those of a block; pieces of each
    int inner;                          // packs that follow each other evenly
    long long count, per_part;          // packs a channel (or pack of channels), and in each part of it
    long long outer_step, channel_step;  // numbers from one row of packs, and one channel (or pack), to the next
};

constexpr int GROUP = 4;  // packs that a thread has under way

// A thread's way through its packs.
template <bool across>
struct PackWalker {
    long long offset, step_offset, carry;
    int position, step_position, inner, remaining, channel;

    __device__ __forceinline__ PackWalker(const BatchNormPacks &walk, int part) {
        const int lanes = blockDim.x / walk.width, lane = threadIdx.x / walk.width;
        channel = blockIdx.x * walk.width + threadIdx.x % walk.width;
        const long long begin = part * walk.per_part + lane, part_end = (part + 1) * walk.per_part;
        const long long end = part_end < walk.count ? part_end : walk.count;
        remaining = channel < walk.channels && begin < end ? (int)((end - begin + lanes - 1) / lanes) : 0;
        offset = channel * walk.channel_step;
        if (across) {
            offset += begin * walk.outer_step;
            step_offset = lanes * walk.outer_step;
        } else {
            inner = walk.inner;
            position = (int)(begin % inner);
            offset += begin / inner * walk.outer_step + position * PACK;
            step_position = lanes % inner;
            step_offset = lanes / inner * walk.outer_step + step_position * PACK;
            carry = walk.outer_step - (long long)inner * PACK;
        }
    }
    __device__ __forceinline__ void advance() {
        offset += step_offset;
        --remaining;
        if (across) return;
        position += step_position;
        if (position >= inner) {
            position -= inner;
            offset += carry;
        }
    }
    template <int count>
    __device__ __forceinline__ void next(long long (&offsets)[count]) {
#pragma unroll
        for (int k = 0; k < count; ++k) {
            offsets[k] = offset;
            advance();
        }
    }
};

// How many channels a thread has, and which of them number k of a pack is.
template <bool across>
struct Channels {
    static constexpr int count = across ? PACK : 1;
    static __device__ __forceinline__ constexpr int of(int k) { return across ? k : 0; }
    // A thread's first channel.
    static __device__ __forceinline__ int first(int channel) { return channel * count; }
};

template <int count>
__device__ __forceinline__ void load_packs(
    const scalar_t *x, const long long (&offsets)[count], Pack<scalar_t, PACK> (&packs)[count]
) {
#pragma unroll
    for (int number = 0; number < count; ++number) packs[number] = load_pack<PACK>(x + offsets[number]);
}

// ---------------------------------------------------------------- statistics

template <bool across, int count>
__device__ __forceinline__ void take_moments(
    PackWalker<across> &walker, const scalar_t *x, const accumulate_t (&shift)[Channels<across>::count],
    Moments (&moments)[Channels<across>::count]
) {
    using channels = Channels<across>;
    constexpr int numbers = count * PACK / channels::count;  // of each channel
    long long offsets[count];
    Pack<scalar_t, PACK> packs[count];
    walker.next(offsets);
    load_packs(x, offsets, packs);
    accumulate_t means[channels::count], squares[channels::count];
#pragma unroll
    for (int c = 0; c < channels::count; ++c) means[c] = squares[c] = NUMBER(0);
#pragma unroll
    for (int k = 0; k < count * PACK; ++k) {
        means[channels::of(k % PACK)] += load(packs[k / PACK].number[k % PACK]) - shift[channels::of(k % PACK)];
    }
#pragma unroll
    for (int c = 0; c < channels::count; ++c) means[c] *= NUMBER(1) / NUMBER(numbers);  // a power of two
#pragma unroll
    for (int k = 0; k < count * PACK; ++k) {
        const int c = channels::of(k % PACK);
        const accumulate_t distance = (load(packs[k / PACK].number[k % PACK]) - shift[c]) - means[c];
        squares[c] += distance * distance;
    }
    // As ``combined``, with one division for all channels: they have the same number of numbers.
    const accumulate_t before = moments[0].count, all = before + NUMBER(numbers), share = NUMBER(numbers) / all;
#pragma unroll
    for (int c = 0; c < channels::count; ++c) {
        const accumulate_t distance = means[c] - moments[c].mean;
        moments[c].mean += distance * share;
        moments[c].squares += squares[c] + distance * distance * before * share;
        moments[c].count = all;
    }
}

template <bool across>
__device__ __forceinline__ void statistics_of_packs(
    const scalar_t *x, double *means, accumulate_t *squares, const BatchNormPacks &walk, BlockMoments *shared
) {
    using channels = Channels<across>;
    PackWalker<across> walker(walk, blockIdx.y);
    accumulate_t shift[channels::count];
    Moments moments[channels::count];
#pragma unroll
    for (int c = 0; c < channels::count; ++c) {
        shift[c] = walker.remaining > 0 ? load(x[walker.offset + c]) : NUMBER(0);
        moments[c] = {NUMBER(0), NUMBER(0), NUMBER(0)};
    }
#pragma unroll 1
    while (walker.remaining >= GROUP) take_moments<across, GROUP>(walker, x, shift, moments);
#pragma unroll 1
    while (walker.remaining > 0) take_moments<across, 1>(walker, x, shift, moments);
#pragma unroll
    for (int c = 0; c < channels::count; ++c) {
        shared[c * blockDim.x + threadIdx.x] = {
            (double)shift[c] + (double)moments[c].mean, moments[c].count, moments[c].squares
        };
    }
#pragma unroll 1
    for (int half = blockDim.x / 2; half >= walk.width; half /= 2) {
        __syncthreads();
        // As many (channel, thread) pairs as there are threads at work, one after the other.
#pragma unroll 1
        for (int pair = threadIdx.x; pair < half * channels::count; pair += blockDim.x) {
            const int place = pair / half * blockDim.x + pair % half;
            shared[place] = combined(shared[place], shared[place + half]);
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int c = threadIdx.x; c < walk.width * channels::count; c += blockDim.x) {
        const int pack = c / channels::count, channel = blockIdx.x * walk.width + pack;
        if (channel >= walk.channels) break;
        const BlockMoments &found = shared[c % channels::count * blockDim.x + pack];
        const long long place = ((long long)channels::first(channel) + c % channels::count) * walk.parts + blockIdx.y;
        means[place] = found.mean;
        squares[place] = found.squares;
    }
}

// means and squares: [channels][parts].
extern "C" __global__ void __launch_bounds__(256, 2) batch_norm_statistics_along(
    const scalar_t *x, double *means, accumulate_t *squares, BatchNormPacks walk
) {
    __shared__ BlockMoments shared[256];
    statistics_of_packs<false>(x, means, squares, walk, shared);
}

extern "C" __global__ void __launch_bounds__(256, 2) batch_norm_statistics_across(
    const scalar_t *x, double *means, accumulate_t *squares, BatchNormPacks walk
) {
    __shared__ BlockMoments shared[PACK * 256];
    statistics_of_packs<true>(x, means, squares, walk, shared);
}

// ---------------------------------------------------------------- normalization

// The mask: a byte a pack, in the order of memory, whose bit k says whether at number k of the result, as it is
// stored, a gradient passes ReLU, leaky ReLU or ReLU6 as it is: above 0, and for ReLU6 below 6. That is all there is
// to know of the result. Of these numbers, those up to ``zero`` are stored as 0 or below, those from ``six`` on as 6.
__device__ __forceinline__ unsigned passing(
    int function, const accumulate_t (&values)[PACK], accumulate_t zero, accumulate_t six
) {
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < PACK; ++k) bits |= values[k] > zero ? 1u << k : 0u;
    if (function == RELU6) {
#pragma unroll
        for (int k = 0; k < PACK; ++k) bits &= values[k] >= six ? ~(1u << k) : ~0u;
    }
    return bits;
}

// What is rounded to 0 and to 6 when it is stored: up to half of the least number that there is, and from half of the
// distance between 6 and the number below it on. Comparing numbers before they are rounded spares converting them
// back.
#if defined(SCALAR_FLOAT16)
constexpr accumulate_t STORED_AS_ZERO = 0x1p-25f, STORED_AS_SIX = 6 - 0x1p-9f;
#elif defined(SCALAR_BFLOAT16)
// The first is 0 where the compiler has such numbers flushed, as sums are there.
constexpr accumulate_t STORED_AS_ZERO = 0x1p-134f, STORED_AS_SIX = 6 - 0x1p-6f;
#else
constexpr accumulate_t STORED_AS_ZERO = 0, STORED_AS_SIX = 6;
#endif

__device__ __forceinline__ unsigned long long number_of_pack(long long offset) {
    return (unsigned long long)offset / PACK;
}

// The activations that cost next to nothing are taken four packs at a time, the others, whose code is long, one.
template <bool across, int count>
__device__ __forceinline__ void normalize_packs(
    PackWalker<across> &walker, const Line (&lines)[Channels<across>::count], const scalar_t *x,
    const scalar_t *residual, scalar_t *y, unsigned char *mask, int function, accumulate_t negative_slope
) {
    long long offsets[count];
    Pack<scalar_t, PACK> packs[count], others[count];
    walker.next(offsets);
    load_packs(x, offsets, packs);
    if (residual) load_packs(residual, offsets, others);
#pragma unroll
    for (int number = 0; number < count; ++number) {
        accumulate_t values[PACK];
#pragma unroll
        for (int k = 0; k < PACK; ++k) {
            const Line &line = lines[Channels<across>::of(k)];
            values[k] = ((load(packs[number].number[k]) - line.middle) - line.rest) * line.factor + line.offset;
            if (residual) values[k] += load(others[number].number[k]);
        }
        if (count == 1) {
            activate_all(function, values, negative_slope);
        } else if (function != IDENTITY) {
#pragma unroll
            for (int k = 0; k < PACK; ++k) values[k] = activate_compared(function, values[k], negative_slope);
        }
#pragma unroll
        for (int k = 0; k < PACK; ++k) packs[number].number[k] = store(values[k]);
        store_pack<PACK>(y + offsets[number], packs[number]);
        if (mask) {
            const unsigned bits = passing(function, values, STORED_AS_ZERO, STORED_AS_SIX);
            mask[number_of_pack(offsets[number])] = (unsigned char)bits;
        }
    }
}

// As batch_norm_normalize; ``mask`` may be null.
template <bool across>
__device__ __forceinline__ void normalize_all_packs(
    const scalar_t *x, const scalar_t *residual, scalar_t *y, unsigned char *mask, const accumulate_t *mean,
    const accumulate_t *rest, const accumulate_t *scale, const accumulate_t *weight, const accumulate_t *bias,
    const BatchNormPacks &walk, bool scale_is_variance, accumulate_t epsilon, int function, accumulate_t negative_slope
) {
    PackWalker<across> walker(walk, walk.parts - 1 - blockIdx.y);
    if (walker.remaining == 0) return;
    Line lines[Channels<across>::count];
#pragma unroll
    for (int c = 0; c < Channels<across>::count; ++c) {
        const int channel = Channels<across>::first(walker.channel) + c;
        accumulate_t factor = scale[channel];
        if (scale_is_variance) factor = NUMBER(1) / square_root(factor + epsilon);
        if (weight) factor *= weight[channel];
        const accumulate_t middle = mean ? mean[channel] : NUMBER(0);
        lines[c] = {middle, rest ? rest[channel] : NUMBER(0), factor, bias ? bias[channel] : NUMBER(0)};
    }
    if (compared(function)) {
#pragma unroll 1
        while (walker.remaining >= GROUP) {
            normalize_packs<across, GROUP>(walker, lines, x, residual, y, mask, function, negative_slope);
        }
    }
#pragma unroll 1
    while (walker.remaining > 0) {
        normalize_packs<across, 1>(walker, lines, x, residual, y, mask, function, negative_slope);
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) batch_norm_normalize_along(
    const scalar_t *x, const scalar_t *residual, scalar_t *y, unsigned char *mask, const accumulate_t *mean,
    const accumulate_t *rest, const accumulate_t *scale, const accumulate_t *weight, const accumulate_t *bias,
    BatchNormPacks walk, bool scale_is_variance, accumulate_t epsilon, int function, accumulate_t negative_slope
) {
    normalize_all_packs<false>(
        x, residual, y, mask, mean, rest, scale, weight, bias, walk, scale_is_variance, epsilon, function,
        negative_slope
    );
}

extern "C" __global__ void __launch_bounds__(256, 2) batch_norm_normalize_across(
    const scalar_t *x, const scalar_t *residual, scalar_t *y, unsigned char *mask, const accumulate_t *mean,
    const accumulate_t *rest, const accumulate_t *scale, const accumulate_t *weight, const accumulate_t *bias,
    BatchNormPacks walk, bool scale_is_variance, accumulate_t epsilon, int function, accumulate_t negative_slope
) {
    normalize_all_packs<true>(
        x, residual, y, mask, mean, rest, scale, weight, bias, walk, scale_is_variance, epsilon, function,
        negative_slope
    );
}

// ---------------------------------------------------------------- gradients

// What ``count`` packs of dy are before the activation, as numbers (gradient_before). Which of them pass as they are
// says the ``mask``, or where that is null the result y; both are null where there is no activation.
template <int count>
struct Gradients {
    long long offsets[count];
    Pack<scalar_t, PACK> of_dy[count], of_x[count];
    unsigned passed[count];

    template <bool across>
    __device__ __forceinline__ void fetch(
        PackWalker<across> &walker, const scalar_t *dy, const scalar_t *x, const scalar_t *y,
        const unsigned char *mask, int function
    ) {
        walker.next(offsets);
        load_packs(dy, offsets, of_dy);
        load_packs(x, offsets, of_x);
        if (mask) {
#pragma unroll
            for (int number = 0; number < count; ++number) passed[number] = mask[number_of_pack(offsets[number])];
        } else if (y) {
            Pack<scalar_t, PACK> of_y[count];
            load_packs(y, offsets, of_y);
#pragma unroll
            for (int number = 0; number < count; ++number) {
                accumulate_t results[PACK];
#pragma unroll
                for (int k = 0; k < PACK; ++k) results[k] = load(of_y[number].number[k]);
                passed[number] = passing(function, results, NUMBER(0), NUMBER(6));
            }
        } else {
#pragma unroll
            for (int number = 0; number < count; ++number) passed[number] = (1u << PACK) - 1;
        }
    }
    __device__ __forceinline__ accumulate_t before(
        int number, int k, int function, accumulate_t negative_slope
    ) const {
        const accumulate_t gradient = load(of_dy[number].number[k]);
        return gradient_before(function, gradient, NUMBER(passed[number] >> k & 1), negative_slope);
    }
};

template <bool across, int count>
__device__ __forceinline__ void sum_packs(
    PackWalker<across> &walker, GradientSums (&sums)[Channels<across>::count],
    const accumulate_t (&middle)[Channels<across>::count], const scalar_t *dy, const scalar_t *x, const scalar_t *y,
    const unsigned char *mask, scalar_t *before, int function, accumulate_t negative_slope
) {
    Gradients<count> given;
    given.fetch(walker, dy, x, y, mask, function);
#pragma unroll
    for (int number = 0; number < count; ++number) {
        Pack<scalar_t, PACK> made;
#pragma unroll
        for (int k = 0; k < PACK; ++k) {
            const int c = Channels<across>::of(k);
            const accumulate_t gradient = given.before(number, k, function, negative_slope);
            const accumulate_t distance = load(given.of_x[number].number[k]) - middle[c];
            sums[c].gradients += gradient;
            sums[c].products += gradient * distance;
            sums[c].distances += distance;
            made.number[k] = store(gradient);
        }
        if (before) store_pack<PACK>(before + given.offsets[number], made);
    }
}

// As batch_norm_backward_sums; partials: [3][channels][parts].
template <bool across>
__device__ __forceinline__ void sums_of_packs(
    const scalar_t *dy, const scalar_t *x, const scalar_t *y, const unsigned char *mask, scalar_t *before,
    const accumulate_t *mean, accumulate_t *partials, const BatchNormPacks &walk, int function,
    accumulate_t negative_slope, accumulate_t *shared
) {
    using channels = Channels<across>;
    constexpr int lines = 3 * channels::count;
    PackWalker<across> walker(walk, blockIdx.y);
    accumulate_t middle[channels::count];
    GradientSums sums[channels::count];
#pragma unroll
    for (int c = 0; c < channels::count; ++c) {
        middle[c] = walker.channel < walk.channels ? mean[channels::first(walker.channel) + c] : NUMBER(0);
        sums[c] = {NUMBER(0), NUMBER(0), NUMBER(0)};
    }
    constexpr int group = channels::count * sizeof(accumulate_t) > 16 ? 2 : GROUP;  // packs, for want of registers
#pragma unroll 1
    while (walker.remaining >= group) {
        sum_packs<across, group>(walker, sums, middle, dy, x, y, mask, before, function, negative_slope);
    }
#pragma unroll 1
    while (walker.remaining > 0) {
        sum_packs<across, 1>(walker, sums, middle, dy, x, y, mask, before, function, negative_slope);
    }
#pragma unroll
    for (int c = 0; c < channels::count; ++c) {
        shared[3 * c * blockDim.x + threadIdx.x] = sums[c].gradients;
        shared[(3 * c + 1) * blockDim.x + threadIdx.x] = sums[c].products;
        shared[(3 * c + 2) * blockDim.x + threadIdx.x] = sums[c].distances;
    }
#pragma unroll 1
    for (int half = blockDim.x / 2; half >= walk.width; half /= 2) {
        __syncthreads();
#pragma unroll 1
        for (int pair = threadIdx.x; pair < half * lines; pair += blockDim.x) {
            const int place = pair / half * blockDim.x + pair % half;
            shared[place] += shared[place + half];
        }
    }
    __syncthreads();
    const long long all = (long long)walk.channels * channels::count;
#pragma unroll 1
    for (int line = threadIdx.x; line < walk.width * lines; line += blockDim.x) {
        const int pack = line / lines, c = line % lines / 3, kind = line % 3;
        const int channel = blockIdx.x * walk.width + pack;
        if (channel >= walk.channels) break;
        const long long place = kind * all + channels::first(channel) + c;
        partials[place * walk.parts + blockIdx.y] = shared[(3 * c + kind) * blockDim.x + pack];
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) batch_norm_backward_sums_along(
    const scalar_t *dy, const scalar_t *x, const scalar_t *y, const unsigned char *mask, scalar_t *before,
    const accumulate_t *mean, accumulate_t *partials, BatchNormPacks walk, int function, accumulate_t negative_slope
) {
    __shared__ accumulate_t shared[3 * 256];
    sums_of_packs<false>(dy, x, y, mask, before, mean, partials, walk, function, negative_slope, shared);
}

extern "C" __global__ void __launch_bounds__(256, 2) batch_norm_backward_sums_across(
    const scalar_t *dy, const scalar_t *x, const scalar_t *y, const unsigned char *mask, scalar_t *before,
    const accumulate_t *mean, accumulate_t *partials, BatchNormPacks walk, int function, accumulate_t negative_slope
) {
    __shared__ accumulate_t shared[3 * PACK * 256];
    sums_of_packs<true>(dy, x, y, mask, before, mean, partials, walk, function, negative_slope, shared);
}

template <bool across, int count>
__device__ __forceinline__ void differentiate_packs(
    PackWalker<across> &walker, const Slope (&slopes)[Channels<across>::count],
    const accumulate_t (&middle)[Channels<across>::count], const scalar_t *dy, const scalar_t *x, const scalar_t *y,
    const unsigned char *mask, scalar_t *dx, int function, accumulate_t negative_slope
) {
    Gradients<count> given;
    given.fetch(walker, dy, x, y, mask, function);
#pragma unroll
    for (int number = 0; number < count; ++number) {
        Pack<scalar_t, PACK> made;
#pragma unroll
        for (int k = 0; k < PACK; ++k) {
            const Slope &slope = slopes[Channels<across>::of(k)];
            const accumulate_t gradient = given.before(number, k, function, negative_slope);
            const accumulate_t distance = load(given.of_x[number].number[k]) - middle[Channels<across>::of(k)];
            made.number[k] = store(slope.of(gradient, distance));
        }
        store_pack<PACK>(dx + given.offsets[number], made);
    }
}

// As batch_norm_backward_data.
template <bool across>
__device__ __forceinline__ void data_of_packs(
    const scalar_t *dy, const scalar_t *x, const scalar_t *y, const unsigned char *mask, scalar_t *dx,
    const accumulate_t *mean, const accumulate_t *coefficients, const BatchNormPacks &walk, int function,
    accumulate_t negative_slope
) {
    using channels = Channels<across>;
    PackWalker<across> walker(walk, walk.parts - 1 - blockIdx.y);
    if (walker.remaining == 0) return;
    const int all = walk.channels * channels::count;
    Slope slopes[channels::count];
    accumulate_t middle[channels::count];
#pragma unroll
    for (int c = 0; c < channels::count; ++c) {
        const int channel = channels::first(walker.channel) + c;
        slopes[c] = {coefficients[channel], coefficients[all + channel], coefficients[2 * (long long)all + channel]};
        middle[c] = mean[channel];
    }
    constexpr int group = channels::count * sizeof(accumulate_t) > 16 ? 2 : GROUP;
#pragma unroll 1
    while (walker.remaining >= group) {
        differentiate_packs<across, group>(walker, slopes, middle, dy, x, y, mask, dx, function, negative_slope);
    }
#pragma unroll 1
    while (walker.remaining > 0) {
        differentiate_packs<across, 1>(walker, slopes, middle, dy, x, y, mask, dx, function, negative_slope);
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) batch_norm_backward_data_along(
    const scalar_t *dy, const scalar_t *x, const scalar_t *y, const unsigned char *mask, scalar_t *dx,
    const accumulate_t *mean, const accumulate_t *coefficients, BatchNormPacks walk, int function,
    accumulate_t negative_slope
) {
    data_of_packs<false>(dy, x, y, mask, dx, mean, coefficients, walk, function, negative_slope);
}

extern "C" __global__ void __launch_bounds__(256, 2) batch_norm_backward_data_across(
    const scalar_t *dy, const scalar_t *x, const scalar_t *y, const unsigned char *mask, scalar_t *dx,
    const accumulate_t *mean, const accumulate_t *coefficients, BatchNormPacks walk, int function,
    accumulate_t negative_slope
) {
    data_of_packs<true>(dy, x, y, mask, dx, mean, coefficients, walk, function, negative_slope);
}
