// The way back of windows: each number of the image gathers from all windows that met it, in a fixed order.
//
// The columns w = i * stride_w + phase, i = 0, 1, ... are met by the same places s, each by the windows i + index(s),
// side by side: so the numbers of one phase are computed in vectors, as a line, and the lines put in turns into the
// row. Rows likewise. Nothing is added into memory, so that overlapping windows need no order among themselves.
#pragma once

#include "windows.h"

namespace gpucnn {

// The places along one axis that meet the positions i * stride + phase of the image: first, first + step, ...; the
// k-th meets i in window `window - k * back + i`.
struct Met {
    int64_t first, step, count, window, back;
};

inline Met meeting(int64_t phase, int64_t padding, int64_t places, int64_t stride, int64_t dilation) {
    int64_t divisor = stride;
    for (int64_t rest = dilation; rest;) {
        int64_t next = divisor % rest;
        divisor = rest;
        rest = next;
    }
    int64_t step = stride / divisor, back = dilation / divisor;
    for (int64_t first = 0; first < least(step, places); ++first) {
        int64_t distance = phase + padding - first * dilation, window = floor_divide(distance, stride);
        if (window * stride == distance) return {first, step, ceil_divide(places - first, step), window, back};
    }
    return {0, step, 0, 0, back};
}

// Where a phase's numbers are gathered: from the window `offset` numbers on in the lines, which they met at `place`.
struct Spots {
    static constexpr int AT_ONCE = 9;  // added in registers
    int count = 0;
    int64_t offset[AT_ONCE], place[AT_ONCE];
};

struct Gather {
    struct Band {
        int64_t h, end;        // rows of the image
        int64_t first, count;  // rows of windows that they gather from
    };

    const Windows &w;
    Lines lines;  // of windows' numbers, a row of them after the other
    Bands bands;
    int64_t held;    // rows of windows that a band needs at most
    int64_t length;  // of the line of a phase: numbers, in whole vectors

    // `multiplier` planes are gathered into one.
    Gather(const Windows &w, int64_t multiplier)
        : w(w),
          lines(
              1, w.out_width, floor_divide(w.left - (w.columns - 1) * w.dilation_w, w.stride_w),
              floor_divide(w.stride_w - 1 + w.left, w.stride_w) + round_up(ceil_divide(w.width, w.stride_w), LANES)),
          bands(
              w.planes(), w.height, w.width * multiplier, ceil_divide(lines.pitch, w.stride_h),
              w.reach(1) + w.stride_h) {
        held = least(w.out_height, ceil_divide(bands.height + w.reach(1), w.stride_h) + 1);
        length = round_up(ceil_divide(w.width, w.stride_w), LANES);
    }

    // Takes memory from `slot`, which stays with the calling thread; false where there is none.
    bool prepare(int slot) {
        // Strides of hundreds have as many places of each; nothing is gained there by finding them beforehand.
        int64_t phases = w.stride_h * w.stride_w <= KNOWN ? w.stride_h * w.stride_w : 0;
        void *memory = scratch(
            slot, ((w.stride_w + w.stride_h) * sizeof(Met) + phases * sizeof(Spots)) / sizeof(float));
        if (!memory) return false;
        across = static_cast<Met *>(memory);
        down = across + w.stride_w;
        whole = phases ? reinterpret_cast<Spots *>(down + w.stride_h) : nullptr;
        for (int64_t i = 0; i < w.stride_w; ++i)
            across[i] = meeting(i, w.left, w.columns, w.stride_w, w.dilation_w);
        for (int64_t i = 0; i < w.stride_h; ++i) down[i] = meeting(i, w.top, w.rows, w.stride_h, w.dilation_h);
        for (int64_t i = 0; i < phases; ++i) {
            const Met &r = down[i / w.stride_w], &s = across[i % w.stride_w];
            whole[i].count = r.count * s.count <= Spots::AT_ONCE ? 0 : -1;
            if (whole[i].count == 0) each_spot(r, 0, 0, r.count, s, [&](int64_t offset, int64_t place) {
                int n = whole[i].count++;
                whole[i].offset[n] = offset;
                whole[i].place[n] = place;
            });
        }
        return true;
    }

