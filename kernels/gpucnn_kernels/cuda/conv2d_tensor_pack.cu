// Puts a factor of a tensor-core convolution where its kernels can read it 16 bytes at a time: channels side by
// side, those of each group filled up with zeros to a multiple of 16 bytes. Images that are contiguous (N, C,
// H, W), images and filters whose channels a group are no such multiple, and the filters of input gradients,
// whose channels that are summed over are the outer ones, go through here into a workspace; others are read
// where they lie.
//
// A block of 256 threads moves 4096 numbers through shared memory: 64 pixels x 64 channels, or, where a group
// has no more, 256 x 16. Where pixels are neighbours and their rows begin at multiples of 16 bytes, as those of
// most contiguous images do, they are read 16 bytes at a time, otherwise one by one along what is neighbouring;
// what is written is always in pieces of 16 bytes.
//
// Limit: the factor read once and, padded, written once. By the code compiled for sm_90, not measured, a number
// takes some 18 instructions of a thread where it is read in pieces: seven numbers a clock could pass a
// multiprocessor, and an H200's memory gives and takes four of 16 bits, or two of 32.
#include "packs.cuh"

constexpr int THREADS = 256;

// Numbers from one index to the next, and how many of each. A packed channel's stride is 1.
struct Packing {
    long long group, image, pixel, channel;
    long long to_group, to_image, to_pixel;
    int groups, images, pixels, channels, padded;
};

// A row of the tile is a channel. Its odd number of words lets both ways through it fall into many banks.
template <int CHANNELS>
__device__ __forceinline__ void pack_tile(
    const scalar_t *given, scalar_t *packed, const Packing &pack, scalar_t *tile
) {
    constexpr int PIXELS = 4096 / CHANNELS, PITCH = PIXELS + 4 / sizeof(scalar_t), CHUNKS = CHANNELS / PACK;
    const int tiles = (pack.pixels + PIXELS - 1) / PIXELS;
    const int first_pixel = blockIdx.x % tiles * PIXELS, first_channel = blockIdx.y * CHANNELS;
    const int image = blockIdx.x / tiles % pack.images, group = blockIdx.x / tiles / pack.images;
    const int channels = min(CHANNELS, pack.channels - first_channel);
    const int pixels = min(PIXELS, pack.pixels - first_pixel);
    given += group * pack.group + image * pack.image + first_pixel * pack.pixel + first_channel * pack.channel;
    packed += group * pack.to_group + image * pack.to_image + first_pixel * pack.to_pixel + first_channel;

    if (pack.pixel == 1 && pack.channel % PACK == 0 && pixels % PACK == 0 && on_pack_boundary<PACK>(given)) {
        constexpr int ROWS = THREADS * PACK / PIXELS;  // that the threads read at once
        const int pixel = threadIdx.x * PACK % PIXELS, row = threadIdx.x * PACK / PIXELS;
        const scalar_t *from = given + row * pack.channel + pixel;
        scalar_t *to = tile + row * PITCH + pixel;
#pragma unroll
        for (int rows = 0; rows < CHANNELS; rows += ROWS, from += ROWS * pack.channel, to += ROWS * PITCH) {
            if (row + rows >= channels || pixel >= pixels) break;
            const Pack<scalar_t, PACK> read = load_pack<PACK>(from);
            constexpr int WORD = 4 / sizeof(scalar_t);
#pragma unroll
            for (int k = 0; k < PACK; k += WORD) {
                Pack<scalar_t, WORD> word;
#pragma unroll
                for (int l = 0; l < WORD; ++l) word.number[l] = read.number[k + l];
                store_pack<WORD>(to + k, word);
            }
        }
    } else {
        const bool by_pixel = pack.pixel < pack.channel;
        for (int item = threadIdx.x; item < PIXELS * CHANNELS; item += THREADS) {
            const int channel = by_pixel ? item / PIXELS : item % CHANNELS;
            const int pixel = by_pixel ? item % PIXELS : item / CHANNELS;
            if (channel < channels && pixel < pixels) {
                tile[channel * PITCH + pixel] = given[pixel * pack.pixel + channel * pack.channel];
            }
        }
    }
    __syncthreads();
    constexpr int COLUMNS = THREADS / CHUNKS;  // that the threads write at once
    const int first = threadIdx.x % CHUNKS * PACK, column = threadIdx.x / CHUNKS;
    if (first_channel + first >= pack.padded) return;
    const scalar_t *from = tile + first * PITCH + column;
    scalar_t *to = packed + column * pack.to_pixel + first;
    const bool whole = first + PACK <= channels;
#pragma unroll
    for (int columns = 0; columns < PIXELS; columns += COLUMNS, from += COLUMNS, to += COLUMNS * pack.to_pixel) {
        if (column + columns >= pixels) break;
        Pack<scalar_t, PACK> written;
#pragma unroll
        for (int k = 0; k < PACK; ++k) {
            written.number[k] = whole || first + k < channels ? from[k * PITCH] : store(NUMBER(0));
        }
        store_pack<PACK>(to, written);
    }
}

// Grid: x the tiles of pixels of each image of each group, one after the other, y the tiles of channels. The
// packed factor begins at a multiple of 16 bytes, and so do its pixels.
extern "C" __global__ void __launch_bounds__(256) conv2d_pack_wide(
    const scalar_t *given, scalar_t *packed, Packing pack
) {
    __shared__ __align__(16) scalar_t tile[64 * (64 + 4 / sizeof(scalar_t))];
    pack_tile<64>(given, packed, pack, tile);
}

extern "C" __global__ void __launch_bounds__(256) conv2d_pack_narrow(
    const scalar_t *given, scalar_t *packed, Packing pack
) {
    __shared__ __align__(16) scalar_t tile[16 * (256 + 4 / sizeof(scalar_t))];
    pack_tile<16>(given, packed, pack, tile);
}
