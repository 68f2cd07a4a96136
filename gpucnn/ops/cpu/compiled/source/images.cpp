// Bytes (N, H, W, C) to floats (N, C, h, w): cut, mirrored and normalized in one pass. Limit: the floats written.
#include "threads.h"

namespace gpucnn {
namespace {

// `count` pixels of CHANNELS bytes each to one plane, from left to right or the other way.
template <int CHANNELS, int STEP>
void convert(int64_t count, int64_t channels, const uint8_t *from, float factor, float shift, float *to) {
    const int64_t stride = CHANNELS ? CHANNELS : channels;
    for (int64_t i = 0; i < count; ++i) to[STEP * i] = from[stride * i] * factor + shift;
}

template <int STEP>
void convert(int64_t count, int64_t channels, const uint8_t *from, float factor, float shift, float *to) {
    if (channels == 1) convert<1, STEP>(count, channels, from, factor, shift, to);
    else if (channels == 3) convert<3, STEP>(count, channels, from, factor, shift, to);
    else convert<0, STEP>(count, channels, from, factor, shift, to);
}

struct Window {
    int64_t begin, end, start;  // of the target, and where in the source it begins
};

// The places of a window of `length` from `offset` on that lie within 0 .. `size`.
Window inside(int64_t offset, int64_t length, int64_t size) {
    int64_t begin = offset < 0 ? -offset : 0, end = size - offset < length ? size - offset : length;
    if (begin > length) begin = length;
    if (end < begin) end = begin;
    return {begin, end, offset + begin};
}

void zeros(float *from, float *to) {
    for (; from < to; ++from) *from = 0;
}

}  // namespace

// offsets (N, 2), row and column of the window, and flip (N) may be null. Places outside the image are 0.
GPUCNN_EXPORT int gpucnn_images_to_float(int threads, int64_t n, int64_t height, int64_t width, int64_t channels,
                                         int64_t h, int64_t w, const uint8_t *images, const float *factor,
                                         const float *shift, const uint8_t *flip, const int64_t *offsets,
                                         float *out) {
    parallel_for(threads, n, [&](int64_t image) {
        Window rows = inside(offsets ? offsets[2 * image] : 0, h, height);
        Window columns = inside(offsets ? offsets[2 * image + 1] : 0, w, width);
        bool mirrored = flip && flip[image];
        int64_t count = columns.end - columns.begin;
        int64_t before = mirrored ? w - columns.end : columns.begin;  // zeros left of the picture
        for (int64_t row = 0; row < h; ++row)
            for (int64_t channel = 0; channel < channels; ++channel) {
                float *to = out + ((image * channels + channel) * h + row) * w;
                if (row < rows.begin || row >= rows.end) {
                    zeros(to, to + w);
                    continue;
                }
                const uint8_t *from =
                    images + ((image * height + rows.start + row - rows.begin) * width + columns.start) * channels +
                    channel;
                zeros(to, to + before);
                if (mirrored)
                    convert<-1>(count, channels, from, factor[channel], shift[channel], to + before + count - 1);
                else convert<1>(count, channels, from, factor[channel], shift[channel], to + before);
                zeros(to + before + count, to + w);
            }
    });
    return 0;
}

}  // namespace gpucnn
