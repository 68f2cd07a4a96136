// What the tensor-core convolutions share: one product of a 16 x 8 tile of sums, in four precisions, and the
// shared memory that the factors wait in.
//
// Seen in pieces of 16 bytes ("chunks": 4 float32 or 8 16-bit numbers), the fragments of m16n8k8 in tf32 and of
// m16n8k16 in 16 bits are the same: 16 rows of 2 chunks on the left, 8 rows of 2 chunks on the right, and
// ldmatrix hands each lane the right words of either. So one skeleton serves all element types, and only
// multiply() differs:
//
//   float16, bfloat16   one product, summed in float32
//   PRODUCTS 1          float32 rounded to tf32 (to nearest), one product, summed in float32
//   PRODUCTS 3          float32 as the sum of two tf32 numbers: big * small, small * big and big * big; small *
//                       small is below float32's rounding, and so is what the tensor core cuts off of small, as
//                       big is rounded to nearest. Tensor cores cut sums off where float32 arithmetic
//                       rounds them, an error that grows with their number; so each product of 8 channels
//                       starts from zero and is added outside the tensor core. Both are the method of Ootomo
//                       and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing
//                       the FP32 theoretical peak performance" (2022).
#include "conv2d.cuh"
#include "ptx.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "asynchronous copies and tensor cores of tf32 and bfloat16 need sm_80 or newer"
#endif

constexpr int CHUNK = 16 / (int)sizeof(scalar_t);  // elements
constexpr int STAGES = 4;                          // of the pipeline from global memory

// A fragment; ``rest`` is what float32 numbers have beyond ``word``, their tf32 part.
struct Left { unsigned word[4], rest[4]; };
struct Right { unsigned word[2], rest[2]; };

__device__ __forceinline__ void prepare(unsigned &word, unsigned &rest) {
    rest = 0u;
#if defined(SCALAR_FLOAT32)
    const float number = __uint_as_float(word);
#if PRODUCTS == 3
#if __CUDA_ARCH__ >= 900
    word = round_to_tf32(number);
#else
    word = (word + 0x1000u) & 0xffffe000u;  // of some NaN no NaN, but then what is left is one
#endif
    // At most 12 bits: that the tensor core drops the last is the error of a number rounded to float32.
    rest = __float_as_uint(number - __uint_as_float(word));
#else
    word = round_to_tf32(number);
#endif
#endif
}

__device__ __forceinline__ void multiply(float (&sums)[4], const Left &left, const Right &right) {
#if defined(SCALAR_FLOAT16)
    multiply_m16n8k16_half(sums, left.word, right.word);
#elif defined(SCALAR_BFLOAT16)
    multiply_m16n8k16_bfloat16(sums, left.word, right.word);
#elif PRODUCTS == 3
    float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    multiply_m16n8k8_tf32(product, left.rest, right.word);
    multiply_m16n8k8_tf32(product, left.word, right.rest);
    multiply_m16n8k8_tf32(product, left.word, right.word);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += product[i];
#else
    multiply_m16n8k8_tf32(sums, left.word, right.word);
#endif
}

// Of three products: whether a sum is one, and not what is left of an infinite factor, or of one that rounds to
// infinity, or of a product that does. Then it is the plain sum, in float32, that is given.
__device__ __forceinline__ bool finite(float sum) { return fabsf(sum) < __int_as_float(0x7f800000); }

// One row of tiles of sums at a time: what is prepared of the left factor is not needed longer.
template <int ACROSS>
__device__ __forceinline__ void multiply_row(float (&sums)[ACROSS][4], Left &left, const Right (&right)[ACROSS]) {
#pragma unroll
    for (int word = 0; word < 4; ++word) prepare(left.word[word], left.rest[word]);
#pragma unroll
    for (int j = 0; j < ACROSS; ++j) multiply(sums[j], left, right[j]);
}

template <int ACROSS> __device__ __forceinline__ void prepare_all(Right (&right)[ACROSS]) {
#pragma unroll
    for (int j = 0; j < ACROSS; ++j) {
#pragma unroll
        for (int word = 0; word < 2; ++word) prepare(right[j].word[word], right[j].rest[word]);
    }
}
