// Winograd's convolution and its filter gradient: the order of the work.
//
// By runs of tiles: a task transforms some tens of tiles, multiplies them by all filters and puts the result into
// the image, all in its second-level cache. Together: where the filters are larger than that cache, many tiles are
// transformed first, then the products are made an element and a panel of filters a task, so that each filter is
// read once. Both orders add the same numbers in the same order.
#include "winograd.h"

#include <atomic>

namespace gpucnn {
namespace winograd {
namespace {

// Slots of scratch memory; the last belongs to the tiles' and filters' files.
enum { FILTERS, INPUTS, PRODUCTS };

constexpr int64_t FILTER_LIMIT = 1 << 19;   // transformed filters (numbers) that share the cache with a run of tiles
constexpr int64_t RUN_NUMBERS = 1 << 18;    // transformed tiles of a run
constexpr int64_t TOGETHER_NUMBERS = 1 << 22;  // and of those that are done together
constexpr int64_t PARTIAL_SUMS = 8;

int64_t run_length(const Images &in, int64_t others, int64_t numbers) {
    int64_t length = numbers / (ELEMENTS * (in.blocks() + others) * LANES) / TILE_ROWS * TILE_ROWS;
    return least(most(length, 4 * TILE_ROWS), in.count());
}

struct Convolution {
    int threads, kernel;
    Images in, out;
    const float *x, *bias;
    float *y;
    Filters filters;
    std::atomic<bool> failed{false};

    Tiles inputs(float *values, int64_t first, int64_t count) const { return {values, first, count, in.blocks()}; }
    Tiles products(float *values, int64_t first, int64_t count) const { return {values, first, count, out.blocks()}; }

    void by_runs() {
        int64_t length = run_length(in, out.blocks(), RUN_NUMBERS);
        parallel_for(threads, up(in.count(), length), [&](int64_t task) {
            int64_t first = task * length, count = least(length, in.count() - first);
            Tiles from = inputs(nullptr, first, count), to = products(nullptr, first, count);
            from.values = scratch(INPUTS, from.size());
            to.values = scratch(PRODUCTS, to.size());
            if (!from.values || !to.values) {
                failed = true;
                return;
            }
            bool done = true;
            for (int64_t block = 0; block < in.blocks(); ++block)
                done &= input_tiles(kernel, in, x, from, block);
            for (int64_t e = 0; e < ELEMENTS; ++e)
                for (int64_t panel = 0; panel < filters.panels(); ++panel) multiply(from, filters, to, e, panel);
            for (int64_t block = 0; block < out.blocks(); ++block)
                done &= place_tiles(kernel, out, to, block, bias, y);
            if (!done) failed = true;
        });
    }

    void together() {
        int64_t length = run_length(in, out.blocks(), TOGETHER_NUMBERS);
        for (int64_t first = 0; first < in.count(); first += length) {
            int64_t count = least(length, in.count() - first);
            Tiles from = inputs(nullptr, first, count), to = products(nullptr, first, count);
            from.values = scratch(INPUTS, from.size());
            to.values = scratch(PRODUCTS, to.size());
            if (!from.values || !to.values) {
                failed = true;
                return;
            }
            parallel_for(threads, in.blocks(), [&](int64_t block) {
                if (!input_tiles(kernel, in, x, from, block)) failed = true;
            });
            parallel_for(threads, ELEMENTS * filters.panels(), [&](int64_t task) {
                multiply(from, filters, to, task / filters.panels(), task % filters.panels());
            });
            parallel_for(threads, out.blocks(), [&](int64_t block) {
                if (!place_tiles(kernel, out, to, block, bias, y)) failed = true;
            });
        }
    }
};

struct Gradient {
    int threads, kernel;
    Images x_images, dy_images;
    const float *x, *dy;
    std::atomic<bool> failed{false};

