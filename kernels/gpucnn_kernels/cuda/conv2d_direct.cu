// Forward convolution with few input channels a group (C / groups <= 4: first layers), where conv2d_implicit_gemm
// would fill most of its 8 channels a step with zeros.
//
// A block makes 256 positions (output pixels of all images) x 16 output channels of one group, a thread one
// position's 16 channels in registers. The filters of those channels lie in shared memory, tap by tap, 256 taps at
// a time (11 x 11 x 3 taps are two rounds); all threads of a warp read the same ones, which is a broadcast. Beside
// them lies where each tap is (channel, row, column), so the inner loop has no division: one pixel from memory, 16
// multiply-adds. Neighbouring threads read neighbouring pixels; taps that overlap come from the L1 cache.
//
// Limit: with 3 -> 64 channels, 3 x 3, stride 1, 3456 operations are done for each pixel's 12 bytes read and 256
// written: 13 a byte, so memory and arithmetic are about in balance; with a 7 x 7 kernel arithmetic is the limit.
// A pixel fetched serves 32 operations here, 8 a byte from L1 in float32.
#include "conv2d.cuh"

constexpr int THREADS = 256;
constexpr int OUTPUTS = 16;  // output channels of a block
constexpr int TAPS = 256;    // taps in shared memory at a time

struct Tap { int channel, row, column; };

extern "C" __global__ void __launch_bounds__(256) conv2d_direct(
    const scalar_t *x, Strides x_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *y, Strides y_strides,
    Channels channels, Axis vertical, Axis horizontal, Epilogue epilogue
) {
    // First the filters, [tap][channel]; at the end the results, [channel][position], a number longer than needed
    // so that reading by channel meets different banks.
    __shared__ __align__(16) accumulate_t numbers[OUTPUTS * (THREADS + 1)];
    __shared__ Tap taps[TAPS];
    __shared__ long long places[THREADS];  // of the positions in y; -1 beyond the last one

    const int group = blockIdx.z;
    const int first_channel = blockIdx.y * OUTPUTS;
    const int outputs = min(OUTPUTS, channels.output - first_channel);
    const long long plane = (long long)vertical.output * horizontal.output;
    const long long position = (long long)blockIdx.x * THREADS + threadIdx.x;
    const bool there = position < plane * channels.images;
    const long long image = there ? position / plane : 0;
    const int p = (int)((position - image * plane) / horizontal.output);
    const int q = (int)((position - image * plane) % horizontal.output);
    places[threadIdx.x] = there ? image * y_strides.n + p * y_strides.h + q * y_strides.w : -1;
    x += image * x_strides.n + (long long)group * channels.source * x_strides.c;
    filter += group * filter_strides.group;
    // A thread without a position is far outside of the image at every tap.
    const int top = there ? p * vertical.stride - vertical.pad : -(1 << 30);
    const int left = q * horizontal.stride - horizontal.pad;

    accumulate_t sums[OUTPUTS];
#pragma unroll
    for (int k = 0; k < OUTPUTS; ++k) sums[k] = NUMBER(0);

    const int all_taps = channels.source * vertical.kernel * horizontal.kernel;
    for (int first = 0; first < all_taps; first += TAPS) {
        const int count = min(TAPS, all_taps - first);
        __syncthreads();
        for (int element = threadIdx.x; element < count * OUTPUTS; element += THREADS) {
            const int k = element % OUTPUTS, tap = first + element / OUTPUTS;
            // Channels innermost: in a channels-last image they are neighbours.
            const int channel = tap % channels.source;
            const int r = tap / channels.source / horizontal.kernel, s = tap / channels.source % horizontal.kernel;
            numbers[element] = k < outputs ? load(filter[(first_channel + k) * filter_strides.output +
                                                         channel * filter_strides.source +
                                                         r * filter_strides.r + s * filter_strides.s])
                                           : NUMBER(0);
            if (k == 0) {
                taps[tap - first].channel = channel;
                taps[tap - first].row = r * vertical.dilation;
                taps[tap - first].column = s * horizontal.dilation;
            }
        }
        __syncthreads();
        for (int tap = 0; tap < count; ++tap) {
            const int row = top + taps[tap].row, column = left + taps[tap].column;
            const bool seen = inside(row, vertical.source) && inside(column, horizontal.source);
            const accumulate_t pixel =
                seen ? load(x[taps[tap].channel * x_strides.c + row * x_strides.h + column * x_strides.w])
                     : NUMBER(0);
#pragma unroll
            for (int quarter = 0; quarter < OUTPUTS; quarter += 4) {
                if (quarter < outputs) {  // the same for all threads
#pragma unroll
                    for (int k = quarter; k < quarter + 4; ++k) sums[k] += pixel * numbers[tap * OUTPUTS + k];
                }
            }
        }
    }

    __syncthreads();
#pragma unroll
    for (int k = 0; k < OUTPUTS; ++k) numbers[k * (THREADS + 1) + threadIdx.x] = sums[k];
    __syncthreads();
    const bool by_channel = y_strides.c < y_strides.w;
    for (int element = threadIdx.x; element < outputs * THREADS; element += THREADS) {
        const int k = by_channel ? element % outputs : element / THREADS;
        const int column = by_channel ? element / outputs : element % THREADS;
        if (places[column] >= 0) {
            const int channel = group * channels.output + first_channel + k;
            const long long place = places[column] + channel * y_strides.c;
            y[place] = finished(
                numbers[k * (THREADS + 1) + column], {scale, bias, residual}, channel, place, epilogue
            );
        }
    }
}
