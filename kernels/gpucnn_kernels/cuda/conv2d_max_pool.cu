// Convolution, bias, activation and max pooling in one kernel, for small networks: the convolution's result, several
// times larger than what is left of it, never goes through memory.
//
// A block makes 128 pooled pixels of all images x 16 (or, where blocks are few, 4) output channels of one group, a
// thread one pooled pixel. It makes the convolution's sums of four places of its window at a time in registers, so
// that a weight, which all threads of a warp read from shared memory at once, serves four products and a pixel 16.
// Filters and places of taps lie in shared memory as in conv2d_direct.cu, here with each tap's offset in the image.
// Sums then go through shared memory, each thread's in a column of its own, where the code of the activation is
// needed once, and meet the largest value so far. Before that they are rounded as the convolution would store them:
// the winner, and on ties the first one, is the one that max_pool_forward finds in the stored result.
// Windows that overlap are worth it only where they overlap little: what they share is computed for each of them.
//
// Limit: as conv2d_direct.cu's, without the convolution's result. LeNet's first layer (1 -> 6, 5 x 5, 28 x 28, halved)
// does 50 operations for each of its 4704 sums an image, on 3136 bytes read and 4704 written (float32): 30 a byte,
// where two kernels write and read another 18816 bytes, 5 a byte. So arithmetic is the limit, not memory. A tap of
// four places is 4 loads of pixels and 4 of 16 bytes of weights for 64 multiply-adds of each thread.
#include "conv2d.cuh"

constexpr int THREADS = 128;
constexpr int TAPS = 128;  // in shared memory at a time
constexpr int PITCH = THREADS + 1;  // reading by channel meets different banks
// In float64 registers and shared memory are enough for half as much.
constexpr int PLACES = sizeof(accumulate_t) == 8 ? 2 : 4;  // of a window at a time
constexpr int WIDE = sizeof(accumulate_t) == 8 ? 8 : 16;   // output channels of a block
constexpr int NARROW = 4;

constexpr int NOWHERE = -(1 << 30);  // outside at every tap

// A tap's way from the first pixel of a window, in elements and in rows and columns.
struct Tap { long long offset; int row, column; };

// The pooling's windows over the convolution's result; P and Q are how many there are.
struct Pool { int P, Q, R, S, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w; };