    Band band(int64_t h) const {
        int64_t end = least(h + bands.height, w.height);
        int64_t first = most(0, ceil_divide(h + w.top - (w.rows - 1) * w.dilation_h, w.stride_h));
        int64_t last = least(w.out_height, floor_divide(end - 1 + w.top, w.stride_h) + 1);
        return {h, end, first, most(0, last - first)};
    }

    // The band's rows of one plane: sums of term(where the window's number is, seen from lines.row(0), place), each a
    // Vector. `add` adds them to what the plane holds. `memory` is for stride_w * length numbers.
    template <class Term>
    void rows(const Band &band, bool add, float *plane, float *memory, Term term) const {
        for (int64_t h = band.h; h < band.end; ++h) {
            const int64_t i = h / w.stride_h, phase = h - i * w.stride_h;
            const Met &r = down[phase];
            float *out = plane + h * w.width;
            // Windows' rows first + .. of those that would meet this one: others are beyond the edges.
            int64_t window = r.window + i, beyond = window - (w.out_height - 1);
            int64_t first = beyond > 0 ? ceil_divide(beyond, r.back) : 0, end = r.count;
            if (window - (end - 1) * r.back < 0) end = floor_divide(window, r.back) + 1;
            const Spots *spots = whole && first == 0 && end == r.count ? whole + phase * w.stride_w : nullptr;
            int64_t shift = (i - band.first) * lines.pitch;
            if (w.stride_w == 1) {
                line(r, first, end, across[0], spots, shift, add, w.width, out, term);
            } else if (w.stride_w == 2 && !add && spots && pair(spots[0], spots[1], shift, out, term)) {
            } else {
                for (int64_t k = 0; k < w.stride_w; ++k)
                    line(
                        r, first, end, across[k], spots ? spots + k : nullptr, shift, false, length,
                        memory + k * length, term);
                merge(memory, add, out);
            }
        }
    }

 private:
    static constexpr int64_t KNOWN = 1024;
    Met *across, *down;  // for each phase of the columns, of the rows
    Spots *whole;        // for each of both, away from the edges; null where they are more than KNOWN

    template <class Body>
    GPUCNN_INLINE void each_spot(
        const Met &r, int64_t shift, int64_t first, int64_t end, const Met &s, Body &&body) const {
        for (int64_t k = first; k < end; ++k) {
            int64_t offset = shift + (r.window - k * r.back) * lines.pitch + s.window;
            int64_t place = (r.first + k * r.step) * w.columns + s.first;
            for (int64_t j = 0; j < s.count; ++j) body(offset - j * s.back, place + j * s.step);
        }
    }

