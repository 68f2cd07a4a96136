// How the threads of depthwise kernels read an image: a thread goes down it row by row, with the rows of its windows
// in registers, so that each row is read once for all outputs of the thread that see it.
//
// A thread has COLUMNS outputs beside each other, whose windows overlap, of CHANNELS channels that are neighbours in
// memory and are loaded together. Or (PACKED) it has one channel of an image whose columns are neighbours in memory,
// and these are loaded together: the windows' first column is KERNEL / 2 in front of a pack of COLUMNS.
#include "conv2d.cuh"

// Columns of a pack: four, or 16 bytes.
constexpr int PACKED_COLUMNS = sizeof(scalar_t) == 8 ? 2 : 4;

template <int KERNEL_, int STRIDE_, int COLUMNS_, int CHANNELS_, bool PACKED_>
struct Form {
    static constexpr int KERNEL = KERNEL_, STRIDE = STRIDE_, COLUMNS = COLUMNS_, CHANNELS = CHANNELS_;
    static constexpr bool PACKED = PACKED_;
    static constexpr int ACROSS = (COLUMNS - 1) * STRIDE + KERNEL;  // columns of the source
    static constexpr int SPAN = ACROSS * CHANNELS, OUTPUTS = COLUMNS * CHANNELS;
    static constexpr int KEPT = KERNEL - STRIDE;  // rows that the next window shares with this one
    static_assert(!PACKED || CHANNELS == 1, "packs of columns are of one channel");
};

// Neighbouring numbers as they come from memory, or zeros, in whole words: numbers of 16 bits are taken apart where
// they are used, and not before.
template <int width, bool WORDS = width * sizeof(scalar_t) % 4 == 0>
struct Loaded {
    Pack<unsigned, width * sizeof(scalar_t) / 4> words;

    __device__ __forceinline__ void read(bool there, const scalar_t *from) {
#pragma unroll
        for (unsigned &word : words.number) word = 0;
        if (there) words = *reinterpret_cast<const decltype(words) *>(from);
    }
    __device__ __forceinline__ void spread(accumulate_t *to) const {
        const Pack<scalar_t, width> pack = *reinterpret_cast<const Pack<scalar_t, width> *>(&words);
#pragma unroll
        for (int k = 0; k < width; ++k) to[k] = load(pack.number[k]);
    }
};
template <int width>
struct Loaded<width, false> {
    static_assert(width == 1, "packs are of whole words");
    scalar_t number;

    __device__ __forceinline__ void read(bool there, const scalar_t *from) {
        number = there ? *from : store(NUMBER(0));
    }
    __device__ __forceinline__ void spread(accumulate_t *to) const { *to = load(number); }
};

// The rows of a thread's windows, from above. ``Raw`` is a row as it comes from memory: numbers of 16 bits are only
// spread over registers when they are used. What lies outside of the image is 0.
template <typename F, bool PACKED = F::PACKED>
struct Rows;

template <typename F>
struct Rows<F, false> {
    struct Raw {
        Loaded<F::CHANNELS> column[F::ACROSS];
    };
    const scalar_t *at;  // the next row, at the windows' first column
    long long down, right;
    int row, height;
    bool seen[F::ACROSS];

    __device__ __forceinline__ Rows(
        const scalar_t *channel, long long down, long long right, int top, int left, int height, int width
    ) : at(channel + top * down + left * right), down(down), right(right), row(top), height(height) {
#pragma unroll
        for (int s = 0; s < F::ACROSS; ++s) seen[s] = inside(left + s, width);
    }

    __device__ __forceinline__ void read(Raw &raw) {
        const bool there = inside(row, height);
#pragma unroll
        for (int s = 0; s < F::ACROSS; ++s) {
            raw.column[s].read(there && seen[s], at + s * right);
        }
        at += down;
        ++row;
    }

    static __device__ __forceinline__ void spread(const Raw &raw, accumulate_t (&numbers)[F::SPAN]) {
#pragma unroll
        for (int s = 0; s < F::ACROSS; ++s) raw.column[s].spread(numbers + s * F::CHANNELS);
    }
};