template <int OUTPUTS>
__device__ __forceinline__ void convolve_and_pool(
    const scalar_t *x, Strides x_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *bias, scalar_t *y, Strides y_strides, unsigned char *argmax, Channels channels, Axis vertical,
    Axis horizontal, Pool pool, Epilogue epilogue, accumulate_t *weights, Tap *taps, accumulate_t *sums_of_threads,
    accumulate_t *largest, unsigned char *winners, long long *pixels
) {
    const int group = blockIdx.z;
    const int first_channel = blockIdx.y * OUTPUTS;
    const int outputs = min(OUTPUTS, channels.output - first_channel);
    const int channel_of_output = group * channels.output + first_channel;
    const int window = pool.R * pool.S;
    const long long plane = (long long)pool.P * pool.Q;
    const long long position = (long long)blockIdx.x * THREADS + threadIdx.x;
    const bool there = position < plane * channels.images;
    const long long image = there ? position / plane : 0;
    const int pooled_row = (int)((position - image * plane) / pool.Q);
    const int pooled_column = (int)((position - image * plane) % pool.Q);
    pixels[threadIdx.x] =
        there ? image * y_strides.n + pooled_row * y_strides.h + pooled_column * y_strides.w : -1;
    x += image * x_strides.n + (long long)group * channels.source * x_strides.c;
    filter += group * filter_strides.group;
    // Of the convolution's result, where the window begins.
    const int top = pooled_row * pool.stride_h - pool.padding_h;
    const int left = pooled_column * pool.stride_w - pool.padding_w;

    // The first place inside wins where nothing is larger than minus infinity.
    const int first_down = top >= 0 ? 0 : (-top + pool.dilation_h - 1) / pool.dilation_h;
    const int first_across = left >= 0 ? 0 : (-left + pool.dilation_w - 1) / pool.dilation_w;
    const bool any = first_down < pool.R && first_across < pool.S &&
                     top + first_down * pool.dilation_h < vertical.output &&
                     left + first_across * pool.dilation_w < horizontal.output;
    for (int k = 0; k < outputs; ++k) {
        largest[k * PITCH + threadIdx.x] = -__int_as_float(0x7f800000);
        winners[k * PITCH + threadIdx.x] = (unsigned char)(any ? first_down * pool.S + first_across : 0);
    }

    const int all_taps = channels.source * vertical.kernel * horizontal.kernel;
    for (int first_place = 0; first_place < window; first_place += PLACES) {
        int rows[PLACES], columns[PLACES];
        long long offsets[PLACES];
#pragma unroll
        for (int i = 0; i < PLACES; ++i) {
            const int place = first_place + i;
            const int p = top + place / pool.S * pool.dilation_h, q = left + place % pool.S * pool.dilation_w;
            const bool seen =
                there && place < window && inside(p, vertical.output) && inside(q, horizontal.output);
            rows[i] = seen ? p * vertical.stride - vertical.pad : NOWHERE;
            columns[i] = seen ? q * horizontal.stride - horizontal.pad : NOWHERE;
            offsets[i] = rows[i] * x_strides.h + columns[i] * x_strides.w;
        }
        accumulate_t sums[PLACES][OUTPUTS];
#pragma unroll
        for (int i = 0; i < PLACES; ++i) {
#pragma unroll
            for (int k = 0; k < OUTPUTS; ++k) sums[i][k] = NUMBER(0);
        }
        for (int first = 0; first < all_taps; first += TAPS) {
            const int count = min(TAPS, all_taps - first);
            if (first_place == 0 || all_taps > TAPS) {
                __syncthreads();  // the taps before have been read
                for (int element = threadIdx.x; element < count * OUTPUTS; element += THREADS) {
                    const int k = element % OUTPUTS, tap = first + element / OUTPUTS;
                    // In the order of conv2d_direct: of a filter's row first the columns that the stride divides.
                    const int planes = horizontal.dilation == 1 ? min(horizontal.stride, horizontal.kernel) : 1;
                    const int place = tap % horizontal.kernel, r = tap / horizontal.kernel % vertical.kernel;
                    const int channel = tap / horizontal.kernel / vertical.kernel;
                    const int each = horizontal.kernel / planes, rest = horizontal.kernel % planes;
                    const int beyond = place - rest * (each + 1);
                    const int s = beyond < 0 ? place / (each + 1) + place % (each + 1) * planes
                                             : rest + beyond / each + beyond % each * planes;
                    weights[element] = k < outputs ? load(filter[(first_channel + k) * filter_strides.output +
                                                                 channel * filter_strides.source +
                                                                 r * filter_strides.r + s * filter_strides.s])
                                                   : NUMBER(0);
                    if (k == 0) {
                        Tap *made = taps + (tap - first);
                        made->row = r * vertical.dilation;
                        made->column = s * horizontal.dilation;
                        made->offset =
                            channel * x_strides.c + made->row * x_strides.h + made->column * x_strides.w;
                    }
                }
                __syncthreads();
            }
            for (int tap = 0; tap < count; ++tap) {
                const Tap to = taps[tap];
                accumulate_t pixel[PLACES];
#pragma unroll
                for (int i = 0; i < PLACES; ++i) {
                    const bool seen =
                        inside(rows[i] + to.row, vertical.source) && inside(columns[i] + to.column, horizontal.source);
                    pixel[i] = seen ? load(x[offsets[i] + to.offset]) : NUMBER(0);
                }
#pragma unroll
                for (int quarter = 0; quarter < OUTPUTS; quarter += 4) {
                    if (quarter < outputs) {  // the same for all threads
#pragma unroll
                        for (int k = quarter; k < quarter + 4; ++k) {
                            const accumulate_t weight = weights[tap * OUTPUTS + k];
#pragma unroll
                            for (int i = 0; i < PLACES; ++i) sums[i][k] += pixel[i] * weight;
                        }
                    }
                }
            }
        }
        // From here on each thread has to do with its own column of shared memory only.
#pragma unroll 1
        for (int i = 0; i < PLACES; ++i) {
            const int place = first_place + i;
            int row = rows[0];
#pragma unroll
            for (int j = 1; j < PLACES; ++j) row = i == j ? rows[j] : row;
            if (row == NOWHERE) continue;
#pragma unroll
            for (int k = 0; k < OUTPUTS; ++k) {
                accumulate_t sum = sums[0][k];
#pragma unroll
                for (int j = 1; j < PLACES; ++j) sum = i == j ? sums[j][k] : sum;
                sums_of_threads[k * PITCH + threadIdx.x] = sum;
            }
#pragma unroll 1
            for (int k = 0; k < outputs; ++k) {
                const accumulate_t value = load(finished(
                    sums_of_threads[k * PITCH + threadIdx.x], {nullptr, bias, nullptr}, channel_of_output + k, 0,
                    epilogue
                ));
                const accumulate_t best = largest[k * PITCH + threadIdx.x];
                if (value > best || (value != value && best == best)) {  // the first NaN wins over all
                    largest[k * PITCH + threadIdx.x] = value;
                    winners[k * PITCH + threadIdx.x] = (unsigned char)place;
                }
            }
        }
    }

    __syncthreads();
    const bool by_channel = y_strides.c < y_strides.w;
#pragma unroll 1
    for (int element = threadIdx.x; element < outputs * THREADS; element += THREADS) {
        const int k = by_channel ? element % outputs : element / THREADS;
        const int column = by_channel ? element / outputs : element % THREADS;
        if (pixels[column] >= 0) {
            const long long place = pixels[column] + (channel_of_output + k) * y_strides.c;
            y[place] = store(largest[k * PITCH + column]);
            if (argmax != nullptr) argmax[place] = winners[k * PITCH + column];
        }
    }
}

