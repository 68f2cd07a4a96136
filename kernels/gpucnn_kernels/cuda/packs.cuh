// Neighbouring elements moved together. A load or store of 16 bytes is the widest that there is: four times fewer
// instructions than element by element in float32, eight times in 16 bits, and as many more bytes under way.
//
// An array may begin at any element, and count any number of them. So whoever moves packs asks first whether the
// addresses allow them (on_pack_boundary), and has a way element by element for what is left.
#include "scalar.cuh"

template <typename T, int width>
struct alignas(width * sizeof(T)) Pack {
    T number[width];
};

// Elements in 16 bytes.
constexpr int PACK = 16 / sizeof(scalar_t);

// Whether packs of ``width`` elements may begin at this place of memory. True of a null pointer.
template <int width, typename T>
__device__ __forceinline__ bool on_pack_boundary(const T *place) {
    return reinterpret_cast<size_t>(place) % (width * sizeof(T)) == 0;
}

template <int width, typename T>
__device__ __forceinline__ Pack<T, width> load_pack(const T *place) {
    return *reinterpret_cast<const Pack<T, width> *>(place);
}

template <int width, typename T>
__device__ __forceinline__ void store_pack(T *place, const Pack<T, width> &pack) {
    *reinterpret_cast<Pack<T, width> *>(place) = pack;
}

// An array of accumulate_t beside one of scalar_t, as optimizers' states are: the overloads take either.
#if defined(SCALAR_FLOAT16) || defined(SCALAR_BFLOAT16)
__device__ __forceinline__ accumulate_t load(accumulate_t value) { return value; }
#endif

template <typename T>
__device__ __forceinline__ T stored_as(accumulate_t value);
template <>
__device__ __forceinline__ accumulate_t stored_as<accumulate_t>(accumulate_t value) { return value; }
#if defined(SCALAR_FLOAT16) || defined(SCALAR_BFLOAT16)
template <>
__device__ __forceinline__ scalar_t stored_as<scalar_t>(accumulate_t value) { return store(value); }
#endif

// What a kernel does at a time that goes through arrays element by element. A thread's elements are ``packs`` packs,
// or single elements; neighbouring threads have neighbouring ones in either case. ``fetch`` loads all of them before
// the first is looked at. Blocks have one dimension.
template <int width, int packs>
struct WideTile {
    static constexpr int elements = width * packs;
    long long first;  // the block's

    template <typename T>
    __device__ __forceinline__ void fetch(const T *source, accumulate_t (&values)[elements]) const {
        const T *place = source + first + threadIdx.x * width;
        Pack<T, width> pack[packs];
#pragma unroll
        for (int number = 0; number < packs; ++number) {
            pack[number] = load_pack<width>(place + number * (int)blockDim.x * width);
        }
#pragma unroll
        for (int k = 0; k < elements; ++k) values[k] = load(pack[k / width].number[k % width]);
    }

    template <typename T>
    __device__ __forceinline__ void put(T *target, const accumulate_t (&values)[elements]) const {
        T *place = target + first + threadIdx.x * width;
#pragma unroll
        for (int number = 0; number < packs; ++number) {
            Pack<T, width> pack;
#pragma unroll
            for (int k = 0; k < width; ++k) pack.number[k] = stored_as<T>(values[number * width + k]);
            store_pack<width>(place + number * (int)blockDim.x * width, pack);
        }
    }
};

struct NarrowTile {
    static constexpr int elements = 4;
    long long first;
    int left;  // elements from ``first`` to the end; those beyond are fetched as 0 and put nowhere

    template <typename T>
    __device__ __forceinline__ void fetch(const T *source, accumulate_t (&values)[elements]) const {
#pragma unroll
        for (int k = 0; k < elements; ++k) {
            const int at = k * blockDim.x + threadIdx.x;
            values[k] = at < left ? load(source[first + at]) : NUMBER(0);
        }
    }

    template <typename T>
    __device__ __forceinline__ void put(T *target, const accumulate_t (&values)[elements]) const {
#pragma unroll
        for (int k = 0; k < elements; ++k) {
            const int at = k * blockDim.x + threadIdx.x;
            if (at < left) target[first + at] = stored_as<T>(values[k]);
        }
    }
};

// body(tile) for the tiles of this block: wide ones, where they lie whole inside arrays that are all on boundaries
// of packs (``aligned``), and narrow ones elsewhere.
template <int width, int packs, typename Body>
__device__ __forceinline__ void over_tiles(long long count, bool aligned, Body body) {
    const int whole = blockDim.x * width * packs;
    for (long long first = (long long)blockIdx.x * whole; first < count; first += (long long)gridDim.x * whole) {
        if (aligned && count - first >= whole) {
            body(WideTile<width, packs>{first});
        } else {
            const int end = count - first < whole ? (int)(count - first) : whole;
#pragma unroll 1
            for (int at = 0; at < end; at += NarrowTile::elements * blockDim.x) {
                body(NarrowTile{first + at, end - at});
            }
        }
    }
}
