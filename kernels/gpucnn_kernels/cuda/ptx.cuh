// The PTX instructions that C++ has no words for: asynchronous copies, fragments from shared memory, tensor cores.
// Each is a function, so that the host runtime can supply the same one with the meaning that the PTX ISA manual
// gives the instruction ("cp.async", "ldmatrix", "mma", "cvt"). What an architecture does not have is not declared
// for it: sm_75 knows load_matrix and multiply_m16n8k8_half, sm_80 and later know all of them.
//
// Fragments, after the manual. Lane l is in group g = l / 4 and is number t = l % 4 of it.
//   accumulator[i]: row g + 8 * (i / 2), column 2 * t + i % 2.
//   tf32, a[i]: row g + 8 * (i % 2), column t + 4 * (i / 2).   b[i]: row t + 4 * i, column g.
//   half and bfloat16, word i with its elements e = 0 (lower half) and 1:
//   a[i]: row g + 8 * (i % 2), column 2 * t + e + 8 * (i / 2).   b[i]: row 2 * t + e + 8 * i, column g.

#if defined(GPUCNN_HOST)
#include <gpucnn_host_ptx.h>
#else

// A place in shared memory, which integers are added to: half as wide as a pointer.
typedef unsigned SharedPlace;
__device__ __forceinline__ SharedPlace shared_place(void *pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Has ``value`` made here and kept in a register: what loops need is otherwise made again in every turn, from
// other numbers that are at hand, which costs instructions where registers are free.
__device__ __forceinline__ void keep(unsigned &value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void keep(int &value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void keep(long long &value) { asm volatile("" : "+l"(value)); }
__device__ __forceinline__ void keep(const char *&value) { asm volatile("" : "+l"(value)); }

// One matrix of 8 x 8 numbers of 16 bits a word of ``fragment``: lanes 8 m to 8 m + 7 give the addresses of matrix
// m's rows, in shared memory, multiples of 16 bytes. Lane l receives numbers 2 t and 2 t + 1 of row g of each.
// With fewer than four matrices the other lanes' addresses must be valid too on sm_75.
__device__ __forceinline__ void load_matrix(unsigned (&fragment)[1], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}
__device__ __forceinline__ void load_matrix(unsigned (&fragment)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}
__device__ __forceinline__ void load_matrix(unsigned (&fragment)[4], SharedPlace row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void load_matrix(unsigned (&fragment)[4], const void *row) {
    load_matrix(fragment, static_cast<unsigned>(__cvta_generic_to_shared(row)));
}

// The same of the transposed matrices: numbers 2 t and 2 t + 1 of column g.
__device__ __forceinline__ void load_matrix_transposed(unsigned (&fragment)[1], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}
__device__ __forceinline__ void load_matrix_transposed(unsigned (&fragment)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}
__device__ __forceinline__ void load_matrix_transposed(unsigned (&fragment)[4], SharedPlace row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void load_matrix_transposed(unsigned (&fragment)[4], const void *row) {
    load_matrix_transposed(fragment, static_cast<unsigned>(__cvta_generic_to_shared(row)));
}

// accumulator += A B by the whole warp, all 32 lanes together; sums are float32.
__device__ __forceinline__ void multiply_m16n8k8_half(
    float (&accumulator)[4], const unsigned (&a)[2], const unsigned (&b)[1]
) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

#if __CUDA_ARCH__ >= 800

// Copies BYTES (4, 8 or 16) from global to shared memory without passing through registers; both addresses are
// multiples of BYTES. Only the first ``source_bytes`` are read, the rest becomes zero: with 0 nothing is read. The
// copy is there for this thread after the wait for its group, and for the others after a barrier behind that.
template <int BYTES>
__device__ __forceinline__ void copy_async(void *shared, const void *global, int source_bytes = BYTES) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const size_t from = __cvta_generic_to_global(global);
    if (BYTES == 16) {  // past the first-level cache, which nothing will look for it in
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(source_bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES),
                     "r"(source_bytes)
                     : "memory");
    }
}

// The same of 16 bytes to ``to`` where ``there`` is not 0, and of zeros where it is: what is read is then not
// looked at, so ``global`` may be any address.
__device__ __forceinline__ void copy_async_or_zero(SharedPlace to, const void *global, unsigned there) {
    const size_t from = __cvta_generic_to_global(global);
    asm volatile(
        "{.reg .pred nothing; setp.eq.u32 nothing, %2, 0;"
        " cp.async.cg.shared.global [%0], [%1], 16, nothing;}" ::"r"(to), "l"(from), "r"(there)
        : "memory");
}

// Where a comparison says it, not a bit, it is a predicate from the start.
__device__ __forceinline__ void copy_async_or_zero(SharedPlace to, const void *global, bool there) {
    const size_t from = __cvta_generic_to_global(global);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

// Makes one group of this thread's copies since the last commit.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most GROUPS_LEFT of this thread's groups, the latest, are still on their way.
template <int GROUPS_LEFT> __device__ __forceinline__ void copy_async_wait() {
    static_assert(GROUPS_LEFT >= 0, "wait until at most this many groups are left");
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
}

// Waits for all of this thread's copies, committed or not.
__device__ __forceinline__ void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The bits of ``value`` rounded to tf32 (10 fraction bits), to nearest: ties away from zero before sm_90, which
// takes three instructions, and from there on to even, which takes one. Without it the tensor core drops the
// lower 13 bits.
__device__ __forceinline__ unsigned round_to_tf32(float value) {
    unsigned bits;
#if __CUDA_ARCH__ >= 900
    asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#else
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#endif
    return bits;
}

__device__ __forceinline__ void multiply_m16n8k4_tf32(
    float (&accumulator)[4], const unsigned (&a)[2], const unsigned (&b)[1]
) {
    asm volatile(
        "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

__device__ __forceinline__ void multiply_m16n8k8_bfloat16(
    float (&accumulator)[4], const unsigned (&a)[2], const unsigned (&b)[1]
) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

__device__ __forceinline__ void multiply_m16n8k8_tf32(
    float (&accumulator)[4], const unsigned (&a)[4], const unsigned (&b)[2]
) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_m16n8k16_half(
    float (&accumulator)[4], const unsigned (&a)[4], const unsigned (&b)[2]
) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_m16n8k16_bfloat16(
    float (&accumulator)[4], const unsigned (&a)[4], const unsigned (&b)[2]
) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif  // sm_80
#endif  // not the host
