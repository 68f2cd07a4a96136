// Puts a factor of a tensor-core convolution where its kernels can read it 16 bytes at a time: channels side by
// side, those of each group filled up with zeros to a multiple of 16 bytes. Images that are contiguous (N, C,
// H, W), images and filters whose channels a group are no such multiple, and the filters of input gradients,
// whose channels that are summed over are the outer ones, go through here into a workspace; others are read
// where they lie.
//
// A block of 32 x 8 threads moves 32 pixels x 32 channels through shared memory, so that both reads and writes run
// along what is neighbouring.
//
// Limit: the factor read once and, padded, written once.
#include "scalar.cuh"

constexpr int TILE = 32;

// Numbers from one index to the next, and how many of each. A packed channel's stride is 1.
struct Pack {
    long long group, image, pixel, channel;
    long long to_group, to_image, to_pixel;
    int groups, images, pixels, channels, padded;
};

// Grid: x the tiles of pixels of each image of each group, one after the other, y the tiles of channels.
extern "C" __global__ void __launch_bounds__(256) conv2d_pack(
    const scalar_t *given, scalar_t *packed, Pack pack
) {
    __shared__ scalar_t tile[TILE][TILE + 2];
    const int tiles = (pack.pixels + TILE - 1) / TILE;
    const int first_pixel = blockIdx.x % tiles * TILE, first_channel = blockIdx.y * TILE;
    const int image = blockIdx.x / tiles % pack.images, group = blockIdx.x / tiles / pack.images;
    given += group * pack.group + image * pack.image;
    packed += group * pack.to_group + image * pack.to_image;
    const bool by_pixel = pack.pixel < pack.channel;
    for (int i = threadIdx.y; i < TILE; i += 8) {
        const int pixel = by_pixel ? threadIdx.x : i, channel = by_pixel ? i : threadIdx.x;
        const bool there = first_pixel + pixel < pack.pixels && first_channel + channel < pack.channels;
        const long long from = (first_pixel + pixel) * pack.pixel + (first_channel + channel) * pack.channel;
        tile[pixel][channel] = there ? given[from] : store(NUMBER(0));
    }
    __syncthreads();
    for (int i = threadIdx.y; i < TILE; i += 8) {
        if (first_pixel + i < pack.pixels && first_channel + threadIdx.x < pack.padded) {
            packed[(first_pixel + i) * pack.to_pixel + first_channel + threadIdx.x] = tile[i][threadIdx.x];
        }
    }
}
