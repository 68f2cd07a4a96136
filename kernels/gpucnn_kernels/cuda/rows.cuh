// Rows of neighbouring numbers, each taken by a row of threads (reduce.cuh): 32 of them, or the block.
//
// A warp takes pieces of a row by turns, a thread of it up to four packs of each: packs of four neighbouring numbers where a
// row is whole fours, otherwise single numbers. So which numbers a thread has, and with it the order of a sum, is a
// matter of the row's length alone: where arrays do not begin on boundaries of fours, or in another element type, the
// same numbers are moved in other pieces. All packs of a piece are under way together; a row comes from memory at the
// first look at it, and from the caches at the others.
#include "activation.cuh"
#include "packs.cuh"
#include "reduce.cuh"

constexpr int FOUR = 4;

// What a thread has of a piece: packs that are 32 packs apart.
template <int width>
struct RowPart {
    static constexpr int packs = sizeof(accumulate_t) == 8 ? 1 : 4;  // in float64 there are no registers for more
    static constexpr int across = 32 * width, piece = packs * across;
    long long first;  // the place of the first pack
    int left;         // numbers from there to the end of the row, or as many as a piece has

    __device__ __forceinline__ bool has(int number) const { return number * across < left; }

    __device__ __forceinline__ void fetch(
        const scalar_t *row, bool aligned, Pack<scalar_t, width> (&found)[packs]
    ) const {
        const scalar_t *from = row + first;
#pragma unroll
        for (int number = 0; number < packs; ++number) {
            if (!has(number)) continue;
            if (aligned) {
                found[number] = load_pack<width>(from + number * across);
            } else {
#pragma unroll
                for (int k = 0; k < width; ++k) found[number].number[k] = from[number * across + k];
            }
        }
    }
};

template <int width, typename Body>
__device__ __forceinline__ void over_parts(long long length, Body body) {
    using Part = RowPart<width>;
    const int step = blockDim.x / 32 * Part::piece;
#pragma unroll 1
    for (long long first = threadIdx.x / 32 * Part::piece + threadIdx.x % 32 * width; first < length; first += step) {
        body(Part{first, length - first < Part::piece ? (int)(length - first) : Part::piece});
    }
}

// body(place, values) for each ``width`` numbers of a row that are this thread's. ``aligned``: whether the row begins
// on a boundary of packs.
template <int width, typename Body>
__device__ __forceinline__ void over_row(const scalar_t *row, long long length, bool aligned, Body body) {
    over_parts<width>(length, [&](const RowPart<width> &part) {
        Pack<scalar_t, width> found[RowPart<width>::packs];
        part.fetch(row, aligned, found);
#pragma unroll
        for (int number = 0; number < RowPart<width>::packs; ++number) {
            if (!part.has(number)) continue;
            accumulate_t values[width];
#pragma unroll
            for (int k = 0; k < width; ++k) values[k] = load(found[number].number[k]);
            body(part.first + number * part.across, values);
        }
    });
}

// body(place, values, others), of two rows of one length.
template <int width, typename Body>
__device__ __forceinline__ void over_rows(
    const scalar_t *row, const scalar_t *other, long long length, bool aligned, Body body
) {
    over_parts<width>(length, [&](const RowPart<width> &part) {
        Pack<scalar_t, width> found[RowPart<width>::packs], beside[RowPart<width>::packs];
        part.fetch(row, aligned, found);
        part.fetch(other, aligned, beside);
#pragma unroll
        for (int number = 0; number < RowPart<width>::packs; ++number) {
            if (!part.has(number)) continue;
            accumulate_t values[width], others[width];
#pragma unroll
            for (int k = 0; k < width; ++k) values[k] = load(found[number].number[k]);
#pragma unroll
            for (int k = 0; k < width; ++k) others[k] = load(beside[number].number[k]);
            body(part.first + number * part.across, values, others);
        }
    });
}

template <int width>
__device__ __forceinline__ void put_in_row(
    scalar_t *row, long long place, bool aligned, const accumulate_t (&values)[width]
) {
    Pack<scalar_t, width> pack;
#pragma unroll
    for (int k = 0; k < width; ++k) pack.number[k] = store(values[k]);
    if (aligned) {
        store_pack<width>(row + place, pack);
    } else {
#pragma unroll
        for (int k = 0; k < width; ++k) row[place + k] = pack.number[k];
    }
}

// Which of the ``width`` numbers from ``first`` on is at this place of the row; -1 where none is.
template <int width>
__device__ __forceinline__ int among(long long place, long long first) {
    return place >= first && place < first + width ? (int)(place - first) : -1;
}

// Of two numbers; of a number and a NaN, the number.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// A row's largest number, and the sum of exp(number - largest): 1 at least, or NaN where a number is NaN or plus
// infinity, or all are minus infinity.
struct Powers {
    accumulate_t largest, total;
};

template <int width>
__device__ __forceinline__ Powers powers_of_row(
    const scalar_t *row, long long length, bool aligned, accumulate_t *shared
) {
    Powers powers = {-__int_as_float(0x7f800000), NUMBER(0)};
    over_row<width>(row, length, aligned, [&](long long, const accumulate_t (&values)[width]) {
#pragma unroll
        for (int k = 0; k < width; ++k) powers.largest = larger(values[k], powers.largest);
    });
    powers.largest = row_maximum(powers.largest, shared);
    over_row<width>(row, length, aligned, [&](long long, const accumulate_t (&values)[width]) {
#pragma unroll
        for (int k = 0; k < width; ++k) powers.total += exponential(values[k] - powers.largest);
    });
    powers.total = row_sum(powers.total, shared);
    return powers;
}
