// Convolution with few input channels a group (C / groups <= 8), forward (first layers) and input gradient, where
// conv2d_implicit_gemm would fill much of its steps, or of its tiles, with zeros. conv2d_direct.cuh says how.
//
// Limit: with 3 -> 64 channels, 3 x 3, stride 1, 3456 operations are done for each pixel's 12 bytes read and 256
// written: 13 a byte, so memory and arithmetic are about in balance; with a 7 x 7 kernel arithmetic is the limit.
//
// By the code compiled for sm_90 (counted, not measured) four taps of a row are 256 multiply-adds of some 300
// instructions, 86 %. A thread of the wide kernel makes 8 positions of 8 channels, one of the narrow kernel 16 of 4.
// With what a block does before (staging 128 numbers of the source costs 47 instructions of a warp, 32 weights 13)
// and after, multiply-adds are 0.6 of a whole launch's instructions for 3 -> 64 channels with 3 x 3, 0.7 with 7 x 7
// at stride 2, 0.6 with 11 x 11 at stride 4. Where a thread's channels or a patch's places are not all needed (6 of
// 8 channels) they are as much less. In the input gradient, where a number that is staged serves four channels only,
// they are 0.4 for 3 x 3.
#include "conv2d_direct.cuh"

template <int QUADS, int OUTPUTS>
__device__ __forceinline__ void convolve(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output, Strides output_strides,
    Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue, Patch patch
) {
    extern __shared__ __align__(16) accumulate_t numbers[];
    const int teams = blockDim.x / patch.threads, member = threadIdx.x % patch.threads;
    const Place place = place_of_block(
        patch, teams * OUTPUTS, channels.groups, transposed ? min(vertical.stride, vertical.output) : 1,
        transposed ? min(horizontal.stride, horizontal.output) : 1
    );
    const Side down = side_of(vertical, transposed, place.phase_down);
    const Side across = side_of(horizontal, transposed, place.phase_across);
    input += (long long)place.group * channels.source * input_strides.c;
    filter += place.group * filter_strides.group + place.channel * filter_strides.output;

    int places[QUADS];
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) {
        places[quad] = place_of_quad(patch, member + quad * patch.threads, down.advance);
    }
    accumulate_t sums[QUADS][OUTPUTS][QUAD];
    add_patch<QUADS, OUTPUTS>(
        sums, numbers, input, input_strides, filter, filter_strides, patch, place, places, down, across, channels,
        vertical, horizontal
    );

    const int first = place.channel + threadIdx.x / patch.threads * OUTPUTS;
    const int outputs = min(OUTPUTS, channels.output - first);
    const int channel = place.group * channels.output + first;
    const long long column_step = across.phases * output_strides.w;
    const bool compared = residual == nullptr && straight(epilogue.function);
    long long bases[QUADS];  // of the quads in the output
    int columns[QUADS];      // of them that there are
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) {
        const int number = member + quad * patch.threads;
        const int line = number / patch.quads;
        const int image = place.image + line / patch.rows, row = place.row + line % patch.rows;
        const int column = place.column + number % patch.quads * QUAD;
        const bool there = line < patch.images * patch.rows && image < channels.images && row < down.outputs;
        columns[quad] = there ? max(0, min(QUAD, across.outputs - column)) : 0;
        bases[quad] = image * output_strides.n + channel * output_strides.c +
                      (down.first_output + row * down.phases) * output_strides.h +
                      (across.first_output + column * across.phases) * output_strides.w;
    }
    if (outputs > 0) {  // the same for a whole warp
        scale_and_compare<QUADS, OUTPUTS>(sums, {scale, bias, residual}, channel, outputs, compared, epilogue);
    }
    if (!compared) {
        add_and_activate<QUADS, OUTPUTS>(
            sums, residual, bases, columns, outputs, output_strides.c, column_step, epilogue
        );
    }
    write_sums<QUADS, OUTPUTS>(
        sums, output, output_strides, bases, columns, outputs, channels.output, column_step, numbers
    );
}

// Registers are enough for half as many numbers of float64.
constexpr int HALF = sizeof(accumulate_t) == 8 ? 2 : 1;

// Two blocks of 256 threads have 128 registers a thread, a few too few on Blackwell and in float64.
#if __CUDA_ARCH__ >= 1000 || defined(SCALAR_FLOAT64)
constexpr int RESIDENT = 1;
#else
constexpr int RESIDENT = 2;
#endif

extern "C" __global__ void __launch_bounds__(256, RESIDENT) conv2d_direct_wide(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output, Strides output_strides,
    Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue, Patch patch
) {
    convolve<2 / HALF, 8>(
        input, input_strides, filter, filter_strides, scale, bias, residual, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, patch
    );
}

extern "C" __global__ void __launch_bounds__(192, RESIDENT) conv2d_direct_narrow(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output, Strides output_strides,
    Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue, Patch patch
) {
    convolve<4 / HALF, 4>(
        input, input_strides, filter, filter_strides, scale, bias, residual, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, patch
    );
}
