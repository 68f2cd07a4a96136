// Batch normalization (Ioffe and Szegedy, ICML 2015): statistics, normalization, and the gradient in two passes.
//
// One walk serves all layouts. A block takes ``width`` neighbouring channels (1 where each channel's numbers lie
// together, up to 32 where channels are the fastest axis) and one of ``parts`` pieces of their numbers; its
// threads are lanes [element][channel], so neighbouring threads touch neighbouring memory in either case, and a
// thread has one channel, whose parameters it keeps in registers. The pieces' results are combined by a warp a
// channel in a second kernel, in float64 and in a fixed order.
//
// A mean far larger than the standard deviation costs no digits. Each thread subtracts its first number from the
// others, and squares only differences from a mean (Welford's update, Technometrics 4, 1962, by groups as in Chan,
// Golub and LeVeque, The American Statistician 37, 1983); threads' means are combined in float64. What the mean
// loses when it is rounded to accumulate_t is kept beside it for the normalization, and found again from the sum of
// x - mean in the gradient.
//
// Memory is the limit: forward reads x twice and writes y, inference reads x and writes y, backward reads dy and x
// twice and writes dx. A residual that is added, and the activation after it, ride along: forward reads the residual
// besides, backward y, each time that it reads dy, or once where what comes through the activation is wanted (the
// residual's gradient) and therefore stored; in packs a mask of a bit a number stands for y. Apart they would be launches
// of their own, of three passes each. The passes that write have the loads of several numbers under way before they store
// the first.
//
// Where a block has all numbers of its channels, and they are few, the launches are what takes the time: the
// ``whole`` kernels then do everything in one, which reads x (and dy and y) the second time from the caches.
//
// Where arrays begin on boundaries of 16 bytes and planes or channels fill them, batch_norm_packs.cu makes the passes.
#include "batch_norm.cuh"
#include "reduce.cuh"

// A thread's way through the numbers of its channel: ``remaining`` of them, each ``lanes`` numbers further on.
// One division at the start instead of one a number.
struct Walker {
    long long offset, position, remaining, step_offset, step_position, inner, carry;
    int channel;
    __device__ __forceinline__ Walker(const BatchNormWalk &walk) {
        const int lanes = blockDim.x / walk.width;
        const int lane = threadIdx.x / walk.width;
        channel = blockIdx.x * walk.width + threadIdx.x % walk.width;
        const long long begin = blockIdx.y * walk.per_part + lane;
        const long long part_end = (blockIdx.y + 1) * walk.per_part;
        const long long end = part_end < walk.count ? part_end : walk.count;
        remaining = channel < walk.channels && begin < end ? (end - begin + lanes - 1) / lanes : 0;
        inner = walk.inner;
        position = begin % inner;
        offset = begin / inner * walk.outer_step + position * walk.inner_step + channel * walk.channel_step;
        step_position = lanes % inner;
        step_offset = lanes / inner * walk.outer_step + step_position * walk.inner_step;
        carry = walk.outer_step - inner * walk.inner_step;
    }
    __device__ __forceinline__ void advance() {
        offset += step_offset;
        position += step_position;
        if (position >= inner) {
            position -= inner;
            offset += carry;
        }
        --remaining;
    }
};

// The moments of the block's part of each of its channels, in shared[0 .. width - 1], read by the thread that wrote it.
__device__ __forceinline__ void block_moments(const scalar_t *x, const BatchNormWalk &walk, BlockMoments *shared) {
    Walker walker(walk);
    const accumulate_t shift = walker.remaining > 0 ? load(x[walker.offset]) : NUMBER(0);
    Moments moments = {NUMBER(0), NUMBER(0), NUMBER(0)};
    while (walker.remaining > 0) {
        // Eight at a time: eight loads under way at once, and one division instead of eight.
        accumulate_t values[8];
        Moments group = {NUMBER(0), NUMBER(0), NUMBER(0)};
        const int filled = walker.remaining < 8 ? (int)walker.remaining : 8;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            values[k] = NUMBER(0);
            if (k < filled) {
                values[k] = load(x[walker.offset]) - shift;
                walker.advance();
            }
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) group.mean += values[k];
        group.count = filled;
        group.mean /= group.count;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const accumulate_t distance = k < filled ? values[k] - group.mean : NUMBER(0);
            group.squares += distance * distance;
        }
        moments = combined(moments, group);
    }
    shared[threadIdx.x] = {(double)shift + (double)moments.mean, moments.count, moments.squares};
    for (int half = blockDim.x / 2; half >= walk.width; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] = combined(shared[threadIdx.x], shared[threadIdx.x + half]);
    }
}

