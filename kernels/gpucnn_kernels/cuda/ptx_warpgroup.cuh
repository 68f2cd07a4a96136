// Products of a warpgroup, four warps in a row of a block, as compute capability 9.0 has them and no later one
// does: "wgmma" of the PTX ISA manual. Both factors lie in shared memory, and a descriptor says where. Functions, so
// that the host runtime can supply the same ones; they need -arch=sm_90a.
//
// A factor's rows are 128 bytes, 64 numbers of the sum's depth, in groups of eight rows that begin at multiples of
// 1024 bytes. Of each row the eight chunks of 16 bytes are exchanged: chunk c of row r lies at c ^ (r % 8).
//
// The 64 x COLUMNS sums of a warpgroup, by thread: warp w has rows 16 w to 16 w + 15, and of these lane l, in group
// g = l / 4 and number t = l % 4 of it,
//   sums[i]: row g + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * t + i % 2.

#if defined(GPUCNN_HOST)
#include <gpucnn_host_warpgroup.h>
#else

// What one factor's rows begin at: an address in shared memory that is a multiple of 1024, and ``depth`` numbers
// of 16 bits behind it, a multiple of 16.
__device__ __forceinline__ unsigned long long factor_at(const void *rows, int depth) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(rows)) + 2 * depth;
    constexpr unsigned long long EXCHANGED = 1ull << 62, FROM_EIGHT_ROWS_TO_THE_NEXT = 1024ull >> 4 << 32;
    return EXCHANGED | FROM_EIGHT_ROWS_TO_THE_NEXT | 1ull << 16 | (address & 0x3ffff) >> 4;
}

// What this thread has written to shared memory, or its finished copies have, is there for products that are begun
// behind a barrier.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// To be called by the whole warpgroup before products, where a thread has written to sums since the last ones.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes one group of the products since the last commit.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most GROUPS_LEFT groups, the latest, are still at work. Until then they read shared memory, and the
// sums belong to them.
template <int GROUPS_LEFT> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS_LEFT) : "memory");
}

// sums += A B over 16 numbers of the depth, A 64 rows at ``left``, B COLUMNS rows at ``right``.
#define GPUCNN_NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, " \
    "%8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define GPUCNN_NAMES_64 \
    GPUCNN_NAMES_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, " \
    "%40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, " \
    "%56, %57, %58, %59, %60, %61, %62, %63"
#define GPUCNN_NAMES_128 \
    GPUCNN_NAMES_64 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, " \
    "%72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, " \
    "%88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, " \
    "%104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, " \
    "%120, %121, %122, %123, %124, %125, %126, %127"
#define GPUCNN_SUMS_4(I) "+f"(sums[I]), "+f"(sums[I + 1]), "+f"(sums[I + 2]), "+f"(sums[I + 3])
#define GPUCNN_SUMS_16(I) GPUCNN_SUMS_4(I), GPUCNN_SUMS_4(I + 4), GPUCNN_SUMS_4(I + 8), GPUCNN_SUMS_4(I + 12)
#define GPUCNN_SUMS_32(I) GPUCNN_SUMS_16(I), GPUCNN_SUMS_16(I + 16)
#define GPUCNN_SUMS_64(I) GPUCNN_SUMS_32(I), GPUCNN_SUMS_32(I + 32)
#define GPUCNN_SUMS_128(I) GPUCNN_SUMS_64(I), GPUCNN_SUMS_64(I + 64)
#define GPUCNN_MULTIPLY(NAME, TYPE, COLUMNS, COUNT, LEFT, RIGHT) \
    __device__ __forceinline__ void NAME( \
        float (&sums)[COUNT], unsigned long long left, unsigned long long right \
    ) { \
        asm volatile("{\n.reg .pred adding;\nsetp.eq.u32 adding, 0, 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" \
                     GPUCNN_NAMES_##COUNT "}, " LEFT ", " RIGHT ", adding, 1, 1, 0, 0;\n}" \
                     : GPUCNN_SUMS_##COUNT(0) \
                     : "l"(left), "l"(right)); \
    }
GPUCNN_MULTIPLY(multiply_warpgroup_half, "f16", 64, 32, "%32", "%33")
GPUCNN_MULTIPLY(multiply_warpgroup_half, "f16", 128, 64, "%64", "%65")
GPUCNN_MULTIPLY(multiply_warpgroup_half, "f16", 256, 128, "%128", "%129")
GPUCNN_MULTIPLY(multiply_warpgroup_bfloat16, "bf16", 64, 32, "%32", "%33")
GPUCNN_MULTIPLY(multiply_warpgroup_bfloat16, "bf16", 128, 64, "%64", "%65")
GPUCNN_MULTIPLY(multiply_warpgroup_bfloat16, "bf16", 256, 128, "%128", "%129")

#endif  // not the host
