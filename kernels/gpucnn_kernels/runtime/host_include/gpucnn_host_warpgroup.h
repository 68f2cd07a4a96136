// The functions of cuda/ptx_warpgroup.cuh, with the meaning that the PTX manual gives the instructions; the work is
// done in runtime_warpgroup.h.
#pragma once

#include "gpucnn_host.h"

namespace {

inline unsigned long long factor_at(const void *rows, int depth, int line = __builtin_LINE()) {
    return gpucnn_host::factor_at(rows, depth, line);
}
inline void show_to_products() { gpucnn_host::show_to_products(); }
inline void begin_products(int line = __builtin_LINE()) { gpucnn_host::begin_products(line); }
inline void commit_products(int line = __builtin_LINE()) { gpucnn_host::commit_products(line); }
template <int GROUPS_LEFT> inline void wait_for_products(int line = __builtin_LINE()) {
    static_assert(GROUPS_LEFT >= 0 && GROUPS_LEFT < 8, "wait until at most this many groups are left");
    gpucnn_host::wait_for_products(GROUPS_LEFT, line);
}

#define GPUCNN_HOST_MULTIPLY_WARPGROUP(NAME, FORMAT) \
    template <int COUNT> \
    inline void NAME( \
        float (&sums)[COUNT], unsigned long long left, unsigned long long right, int line = __builtin_LINE() \
    ) { \
        static_assert(COUNT == 32 || COUNT == 64 || COUNT == 128, "a product has 64, 128 or 256 columns"); \
        gpucnn_host::multiply_warpgroup(sums, 2 * COUNT, left, right, gpucnn_host::FORMAT, line); \
    }
GPUCNN_HOST_MULTIPLY_WARPGROUP(multiply_warpgroup_half, HALF)
GPUCNN_HOST_MULTIPLY_WARPGROUP(multiply_warpgroup_bfloat16, BFLOAT16)
#undef GPUCNN_HOST_MULTIPLY_WARPGROUP

}  // namespace