// means and squares: [channels][parts].
extern "C" __global__ void __launch_bounds__(256, 3) batch_norm_statistics(
    const scalar_t *x, double *means, accumulate_t *squares, BatchNormWalk walk
) {
    __shared__ BlockMoments shared[256];
    block_moments(x, walk, shared);
    const int channel = blockIdx.x * walk.width + threadIdx.x;
    if (threadIdx.x < walk.width && channel < walk.channels) {
        const long long place = (long long)channel * walk.parts + blockIdx.y;
        means[place] = shared[threadIdx.x].mean;
        squares[place] = shared[threadIdx.x].squares;
    }
}

__device__ __forceinline__ double count_of_part(BatchNormWalk walk, int part) {
    const long long rest = walk.count - part * walk.per_part;
    return rest < 0 ? 0 : rest < walk.per_part ? rest : walk.per_part;
}

// What is kept of a channel's statistics: its mean, what that lost in rounding, and 1 / sqrt(variance + epsilon).
struct Statistics {
    accumulate_t mean, rest, inverse_std;
};

// They, stored but for the rest, and the running statistics moved on. Double on purpose: a few numbers a channel, and
// the digits of mean + rest are the point.
__device__ __forceinline__ Statistics kept_statistics(
    int channel, double middle, double spread, double count, accumulate_t *mean, accumulate_t *inverse_std,
    accumulate_t *running_mean, accumulate_t *running_var, double momentum, double epsilon
) {
    Statistics kept;
    kept.mean = middle;
    kept.rest = middle - (double)kept.mean;
    kept.inverse_std = 1 / sqrt(spread / count + epsilon);
    mean[channel] = kept.mean;
    inverse_std[channel] = kept.inverse_std;
    if (running_mean) {
        const double before = running_mean[channel];
        running_mean[channel] = before + momentum * (middle - before);
    }
    if (running_var) {
        const double before = running_var[channel];
        running_var[channel] = before + momentum * (spread / (count - 1) - before);
    }
    return kept;
}

// A warp a channel: the parts' statistics made one.
extern "C" __global__ void __launch_bounds__(256, 4) batch_norm_combine(
    const double *means, const accumulate_t *squares, accumulate_t *mean, accumulate_t *rest,
    accumulate_t *inverse_std, accumulate_t *running_mean, accumulate_t *running_var, BatchNormWalk walk,
    double momentum, double epsilon
) {
    const int channel = blockIdx.x * blockDim.y + threadIdx.y;
    if (channel >= walk.channels) return;  // a whole warp
    means += (long long)channel * walk.parts;
    squares += (long long)channel * walk.parts;
    const double count = walk.count;
    double sum = 0;
    for (int part = threadIdx.x; part < walk.parts; part += 32) sum += count_of_part(walk, part) * means[part];
    const double middle = warp_sum(sum) / count;
    double spread = 0;
    for (int part = threadIdx.x; part < walk.parts; part += 32) {
        const double distance = means[part] - middle;
        spread += squares[part] + count_of_part(walk, part) * distance * distance;
    }
    spread = warp_sum(spread);
    if (threadIdx.x == 0) {
        rest[channel] = kept_statistics(
            channel, middle, spread, count, mean, inverse_std, running_mean, running_var, momentum, epsilon
        ).rest;
    }
}

// Numbers that a thread loads before it stores the first: a store, which may be to the same array, lets no further
// load begin. In float64 registers are enough for two.
constexpr int GROUP = sizeof(accumulate_t) == 8 ? 2 : 4;

template <int COUNT>
__device__ __forceinline__ void normalize_next(
    Walker &walker, const Line &line, const scalar_t *x, const scalar_t *residual, scalar_t *y, int function,
    accumulate_t negative_slope
) {
    accumulate_t values[COUNT], others[COUNT];
    long long offsets[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
        offsets[k] = walker.offset;
        values[k] = load(x[walker.offset]);
        others[k] = residual ? load(residual[walker.offset]) : NUMBER(0);
        walker.advance();
    }
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
        accumulate_t value = ((values[k] - line.middle) - line.rest) * line.factor + line.offset;
        if (residual) value += others[k];
        // The other functions one number at a time: their code is long.
        value = COUNT == 1 ? activate(function, value, negative_slope)
                           : activate_compared(function, value, negative_slope);
        y[offsets[k]] = store(value);
    }
}

