// Windows that walk over planes, and the planes' rows laid out for them.
//
// Place (r, s) of the windows in output row p meets row p * stride_h - top + r * dilation_h, and for the outputs q,
// q + 1, ... the columns q * stride_w - left + s * dilation_w, stride_w apart. So a row is kept as `step` = stride_w
// lines, line f with the columns f, f + step, ...: what a place meets are then consecutive numbers of one line, for
// any stride and dilation. A margin on both sides, and rows above and below, stand for the padding: nothing is
// masked, and nothing beyond the plane is read. The copy stays in the first-level cache, where it costs a load and a
// store a vector; it is made while the plane comes from memory.
#pragma once

#include "lanes.h"
#include "threads.h"
#include "vector.h"

namespace gpucnn {

// As Python hands it over, int64 each, in this order. Padding on the other two sides is in out_height, out_width.
struct Windows {
    int64_t images, channels, multiplier;  // outputs have channels * multiplier planes
    int64_t height, width, out_height, out_width;
    int64_t rows, columns;  // of a window
    int64_t stride_h, stride_w, top, left, dilation_h, dilation_w;

    int64_t planes() const { return images * channels; }
    // Rows of the image from the first to the last one that `count` rows of windows meet.
    int64_t reach(int64_t count) const { return (count - 1) * stride_h + (rows - 1) * dilation_h + 1; }
};

inline int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
inline int64_t ceil_divide(int64_t a, int64_t b) { return floor_divide(a + b - 1, b); }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_divide(a, b) * b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

inline void fill(float *to, int64_t count, float value) {
    for (int64_t i = 0; i < count; ++i) to[i] = value;
}

inline void copy(const float *from, int64_t count, float *to) {
    if (count < LANES) {
        store_first(to, load_first(from, count), count);
        return;
    }
    for (int64_t i = 0; i < count - LANES; i += LANES) store(to + i, load(from + i));
    store(to + count - LANES, load(from + count - LANES));
}

// Numbers 0, 2, ... of `from` to `even`, 1, 3, ... to `odd`.
inline void deal_out(const float *from, int64_t count, float *even, float *odd) {
    int64_t i = 0;
    auto deal = [&](int64_t at) {
        Vector a = load(from + at), b = load(from + at + LANES);
        store(even + at / 2, evens(a, b));
        store(odd + at / 2, odds(a, b));
    };
    for (; i + 2 * LANES <= count; i += 2 * LANES) deal(i);
    if (i < count && count >= 2 * LANES) {
        deal((count - 2 * LANES) & ~int64_t{1});  // again what is done already, up to the last pair
        if (count % 2) even[count / 2] = from[count - 1];
    } else if (i < count) {
        int first = count < LANES ? count : LANES;
        Vector a = load_first(from, first), b = load_first(from + first, count - first);
        store_first(even, evens(a, b), (count + 1) / 2);
        store_first(odd, odds(a, b), count / 2);
    }
}

struct Lines {
    float *memory = nullptr;
    int64_t step = 1, before = 0, pitch = 0;

    // Lines of rows of `width` numbers, to be read at the indices low .. high - 1.
    Lines(int64_t step, int64_t width, int64_t low, int64_t high) : step(step) {
        before = low < 0 ? round_up(-low, LANES) : 0;
        pitch = round_up(before + most(ceil_divide(width, step), high), LANES);
    }

    // For windows that go over the plane: `count` outputs a row, in whole vectors.
    static Lines under(const Windows &w) {
        int64_t low = floor_divide(-w.left, w.stride_w);
        int64_t high = floor_divide((w.columns - 1) * w.dilation_w - w.left, w.stride_w);
        return Lines(w.stride_w, w.width, low, high + round_up(w.out_width, LANES));
    }

    int64_t row_pitch() const { return step * pitch; }
    // The line of the first column; `place` leads from here.
    float *row(int64_t i) const { return memory + i * row_pitch() + before; }
    // Where column `w` is, seen from column 0 of its row; w may lie in the margin.
    int64_t place(int64_t w) const {
        int64_t index = floor_divide(w, step);
        return (w - index * step) * pitch + index;
    }

    // The windows' columns' places, in memory of `slot`; null where there is none.
    const int64_t *places(int slot, const Windows &w) const {
        int64_t *found = reinterpret_cast<int64_t *>(scratch(slot, 2 * w.columns));
        for (int64_t s = 0; found && s < w.columns; ++s) found[s] = place(s * w.dilation_w - w.left);
        return found;
    }

    // Takes memory for `rows` rows from `slot`, all of it `value`; false where there is none.
    bool allocate(int slot, int64_t rows, float value) {
        memory = scratch(slot, rows * row_pitch());
        if (memory) fill(memory, rows * row_pitch(), value);
        return memory != nullptr;
    }

    // One row of the plane. Margins stay as they are.
    void lay(const float *from, int64_t width, float *to) const {
        if (step == 1) {
            copy(from, width, to);
        } else if (step == 2) {
            deal_out(from, width, to, to + pitch);
        } else {
            for (int64_t phase = 0; phase < step; ++phase)
                for (int64_t w = phase, i = 0; w < width; w += step, ++i) to[phase * pitch + i] = from[w];
        }
    }

    // Rows first .. first + count - 1 of a plane, `value` for those outside of it.
    void lay(const float *plane, int64_t height, int64_t width, int64_t first, int64_t count, float value) const {
        for (int64_t i = 0; i < count; ++i) {
            int64_t h = first + i;
            if (h >= 0 && h < height) lay(plane + h * width, width, row(i));
            else fill(row(i) - before, row_pitch(), value);
        }
    }
};

// Output rows cut into bands whose laid-out rows stay in the first-level cache, a few bands a task. The cut depends
// on the problem alone.
struct Bands {
    static constexpr int64_t NUMBERS = 6144;  // a band's: 24 KiB
    static constexpr int64_t WORK = 16384;    // numbers a task, at least: waking a thread takes some microseconds

    int64_t height, count, planes, together;

    // Planes of `rows` rows, each of them `width` numbers of work; `row_pitch` numbers are laid out for one, and
    // for `extra` more a band.
    Bands(int64_t planes, int64_t rows, int64_t width, int64_t row_pitch, int64_t extra) : planes(planes) {
        int64_t most_rows = most(8, NUMBERS / row_pitch - extra);
        count = ceil_divide(rows, most_rows);
        height = least(rows, round_up(ceil_divide(rows, count), 4));
        count = ceil_divide(rows, height);
        together = most(1, WORK / (height * width));
    }

    int64_t tasks() const { return ceil_divide(planes * count, together); }

    // body(plane, first row) for each band of a task.
    template <class Body>
    void each(int64_t task, Body &&body) const {
        int64_t end = least(planes * count, (task + 1) * together);
        for (int64_t i = task * together; i < end; ++i) body(i / count, i % count * height);
    }
};

}  // namespace gpucnn
