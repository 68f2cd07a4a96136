// Which places of a pooling window lie inside an image.

struct Range {
    int first, end;
};

// The places of a window that starts at ``start`` (below 0 in the padding) which lie inside an axis of ``size``.
__device__ __forceinline__ Range places_inside(int start, int window, int dilation, int size) {
    const int first = start >= 0 ? 0 : (-start + dilation - 1) / dilation;
    const int end = start >= size ? 0 : (size - start + dilation - 1) / dilation;
    return {first, end < window ? end : window};
}