__device__ __forceinline__ void normalize_all(
    Walker &walker, const Line &line, const scalar_t *x, const scalar_t *residual, scalar_t *y, int function,
    accumulate_t negative_slope
) {
    if (compared(function)) {
        while (walker.remaining >= GROUP) normalize_next<GROUP>(walker, line, x, residual, y, function, negative_slope);
    }
    while (walker.remaining > 0) normalize_next<1>(walker, line, x, residual, y, function, negative_slope);
}

// In training ``scale`` holds the inverse standard deviation; in inference it holds the variance, and there is no
// rest. ``mean`` and ``residual`` may be null, y may be x or the residual. Of a gradient, without mean and bias, it is
// inference's way back.
extern "C" __global__ void __launch_bounds__(256) batch_norm_normalize(
    const scalar_t *x, const scalar_t *residual, scalar_t *y, const accumulate_t *mean, const accumulate_t *rest,
    const accumulate_t *scale, const accumulate_t *weight, const accumulate_t *bias, BatchNormWalk walk,
    bool scale_is_variance, accumulate_t epsilon, int function, accumulate_t negative_slope
) {
    Walker walker(walk);
    if (walker.remaining == 0) return;
    const int channel = walker.channel;
    Line line = {mean ? mean[channel] : NUMBER(0), rest ? rest[channel] : NUMBER(0), scale[channel], NUMBER(0)};
    if (scale_is_variance) line.factor = NUMBER(1) / square_root(line.factor + epsilon);
    if (weight) line.factor *= weight[channel];
    if (bias) line.offset = bias[channel];
    normalize_all(walker, line, x, residual, y, function, negative_slope);
}

// Forward in one launch, for blocks that have all numbers of their channels (walk.parts is 1).
extern "C" __global__ void __launch_bounds__(512) batch_norm_whole(
    const scalar_t *x, const scalar_t *residual, scalar_t *y, accumulate_t *mean, accumulate_t *inverse_std,
    accumulate_t *running_mean, accumulate_t *running_var, const accumulate_t *weight, const accumulate_t *bias,
    BatchNormWalk walk, double momentum, double epsilon, int function, accumulate_t negative_slope
) {
    __shared__ BlockMoments shared[512];
    __shared__ Line lines[32];
    block_moments(x, walk, shared);
    const int made = blockIdx.x * walk.width + threadIdx.x;
    if (threadIdx.x < walk.width && made < walk.channels) {
        const Statistics kept = kept_statistics(
            made, shared[threadIdx.x].mean, shared[threadIdx.x].squares, walk.count, mean, inverse_std, running_mean,
            running_var, momentum, epsilon
        );
        const accumulate_t factor = weight ? kept.inverse_std * weight[made] : kept.inverse_std;
        lines[threadIdx.x] = {kept.mean, kept.rest, factor, bias ? bias[made] : NUMBER(0)};
    }
    __syncthreads();
    Walker walker(walk);
    if (walker.remaining == 0) return;
    const Line line = lines[threadIdx.x % walk.width];
    normalize_all(walker, line, x, residual, y, function, negative_slope);
}

template <int COUNT>
__device__ __forceinline__ void sum_next(
    Walker &walker, GradientSums &sums, accumulate_t middle, const scalar_t *dy, const scalar_t *x, const scalar_t *y,
    scalar_t *before, int function, accumulate_t negative_slope
) {
    accumulate_t gradients[COUNT], values[COUNT], results[COUNT];
    long long offsets[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
        offsets[k] = walker.offset;
        gradients[k] = load(dy[walker.offset]);
        values[k] = load(x[walker.offset]);
        results[k] = y ? load(y[walker.offset]) : NUMBER(1);
        walker.advance();
    }
    if (function == RELU6) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) gradients[k] = results[k] >= NUMBER(6) ? NUMBER(0) : gradients[k];
    }
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
        const accumulate_t gradient = gradient_before(function, gradients[k], results[k], negative_slope);
        const accumulate_t distance = values[k] - middle;
        sums.gradients += gradient;
        sums.products += gradient * distance;
        sums.distances += distance;
        if (before) before[offsets[k]] = store(gradient);
    }
}

