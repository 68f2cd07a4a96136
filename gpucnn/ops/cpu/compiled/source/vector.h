// Vectors of floats as wide as the processor's registers, in the compilers' own vector extension: AVX-512, AVX2, SSE
// and NEON from one text. Arithmetic on them is elementwise; a comparison gives an IntVector of 0 or -1, which
// `mask ? a : b` takes.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace gpucnn {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int REGISTERS = 16;
#else
constexpr int LANES = 4;
#if defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVector __attribute__((vector_size(LANES * 4)));

#define GPUCNN_INLINE inline __attribute__((always_inline))

GPUCNN_INLINE Vector load(const float *from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

GPUCNN_INLINE void store(float *to, Vector value) { std::memcpy(to, &value, sizeof value); }

// v - 0 is v for every v, minus zero too, so that this is one instruction and not an addition.
GPUCNN_INLINE Vector broadcast(float value) { return value - Vector{}; }

// The first `count` of LANES numbers, zeros after them; nothing beyond them is read.
GPUCNN_INLINE Vector load_first(const float *from, int count) {
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
    Vector value = {};
    std::memcpy(&value, from, count * sizeof(float));
    return value;
#endif
}

GPUCNN_INLINE void store_first(float *to, Vector value, int count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), value);
#else
    std::memcpy(to, &value, count * sizeof(float));
#endif
}

// The sum of a vector's numbers, by halves: the same order on every call.
GPUCNN_INLINE float sum_of(Vector value) {
    float part[LANES];
    std::memcpy(part, &value, sizeof value);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) part[lane] += part[lane + width];
    return part[0];
}

}  // namespace gpucnn