    template <int N, class Term>
    static GPUCNN_INLINE Vector terms(const int64_t (&offset)[N], const int64_t (&place)[N], Vector total, Term &term) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) total += term(offset[n], place[n]);
        return total;
    }

    // to[0 .. count - 1] = (what it is, where `add`) + the terms at N spots.
    template <int N, class Term>
    static void sum(const Spots &spots, int64_t shift, bool add, int64_t count, float *to, Term term) {
        int64_t offset[N], place[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            offset[n] = spots.offset[n] + shift;
            place[n] = spots.place[n];
        }
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) {
            store(to + i, terms(offset, place, add ? load(to + i) : Vector{}, term));
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) offset[n] += LANES;
        }
        if (i < count)
            store_first(to + i, terms(offset, place, add ? load_first(to + i, count - i) : Vector{}, term), count - i);
    }

    // Any number of spots, from the back: the largest sum that there is code for, then the others.
    template <class Term>
    static void sum_any(Spots &spots, int64_t shift, bool &add, int64_t count, float *to, Term &term) {
        while (spots.count) {
            int n = spots.count;
            n = n >= 9 ? 9 : n >= 6 ? 6 : n >= 4 ? 4 : n;
            Spots last;
            for (int i = 0; i < n; ++i) {
                last.offset[i] = spots.offset[spots.count - n + i];
                last.place[i] = spots.place[spots.count - n + i];
            }
            sum_known(n, last, shift, add, count, to, term);
            spots.count -= n;
            add = true;
        }
    }

    template <class Term>
    static bool sum_known(int n, const Spots &spots, int64_t shift, bool add, int64_t count, float *to, Term &term) {
        if (n == 1) sum<1>(spots, shift, add, count, to, term);
        else if (n == 2) sum<2>(spots, shift, add, count, to, term);
        else if (n == 3) sum<3>(spots, shift, add, count, to, term);
        else if (n == 4) sum<4>(spots, shift, add, count, to, term);
        else if (n == 6) sum<6>(spots, shift, add, count, to, term);
        else if (n == 9) sum<9>(spots, shift, add, count, to, term);
        else return false;
        return true;
    }

    // A row's numbers of one phase.
    template <class Term>
    void line(
        const Met &r, int64_t first, int64_t end, const Met &s, const Spots *whole, int64_t shift, bool add,
        int64_t count, float *to, Term &term) const {
        if (whole && sum_known(whole->count, *whole, shift, add, count, to, term)) return;
        Spots spots;
        each_spot(r, 0, first, end, s, [&](int64_t offset, int64_t place) {
            spots.offset[spots.count] = offset;
            spots.place[spots.count] = place;
            if (++spots.count == Spots::AT_ONCE) sum_any(spots, shift, add, count, to, term);
        });
        sum_any(spots, shift, add, count, to, term);
        if (!add) fill(to, count, 0);
    }

    // Both phases of a stride of 2 at once, put in turns while they are in registers.
    template <int A, int B, class Term>
    void two_lines(const Spots &even, const Spots &odd, int64_t shift, float *out, Term term) const {
        int64_t a[A], b[B], a_place[A], b_place[B];
#pragma GCC unroll 8
        for (int n = 0; n < A; ++n) {
            a[n] = even.offset[n] + shift;
            a_place[n] = even.place[n];
        }
#pragma GCC unroll 8
        for (int n = 0; n < B; ++n) {
            b[n] = odd.offset[n] + shift;
            b_place[n] = odd.place[n];
        }
        for (int64_t rest = w.width; rest > 0; rest -= 2 * LANES, out += 2 * LANES) {
            Vector evens = terms(a, a_place, Vector{}, term), odds = terms(b, b_place, Vector{}, term);
            Vector low = zip_first(evens, odds), high = zip_second(evens, odds);
            if (rest >= 2 * LANES) {
                store(out, low);
                store(out + LANES, high);
            } else {
                store_first(out, low, least(rest, LANES));
                if (rest > LANES) store_first(out + LANES, high, rest - LANES);
            }
#pragma GCC unroll 8
            for (int n = 0; n < A; ++n) a[n] += LANES;
#pragma GCC unroll 8
            for (int n = 0; n < B; ++n) b[n] += LANES;
        }
    }

    // False where there is no code for so many spots.
    template <class Term>
    bool pair(const Spots &even, const Spots &odd, int64_t shift, float *out, Term &term) const {
        int counts = even.count * 10 + odd.count;
        if (counts == 11) two_lines<1, 1>(even, odd, shift, out, term);  // windows of 2
        else if (counts == 21) two_lines<2, 1>(even, odd, shift, out, term);  // of 3
        else if (counts == 42) two_lines<4, 2>(even, odd, shift, out, term);
        else if (counts == 12) two_lines<1, 2>(even, odd, shift, out, term);  // and with padding
        else if (counts == 24) two_lines<2, 4>(even, odd, shift, out, term);
        else return false;
        return true;
    }

    // Lines put in turns into a row.
    void merge(const float *lines, bool add, float *out) const {
        for (int64_t k = 0; k < w.stride_w; ++k)
            for (int64_t at = k, j = k * length; at < w.width; at += w.stride_w, ++j)
                out[at] = add ? out[at] + lines[j] : lines[j];
    }
};

}  // namespace gpucnn
