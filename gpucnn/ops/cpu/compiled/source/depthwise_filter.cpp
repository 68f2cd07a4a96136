// Depthwise convolution's filter gradient: for each place of a kernel, the dot product of a plane of dy and of what the
// place meets in x.
//
// Limit: x and dy once through memory. The sums of all places of a 3 x 3 or 5 x 5 kernel stay in registers, a vector
// each; TALL rows of dy at a time share the rows of x that they meet.
#include <atomic>

#include "windows.h"

namespace gpucnn {
namespace {

constexpr int TALL = 4;

// The places' sums over `rows` rows of a plane, a vector each, added to `sum`.
template <int R, int S, int STRIDE, int T>
GPUCNN_INLINE void add_rows(
    const float *row, int64_t pitch, const int64_t *place, const float *dy, int64_t width, Vector (&sum)[R][S]) {
    auto products = [&](int64_t q, const Vector(&slope)[T], IntVector mask) {
#pragma GCC unroll 16
        for (int i = 0; i < (T - 1) * STRIDE + R; ++i) {
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) {
                Vector x = (Vector)((IntVector)load(row + i * pitch + place[s] + q) & mask);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t)
                    if (i >= t * STRIDE && i < t * STRIDE + R) sum[i - t * STRIDE][s] += slope[t] * x;
            }
        }
    };
    int64_t q = 0;
    for (; q + LANES <= width; q += LANES) {
        Vector slope[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) slope[t] = load(dy + t * width + q);
        products(q, slope, ~IntVector{});
    }
    if (q < width) {
        // Lanes beyond the row meet what windows do not: an infinity there, times zero, would be a NaN.
        Vector slope[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) slope[t] = load_first(dy + t * width + q, width - q);
        products(q, slope, lane_numbers() < static_cast<int32_t>(width - q));
    }
}

template <int R, int S, int STRIDE>
void add_unrolled(const Windows &w, const Lines &lines, const float *dy, int64_t rows, float *sums) {
    int64_t place[S], pitch = lines.row_pitch(), p = 0;
    Vector sum[R][S] = {};
    for (int s = 0; s < S; ++s) place[s] = lines.place(s * w.dilation_w - w.left);
    for (; p + TALL <= rows; p += TALL)
        add_rows<R, S, STRIDE, TALL>(lines.row(p * STRIDE), pitch, place, dy + p * w.out_width, w.out_width, sum);
    for (; p < rows; ++p)
        add_rows<R, S, STRIDE, 1>(lines.row(p * STRIDE), pitch, place, dy + p * w.out_width, w.out_width, sum);
    // Unrolled, or the sums would be numbered at run time, and so live in memory.
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) sums[r * S + s] += sum_of(sum[r][s]);
    }
}

// V places side by side in a kernel's row.
template <int V>
void add_places(
    const Windows &w, const Lines &lines, const float *dy, int64_t r, int64_t s, int64_t rows, float *sums) {
    int64_t place[V];
    Vector sum[V] = {};
    for (int v = 0; v < V; ++v) place[v] = lines.place((s + v) * w.dilation_w - w.left);
    for (int64_t p = 0; p < rows; ++p, dy += w.out_width) {
        const float *row = lines.row(p * w.stride_h + r * w.dilation_h);
        int64_t q = 0;
        for (; q + LANES <= w.out_width; q += LANES) {
            Vector slope = load(dy + q);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[v] += slope * load(row + place[v] + q);
        }
        if (q < w.out_width) {
            int count = w.out_width - q;
            Vector slope = load_first(dy + q, count);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v)
                sum[v] += slope * (Vector)((IntVector)load(row + place[v] + q) & (lane_numbers() < count));
        }
    }
    for (int v = 0; v < V; ++v) sums[r * w.columns + s + v] += sum_of(sum[v]);
}

// Adds to `sums` (R, S) what `rows` rows of dy give with the lines.
void add_band(const Windows &w, const Lines &lines, const float *dy, int64_t rows, float *sums) {
    if (w.dilation_h == 1 && w.rows == w.columns && w.stride_h <= 2) {
        if (w.rows == 3 && w.stride_h == 1) return add_unrolled<3, 3, 1>(w, lines, dy, rows, sums);
        if (w.rows == 3) return add_unrolled<3, 3, 2>(w, lines, dy, rows, sums);
        if (w.rows == 5 && REGISTERS == 32) {
            if (w.stride_h == 1) return add_unrolled<5, 5, 1>(w, lines, dy, rows, sums);
            return add_unrolled<5, 5, 2>(w, lines, dy, rows, sums);
        }
    }
    constexpr int V = 6;
    for (int64_t r = 0; r < w.rows; ++r) {
        int64_t s = 0;
        for (; s + V <= w.columns; s += V) add_places<V>(w, lines, dy, r, s, rows, sums);
        for (; s < w.columns; ++s) add_places<1>(w, lines, dy, r, s, rows, sums);
    }
}

}  // namespace

// A task is a channel: its images are added in their order.
GPUCNN_EXPORT int gpucnn_depthwise_backward_filter(
    int threads, const Windows *windows, const float *dy, const float *x, float *dw) {
    const Windows &w = *windows;
    Lines lines = Lines::under(w);
    Bands bands(1, w.out_height, w.out_width, lines.row_pitch() * w.stride_h, w.reach(1));
    int64_t taps = w.rows * w.columns;
    std::atomic<int> failed{0};
    parallel_for(threads, w.channels, [&](int64_t c) {
        Lines mine = lines;
        if (!mine.allocate(0, w.reach(bands.height), 0)) {
            failed.store(1);
            return;
        }
        fill(dw + c * w.multiplier * taps, w.multiplier * taps, 0);
        for (int64_t n = 0; n < w.images; ++n) {
            int64_t plane = n * w.channels + c;
            for (int64_t p = 0; p < w.out_height; p += bands.height) {
                int64_t rows = least(bands.height, w.out_height - p);
                mine.lay(
                    x + plane * w.height * w.width, w.height, w.width, p * w.stride_h - w.top, w.reach(rows), 0);
                for (int64_t m = 0; m < w.multiplier; ++m)
                    add_band(
                        w, mine, dy + ((plane * w.multiplier + m) * w.out_height + p) * w.out_width, rows,
                        dw + (c * w.multiplier + m) * taps);
            }
        }
    });
    return failed.load();
}

}  // namespace gpucnn
