// The functions of cuda/ptx.cuh, with the meaning that the PTX manual gives the instructions; the work is done in
// runtime_ptx.h.
#pragma once

#include "gpucnn_host.h"

namespace {

// A place in shared memory. On the host it is a pointer: integers are added to either.
typedef unsigned char *SharedPlace;
inline SharedPlace shared_place(void *pointer) { return static_cast<unsigned char *>(pointer); }

template <typename Value> inline void keep(Value &) {}

template <int BYTES>
inline void copy_async(void *shared, const void *global, int source_bytes = BYTES, int line = __builtin_LINE()) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    gpucnn_host::copy_async(shared, global, BYTES, source_bytes, line);
}
inline void copy_async_or_zero(
    SharedPlace to, const void *global, unsigned there, int line = __builtin_LINE()
) {
    gpucnn_host::copy_async(to, global, 16, there != 0 ? 16 : 0, line);
}
inline void copy_async_or_zero(SharedPlace to, const void *global, bool there, int line = __builtin_LINE()) {
    gpucnn_host::copy_async(to, global, 16, there ? 16 : 0, line);
}
inline void copy_async_commit() { gpucnn_host::commit_copies(); }
template <int GROUPS_LEFT> inline void copy_async_wait(int line = __builtin_LINE()) {
    static_assert(GROUPS_LEFT >= 0, "wait until at most this many groups are left");
    gpucnn_host::wait_for_copies(GROUPS_LEFT, line);
}
inline void copy_async_wait_all(int line = __builtin_LINE()) { gpucnn_host::wait_for_copies(-1, line); }

template <int COUNT>
inline void load_matrix(unsigned (&fragment)[COUNT], const void *row, int line = __builtin_LINE()) {
    static_assert(COUNT == 1 || COUNT == 2 || COUNT == 4, "ldmatrix loads 1, 2 or 4 matrices");
    gpucnn_host::load_matrices(fragment, row, COUNT, false, line);
}
template <int COUNT>
inline void load_matrix_transposed(unsigned (&fragment)[COUNT], const void *row, int line = __builtin_LINE()) {
    static_assert(COUNT == 1 || COUNT == 2 || COUNT == 4, "ldmatrix loads 1, 2 or 4 matrices");
    gpucnn_host::load_matrices(fragment, row, COUNT, true, line);
}

// Rounds to the nearest number with 10 fraction bits, ties to even, as compute capability 9.0 does; a NaN becomes
// the canonical one.
inline unsigned round_to_tf32(float value) {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits & 0x007fffffu ? 0x7fffffffu : bits;
    return (bits + 0xfffu + (bits >> 13 & 1)) & 0xffffe000u;
}

#define GPUCNN_HOST_MULTIPLY(NAME, A_WORDS, B_WORDS, FORMAT, DEPTH) \
    inline void NAME( \
        float (&accumulator)[4], const unsigned (&a)[A_WORDS], const unsigned (&b)[B_WORDS], \
        int line = __builtin_LINE() \
    ) { \
        gpucnn_host::multiply_matrices(accumulator, a, b, gpucnn_host::FORMAT, DEPTH, line); \
    }
GPUCNN_HOST_MULTIPLY(multiply_m16n8k4_tf32, 2, 1, TF32, 4)
GPUCNN_HOST_MULTIPLY(multiply_m16n8k8_tf32, 4, 2, TF32, 8)
GPUCNN_HOST_MULTIPLY(multiply_m16n8k8_half, 2, 1, HALF, 8)
GPUCNN_HOST_MULTIPLY(multiply_m16n8k16_half, 4, 2, HALF, 16)
GPUCNN_HOST_MULTIPLY(multiply_m16n8k8_bfloat16, 2, 1, BFLOAT16, 8)
GPUCNN_HOST_MULTIPLY(multiply_m16n8k16_bfloat16, 4, 2, BFLOAT16, 16)
#undef GPUCNN_HOST_MULTIPLY

}  // namespace