// The sums over a block's part, in shared[.][0 .. width - 1], read by the thread that wrote it. ``y`` is null where
// there is no activation, ``before`` where the gradient before it is not wanted; it may be dy.
template <int THREADS>
__device__ __forceinline__ void block_gradient_sums(
    const scalar_t *dy, const scalar_t *x, const scalar_t *y, scalar_t *before, const accumulate_t *mean,
    const BatchNormWalk &walk, int function, accumulate_t negative_slope, accumulate_t (*shared)[THREADS]
) {
    Walker walker(walk);
    const accumulate_t middle = walker.channel < walk.channels ? mean[walker.channel] : NUMBER(0);
    GradientSums sums = {NUMBER(0), NUMBER(0), NUMBER(0)};
    while (walker.remaining >= GROUP) {
        sum_next<GROUP>(walker, sums, middle, dy, x, y, before, function, negative_slope);
    }
    while (walker.remaining > 0) {
        sum_next<1>(walker, sums, middle, dy, x, y, before, function, negative_slope);
    }
    shared[0][threadIdx.x] = sums.gradients;
    shared[1][threadIdx.x] = sums.products;
    shared[2][threadIdx.x] = sums.distances;
    for (int half = blockDim.x / 2; half >= walk.width; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            for (int k = 0; k < 3; ++k) shared[k][threadIdx.x] += shared[k][threadIdx.x + half];
        }
    }
}

// partials: [3][channels][parts].
extern "C" __global__ void __launch_bounds__(256) batch_norm_backward_sums(
    const scalar_t *dy, const scalar_t *x, const scalar_t *y, scalar_t *before, const accumulate_t *mean,
    accumulate_t *partials, BatchNormWalk walk, int function, accumulate_t negative_slope
) {
    __shared__ accumulate_t shared[3][256];
    block_gradient_sums<256>(dy, x, y, before, mean, walk, function, negative_slope, shared);
    const int channel = blockIdx.x * walk.width + threadIdx.x;
    if (threadIdx.x < walk.width && channel < walk.channels) {
        const long long place = (long long)channel * walk.parts + blockIdx.y;
        for (int k = 0; k < 3; ++k) {
            partials[k * (long long)walk.channels * walk.parts + place] = shared[k][threadIdx.x];
        }
    }
}

// It, of a channel's three sums, and the parameters' gradients, stored. In double for the reason above.
__device__ __forceinline__ Slope kept_gradients(
    int channel, const double *sums, long long numbers, const accumulate_t *inverse_std, const accumulate_t *weight,
    accumulate_t *dweight, accumulate_t *dbias
) {
    const double count = numbers > 0 ? numbers : 1;
    const double scale = inverse_std[channel];
    // The mean was rounded; the average of x - mean is what it lacks.
    const double left = sums[2] / count;
    const double product = (sums[1] - left * sums[0]) * scale;
    dbias[channel] = sums[0];
    dweight[channel] = product;
    const double factor = weight ? scale * weight[channel] : scale;
    const double slant = -factor * scale * product / count;
    return {(accumulate_t)factor, (accumulate_t)slant, (accumulate_t)(-factor * sums[0] / count - slant * left)};
}

// A warp a channel: the parameters' gradients, and the slope as three numbers a channel, [3][channels].
extern "C" __global__ void __launch_bounds__(256) batch_norm_backward_combine(
    const accumulate_t *partials, const accumulate_t *inverse_std, const accumulate_t *weight,
    accumulate_t *dweight, accumulate_t *dbias, accumulate_t *coefficients, BatchNormWalk walk
) {
    const int channel = blockIdx.x * blockDim.y + threadIdx.y;
    if (channel >= walk.channels) return;  // a whole warp
    double sums[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        const accumulate_t *values = partials + (k * (long long)walk.channels + channel) * walk.parts;
        double sum = 0;
        for (int part = threadIdx.x; part < walk.parts; part += 32) sum += values[part];
        sums[k] = warp_sum(sum);
    }
    if (threadIdx.x == 0) {
        const Slope slope = kept_gradients(channel, sums, walk.count, inverse_std, weight, dweight, dbias);
        coefficients[channel] = slope.factor;
        coefficients[walk.channels + channel] = slope.slant;
        coefficients[2 * walk.channels + channel] = slope.offset;
    }
}

