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
// twice and writes dx.
#include "activation.cuh"
#include "reduce.cuh"

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

// means and squares: [channels][parts].
extern "C" __global__ void __launch_bounds__(256, 3) batch_norm_statistics(
    const scalar_t *x, double *means, accumulate_t *squares, BatchNormWalk walk
) {
    __shared__ BlockMoments shared[256];
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
    if (threadIdx.x < walk.width && walker.channel < walk.channels) {
        // A thread reads here what it wrote itself.
        const long long place = (long long)walker.channel * walk.parts + blockIdx.y;
        means[place] = shared[threadIdx.x].mean;
        squares[place] = shared[threadIdx.x].squares;
    }
}

__device__ __forceinline__ double count_of_part(BatchNormWalk walk, int part) {
    const long long rest = walk.count - part * walk.per_part;
    return rest < 0 ? 0 : rest < walk.per_part ? rest : walk.per_part;
}

// A warp a channel: the parts' statistics made one, and the running statistics moved on. Double on purpose: a few
// numbers a channel, and the digits of mean + rest are the point.
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
        const accumulate_t rounded = middle;
        mean[channel] = rounded;
        rest[channel] = middle - (double)rounded;
        inverse_std[channel] = 1 / sqrt(spread / count + epsilon);
        if (running_mean) {
            const double before = running_mean[channel];
            running_mean[channel] = before + momentum * (middle - before);
        }
        if (running_var) {
            const double before = running_var[channel];
            running_var[channel] = before + momentum * (spread / (count - 1) - before);
        }
    }
}

// y = ((x - mean) - rest) * scale * weight + bias, and the activation. In training ``scale`` holds the inverse
// standard deviation; in inference it holds the variance, and there is no rest. y may be x.
extern "C" __global__ void __launch_bounds__(256) batch_norm_normalize(
    const scalar_t *x, scalar_t *y, const accumulate_t *mean, const accumulate_t *rest, const accumulate_t *scale,
    const accumulate_t *weight, const accumulate_t *bias, BatchNormWalk walk, bool scale_is_variance,
    accumulate_t epsilon, int function, accumulate_t negative_slope
) {
    Walker walker(walk);
    if (walker.remaining == 0) return;
    const int channel = walker.channel;
    const accumulate_t middle = mean[channel];
    const accumulate_t left = rest ? rest[channel] : NUMBER(0);
    accumulate_t factor = scale[channel];
    if (scale_is_variance) factor = NUMBER(1) / square_root(factor + epsilon);
    if (weight) factor *= weight[channel];
    const accumulate_t offset = bias ? bias[channel] : NUMBER(0);
    for (; walker.remaining > 0; walker.advance()) {
        const accumulate_t value = ((load(x[walker.offset]) - middle) - left) * factor + offset;
        y[walker.offset] = store(activate(function, value, negative_slope));
    }
}

// partials: [3][channels][parts], the sums of dy, of dy * (x - mean), and of x - mean.
extern "C" __global__ void __launch_bounds__(256) batch_norm_backward_sums(
    const scalar_t *dy, const scalar_t *x, const accumulate_t *mean, accumulate_t *partials, BatchNormWalk walk
) {
    __shared__ accumulate_t shared[3][256];
    Walker walker(walk);
    const accumulate_t middle = walker.channel < walk.channels ? mean[walker.channel] : NUMBER(0);
    accumulate_t gradients = NUMBER(0), products = NUMBER(0), distances = NUMBER(0);
    for (; walker.remaining > 0; walker.advance()) {
        const accumulate_t gradient = load(dy[walker.offset]);
        const accumulate_t distance = load(x[walker.offset]) - middle;
        gradients += gradient;
        products += gradient * distance;
        distances += distance;
    }
    shared[0][threadIdx.x] = gradients;
    shared[1][threadIdx.x] = products;
    shared[2][threadIdx.x] = distances;
    for (int half = blockDim.x / 2; half >= walk.width; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            for (int k = 0; k < 3; ++k) shared[k][threadIdx.x] += shared[k][threadIdx.x + half];
        }
    }
    if (threadIdx.x < walk.width && walker.channel < walk.channels) {
        const long long place = (long long)walker.channel * walk.parts + blockIdx.y;
        for (int k = 0; k < 3; ++k) {
            partials[k * (long long)walk.channels * walk.parts + place] = shared[k][threadIdx.x];
        }
    }
}

// A warp a channel: the parameters' gradients, and dx = dy * factor + (x - mean) * slant + offset as three numbers
// a channel, [3][channels]. In double for the reason above.
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
        const double count = walk.count > 0 ? walk.count : 1;
        const double scale = inverse_std[channel];
        // The mean was rounded; the average of x - mean is what it lacks.
        const double left = sums[2] / count;
        const double product = (sums[1] - left * sums[0]) * scale;
        dbias[channel] = sums[0];
        dweight[channel] = product;
        const double factor = weight ? scale * weight[channel] : scale;
        const double slant = -factor * scale * product / count;
        coefficients[channel] = factor;
        coefficients[walk.channels + channel] = slant;
        coefficients[2 * walk.channels + channel] = -factor * sums[0] / count - slant * left;
    }
}

// dx may be dy or x.
extern "C" __global__ void __launch_bounds__(256) batch_norm_backward_data(
    const scalar_t *dy, const scalar_t *x, scalar_t *dx, const accumulate_t *mean,
    const accumulate_t *coefficients, BatchNormWalk walk
) {
    Walker walker(walk);
    if (walker.remaining == 0) return;
    const int channel = walker.channel;
    const accumulate_t middle = mean[channel];
    const accumulate_t factor = coefficients[channel];
    const accumulate_t slant = coefficients[walk.channels + channel];
    const accumulate_t offset = coefficients[2 * walk.channels + channel];
    for (; walker.remaining > 0; walker.advance()) {
        const accumulate_t distance = load(x[walker.offset]) - middle;
        dx[walker.offset] = store(load(dy[walker.offset]) * factor + distance * slant + offset);
    }
}