// ``argmax``, laid out as y, may be null. Grid: x the pooled pixels, y the output channels, z the groups.
extern "C" __global__ void __launch_bounds__(128) conv2d_max_pool_wide(
    const scalar_t *x, Strides x_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *bias, scalar_t *y, Strides y_strides, unsigned char *argmax, Channels channels, Axis vertical,
    Axis horizontal, Pool pool, Epilogue epilogue
) {
    __shared__ __align__(16) accumulate_t weights[TAPS * WIDE];
    __shared__ Tap taps[TAPS];
    __shared__ accumulate_t sums_of_threads[WIDE * PITCH];
    __shared__ accumulate_t largest[WIDE * PITCH];
    __shared__ unsigned char winners[WIDE * PITCH];
    __shared__ long long pixels[THREADS];
    convolve_and_pool<WIDE>(
        x, x_strides, filter, filter_strides, bias, y, y_strides, argmax, channels, vertical, horizontal, pool,
        epilogue, weights, taps, sums_of_threads, largest, winners, pixels
    );
}

extern "C" __global__ void __launch_bounds__(128) conv2d_max_pool_narrow(
    const scalar_t *x, Strides x_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *bias, scalar_t *y, Strides y_strides, unsigned char *argmax, Channels channels, Axis vertical,
    Axis horizontal, Pool pool, Epilogue epilogue
) {
    __shared__ __align__(16) accumulate_t weights[TAPS * NARROW];
    __shared__ Tap taps[TAPS];
    __shared__ accumulate_t sums_of_threads[NARROW * PITCH];
    __shared__ accumulate_t largest[NARROW * PITCH];
    __shared__ unsigned char winners[NARROW * PITCH];
    __shared__ long long pixels[THREADS];
    convolve_and_pool<NARROW>(
        x, x_strides, filter, filter_strides, bias, y, y_strides, argmax, channels, vertical, horizontal, pool,
        epilogue, weights, taps, sums_of_threads, largest, winners, pixels
    );
}