// Of a row some packs are in the middle, and single numbers, which lie in the neighbours' packs, before and after.
template <typename F>
struct Rows<F, true> {
    static constexpr int BEFORE = F::KERNEL / 2, PACKS = F::STRIDE, AFTER = F::KERNEL - F::STRIDE - BEFORE;
    struct Raw {
        Loaded<1> before[BEFORE], after[AFTER + 1];  // an array has one element at least
        Loaded<F::COLUMNS> middle[PACKS];
    };
    const scalar_t *at;  // the next row, at the first pack
    long long down;
    int row, height;
    bool seen_before[BEFORE], seen_middle[PACKS], seen_after[AFTER + 1];

    __device__ __forceinline__ Rows(
        const scalar_t *channel, long long down, long long, int top, int left, int height, int width
    ) : at(channel + top * down + (left + BEFORE)), down(down), row(top), height(height) {
        const int first = left + BEFORE, after = first + PACKS * F::COLUMNS;
#pragma unroll
        for (int s = 0; s < BEFORE; ++s) seen_before[s] = inside(left + s, width);
#pragma unroll
        for (int s = 0; s < PACKS; ++s) seen_middle[s] = inside(first + s * F::COLUMNS, width);
#pragma unroll
        for (int s = 0; s < AFTER; ++s) seen_after[s] = inside(after + s, width);
    }

    __device__ __forceinline__ void read(Raw &raw) {
        const bool there = inside(row, height);
#pragma unroll
        for (int s = 0; s < PACKS; ++s) {
            raw.middle[s].read(there && seen_middle[s], at + s * F::COLUMNS);
        }
#pragma unroll
        for (int s = 0; s < BEFORE; ++s) raw.before[s].read(there && seen_before[s], at + (s - BEFORE));
#pragma unroll
        for (int s = 0; s < AFTER; ++s) {
            raw.after[s].read(there && seen_after[s], at + (PACKS * F::COLUMNS + s));
        }
        at += down;
        ++row;
    }

    static __device__ __forceinline__ void spread(const Raw &raw, accumulate_t (&numbers)[F::SPAN]) {
#pragma unroll
        for (int s = 0; s < BEFORE; ++s) raw.before[s].spread(numbers + s);
#pragma unroll
        for (int s = 0; s < PACKS; ++s) raw.middle[s].spread(numbers + BEFORE + s * F::COLUMNS);
#pragma unroll
        for (int s = 0; s < AFTER; ++s) raw.after[s].spread(numbers + BEFORE + PACKS * F::COLUMNS + s);
    }
};

// A row of a thread's outputs, as they lie in memory: one pack, or one of each column. ``here`` says which columns
// there are; of packed ones that is all.
template <typename F>
struct Outputs {
    static constexpr int WIDTH = F::PACKED ? F::COLUMNS : F::CHANNELS, PACKS = F::OUTPUTS / WIDTH;
    Loaded<WIDTH> pack[PACKS];

    __device__ __forceinline__ void read(
        bool there, const bool (&here)[F::COLUMNS], const scalar_t *from, long long right
    ) {
#pragma unroll
        for (int i = 0; i < PACKS; ++i) pack[i].read(there && here[i], from + i * right);
    }

    __device__ __forceinline__ void spread(accumulate_t (&numbers)[F::OUTPUTS]) const {
#pragma unroll
        for (int i = 0; i < PACKS; ++i) pack[i].spread(numbers + i * WIDTH);
    }

    static __device__ __forceinline__ void write(
        const accumulate_t *numbers, const bool (&here)[F::COLUMNS], scalar_t *to, long long right
    ) {
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            Pack<scalar_t, WIDTH> made;
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) made.number[k] = store(numbers[i * WIDTH + k]);
            if (here[i]) store_pack<WIDTH>(to + i * right, made);
        }
    }
};
