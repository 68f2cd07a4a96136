// Depthwise convolution forward, and its input gradient: every channel has kernels of its own.
//
// Limit: x and y once through memory. The 9 products of a 3 x 3 kernel take 4.5 cycles a vector; the loads for them,
// of which two in three lie across two cache lines, would take 7: so TALL output rows are computed at a time, which
// share their input rows, with the kernel in registers.
#include <atomic>

#include "gather.h"
#include "windows.h"

namespace gpucnn {
namespace {

constexpr int TALL = 4;

// T rows of outputs, the first one's windows at `row`: onto the bias, or onto what `out` holds where `add`.
template <int R, int S, int STRIDE, int T>
GPUCNN_INLINE void correlate_rows(
    const float *row, int64_t pitch, const int64_t *place, const Vector (&tap)[R][S], Vector bias, bool add,
    int64_t width, float *out) {
    auto products = [&](int64_t q, Vector(&sum)[T]) {
#pragma GCC unroll 16
        for (int i = 0; i < (T - 1) * STRIDE + R; ++i) {
#pragma GCC unroll 8
            for (int s = 0; s < S; ++s) {
                Vector x = load(row + i * pitch + place[s] + q);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t)
                    if (i >= t * STRIDE && i < t * STRIDE + R) sum[t] += tap[i - t * STRIDE][s] * x;
            }
        }
    };
    int64_t q = 0;
    for (; q + LANES <= width; q += LANES) {
        Vector sum[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sum[t] = add ? load(out + t * width + q) : bias;
        products(q, sum);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) store(out + t * width + q, sum[t]);
    }
    if (q < width) {
        int count = width - q;
        Vector sum[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) sum[t] = add ? load_first(out + t * width + q, count) : bias;
        products(q, sum);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) store_first(out + t * width + q, sum[t], count);
    }
}

template <int R, int S, int STRIDE>
void correlate_unrolled(
    const Windows &w, const Lines &lines, const float *kernel, float bias, bool add, int64_t rows, float *out) {
    int64_t place[S];
    Vector tap[R][S];
    for (int s = 0; s < S; ++s) place[s] = lines.place(s * w.dilation_w - w.left);
    // Unrolled, or the kernel would be numbered at run time, and so live in memory.
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) tap[r][s] = broadcast(kernel[r * S + s]);
    }
    Vector start = broadcast(bias);
    int64_t pitch = lines.row_pitch(), p = 0;
    auto row = [&] { return lines.row(p * STRIDE); };
    for (; p + TALL <= rows; p += TALL)
        correlate_rows<R, S, STRIDE, TALL>(row(), pitch, place, tap, start, add, w.out_width, out + p * w.out_width);
    for (; p < rows; ++p)
        correlate_rows<R, S, STRIDE, 1>(row(), pitch, place, tap, start, add, w.out_width, out + p * w.out_width);
}

// V vectors of one row of outputs, the last of them with `last` numbers.
template <int V>
void correlate_vectors(
    const Windows &w, const Lines &lines, const int64_t *place, const float *row, const float *kernel, float bias,
    bool add, int last, float *out) {
    Vector sum[V];
    for (int v = 0; v < V; ++v) {
        sum[v] = broadcast(bias);
        if (add) sum[v] = v < V - 1 ? load(out + v * LANES) : load_first(out + v * LANES, last);
    }
    for (int64_t r = 0; r < w.rows; ++r, row += w.dilation_h * lines.row_pitch()) {
        for (int64_t s = 0; s < w.columns; ++s) {
            const float *x = row + place[s];
            Vector tap = broadcast(*kernel++);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[v] += tap * load(x + v * LANES);
        }
    }
    for (int v = 0; v < V - 1; ++v) store(out + v * LANES, sum[v]);
    store_first(out + (V - 1) * LANES, sum[V - 1], last);
}

// `rows` rows of one plane's outputs, whose windows begin at the first of the lines.
void correlate(
    const Windows &w, const Lines &lines, const int64_t *place, const float *kernel, float bias, bool add, int64_t rows,
    float *out) {
    if (w.dilation_h == 1 && w.rows == w.columns && w.stride_h <= 2) {
        if (w.rows == 3 && w.stride_h == 1) return correlate_unrolled<3, 3, 1>(w, lines, kernel, bias, add, rows, out);
        if (w.rows == 3) return correlate_unrolled<3, 3, 2>(w, lines, kernel, bias, add, rows, out);
        if (w.rows == 5 && w.stride_h == 1) return correlate_unrolled<5, 5, 1>(w, lines, kernel, bias, add, rows, out);
        if (w.rows == 5) return correlate_unrolled<5, 5, 2>(w, lines, kernel, bias, add, rows, out);
    }
    constexpr int V = 4;
    for (int64_t p = 0; p < rows; ++p, out += w.out_width) {
        const float *row = lines.row(p * w.stride_h);
        int64_t q = 0;
        for (; q + V * LANES <= w.out_width; q += V * LANES)
            correlate_vectors<V>(w, lines, place, row + q, kernel, bias, add, LANES, out + q);
        for (; q < w.out_width; q += LANES)
            correlate_vectors<1>(w, lines, place, row + q, kernel, bias, add, least(LANES, w.out_width - q), out + q);
    }
}

