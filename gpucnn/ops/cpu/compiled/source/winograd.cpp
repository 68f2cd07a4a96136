// Winograd's convolution forward, and backward to the input: the order of the work.
//
// Tiles are taken in runs of some tens. Where all filters fit the second-level cache beside a run, they are
// transformed first, and a task takes a run through all steps. Otherwise the runs of many tiles are transformed
// first, and a task takes one of them and a panel of the filters, which it transforms for itself, a stretch of the
// depth at a time: reading 9 numbers again costs less than writing 36 to memory, and reading them back.
#include "winograd.h"

#include <atomic>

namespace gpucnn {
namespace winograd {
namespace {

enum { FILTERS, INPUTS, PRODUCTS };  // slots of scratch memory

// By measurement on 2 MiB of cache; from half to double of each costs some percent.
constexpr int64_t FILTER_LIMIT = 3 << 18;      // numbers of transformed filters beside a run of tiles
constexpr int64_t RUN_NUMBERS = 1 << 18;       // of a run's transformed tiles
constexpr int64_t RUN_TILES = 8 * TILE_ROWS;   // of a run, at least
constexpr int64_t MOST_TILES = 22 * TILE_ROWS;  // of a run that a panel of filters is made for, at most
constexpr int64_t STRETCH = 64;                // inputs of such a panel
constexpr int64_t TOGETHER = 1 << 22;          // numbers of tiles transformed at once

struct Convolution {
    int threads;
    Images in, out;
    const float *x, *bias;
    float *y;
    Weight weight;
    std::atomic<bool> failed{false};

    int64_t panels() const { return up(out.blocks(), PANEL); }
    int64_t vectors(int64_t panel) const { return least(PANEL, out.blocks() - panel * PANEL); }

    // The filters of all panels lie behind one another.
    Panel panel_of(float *values, int64_t depth, int64_t panel) const {
        return {values + panel * Panel{nullptr, depth, PANEL}.size(), depth, vectors(panel)};
    }

    void run(const Tiles &from, const Tiles &to, float *filters) {
        bool done = true;
        for (int64_t block = 0; block < in.blocks(); ++block)
            done &= input_tiles(weight.kernel, in, x, from, block);
        for (int64_t e = 0; e < ELEMENTS; ++e)
            for (int64_t panel = 0; panel < panels(); ++panel)
                for (int64_t begin = 0; begin < weight.inputs; begin += DEPTH)
                    multiply(from, begin, panel_of(filters, weight.inputs, panel), begin,
                             least(DEPTH, weight.inputs - begin), to, panel * PANEL, e, begin == 0);
        for (int64_t block = 0; block < out.blocks(); ++block)
            done &= place_tiles(weight.kernel, out, to, block, bias, y, block);
        if (!done) failed = true;
    }

    void by_runs() {
        float *filters = scratch(FILTERS, panels() * Panel{nullptr, weight.inputs, PANEL}.size());
        if (!filters) {
            failed = true;
            return;
        }
        int64_t stretches = up(weight.inputs, LANES);
        parallel_for(threads, out.blocks() * stretches, [&](int64_t task) {
            int64_t block = task / stretches, input = task % stretches * LANES;
            filters_of(weight, block, 0, panel_of(filters, weight.inputs, block / PANEL), block % PANEL, input,
                       least(LANES, weight.inputs - input));
        });
        int64_t tiles = RUN_NUMBERS / (ELEMENTS * (in.blocks() + out.blocks()) * LANES) / TILE_ROWS * TILE_ROWS;
        tiles = most(tiles, RUN_TILES);
        parallel_for(threads, up(in.count(), tiles), [&](int64_t task) {
            int64_t first = task * tiles, count = least(tiles, in.count() - first);
            Tiles from{nullptr, first, count, in.blocks()}, to{nullptr, first, count, out.blocks()};
            from.values = scratch(INPUTS, from.size());
            to.values = scratch(PRODUCTS, to.size());
            if (from.values && to.values) run(from, to, filters);
            else failed = true;
        });
    }

    void multiply_panel(const Tiles &from, int64_t number) {
        Panel panel{nullptr, least(STRETCH, weight.inputs), vectors(number)};
        Tiles to{nullptr, from.first, from.count, panel.vectors};
        panel.values = scratch(FILTERS, panel.size());
        to.values = scratch(PRODUCTS, to.size());
        if (!panel.values || !to.values) {
            failed = true;
            return;
        }
        for (int64_t begin = 0; begin < weight.inputs; begin += STRETCH) {
            int64_t depth = least(STRETCH, weight.inputs - begin);
            for (int64_t vector = 0; vector < panel.vectors; ++vector)
                filters_of(weight, number * PANEL + vector, begin, panel, vector, 0, depth);
            for (int64_t e = 0; e < ELEMENTS; ++e) multiply(from, begin, panel, 0, depth, to, 0, e, begin == 0);
        }
        for (int64_t vector = 0; vector < panel.vectors; ++vector)
            if (!place_tiles(weight.kernel, out, to, vector, bias, y, number * PANEL + vector)) failed = true;
    }

    void together() {
        int64_t runs = up(in.count(), MOST_TILES), tiles = up(up(in.count(), runs), TILE_ROWS) * TILE_ROWS;
        runs = up(in.count(), tiles);
        int64_t size = Tiles{nullptr, 0, tiles, in.blocks()}.size();
        int64_t at_once = least(runs, most(1, TOGETHER / size));
        float *values = scratch(INPUTS, at_once * size);
        if (!values) {
            failed = true;
            return;
        }
        for (int64_t begin = 0; begin < runs; begin += at_once) {
            int64_t count = least(at_once, runs - begin);
            auto tiles_of = [&](int64_t number) -> Tiles {
                int64_t first = (begin + number) * tiles;
                return {values + number * size, first, least(tiles, in.count() - first), in.blocks()};
            };
            parallel_for(threads, count * in.blocks(), [&](int64_t task) {
                if (!input_tiles(weight.kernel, in, x, tiles_of(task / in.blocks()), task % in.blocks()))
                    failed = true;
            });
            parallel_for(threads, count * panels(),
                         [&](int64_t task) { multiply_panel(tiles_of(task % count), task / count); });
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
    Convolution work{threads, {n, c, h, w, top, left, high, wide}, {n, k, p, q, 0, 0, high, wide}, x, bias, y,
                     {weight, c, k, static_cast<int>(kernel), turned != 0}};
    if (ELEMENTS * c * k <= FILTER_LIMIT) work.by_runs();
    else work.together();
    return work.failed;
}

}  // namespace gpucnn
