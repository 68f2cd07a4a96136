// Max pooling and its gradient. Places in the window are counted in one byte each.
//
// Limit: x, y and the places once through memory. For a vector of windows each of their places takes two comparisons
// and two selections; so that a NaN, which wins over all numbers, needs no comparison of its own, planes without any
// go another way than those with one.
#include <atomic>

#include "gather.h"
#include "windows.h"

namespace gpucnn {
namespace {

typedef uint8_t ByteVector __attribute__((vector_size(LANES)));

GPUCNN_INLINE void store_bytes(uint8_t *to, IntVector value, int64_t count) {
    ByteVector bytes = __builtin_convertvector(value, ByteVector);
    if (count >= LANES) std::memcpy(to, &bytes, sizeof bytes);
    else std::memcpy(to, &bytes, count);
}

// For each window its first place that lies in the image, along one axis; -1 where there is none.
void first_places(
    int64_t windows, int64_t places, int64_t stride, int64_t padding, int64_t dilation, int64_t size, int32_t *first) {
    for (int64_t i = 0; i < windows; ++i) {
        int64_t at = i * stride - padding, s = at < 0 ? ceil_divide(-at, dilation) : 0;
        first[i] = s < places && at + s * dilation < size ? s : -1;
    }
}

// R x S windows (0: as many as `w` says): a row of maxima and their places, from lines whose padding is minus infinity.
template <int R, int S, bool NANS>
void pool_row(
    const Windows &w, const Lines &lines, const int64_t *places, int64_t first_row, int32_t first_place,
    const int32_t *first_column, float *y, uint8_t *place) {
    const int64_t rows = R ? R : w.rows, columns = S ? S : w.columns;
    for (int64_t q = 0; q < w.out_width; q += LANES) {
        int64_t count = least(LANES, w.out_width - q);
        // Where everything is minus infinity no place is better than the first in the image.
        IntVector from;
        std::memcpy(&from, first_column + q, sizeof from);
        IntVector at = first_place < 0 ? IntVector{} : (from >= 0) & (from + first_place);
        Vector top = Vector{} - __builtin_inff();
        for (int64_t r = 0; r < rows; ++r) {
            const float *row = lines.row(first_row + r * w.dilation_h) + q;
            for (int64_t s = 0; s < columns; ++s) {
                Vector x = load(row + places[s]);
                IntVector better = NANS ? (x > top) | ((x != x) & (top == top)) : x > top;
                top = better ? x : top;
                at = better ? IntVector{} + static_cast<int32_t>(r * columns + s) : at;
            }
        }
        if (count == LANES) store(y + q, top);
        else store_first(y + q, top, count);
        store_bytes(place + q, at, count);
    }
}

template <bool NANS>
void pool_rows(
    const Windows &w, const Lines &lines, const int64_t *places, int64_t p, int64_t rows, const int32_t *first_row,
    const int32_t *first_column, float *y, uint8_t *place) {
    for (int64_t i = 0; i < rows; ++i) {
        int64_t row = i * w.stride_h, out = (p + i) * w.out_width;
        int32_t first = first_row[p + i] < 0 ? -1 : first_row[p + i] * static_cast<int32_t>(w.columns);
        if (w.rows == 2 && w.columns == 2)
            pool_row<2, 2, NANS>(w, lines, places, row, first, first_column, y + out, place + out);
        else if (w.rows == 3 && w.columns == 3)
            pool_row<3, 3, NANS>(w, lines, places, row, first, first_column, y + out, place + out);
        else pool_row<0, 0, NANS>(w, lines, places, row, first, first_column, y + out, place + out);
    }
}

// Whether a NaN or an infinity is among these: NaN and infinity, times zero, are NaN.
bool unusual(const float *x, int64_t count) {
    Vector sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int v = 0; v < 4; ++v) sum[v] += load(x + i + v * LANES) * 0.0f;
    for (; i < count; i += LANES) sum[0] += load_first(x + i, least(LANES, count - i)) * 0.0f;
    float total = sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
    return total != total;
}

}  // namespace