// Each plane of outputs from one of x (forward), or from `multiplier` planes of dy (back).
int correlate_planes(
    int threads, const Windows &w, bool back, const float *from, const float *weight, const float *bias, float *out) {
    Lines lines = Lines::under(w);
    Bands bands(w.planes(), w.out_height, w.out_width * w.multiplier, lines.row_pitch() * w.stride_h, w.reach(1));
    int64_t area = w.height * w.width, out_area = w.out_height * w.out_width, taps = w.rows * w.columns;
    const int64_t *place = lines.places(2, w);
    if (!place) return 1;
    std::atomic<int> failed{0};
    parallel_for(threads, bands.tasks(), [&](int64_t task) {
        Lines mine = lines;
        if (!mine.allocate(0, w.reach(bands.height), 0)) {
            failed.store(1);
            return;
        }
        bands.each(task, [&](int64_t plane, int64_t p) {
            int64_t rows = least(bands.height, w.out_height - p);
            for (int64_t m = 0; m < w.multiplier; ++m) {
                int64_t k = plane % w.channels * w.multiplier + m, output = plane * w.multiplier + m;
                if (back || m == 0)
                    mine.lay(
                        from + (back ? output : plane) * area, w.height, w.width, p * w.stride_h - w.top,
                        w.reach(rows), 0);
                correlate(
                    w, mine, place, weight + k * taps, bias ? bias[k] : 0, back && m > 0, rows,
                    out + (back ? plane : output) * out_area + p * w.out_width);
            }
        });
    });
    return failed.load();
}

// The gradient where the stride is 1: dy, padded by the rest of the kernel's reach, under kernels turned round.
int turned(int threads, const Windows &w, const float *dy, const float *weight, float *dx) {
    int64_t taps = w.rows * w.columns, count = w.channels * w.multiplier * taps;
    float *kernels = scratch(1, count);
    if (!kernels) return 1;
    for (int64_t i = 0; i < count; ++i) kernels[i] = weight[i / taps * taps + (taps - 1 - i % taps)];
    Windows back = w;
    back.height = w.out_height;
    back.width = w.out_width;
    back.out_height = w.height;
    back.out_width = w.width;
    back.top = (w.rows - 1) * w.dilation_h - w.top;
    back.left = (w.columns - 1) * w.dilation_w - w.left;
    return correlate_planes(threads, back, true, dy, kernels, nullptr, dx);
}

int gathered(int threads, const Windows &w, const float *dy, const float *weight, float *dx) {
    Gather gather(w, w.multiplier);
    int64_t taps = w.rows * w.columns;
    if (!gather.prepare(2)) return 1;
    std::atomic<int> failed{0};
    parallel_for(threads, gather.bands.tasks(), [&](int64_t task) {
        Lines lines = gather.lines;
        float *memory = scratch(3, w.stride_w * gather.length);
        if (!memory || !lines.allocate(0, gather.held, 0)) {
            failed.store(1);
            return;
        }
        gather.bands.each(task, [&](int64_t plane, int64_t h) {
            Gather::Band band = gather.band(h);
            for (int64_t m = 0; m < w.multiplier; ++m) {
                const float *kernel = weight + (plane % w.channels * w.multiplier + m) * taps;
                lines.lay(
                    dy + (plane * w.multiplier + m) * w.out_height * w.out_width, w.out_height, w.out_width,
                    band.first, band.count, 0);
                const float *from = lines.row(0);
                gather.rows(band, m > 0, dx + plane * w.height * w.width, memory, [=](int64_t offset, int64_t place) {
                    return broadcast(kernel[place]) * load(from + offset);
                });
            }
        });
    });
    return failed.load();
}

}  // namespace

GPUCNN_EXPORT int gpucnn_depthwise_forward(
    int threads, const Windows *w, const float *x, const float *weight, const float *bias, float *y) {
    return correlate_planes(threads, *w, false, x, weight, bias, y);
}

GPUCNN_EXPORT int gpucnn_depthwise_backward_data(
    int threads, const Windows *w, const float *dy, const float *weight, float *dx) {
    bool one = w->stride_h == 1 && w->stride_w == 1;
    return (one ? turned : gathered)(threads, *w, dy, weight, dx);
}

}  // namespace gpucnn
