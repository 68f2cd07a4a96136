// Dropout: Srivastava et al., JMLR 15 (2014), scaled while training. Limit: memory; forward reads x and writes y
// and a byte of mask an element, backward reads dy and the mask and writes dx. Philox adds some 70 instructions
// for every four elements.
//
// The mask is a function of the seed, the offset and the element's index in C order of the logical array (n, c, h,
// w), in whatever layout the array lies. One form serves all layouts: planes (n, c) of ``size`` places, where a
// contiguous array is one plane, and a channels-last one has its C planes interleaved. Threads next to each other
// take the same four places of neighbouring planes, or neighbouring places of the one plane.
//
// ``start``, where it is not null, points to words to be added to the offset: a step that is captured once and
// started many times finds there how far the stream has come.
//
// Where one plane begins with a block of four words and on boundaries of 16 bytes, it is moved in packs of so many;
// so is a gradient that lies in memory as its mask does. By the compiled code for sm_90, not measured, an element then
// takes 25 instructions forward in float32 and 27 in bfloat16, and about 11 backward, where it took 74 and 130; an
// H200's memory leaves time for 70 and 39.
#include "packs.cuh"
#include "philox.cuh"

__device__ __forceinline__ accumulate_t load(bool value) { return value ? NUMBER(1) : NUMBER(0); }

// Four blocks a multiprocessor, said aloud: for more of them the compiler would spill on sm_120.
extern "C" __global__ void __launch_bounds__(256, 4) dropout_forward(
    const scalar_t *x, scalar_t *y, bool *mask, long long images, int channels, long long size,
    unsigned long long seed, unsigned long long offset, unsigned long long threshold, accumulate_t scale,
    const unsigned long long *start
) {
    if (start) offset += *start;
    // A plane's words begin anywhere within a block of four, so it reaches into up to so many blocks.
    const long long blocks = (size + 6) / 4;
    const long long step = (long long)gridDim.x * blockDim.x, count = images * blocks * channels;
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long done = 0;  // blocks of words, that packs have taken
    constexpr int words_blocks = PACK / 4;
    if (words_blocks > 0 && images * channels == 1 && offset % 4 == 0 && on_pack_boundary<PACK>(x) &&
        on_pack_boundary<PACK>(y) && on_pack_boundary<PACK>(mask)) {
        const long long packs = size / PACK;
        for (long long i = thread; i < packs; i += step) {
            const Pack<scalar_t, PACK> given = load_pack<PACK>(x + i * PACK);
            Pack<scalar_t, PACK> made;
            Pack<bool, PACK> kept;
#pragma unroll
            for (int part = 0; part < words_blocks; ++part) {
                const PhiloxBlock words = philox(seed, offset / 4 + i * words_blocks + part);
#pragma unroll
                for (int number = 0; number < 4; ++number) {
                    const int k = part * 4 + number;
                    kept.number[k] = word_of(words, number) >= threshold;
                    made.number[k] = store(kept.number[k] ? load(given.number[k]) * scale : NUMBER(0));
                }
            }
            store_pack<PACK>(mask + i * PACK, kept);
            store_pack<PACK>(y + i * PACK, made);
        }
        done = packs * words_blocks;
    }
    for (long long i = done + thread; i < count; i += step) {
        const long long line = channels == 1 ? i : i / channels, n = line / blocks;
        const int c = (int)(i - line * channels);
        const unsigned long long first_word = offset + (n * channels + c) * size;
        const unsigned long long block = first_word / 4 + (line - n * blocks);
        const PhiloxBlock words = philox(seed, block);
        const long long first_place = (long long)(block * 4 - first_word);  // of word 0; below 0 before the plane
        for (int number = 0; number < 4; ++number) {
            const long long place = first_place + number;
            if (place < 0 || place >= size) continue;
            const long long at = (n * size + place) * channels + c;
            const bool keep = word_of(words, number) >= threshold;
            mask[at] = keep;
            y[at] = store(keep ? load(x[at]) * scale : NUMBER(0));  // a choice: a dropped infinity is 0
        }
    }
}

// ``count`` elements of a mask by themselves: for masks of whole channels.
extern "C" __global__ void __launch_bounds__(256) dropout_mask(
    bool *mask, long long count, unsigned long long seed, unsigned long long offset, unsigned long long threshold,
    const unsigned long long *start
) {
    if (start) offset += *start;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const unsigned long long word = offset + i;
        mask[i] = word_of(philox(seed, word / 4), (int)(word % 4)) >= threshold;
    }
}

struct Apply {
    const scalar_t *dy;
    const bool *mask;
    scalar_t *dx;
    accumulate_t scale;
    template <typename Tile>
    __device__ __forceinline__ void operator()(const Tile &tile) const {
        accumulate_t gradients[Tile::elements], kept[Tile::elements];
        tile.fetch(dy, gradients);
        tile.fetch(mask, kept);
#pragma unroll
        for (int k = 0; k < Tile::elements; ++k) {
            gradients[k] = kept[k] != NUMBER(0) ? gradients[k] * scale : NUMBER(0);
        }
        tile.put(dx, gradients);
    }
};

// Arrays and a mask of one shape and layout. dx may be dy.
extern "C" __global__ void __launch_bounds__(256) dropout_apply_elements(
    const scalar_t *dy, const bool *mask, scalar_t *dx, long long count, accumulate_t scale
) {
    const bool aligned = on_pack_boundary<PACK>(dy) && on_pack_boundary<PACK>(mask) && on_pack_boundary<PACK>(dx);
    over_tiles<PACK, 2>(count, aligned, Apply{dy, mask, dx, scale});
}

// Elements from one to the next image (n), channel (c) and place within a plane (s).
struct PlaneStrides {
    long long n, c, s;
};

// Arrays and masks in any mixture of layouts; a mask of whole channels has s = 0. In the order in which dx lies.
extern "C" __global__ void __launch_bounds__(256) dropout_apply(
    const scalar_t *dy, const bool *mask, scalar_t *dx, long long count, int channels, long long size,
    accumulate_t scale, PlaneStrides dy_strides, PlaneStrides mask_strides, PlaneStrides dx_strides
) {
    const bool channels_last = dx_strides.c < dx_strides.s;
    const long long inner = channels_last ? channels : size, outer = channels_last ? size : channels;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const long long line = i / inner, n = line / outer;
        const long long fast = i - line * inner, slow = line - n * outer;
        const long long c = channels_last ? fast : slow, s = channels_last ? slow : fast;
        const bool keep = mask[n * mask_strides.n + c * mask_strides.c + s * mask_strides.s];
        const accumulate_t gradient = load(dy[n * dy_strides.n + c * dy_strides.c + s * dy_strides.s]);
        dx[n * dx_strides.n + c * dx_strides.c + s * dx_strides.s] =
            store(keep ? gradient * scale : NUMBER(0));
    }
}