// y and place (images, channels, out_height, out_width): the first largest number of each window, or its first NaN.
GPUCNN_EXPORT int gpucnn_max_pool_forward(
    int threads, const Windows *windows, const float *x, float *y, uint8_t *place) {
    const Windows &w = *windows;
    Lines lines = Lines::under(w);
    Bands bands(w.planes(), w.out_height, w.out_width, lines.row_pitch() * w.stride_h, w.reach(1));
    // Columns in whole vectors: what is beyond the last window is read, and not used.
    int64_t padded = round_up(w.out_width, LANES);
    int32_t *first = reinterpret_cast<int32_t *>(scratch(1, w.out_height + padded));
    const int64_t *places = lines.places(2, w);
    if (!first || !places) return 1;
    first_places(w.out_height, w.rows, w.stride_h, w.top, w.dilation_h, w.height, first + padded);
    first_places(w.out_width, w.columns, w.stride_w, w.left, w.dilation_w, w.width, first);
    for (int64_t q = w.out_width; q < padded; ++q) first[q] = 0;
    const float lowest = -__builtin_inff();
    std::atomic<int> failed{0};
    parallel_for(threads, bands.tasks(), [&](int64_t task) {
        Lines mine = lines;
        if (!mine.allocate(0, w.reach(bands.height), lowest)) {
            failed.store(1);
            return;
        }
        bands.each(task, [&](int64_t plane, int64_t p) {
            const float *image = x + plane * w.height * w.width;
            int64_t rows = least(bands.height, w.out_height - p), h = p * w.stride_h - w.top;
            int64_t begin = least(w.height, most(0, h)), end = most(begin, least(w.height, h + w.reach(rows)));
            mine.lay(image, w.height, w.width, h, w.reach(rows), lowest);
            auto pool = unusual(image + begin * w.width, (end - begin) * w.width) ? pool_rows<true> : pool_rows<false>;
            int64_t out = plane * w.out_height * w.out_width;
            pool(w, mine, places, p, rows, first + padded, first, y + out, place + out);
        });
    });
    return failed.load();
}

// dx (images, channels, height, width): each dy at its window's place.
GPUCNN_EXPORT int gpucnn_max_pool_backward(
    int threads, const Windows *windows, const float *dy, const uint8_t *place, float *dx) {
    const Windows &w = *windows;
    Gather gather(w, 1);
    if (!gather.prepare(2)) return 1;
    std::atomic<int> failed{0};
    parallel_for(threads, gather.bands.tasks(), [&](int64_t task) {
        Lines slopes = gather.lines, places = gather.lines;  // places as integers, in memory for floats
        float *memory = scratch(3, w.stride_w * gather.length);
        if (!memory || !slopes.allocate(0, gather.held, 0) || !places.allocate(1, gather.held, 0)) {
            failed.store(1);
            return;
        }
        gather.bands.each(task, [&](int64_t plane, int64_t h) {
            Gather::Band band = gather.band(h);
            const uint8_t *from = place + (plane * w.out_height + band.first) * w.out_width;
            slopes.lay(
                dy + plane * w.out_height * w.out_width, w.out_height, w.out_width, band.first, band.count, 0);
            for (int64_t i = 0; i < band.count; ++i, from += w.out_width) {
                float *to = places.row(i);
                for (int64_t q = 0; q < w.out_width; ++q) {
                    int32_t number = from[q];
                    std::memcpy(to + q, &number, sizeof number);
                }
            }
            const float *slope = slopes.row(0), *number = places.row(0);
            gather.rows(band, false, dx + plane * w.height * w.width, memory, [=](int64_t offset, int64_t at) {
                // A window beyond the edge has no slope, whatever its place.
                IntVector here = (IntVector)load(number + offset) == static_cast<int32_t>(at);
                return here ? load(slope + offset) : Vector{};
            });
        });
    });
    return failed.load();
}

}  // namespace gpucnn