// A warp a channel: the gradients of inference's weight and bias, of the sums for the running mean. The batch's own
// mean and variance are in neither.
extern "C" __global__ void __launch_bounds__(256) batch_norm_inference_combine(
    const accumulate_t *partials, const accumulate_t *variance, accumulate_t *dweight, accumulate_t *dbias,
    BatchNormWalk walk, double epsilon
) {
    const int channel = blockIdx.x * blockDim.y + threadIdx.y;
    if (channel >= walk.channels) return;  // a whole warp
    double gradients = 0, products = 0;
    const accumulate_t *values = partials + (long long)channel * walk.parts;
    for (int part = threadIdx.x; part < walk.parts; part += 32) {
        gradients += values[part];
        products += values[(long long)walk.channels * walk.parts + part];
    }
    gradients = warp_sum(gradients);
    products = warp_sum(products);
    if (threadIdx.x == 0) {
        dbias[channel] = gradients;
        dweight[channel] = products / sqrt(variance[channel] + epsilon);
    }
}

template <int COUNT>
__device__ __forceinline__ void differentiate_next(
    Walker &walker, const Slope &slope, accumulate_t middle, const scalar_t *dy, const scalar_t *x, const scalar_t *y,
    scalar_t *before, scalar_t *dx, int function, accumulate_t negative_slope
) {
    accumulate_t gradients[COUNT], values[COUNT], results[COUNT];
    long long offsets[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
        offsets[k] = walker.offset;
        gradients[k] = load(dy[walker.offset]);
        values[k] = load(x[walker.offset]);
        results[k] = y ? load(y[walker.offset]) : NUMBER(1);
        walker.advance();
    }
    if (function == RELU6) {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) gradients[k] = results[k] >= NUMBER(6) ? NUMBER(0) : gradients[k];
    }
#pragma unroll
    for (int k = 0; k < COUNT; ++k) {
        const accumulate_t gradient = gradient_before(function, gradients[k], results[k], negative_slope);
        const accumulate_t distance = values[k] - middle;
        if (before) before[offsets[k]] = store(gradient);
        dx[offsets[k]] = store(slope.of(gradient, distance));
    }
}

__device__ __forceinline__ void differentiate_all(
    Walker &walker, const Slope &slope, accumulate_t middle, const scalar_t *dy, const scalar_t *x, const scalar_t *y,
    scalar_t *before, scalar_t *dx, int function, accumulate_t negative_slope
) {
    while (walker.remaining >= GROUP) {
        differentiate_next<GROUP>(walker, slope, middle, dy, x, y, before, dx, function, negative_slope);
    }
    while (walker.remaining > 0) {
        differentiate_next<1>(walker, slope, middle, dy, x, y, before, dx, function, negative_slope);
    }
}

// dx may be dy, x or y.
extern "C" __global__ void __launch_bounds__(256) batch_norm_backward_data(
    const scalar_t *dy, const scalar_t *x, const scalar_t *y, scalar_t *dx, const accumulate_t *mean,
    const accumulate_t *coefficients, BatchNormWalk walk, int function, accumulate_t negative_slope
) {
    Walker walker(walk);
    if (walker.remaining == 0) return;
    const int channel = walker.channel;
    const Slope slope = {
        coefficients[channel], coefficients[walk.channels + channel], coefficients[2 * walk.channels + channel]
    };
    differentiate_all(walker, slope, mean[channel], dy, x, y, nullptr, dx, function, negative_slope);
}

// Backward in one launch, for blocks that have all numbers of their channels.
extern "C" __global__ void __launch_bounds__(512) batch_norm_backward_whole(
    const scalar_t *dy, const scalar_t *x, const scalar_t *y, scalar_t *before, scalar_t *dx,
    const accumulate_t *mean, const accumulate_t *inverse_std, const accumulate_t *weight, accumulate_t *dweight,
    accumulate_t *dbias, BatchNormWalk walk, int function, accumulate_t negative_slope
) {
    __shared__ accumulate_t shared[3][512];
    __shared__ Slope slopes[32];
    block_gradient_sums<512>(dy, x, y, nullptr, mean, walk, function, negative_slope, shared);
    const int made = blockIdx.x * walk.width + threadIdx.x;
    if (threadIdx.x < walk.width && made < walk.channels) {
        const double sums[3] = {shared[0][threadIdx.x], shared[1][threadIdx.x], shared[2][threadIdx.x]};
        slopes[threadIdx.x] = kept_gradients(made, sums, walk.count, inverse_std, weight, dweight, dbias);
    }
    __syncthreads();
    Walker walker(walk);
    if (walker.remaining == 0) return;
    const Slope slope = slopes[threadIdx.x % walk.width];
    differentiate_all(walker, slope, mean[walker.channel], dy, x, y, before, dx, function, negative_slope);
}
