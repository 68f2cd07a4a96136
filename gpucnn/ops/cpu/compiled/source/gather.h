// The way back of windows: each number of the image gathers from all windows that met it, in a fixed order.
//
// The columns w = i * stride_w + phase, i = 0, 1, ... are met by the same places s, each by the windows i + index(s),
// side by side: so the numbers of one phase are computed in vectors, and the phases put in turns when stored. Rows
// likewise. Nothing is added into memory, so that overlapping windows need no order among themselves.
#pragma once

#include "windows.h"

namespace gpucnn {

// The places along one axis that meet the image where it leaves one remainder modulo the stride: first, first + step,
// ...; the k-th lies in window (position) `window - k * back`.
struct Met {
    int64_t first = 0, step = 1, count = 0, window = 0, back = 0;

    // Of `places` places, for position `at` of the image and padding before it.
    Met(int64_t at, int64_t padding, int64_t places, int64_t stride, int64_t dilation) {
        int64_t a = stride, b = dilation;
        while (b) {
            int64_t rest = a % b;
            a = b;
            b = rest;
        }
        step = stride / a;
        back = dilation / a;
        for (; first < least(step, places); ++first) {
            int64_t distance = at + padding - first * dilation;
            window = floor_divide(distance, stride);
            if (window * stride == distance) {
                count = ceil_divide(places - first, step);
                return;
            }
        }
    }
};

struct Gather {
    struct Band {
        int64_t h, end;        // rows of the image
        int64_t first, count;  // rows of windows that they gather from
    };

    const Windows &w;
    Lines lines;  // of windows' numbers, a row of them after the other
    Bands bands;
    int64_t held;  // rows of windows that a band needs at most

    Gather(const Windows &w, int64_t multiplier)
        : w(w),
          lines(
              1, w.out_width, floor_divide(w.left - (w.columns - 1) * w.dilation_w, w.stride_w),
              floor_divide(w.stride_w - 1 + w.left, w.stride_w) + round_up(ceil_divide(w.width, w.stride_w), LANES)),
          bands(
              w.planes(), w.height, w.width * multiplier, ceil_divide(lines.pitch, w.stride_h),
              w.reach(1) + w.stride_h) {
        held = least(w.out_height, ceil_divide(bands.height + w.reach(1), w.stride_h) + 1);
    }

    Band band(int64_t h) const {
        int64_t end = least(h + bands.height, w.height);
        int64_t first = most(0, ceil_divide(h + w.top - (w.rows - 1) * w.dilation_h, w.stride_h));
        int64_t last = least(w.out_height, floor_divide(end - 1 + w.top, w.stride_h) + 1);
        return {h, end, first, most(0, last - first)};
    }

    // The band's rows of one plane: sums of term(row of windows - band.first, column of windows, place), each a
    // Vector. `add` adds them to what the plane holds.
    template <class Term>
    GPUCNN_INLINE void rows(const Band &band, bool add, float *plane, Term &&term) const {
        for (int64_t h = band.h; h < band.end; ++h) {
            Met r(h, w.top, w.rows, w.stride_h, w.dilation_h);
            int64_t skipped = r.count ? most(0, ceil_divide(r.window - (w.out_height - 1), r.back)) : 0;
            float *out = plane + h * w.width;
            auto sum = [&](const Met &s, int64_t i) {
                Vector total = {};
                for (int64_t k = skipped; k < r.count; ++k) {
                    int64_t row = r.window - k * r.back;
                    if (row < 0) break;
                    for (int64_t j = 0; j < s.count; ++j)
                        total += term(
                            row - band.first, s.window - j * s.back + i,
                            (r.first + k * r.step) * w.columns + s.first + j * s.step);
                }
                return total;
            };
            auto put = [&](float *to, Vector value, int64_t count) {
                if (count >= LANES) store(to, add ? load(to) + value : value);
                else if (count > 0) store_first(to, add ? load_first(to, count) + value : value, count);
            };
            if (w.stride_w == 1) {
                Met s(0, w.left, w.columns, 1, w.dilation_w);
                for (int64_t i = 0; i < w.width; i += LANES) put(out + i, sum(s, i), w.width - i);
            } else if (w.stride_w == 2) {
                Met s(0, w.left, w.columns, 2, w.dilation_w), t(1, w.left, w.columns, 2, w.dilation_w);
                for (int64_t i = 0; 2 * i < w.width; i += LANES) {
                    Vector even = sum(s, i), odd = sum(t, i);
                    put(out + 2 * i, in_turns_low(even, odd), w.width - 2 * i);
                    put(out + 2 * i + LANES, in_turns_high(even, odd), w.width - 2 * i - LANES);
                }
            } else {
                for (int64_t phase = 0; phase < w.stride_w; ++phase) {
                    Met s(phase, w.left, w.columns, w.stride_w, w.dilation_w);
                    int64_t count = ceil_divide(w.width - phase, w.stride_w);
                    for (int64_t i = 0; i < count; i += LANES) {
                        float number[LANES];
                        store(number, sum(s, i));
                        for (int64_t l = 0; l < least(LANES, count - i); ++l) {
                            float &to = out[(i + l) * w.stride_w + phase];
                            to = add ? to + number[l] : number[l];
                        }
                    }
                }
            }
        }
    }
};

}  // namespace gpucnn
