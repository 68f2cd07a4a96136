// CUDA's bfloat16 header for the host: __nv_bfloat16 and __nv_bfloat162, their conversions and arithmetic.
#pragma once

#include "gpucnn_host.h"
#include "gpucnn_host_sixteen_bit.h"

typedef gpucnn_host::SixteenBit<8> __nv_bfloat16;
typedef gpucnn_host::SixteenBitPair<8> __nv_bfloat162;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

namespace {

GPUCNN_HOST_CONVERSIONS(__nv_bfloat16, __nv_bfloat162, bfloat16, 8)
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }

}  // namespace
