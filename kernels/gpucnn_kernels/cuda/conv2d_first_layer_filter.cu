// The gradient of a first layer's filter on tensor cores, in 16 bits: at most four input channels, one group.
//
//   dw[k, r, s, c] = sum over positions of dy[position, k]
//                                          * x[position's row * stride + r, column * stride + s, c]
//
// As in conv2d_first_layer.cu a block brings the rows of the image that a tile of positions meets into shared
// memory once, and the tile of dy beside them. The sum of a product is a run of 16 positions; its left factor are
// 16 channels of dy, its right one 8 numbers that are neighbours in shared memory: two pixels, two taps of a row
// with their four channels. ldmatrix turns both. It reads 16 bytes from multiples of 16: with an odd stride every
// second position begins between them, so the patch is there twice, the second time a pixel further on.
//
// A warp makes 64 (or 16) channels x 64 numbers of the filter. Warps share out the filter's rows first, then the
// runs of a tile; blocks share out the tiles, and the filter where four warps are not enough for it. Each warp
// sums over all of its runs and stores its sums once, as a part of its own: the parts are added up by another
// launch, in an order that is always the same.
//
// A position that there is not has zeros of dy, and its pixels are masked to zero, too, which another position
// meets and may be infinite. Numbers of the filter that there are not, beyond a row's last tap or the last
// channel, are summed and left out.
//
// Limit: dy and x once through memory, or 2 * N * P * Q * K * R * S' * 4 operations at the tensor cores' rate, S'
// being S filled up to a multiple of four. Of the stem of a ResNet in bfloat16, 256 images, 113 us and 148 us.
// Counted in the code compiled for sm_90, not measured: a run takes a wide block's warp 129 instructions for 32
// products, which keep its tensor core busy for 202 clocks. Registers 216 and 119.
#include "conv2d_first_layer.cuh"

// The filter, and how many warps of a block have columns of their own.
struct Filter { int K, R, S, C, here; };

constexpr int NUMBERS = 8;           // of the filter, of a product
constexpr int PAIRS = 4;             // products side by side are made two by two: 4 pairs are 64 numbers
constexpr int PADDING = 8;           // numbers between the rows of dy, which then fall into different banks
constexpr int POSITION_LINE = POSITIONS + PADDING;  // of dy where its positions are neighbours

template <int OUTPUTS>
__device__ __forceinline__ void sum_filter(
    const scalar_t *x, Strides x_strides, const scalar_t *dy, Strides dy_strides, float *partial, Filter filter,
    Axis vertical, Axis horizontal, int vectors, Patch patch, int tiles, unsigned char *shared, long long *places
) {
    constexpr int DOWN = OUTPUTS / 16;
    constexpr int CHANNEL_LINE = OUTPUTS + PADDING;  // of dy where its channels are neighbours
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_channel = blockIdx.z * OUTPUTS;
    const bool by_channel = dy_strides.c < dy_strides.w;

    scalar_t *slopes = reinterpret_cast<scalar_t *>(shared);
    constexpr int SLOPES = OUTPUTS * POSITION_LINE > POSITIONS * CHANNEL_LINE ? OUTPUTS * POSITION_LINE
                                                                              : POSITIONS * CHANNEL_LINE;
    unsigned char *const pixels = shared + SLOPES * sizeof(scalar_t);
    const int area = patch.height * patch.width;
    // Where the second patch begins an odd pixel is at a multiple of 16 bytes, and meets the banks that even ones
    // of the first do not.
    const int odd = horizontal.stride % 2, second = odd ? area + (7 - area % 16 + 16) % 16 : 0;

    // The warp's columns of the filter, 16 numbers each, in order of rows and steps; and its share of the runs.
    const int group = blockIdx.y * filter.here + warp % filter.here;
    const int shares = WARPS / filter.here, share = warp / filter.here;
    const int pixels_of_lane = (lane % 8 + lane / 8 % 2 * 8) * horizontal.stride;
    const int right_of_lane =
        pixels_of_lane * PIXEL + lane / 16 * 16 + (odd && lane % 2 ? second * PIXEL : 0);
    int rights[PAIRS];
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
        const int column = min(group * PAIRS + j, filter.R * patch.steps - 1);
        rights[j] = right_of_lane + column / patch.steps * vertical.dilation * patch.width * PIXEL +
                    column % patch.steps * STEP;
    }
    const int row_of_lane = lane % 8;
    const int left_of_lane = by_channel ? (row_of_lane + lane / 16 * 8) * CHANNEL_LINE + lane / 8 % 2 * 8
                                        : (row_of_lane + lane / 8 % 2 * 8) * POSITION_LINE + lane / 16 * 8;
    const int left_step = by_channel ? 16 : 16 * POSITION_LINE, run_step = by_channel ? RUN * CHANNEL_LINE : RUN;

    float sums[DOWN][2 * PAIRS][4];
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * PAIRS; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[i][j][k] = 0.0f;
        }
    }