    // The tiles' part of the sums, on this thread and, where `spread`, on others.
    void add(int64_t begin, int64_t end, int64_t length, float *sums, bool spread) {
        int workers = spread ? threads : 1;
        for (int64_t first = begin; first < end; first += length) {
            int64_t count = least(length, end - first), blocks = x_images.blocks();
            Tiles of_x{nullptr, first, count, blocks}, of_dy{nullptr, first, count, dy_images.blocks()};
            of_x.values = scratch(INPUTS, of_x.size());
            of_dy.values = scratch(PRODUCTS, of_dy.size());
            if (!of_x.values || !of_dy.values) {
                failed = true;
                return;
            }
            parallel_for(workers, blocks + of_dy.blocks, [&](int64_t task) {
                bool done = task < blocks ? input_tiles(kernel, x_images, x, of_x, task)
                                          : gradient_tiles(kernel, dy_images, dy, of_dy, task - blocks);
                if (!done) failed = true;
            });
            parallel_for(workers, ELEMENTS * of_dy.blocks, [&](int64_t task) {
                correlate(of_dy, of_x, sums, first == begin, task / of_dy.blocks, task % of_dy.blocks);
            });
        }
    }
};

}  // namespace
}  // namespace winograd

using namespace winograd;

// x (n, c, h, w) to y (n, k, p, q) through filters (k, c, kernel, kernel), or turned ones (c, k, kernel, kernel).
GPUCNN_EXPORT int gpucnn_winograd_forward(
    int threads, int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, int64_t p, int64_t q, int64_t kernel,
    int64_t top, int64_t left, int64_t turned, const float *x, const float *weight, const float *bias, float *y) {
    int64_t step = TILE + 1 - kernel, high = up(p, step), wide = up(q, step);
    Convolution work{threads, static_cast<int>(kernel), {n, c, h, w, top, left, high, wide},
                     {n, k, p, q, 0, 0, high, wide}, x, bias, y, {nullptr, c, k}};
    Filters &filters = work.filters;
    filters.values = scratch(FILTERS, filters.size());
    if (!filters.values) return 1;
    parallel_for(threads, filter_parts(filters),
                 [&](int64_t part) { filters_of(work.kernel, turned, weight, filters, part); });
    if (filters.size() <= FILTER_LIMIT) work.by_runs();
    else work.together();
    return work.failed;
}

// dw (k, c, kernel, kernel) from dy (n, k, p, q) and x (n, c, h, w).
GPUCNN_EXPORT int gpucnn_winograd_backward_filter(
    int threads, int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, int64_t p, int64_t q, int64_t kernel,
    int64_t top, int64_t left, const float *dy, const float *x, float *dw) {
    int64_t step = TILE + 1 - kernel, high = up(p, step), wide = up(q, step), size = sums_size(k, c);
    Gradient work{threads, static_cast<int>(kernel), {n, c, h, w, top, left, high, wide},
                  {n, k, p, q, 0, 0, high, wide}, x, dy};
    const Images &images = work.x_images;
    bool together = size > FILTER_LIMIT;
    int64_t length = run_length(images, work.dy_images.blocks(), together ? TOGETHER_NUMBERS : RUN_NUMBERS);
    int64_t runs = up(images.count(), length), parts = together ? 1 : least(runs, PARTIAL_SUMS);
    float *sums = scratch(FILTERS, parts * size);
    if (!sums) return 1;
    if (together) {
        work.add(0, images.count(), length, sums, true);
    } else {
        parallel_for(threads, parts, [&](int64_t part) {
            work.add(runs * part / parts * length, least(runs * (part + 1) / parts * length, images.count()), length,
                     sums + part * size, false);
        });
    }
    int64_t element = sums_element(k, c), pitch = up(c, LANES) * LANES;
    parallel_for(threads, k, [&](int64_t row) {
        for (int64_t part = 1; part < parts; ++part)
            for (int64_t e = 0; e < ELEMENTS; ++e) {
                float *to = sums + e * element + row * pitch, *from = to + part * size;
                for (int64_t i = 0; i < pitch; i += LANES) store(to + i, load(to + i) + load(from + i));
            }
        filter_gradient(work.kernel, k, c, sums, row, dw);
    });
    return work.failed;
}

}  // namespace gpucnn
