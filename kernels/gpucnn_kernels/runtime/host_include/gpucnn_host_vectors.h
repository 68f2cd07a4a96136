// CUDA's vector types, with CUDA's alignments, and their make_ functions.
#pragma once

#define GPUCNN_HOST_VECTORS(NAME, TYPE, ALIGN2, ALIGN4) \
    struct NAME##1 { TYPE x; }; \
    struct alignas(ALIGN2) NAME##2 { TYPE x, y; }; \
    struct alignas(ALIGN4) NAME##4 { TYPE x, y, z, w; }; \
    inline NAME##1 make_##NAME##1(TYPE x) { return NAME##1{x}; } \
    inline NAME##2 make_##NAME##2(TYPE x, TYPE y) { return NAME##2{x, y}; } \
    inline NAME##4 make_##NAME##4(TYPE x, TYPE y, TYPE z, TYPE w) { return NAME##4{x, y, z, w}; }
#define GPUCNN_HOST_VECTOR3(NAME, TYPE) \
    struct NAME##3 { TYPE x, y, z; }; \
    inline NAME##3 make_##NAME##3(TYPE x, TYPE y, TYPE z) { return NAME##3{x, y, z}; }

namespace {

GPUCNN_HOST_VECTORS(char, signed char, 2, 4)
GPUCNN_HOST_VECTORS(uchar, unsigned char, 2, 4)
GPUCNN_HOST_VECTORS(short, short, 4, 8)
GPUCNN_HOST_VECTORS(ushort, unsigned short, 4, 8)
GPUCNN_HOST_VECTORS(int, int, 8, 16)
GPUCNN_HOST_VECTORS(uint, unsigned int, 8, 16)
GPUCNN_HOST_VECTORS(longlong, long long, 16, 16)
GPUCNN_HOST_VECTORS(ulonglong, unsigned long long, 16, 16)
GPUCNN_HOST_VECTORS(float, float, 8, 16)
GPUCNN_HOST_VECTORS(double, double, 16, 16)

GPUCNN_HOST_VECTOR3(char, signed char)
GPUCNN_HOST_VECTOR3(uchar, unsigned char)
GPUCNN_HOST_VECTOR3(short, short)
GPUCNN_HOST_VECTOR3(ushort, unsigned short)
GPUCNN_HOST_VECTOR3(int, int)
GPUCNN_HOST_VECTOR3(longlong, long long)
GPUCNN_HOST_VECTOR3(ulonglong, unsigned long long)
GPUCNN_HOST_VECTOR3(float, float)
GPUCNN_HOST_VECTOR3(double, double)
inline uint3 make_uint3(unsigned int x, unsigned int y, unsigned int z) { return uint3{x, y, z}; }

}  // namespace

#undef GPUCNN_HOST_VECTORS
#undef GPUCNN_HOST_VECTOR3
