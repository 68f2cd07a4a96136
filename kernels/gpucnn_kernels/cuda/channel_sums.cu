// Sums of an image's channels, or of a matrix's columns: the gradient of a bias. Limit: memory, every element read
// once.
//
// A block is X channels by Y lines of positions: X = 1 where the positions of a channel are neighbours in memory, up
// to 32 where the channels are, so that neighbouring threads touch neighbouring memory. A block sums one part of the
// positions, its lines by halves at the end; a second launch sums the parts. The order is that of the shape alone.
//
// A thread has eight loads under way. By the compiled code for sm_90, not measured, a number takes 16 instructions, 32
// where it was loaded and added before the next; an H200's memory leaves time for 31 in float32 and 16 in 16 bits.
#include "scalar.cuh"

struct Sums {
    long long images, pixels, channels;  // a position is a pixel of an image
    long long n, pixel, c;               // strides, in elements
    long long part;                      // positions of a part
};

constexpr int UNDER_WAY = 8;  // numbers that a thread has

// The values are in one of two precisions: scalar_t, or what an earlier launch has summed. With one part the sums are
// stored, with more they go to ``partial``, a row of channels for every part.
extern "C" __global__ void __launch_bounds__(256) channel_sums(
    const scalar_t *values, const accumulate_t *wide, accumulate_t *partial, scalar_t *sums, Sums shape
) {
    __shared__ accumulate_t lines[256];
    const long long channel = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const long long first = blockIdx.y * shape.part + threadIdx.y;
    const long long left = shape.images * shape.pixels - first;
    const long long end = shape.part - threadIdx.y;
    const int step = blockDim.y;
    const long long images_on = step / shape.pixels, pixels_on = step % shape.pixels;
    accumulate_t sum = NUMBER(0);
    if (channel < shape.channels) {
        long long pixel = first % shape.pixels;
        long long at = first / shape.pixels * shape.n + pixel * shape.pixel + channel * shape.c;
        const long long on = images_on * shape.n + pixels_on * shape.pixel, carry = shape.n - shape.pixels * shape.pixel;
        const auto next = [&]() {
            const long long here = at;
            at += on;
            pixel += pixels_on;
            if (pixel >= shape.pixels) {
                pixel -= shape.pixels;
                at += carry;
            }
            return here;
        };
        const long long count = end < left ? end : left;
        long long i = 0;
#pragma unroll 1
        for (; i + (UNDER_WAY - 1) * step < count; i += UNDER_WAY * step) {
            accumulate_t numbers[UNDER_WAY];
#pragma unroll
            for (int k = 0; k < UNDER_WAY; ++k) {
                const long long here = next();
                numbers[k] = wide ? wide[here] : load(values[here]);
            }
#pragma unroll
            for (int k = 0; k < UNDER_WAY; ++k) sum += numbers[k];
        }
#pragma unroll 1
        for (; i < count; i += step) {
            const long long here = next();
            sum += wide ? wide[here] : load(values[here]);
        }
    }
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    lines[thread] = sum;
    for (int half = blockDim.y / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) lines[thread] += lines[thread + half * blockDim.x];
    }
    if (threadIdx.y == 0 && channel < shape.channels) {
        if (partial) {
            partial[blockIdx.y * shape.channels + channel] = lines[thread];
        } else {
            sums[channel] = store(lines[thread]);
        }
    }
}
