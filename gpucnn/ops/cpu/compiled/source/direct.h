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

    int64_t plane() const { return rows * pitch + LANES; }  // zeros at the end, where a last vector reaches to
    int64_t channel() const { return phases_h * phases_w * plane(); }
    int64_t line() const { return (pitch + LANES) * step_w + 4 * LANES + larger(left, 0) + width; }
};

// Zeros behind the last plane: what vectors read beyond it, and the next row's zeros on the left.
constexpr int64_t STAGING_END = 10 * LANES;

// The pitch for `columns` outputs a row and shifts up to `shift`. With step 1 one row's zeros on the right are the
// next one's on the left.
inline int64_t staging_pitch(const Staging &staging, int64_t columns, int64_t shift) {
    int64_t pitch = columns + shift;
    if (staging.step_w == 1) {
        int64_t right = pitch - staging.width - staging.left;
        pitch -= larger(0, smaller(smaller(staging.left, LANES), smaller(right, shift)));
    }
    return pitch;
}

// to[j] = row[j - left], zero outside the row. Up to LANES - 1 numbers behind `pitch` are overwritten.
inline void stage_row(const float *row, int64_t width, int64_t left, int64_t pitch, float *to) {
    int64_t begin = smaller(larger(left, 0), pitch), j = 0;
    for (; j < begin; j += LANES) store(to + j, Vector{});
    row += begin - left;
    width = smaller(width - (begin - left), pitch - begin);
    float *target = to + begin;
    for (j = 0; j + LANES <= width; j += LANES) store(target + j, load(row + j));
    if (j < width) store(target + j, load_first(row + j, width - j)), j += LANES;
    for (j = larger(j, 0) + begin; j < pitch; j += LANES) store(to + j, Vector{});
}

// Every step-th number of a padded row, from the b-th on, for all phases b, whose planes lie `apart`.
inline void split_row(const float *line, int64_t step, int64_t phases, int64_t pitch, int64_t apart, float *to) {
    if (step == 2) {
        for (int64_t j = 0; j < pitch; j += LANES) {
            Vector a = load(line + 2 * j), b = load(line + 2 * j + LANES);
            store(to + j, evens(a, b));
            if (phases == 2) store(to + apart + j, odds(a, b));
        }
    } else if (step == 4 && phases == 4) {
        for (int64_t j = 0; j < pitch; j += LANES) {
            Vector a = load(line + 4 * j), b = load(line + 4 * j + LANES);
            Vector c = load(line + 4 * j + 2 * LANES), d = load(line + 4 * j + 3 * LANES);
            Vector even_first = evens(a, b), even_second = evens(c, d), odd_first = odds(a, b), odd_second = odds(c, d);
            store(to + j, evens(even_first, even_second));
            store(to + apart + j, evens(odd_first, odd_second));
            store(to + 2 * apart + j, odds(even_first, even_second));
            store(to + 3 * apart + j, odds(odd_first, odd_second));
        }
    } else {
        for (int64_t b = 0; b < phases; ++b)
            for (int64_t j = 0; j < pitch; ++j) to[b * apart + j] = line[j * step + b];
    }
}

// Stages `channels` planes of an image from output row `first` on; `line` has room for staging.line() numbers.
inline void stage(
    const Staging &s, const float *source, int64_t channels, int64_t first, float *line, float *to) {
    int64_t plane = s.plane(), length = s.step_w == 1 ? 0 : (s.pitch + LANES) * s.step_w;
    for (int64_t c = 0; c < channels; ++c, source += s.height * s.width)
        for (int64_t a = 0; a < s.phases_h; ++a, to += s.phases_w * plane) {
            for (int64_t i = 0; i < s.rows; ++i) {
                int64_t y = (first + i) * s.step_h + a - s.top;
                float *target = to + i * s.pitch;
                if (y < 0 || y >= s.height) {
                    for (int64_t b = 0; b < s.phases_w; ++b)
                        for (int64_t j = 0; j < s.pitch; j += LANES) store(target + b * plane + j, Vector{});
                } else if (s.step_w == 1) {
                    stage_row(source + y * s.width, s.width, s.left, s.pitch, target);
                } else {
                    stage_row(source + y * s.width, s.width, s.left, length, line);
                    split_row(line, s.step_w, s.phases_w, s.pitch, plane, target);
                }
            }
            for (int64_t b = 0; b < s.phases_w; ++b) store(to + b * plane + plane - LANES, Vector{});
        }
}

// Memory that will be read, or written, asked for ahead while products are made: without that, every copy to and from
// scratch waits for the last-level cache while the multipliers rest.
class Ahead {
  public:
    // `count` runs of `length` numbers, `apart` from the first number of one to the next one's; none beyond `end`.
    Ahead(const float *from, int64_t count, int64_t apart, int64_t length)
        : run_(from), runs_(length > 0 ? count : 0), apart_(apart), length_(length) {}

    int64_t lines() const { return runs_ * ceiling(length_, LINE) ; }

    template <bool written>
    void ask(int64_t lines) {
        for (; lines > 0 && runs_ > 0; --lines) {
            __builtin_prefetch(run_ + at_, written, 2);
            if ((at_ += LINE) >= length_) at_ = 0, run_ += apart_, --runs_;
        }
    }

  private:
    static constexpr int64_t LINE = 16;  // numbers of a cache line
    const float *run_;
    int64_t runs_, apart_, length_, at_ = 0;
};

// Phases of a kernel of `size` positions `dilation` apart: remainders of their places modulo `step`.
inline int64_t phases(int64_t size, int64_t dilation, int64_t step) {
    int64_t largest = 0;
    for (int64_t i = 0; i < size && i < step; ++i) largest = larger(largest, i * dilation % step);
    return largest + 1;
}

}  // namespace gpucnn
