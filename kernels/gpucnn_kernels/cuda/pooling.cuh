// What the pooling kernels share: how threads are spread over an image, and which windows meet which pixels.
//
// A grid has a thread for every ``position`` along x and walks through ``rows`` along y, so that neighbouring
// threads touch neighbouring memory in either layout, and a thread divides once and not for every element:
//   contiguous     position y * width + x of a plane,    row n * C + c
//   channels-last  position x * C + c of an image's line, row n * height + y
// Fewer than 2^31 positions; an array may have more elements.
#include "pooling_windows.cuh"
#include "scalar.cuh"

struct Pooling {
    long long rows;
    int channels_last;
    int C, H, W, P, Q, R, S;
    int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
};

struct Strides {
    long long n, c, h, w;  // in elements
};

struct Place {
    long long n;
    int c, y, x;
};

// How many positions an image of this size has along x: threads beyond have nothing to do.
__device__ __forceinline__ unsigned positions(const Pooling &pooling, int height, int width) {
    return (unsigned)width * (pooling.channels_last ? pooling.C : height);
}

__device__ __forceinline__ Place place_of(
    const Pooling &pooling, int height, int width, unsigned position, long long row
) {
    const unsigned inner = pooling.channels_last ? pooling.C : width;
    const int outer_rows = pooling.channels_last ? height : pooling.C;
    const int slow = position / inner, fast = position - slow * inner;
    const long long n = row / outer_rows;
    const int within = (int)(row - n * outer_rows);
    if (pooling.channels_last) return {n, fast, within, slow};
    return {n, within, slow, fast};
}

__device__ __forceinline__ long long offset_of(const Strides &strides, const Place &place) {
    return place.n * strides.n + place.c * strides.c + place.y * strides.h + place.x * strides.w;
}

// The windows, of ``count`` along an axis, whose first to last place encloses the pixel at ``shifted`` - padding.
__device__ __forceinline__ Range windows_around(int shifted, int window, int stride, int dilation, int count) {
    const int beyond = shifted - (window - 1) * dilation;
    const int first = beyond <= 0 ? 0 : (beyond + stride - 1) / stride;
    const int end = shifted / stride + 1;
    return {first, end < count ? end : count};
}
