// A network's first convolution on tensor cores: at most four input channels, one group, forward.
//
//   y[position, k] = sum over (r, s, c) of x[position's row * stride + r, column * stride + s, c] * w[k, r, s, c]
//
// The implicit matrix product of conv2d_tensor.cu fetches each pixel once for every tap that meets it, filled up
// to 16 bytes: of a 7x7 filter at stride 2 that is 12 times, through L2, which is then what limits. Here a block
// brings the rows of the image that its positions meet into shared memory once, pixel by pixel with four channels
// each, from wherever they lie, and reads all taps there: no copy of the image is made, and the filter, too, is
// read once for all of the blocks' tiles, through which it goes one after another.
//
// Seen from a position, the taps of one row of the filter are neighbouring pixels, so that (s, c) is one run of
// numbers in shared memory. The sum goes through it in steps of 32 bytes, a product of tensor cores each: four
// pixels in 16 bits, two in tf32. Within a step it does not matter which of the sum's terms is which, if both
// factors agree: lane t of four takes the 8 bytes at 8 t of its positions' and of its channels' runs, which is one
// load for both words of a fragment, whatever the stride, and neighbouring positions, whose runs overlap, meet
// different banks or the same word. A row's last step may reach pixels beyond the window: they are masked to zero,
// for an infinite number there is not to become NaN; the filter is zero there, and in the channels that there are
// not.
//
// A warp makes 64 positions, four runs of 16 in a row, x 64, 32 or 16 channels; a block of four warps 256
// positions. The sums leave as those of conv2d_tensor.cu, with its epilogue.
//
// Limit: input and output once through memory, or 2 * N * P * Q * K * R * S' * 4 operations at the tensor cores'
// rate, S' being S filled up to whole steps. Of the stem of a ResNet in bfloat16, 256 images, that is 113 us for
// the bytes and, at the 63 % of the datasheet's rate that mma.sync is known to reach, 148 us for the products.
//
// Counted in the code compiled for sm_90, not measured: a step of a wide block's warp takes 75 instructions for 32
// products in 16 bits, 107 in tf32, where each number is rounded; a pixel that is brought 39 of its thread. A
// product keeps the tensor core busy for 6.3 clocks of that rate, so that the stem's steps are limited by it, and
// what comes before and after them is for the other block of the multiprocessor to fill. Registers, wide, medium
// and narrow: 206, 142 and 110 in 16 bits, 198, 125 and 96 in tf32.
#include "conv2d_first_layer.cuh"
#include "conv2d_tensor_output.cuh"

template <int OUTPUTS>
__device__ __forceinline__ void convolve(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    Terms terms, scalar_t *output, Strides output_strides, Channels channels, Axis vertical, Axis horizontal,
    Epilogue epilogue, int vectors, Patch patch, int tiles, unsigned char *shared, long long *places
) {
    constexpr int DOWN = 4, ACROSS = OUTPUTS / 8;  // tiles of a warp
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_channel = blockIdx.y * OUTPUTS;
    const int steps = vertical.kernel * patch.steps;

    // The filter: for each row and step of it a line of 32 bytes for every channel.
    constexpr int LINE = STEP_PIXELS * DEPTH, LINES = THREADS / LINE;
    const int of_line = threadIdx.x % LINE, first_line = threadIdx.x / LINE;
    const int c = of_line % DEPTH, pixel_of_line = of_line / DEPTH;
    scalar_t *weights = reinterpret_cast<scalar_t *>(shared);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const int r = step / patch.steps, s = step % patch.steps * STEP_PIXELS + pixel_of_line;
        const bool tap = c < channels.source && s < horizontal.kernel;
        const scalar_t *from = filter + c * filter_strides.source + r * filter_strides.r + s * filter_strides.s;
#pragma unroll 8
        for (int line = first_line; line < OUTPUTS; line += LINES) {
            const int k = first_channel + line;
            weights[(step * OUTPUTS + line) * LINE + of_line] =
                tap && k < channels.output ? from[k * filter_strides.output] : store(0.0f);
        }
    }
    unsigned char *const pixels = shared + steps * OUTPUTS * STEP;  // and the sums on their way out

    // The lane's 8 bytes of the first step: of positions g and g + 8 of each run, and of channel g of each eight.
    const int group = lane / 4, part = lane % 4 * 8;
    const int pitch = patch.width * PIXEL, advance = horizontal.stride * PIXEL;
    int lefts[DOWN];
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
        const int run = warp * DOWN + i, row = run / patch.runs;
        const int column = run % patch.runs * RUN + group;
        lefts[i] = row < patch.rows ? row * vertical.stride * pitch + column * advance + part : part;
    }
    const int right_part = group * STEP + part;
    const int kept = horizontal.kernel - part / PIXEL;  // pixels of the lane that the first step's window has left

    // The places of the positions that this thread looks up, and its first pixel.
    constexpr int LOOKED_UP = POSITIONS / THREADS;
    int rows[LOOKED_UP], columns[LOOKED_UP];
