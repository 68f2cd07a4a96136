// CUDA C++ as NVRTC gives it to a kernel, on the CPU. Included in front of the kernel's text by the command line;
// text and headers share one unnamed namespace, so that overloads of both are found together and nothing collides
// with the C library's names. No standard header is included: NVRTC has none either, and they cost compile time.
#pragma once

#include "gpucnn_host_runtime.h"

#define GPUCNN_HOST 1
#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __CUDA_ARCH__ 900  // of the instructions of ptx.cuh and ptx_warpgroup.cuh

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static_assert(false, "declare __shared__ variables in the open, not inside a macro");
#define __builtin_align__(bytes) __attribute__((aligned(bytes)))

namespace {

typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;

constexpr const uint3 &threadIdx = gpucnn_host::indices.thread;
constexpr const uint3 &blockIdx = gpucnn_host::indices.block;
constexpr const dim3 &blockDim = gpucnn_host::indices.block_size;
constexpr const dim3 &gridDim = gpucnn_host::indices.grid_size;
constexpr int warpSize = 32;

[[noreturn]] inline void __trap(int line = __builtin_LINE()) { gpucnn_host::fault(line, "__trap() was called"); }

}  // namespace

#define assert(condition) \
    ((condition) ? (void)0 : gpucnn_host::fault(__LINE__, "the assertion %s does not hold", #condition))
#define printf __builtin_printf

#include "gpucnn_host_vectors.h"
#include "gpucnn_host_math.h"
#include "gpucnn_host_warp.h"
#include "gpucnn_host_atomics.h"
#include "gpucnn_host_entry.h"
