// Average pooling and its gradient; means of whole planes.
//
// Limit: x and y once through memory.
#include <atomic>

#include "gather.h"
#include "windows.h"

namespace gpucnn {
namespace {

// R x S windows (0: as many as `w` says): a row of sums times `factor`.
template <int R, int S>
void pool_row(
    const Windows &w, const Lines &lines, const int64_t *place, int64_t first_row, const float *factor, float *y) {
    const int64_t rows = R ? R : w.rows, columns = S ? S : w.columns;
    for (int64_t q = 0; q < w.out_width; q += LANES) {
        Vector sum = {};
        for (int64_t r = 0; r < rows; ++r) {
            const float *row = lines.row(first_row + r) + q;
            Vector part = {};
            for (int64_t s = 0; s < columns; ++s) part += load(row + place[s]);
            sum += part;
        }
        if (q + LANES <= w.out_width) store(y + q, sum * load(factor + q));
        else {
            int count = w.out_width - q;
            store_first(y + q, sum * load_first(factor + q, count), count);
        }
    }
}

// The sum of `count` numbers, in 4 * LANES sums that are then added.
float sum_plane(const float *x, int64_t count) {
    Vector sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int v = 0; v < 4; ++v) sum[v] += load(x + i + v * LANES);
    for (; i < count; i += LANES) sum[0] += load_first(x + i, least(LANES, count - i));
    return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

constexpr int64_t WORK = 1 << 15;  // numbers a task

}  // namespace

// y (images, channels, out_height, out_width): windows' sums times factor (out_height, out_width).
GPUCNN_EXPORT int gpucnn_average_pool_forward(
    int threads, const Windows *windows, const float *x, const float *factor, float *y) {
    const Windows &w = *windows;
    Lines lines = Lines::under(w);
    Bands bands(w.planes(), w.out_height, w.out_width, lines.row_pitch() * w.stride_h, w.reach(1));
    const int64_t *place = lines.places(1, w);
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
            mine.lay(
                x + plane * w.height * w.width, w.height, w.width, p * w.stride_h - w.top, w.reach(rows), 0);
            for (int64_t i = 0; i < rows; ++i) {
                const float *factors = factor + (p + i) * w.out_width;
                float *to = y + (plane * w.out_height + p + i) * w.out_width;
                if (w.rows == 2 && w.columns == 2) pool_row<2, 2>(w, mine, place, i * w.stride_h, factors, to);
                else if (w.rows == 3 && w.columns == 3) pool_row<3, 3>(w, mine, place, i * w.stride_h, factors, to);
                else pool_row<0, 0>(w, mine, place, i * w.stride_h, factors, to);
            }
        });
    });
    return failed.load();
}

// dx (images, channels, height, width): each dy times its factor, on all places of its window.
GPUCNN_EXPORT int gpucnn_average_pool_backward(
    int threads, const Windows *windows, const float *dy, const float *factor, float *dx) {
    const Windows &w = *windows;
    Gather gather(w, 1);
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
            for (int64_t i = 0; i < band.count; ++i) {
                const float *factors = factor + (band.first + i) * w.out_width;
                const float *from = dy + (plane * w.out_height + band.first + i) * w.out_width;
                float *to = lines.row(i);
                int64_t q = 0;
                for (; q + LANES <= w.out_width; q += LANES) store(to + q, load(from + q) * load(factors + q));
                if (q < w.out_width) {
                    int count = w.out_width - q;
                    store_first(to + q, load_first(from + q, count) * load_first(factors + q, count), count);
                }
            }
            const float *shares = lines.row(0);
            gather.rows(band, false, dx + plane * w.height * w.width, memory, [=](int64_t offset, int64_t) {
                return load(shares + offset);
            });
        });
    });
    return failed.load();
}

// y (planes): the mean of each plane of `count` numbers.
GPUCNN_EXPORT int gpucnn_plane_means(int threads, int64_t planes, int64_t count, const float *x, float *y) {
    int64_t together = most(1, WORK / count), tasks = ceil_divide(planes, together);
    parallel_for(threads, tasks, [&](int64_t task) {
        for (int64_t i = task * together; i < least(planes, (task + 1) * together); ++i)
            y[i] = sum_plane(x + i * count, count) / static_cast<float>(count);
    });
    return 0;
}

// x (planes, count): each plane's share of its dy.
GPUCNN_EXPORT int gpucnn_plane_shares(int threads, int64_t planes, int64_t count, const float *dy, float *dx) {
    int64_t together = most(1, WORK / count), tasks = ceil_divide(planes, together);
    parallel_for(threads, tasks, [&](int64_t task) {
        for (int64_t i = task * together; i < least(planes, (task + 1) * together); ++i)
            fill(dx + i * count, count, dy[i] / static_cast<float>(count));
    });
    return 0;
}

}  // namespace gpucnn
