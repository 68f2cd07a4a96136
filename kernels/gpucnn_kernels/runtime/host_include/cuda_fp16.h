// CUDA's half-precision header for the host: __half and __half2, their conversions and arithmetic.
#pragma once

#include "gpucnn_host.h"
#include "gpucnn_host_sixteen_bit.h"

typedef gpucnn_host::SixteenBit<5> __half;
typedef gpucnn_host::SixteenBitPair<5> __half2;
typedef __half half;
typedef __half2 half2;

namespace {

GPUCNN_HOST_CONVERSIONS(__half, __half2, half, 5)
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }

}  // namespace
