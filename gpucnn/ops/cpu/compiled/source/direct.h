// What the direct convolutions share: the problem, and images copied into scratch so that a convolution of any stride
// reads contiguous pixels.
#pragma once

#include "lanes.h"
#include "threads.h"
#include "vector.h"

namespace gpucnn {

// A convolution of n images, c x h x w, with k filters of r x s, to p x q; a group has c / groups and k / groups.
struct Problem {
    int64_t n, c, h, w, k, r, s, p, q, stride_h, stride_w, top, left, dilation_h, dilation_w, groups;
};

GPUCNN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
GPUCNN_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
GPUCNN_INLINE int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }  // of a / b, a not negative

GPUCNN_INLINE void fill_zeros(float *to, int64_t count) { std::memset(to, 0, count * sizeof(float)); }

// to[i] = from[i]; nothing beyond `count` is read or written.
GPUCNN_INLINE void copy(float *to, const float *from, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    if (i < count) store_first(to + i, load_first(from + i, count - i), count - i);
}

// Rows of a few channels, padded, in scratch. Where the convolution has a stride, the pixels that one kernel position
// meets lie `step` apart: each row and column modulo `step` is a plane of its own, in which they are neighbors. Then
// output pixel y * pitch + x meets, for kernel position (r, s), the number at plane(r, s) + (y + row shift) * pitch
// + x + column shift, for whole runs of output pixels across the ends of rows: what is computed for the few x beyond
// a row is not used.
struct Staging {
    int64_t height, width;       // of a source plane
    int64_t step_h, step_w;      // the convolution's stride
    int64_t top, left;           // rows and columns of zeros before the first; negative where some are left out
    int64_t phases_h, phases_w;  // planes a channel
    int64_t rows, pitch;         // of a plane in scratch

    int64_t plane() const { return rows * pitch; }
    int64_t channel() const { return phases_h * phases_w * plane(); }
};

// Zeros behind the last plane: what vectors read beyond it, and the next row's zeros on the left.
constexpr int64_t STAGING_END = 10 * LANES;

// The pitch for `columns` outputs a row and shifts up to `shift`. With step 1 one row's zeros on the right are the
// next one's on the left.
inline int64_t staging_pitch(const Staging &staging, int64_t columns, int64_t shift) {
    int64_t pitch = columns + shift;
    if (staging.step_w == 1) {
        int64_t right = pitch - staging.width - staging.left;
        pitch -= larger(0, smaller(smaller(staging.left, LANES), right));
    }
    return pitch;
}

// to[j] = row[first + j * step], zero outside the row. Up to LANES - 1 numbers behind `pitch` are overwritten.
inline void stage_row(const float *row, int64_t width, int64_t first, int64_t step, int64_t pitch, float *to) {
    int64_t begin = first >= 0 ? 0 : smaller(pitch, ceiling(-first, step));
    int64_t end = first >= width ? begin : larger(begin, smaller(pitch, ceiling(width - first, step)));
    for (int64_t j = 0; j < begin; j += LANES) store(to + j, Vector{});
    const float *from = row + first + begin * step;
    int64_t inside = width - first - begin * step, count = end - begin, j = 0;
    float *target = to + begin;
    auto part = [&](int64_t at) {  // LANES numbers of the row, zeros after its end
        int64_t left = inside - at;
        return left >= LANES ? load(from + at) : left > 0 ? load_first(from + at, left) : Vector{};
    };
    if (step == 1) {
        for (; j < count; j += LANES) store(target + j, part(j));
    } else if (step == 2) {
        for (; j < count; j += LANES) store(target + j, evens(part(2 * j), part(2 * j + LANES)));
    } else if (step == 4) {
        for (; j < count; j += LANES) {
            Vector a = evens(part(4 * j), part(4 * j + LANES));
            store(target + j, evens(a, evens(part(4 * j + 2 * LANES), part(4 * j + 3 * LANES))));
        }
    } else {
        for (; j < count; ++j) target[j] = from[j * step];
    }
    for (j += begin; j < pitch; j += LANES) store(to + j, Vector{});
}

// Stages `channels` planes of an image from output row `first` on. Needs LANES numbers behind the last plane.
inline void stage(const Staging &staging, const float *source, int64_t channels, int64_t first, float *to) {
    for (int64_t c = 0; c < channels; ++c, source += staging.height * staging.width)
        for (int64_t a = 0; a < staging.phases_h; ++a)
            for (int64_t b = 0; b < staging.phases_w; ++b)
                for (int64_t i = 0; i < staging.rows; ++i, to += staging.pitch) {
                    int64_t y = (first + i) * staging.step_h + a - staging.top;
                    bool inside = y >= 0 && y < staging.height;
                    const float *row = inside ? source + y * staging.width : source;
                    int64_t width = inside ? staging.width : 0;
                    stage_row(row, width, b - staging.left, staging.step_w, staging.pitch, to);
                }
}

// Phases of a kernel of `size` positions `dilation` apart: remainders of their places modulo `step`.
inline int64_t phases(int64_t size, int64_t dilation, int64_t step) {
    int64_t largest = 0;
    for (int64_t i = 0; i < size && i < step; ++i) largest = larger(largest, i * dilation % step);
    return largest + 1;
}

}  // namespace gpucnn