#pragma unroll
    for (int i = 0; i < LOOKED_UP; ++i) {
        const int local = threadIdx.x + i * THREADS, run = local / RUN;
        rows[i] = run / patch.runs < patch.rows ? run / patch.runs : vertical.output;
        columns[i] = run % patch.runs * RUN + local % RUN;
    }
    const int thread_row = threadIdx.x / patch.width, thread_column = threadIdx.x % patch.width;
    const int area = patch.height * patch.width;

#pragma unroll 1
    for (unsigned tile = blockIdx.x; tile < (unsigned)tiles; tile += gridDim.x) {
        const int image = (int)(tile / (unsigned)(patch.down * patch.across));
        const int corner = (int)(tile - (unsigned)image * (patch.down * patch.across));
        const int first_row = corner / patch.across * patch.rows;
        const int first_column = corner % patch.across * patch.runs * RUN;

        const scalar_t *source = input + image * input_strides.n;
        const Corner corner_of_patch = {
            first_row * vertical.stride - vertical.pad + thread_row,
            first_column * horizontal.stride - horizontal.pad, thread_column
        };
        bring_image(
            source, input_strides, channels.source, vertical.source, horizontal.source, patch, corner_of_patch,
            area, pixels, 0
        );
#pragma unroll
        for (int i = 0; i < LOOKED_UP; ++i) {
            const int p = first_row + rows[i], q = first_column + columns[i];
            const bool there = p < vertical.output && q < horizontal.output && rows[i] < vertical.output;
            places[threadIdx.x + i * THREADS] =
                there ? image * output_strides.n + p * output_strides.h + q * output_strides.w : -1;
        }
        __syncthreads();

        float sums[DOWN][ACROSS][4];
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
#pragma unroll
            for (int j = 0; j < ACROSS; ++j) {
#pragma unroll
                for (int k = 0; k < 4; ++k) sums[i][j][k] = 0.0f;
            }
        }
        const unsigned char *right_at = shared + right_part;
        const unsigned char *row_at = pixels;
#pragma unroll 1
        for (int r = 0; r < vertical.kernel; ++r) {
            const unsigned char *left_at = row_at;
            int left_over = kept;
#pragma unroll 1
            for (int step = 0; step < patch.steps; ++step) {
                const unsigned mask = left_over > 0 ? ~0u : 0u;
                Right right[ACROSS];
#pragma unroll
                for (int j = 0; j < ACROSS; ++j) {
                    const uint2 words = *reinterpret_cast<const uint2 *>(right_at + j * 8 * STEP);
                    right[j].word[0] = words.x, right[j].word[1] = words.y;
                }
                prepare_all(right);
#pragma unroll
                for (int i = 0; i < DOWN; ++i) {
                    const uint2 upper = *reinterpret_cast<const uint2 *>(left_at + lefts[i]);
                    const uint2 lower = *reinterpret_cast<const uint2 *>(left_at + lefts[i] + 8 * advance);
                    Left factor;
                    factor.word[0] = upper.x & mask, factor.word[2] = upper.y & mask;
                    factor.word[1] = lower.x & mask, factor.word[3] = lower.y & mask;
                    multiply_row(sums[i], factor, right);
                }
                right_at += OUTPUTS * STEP;
                left_at += STEP;
                left_over -= STEP_PIXELS;
            }
            row_at += vertical.dilation * pitch;
        }

        const Written<POSITIONS, OUTPUTS, THREADS> written = {
            output, output_strides, terms, epilogue, places, first_channel, channels.output - first_channel
        };
        written.write(sums, warp * 64, 0, reinterpret_cast<float *>(pixels), vectors);
        __syncthreads();  // the next tile's pixels lie where the sums were
    }
}

// Grid: blocks that share out the ``tiles`` of all images, and the channels' tiles. Strides are in elements, and
// may be any. With ``vectors`` output and residual begin at multiples of 16 bytes, and the neighbours in them,
// channels or a row's positions, are whole packs.
extern "C" __global__ void __launch_bounds__(128, 2) conv2d_first_layer_wide(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, Epilogue epilogue, int vectors,
    Patch patch, int tiles
) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ long long places[POSITIONS];
    convolve<64>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, epilogue, vectors, patch, tiles, shared, places
    );
}

extern "C" __global__ void __launch_bounds__(128, 3) conv2d_first_layer_medium(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, Epilogue epilogue, int vectors,
    Patch patch, int tiles
) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ long long places[POSITIONS];
    convolve<32>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, epilogue, vectors, patch, tiles, shared, places
    );
}

extern "C" __global__ void __launch_bounds__(128, 4) conv2d_first_layer_narrow(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, Epilogue epilogue, int vectors,
    Patch patch, int tiles
) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ long long places[POSITIONS];
    convolve<16>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, epilogue, vectors, patch, tiles, shared, places
    );
}
