// The element type of a source's arrays: scalar_t is what lies in memory, accumulate_t what is computed with.
// One of SCALAR_FLOAT32, SCALAR_FLOAT16, SCALAR_BFLOAT16 and SCALAR_FLOAT64 is defined in front of the source.
// Half types are stored and never computed with: sums of thousands of products need float32.

#if defined(SCALAR_FLOAT32)
typedef float scalar_t;
typedef float accumulate_t;
__device__ __forceinline__ accumulate_t load(scalar_t value) { return value; }
__device__ __forceinline__ scalar_t store(accumulate_t value) { return value; }
#elif defined(SCALAR_FLOAT64)
typedef double scalar_t;
typedef double accumulate_t;
__device__ __forceinline__ accumulate_t load(scalar_t value) { return value; }
__device__ __forceinline__ scalar_t store(accumulate_t value) { return value; }
#elif defined(SCALAR_FLOAT16)
#include <cuda_fp16.h>
typedef __half scalar_t;
typedef float accumulate_t;
__device__ __forceinline__ accumulate_t load(scalar_t value) { return __half2float(value); }
__device__ __forceinline__ scalar_t store(accumulate_t value) { return __float2half_rn(value); }
#elif defined(SCALAR_BFLOAT16)
#include <cuda_bf16.h>
typedef __nv_bfloat16 scalar_t;
typedef float accumulate_t;
__device__ __forceinline__ accumulate_t load(scalar_t value) { return __bfloat162float(value); }
__device__ __forceinline__ scalar_t store(accumulate_t value) { return __float2bfloat16_rn(value); }
#else
#error "define one of SCALAR_FLOAT32, SCALAR_FLOAT16, SCALAR_BFLOAT16, SCALAR_FLOAT64"
#endif

// A literal of the accumulating type: a double literal in a float kernel would compute in double.
#define NUMBER(literal) static_cast<accumulate_t>(literal)