#pragma unroll 1
    for (unsigned tile = blockIdx.x; tile < (unsigned)tiles; tile += gridDim.x) {
        const int image = (int)(tile / (unsigned)(patch.down * patch.across));
        const int corner = (int)(tile - (unsigned)image * (patch.down * patch.across));
        const int first_row = corner / patch.across * patch.rows;
        const int first_column = corner % patch.across * patch.runs * RUN;
        for (int local = threadIdx.x; local < POSITIONS; local += THREADS) {
            const int run = local / RUN, row = run / patch.runs;
            const int p = first_row + row, q = first_column + run % patch.runs * RUN + local % RUN;
            const bool there = row < patch.rows && p < vertical.output && q < horizontal.output;
            places[local] = there ? image * dy_strides.n + p * dy_strides.h + q * dy_strides.w : -1;
        }
        const Corner corner_of_patch = {
            first_row * vertical.stride - vertical.pad + (int)threadIdx.x / patch.width,
            first_column * horizontal.stride - horizontal.pad, (int)threadIdx.x % patch.width
        };
        bring_image(
            x + image * x_strides.n, x_strides, filter.C, vertical.source, horizontal.source, patch,
            corner_of_patch, area, pixels, second
        );
        __syncthreads();

        // dy's tile, in packs of eight channels of a position or eight positions of a channel.
#pragma unroll 4
        for (int pack = threadIdx.x; pack < POSITIONS * OUTPUTS / PACK; pack += THREADS) {
            const int along = by_channel ? OUTPUTS / PACK : POSITIONS / PACK;
            const int here = pack / along, first = pack % along * PACK;
            const int channel = by_channel ? first : here, position = by_channel ? here : first;
            scalar_t *to = slopes;
            to += by_channel ? position * CHANNEL_LINE + channel : channel * POSITION_LINE + position;
            Pack<scalar_t, PACK> numbers;
#pragma unroll
            for (int k = 0; k < PACK; ++k) numbers.number[k] = store(0.0f);
            if (vectors) {
                const long long place = places[position];
                if (place >= 0 && first_channel + channel < filter.K) {
                    numbers = load_pack<PACK>(dy + place + (first_channel + channel) * dy_strides.c);
                }
            } else {
#pragma unroll
                for (int k = 0; k < PACK; ++k) {
                    const long long place = places[position + (by_channel ? 0 : k)];
                    const int of = first_channel + channel + (by_channel ? k : 0);
                    if (place >= 0 && of < filter.K) numbers.number[k] = dy[place + of * dy_strides.c];
                }
            }
            store_pack<PACK>(to, numbers);
        }
        __syncthreads();

        const int columns_left = horizontal.output - first_column;
#pragma unroll 1
        for (int run = share; run < patch.rows * patch.runs; run += shares) {
            const int row = run / patch.runs, first = run % patch.runs * RUN;
            const int there = first_row + row < vertical.output ? columns_left - first : 0;  // of the run
            if (there <= 0) continue;
            const unsigned char *patch_at =
                pixels + (row * vertical.stride * patch.width + first * horizontal.stride) * PIXEL;
            // Of positions 2 t and 2 t + 1, and of those eight further on.
            unsigned masks[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int position = lane % 4 * 2 + half * 8;
                masks[half] = (position < there ? 0xffffu : 0u) | (position + 1 < there ? 0xffff0000u : 0u);
            }
            Right right[2 * PAIRS];
#pragma unroll
            for (int j = 0; j < PAIRS; ++j) {
                unsigned words[4];
                load_matrix_transposed(words, patch_at + rights[j]);
                right[2 * j].word[0] = words[0] & masks[0], right[2 * j].word[1] = words[1] & masks[1];
                right[2 * j + 1].word[0] = words[2] & masks[0], right[2 * j + 1].word[1] = words[3] & masks[1];
            }
            const scalar_t *left_at = slopes + run * run_step + left_of_lane;
#pragma unroll
            for (int i = 0; i < DOWN; ++i) {
                Left left;
                if (by_channel) {
                    load_matrix_transposed(left.word, left_at + i * left_step);
                } else {
                    load_matrix(left.word, left_at + i * left_step);
                }
                multiply_row(sums[i], left, right);
            }
        }
        __syncthreads();  // the next tile lies where this one was
    }

    float *part = partial + (long long)(blockIdx.x * shares + share) * filter.K * filter.R * filter.S * filter.C;
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * PAIRS; ++j) {
            const int column = group * PAIRS + j / 2, r = column / patch.steps;
            if (r >= filter.R) continue;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int channel = first_channel + i * 16 + lane / 4 + k / 2 * 8;
                const int number = column % patch.steps * 16 + j % 2 * NUMBERS + lane % 4 * 2 + k % 2;
                const int s = number / DEPTH, c = number % DEPTH;
                if (channel < filter.K && s < filter.S && c < filter.C) {
                    part[(((long long)channel * filter.R + r) * filter.S + s) * filter.C + c] = sums[i][j][k];
                }
            }
        }
    }
}

// Grid: blocks that share out the tiles of all images, groups of columns of the filter, and tiles of channels.
// With ``vectors`` dy begins at a multiple of 16 bytes, and its neighbours, channels or a row's positions, are
// whole packs.
extern "C" __global__ void __launch_bounds__(128, 2) first_layer_filter_wide(
    const scalar_t *x, Strides x_strides, const scalar_t *dy, Strides dy_strides, float *partial, Filter filter,
    Axis vertical, Axis horizontal, int vectors, Patch patch, int tiles
) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ long long places[POSITIONS];
    sum_filter<64>(
        x, x_strides, dy, dy_strides, partial, filter, vertical, horizontal, vectors, patch, tiles, shared, places
    );
}

extern "C" __global__ void __launch_bounds__(128, 3) first_layer_filter_narrow(
    const scalar_t *x, Strides x_strides, const scalar_t *dy, Strides dy_strides, float *partial, Filter filter,
    Axis vertical, Axis horizontal, int vectors, Patch patch, int tiles
) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ long long places[POSITIONS];
    sum_filter<16>(
        x, x_strides, dy, dy_strides, partial, filter, vertical, horizontal, vectors, patch, tiles, shared, places
    );
}
