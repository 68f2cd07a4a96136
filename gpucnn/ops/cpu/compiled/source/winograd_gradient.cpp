// Winograd's filter gradient: the order of the work.
//
// For each of a tile's elements, the outputs' gradients times the inputs, summed over all tiles; then 36 sums become
// 9 numbers. Where all sums fit the second-level cache, a task takes its share of the tiles through all steps, and
// the tasks' sums are added in order. Otherwise the runs of many tiles are transformed first, and a task makes the
// sums of some outputs and inputs, over all of those.
#include "winograd.h"

#include <atomic>

namespace gpucnn {
namespace winograd {
namespace {

enum { SUMS, INPUTS, GRADIENTS };  // slots of scratch memory

// By measurement on 2 MiB of cache; from half to double of each costs some percent.
constexpr int64_t SUMS_LIMIT = 1 << 19;        // numbers of sums beside a run of tiles
constexpr int64_t RUN_NUMBERS = 1 << 18;       // of a run's transformed tiles
constexpr int64_t RUN_TILES = 8 * TILE_ROWS;   // of a run, at least
constexpr int64_t SHARES = 8;                  // of the tiles, at most, each with sums of its own
constexpr int64_t MOST_TILES = 22 * TILE_ROWS;  // of a run, where there are many sums
constexpr int64_t TOGETHER = 6 << 20;          // numbers of tiles transformed at once
constexpr int64_t COLUMNS = 8;                 // blocks of inputs of a task's sums

struct Gradient {
    int threads, kernel;
    Images x_images, dy_images;
    const float *x, *dy;
    float *dw;
    std::atomic<bool> failed{false};

    int64_t count() const { return x_images.count(); }
    int64_t blocks() const { return x_images.blocks() + dy_images.blocks(); }
    int64_t run_size(int64_t tiles) const {
        return Tiles{nullptr, 0, tiles, x_images.blocks()}.size() + Tiles{nullptr, 0, tiles, dy_images.blocks()}.size();
    }

    struct Run {
        Tiles x, dy;
    };
    Run run_at(float *values, int64_t first, int64_t tiles) const {
        Tiles of_x{values, first, least(tiles, count() - first), x_images.blocks()};
        return {of_x, {values + of_x.size(), first, of_x.count, dy_images.blocks()}};
    }
    void transform(const Run &run, int64_t block) {
        bool done = block < run.x.blocks ? input_tiles(kernel, x_images, x, run.x, block)
                                         : gradient_tiles(kernel, dy_images, dy, run.dy, block - run.x.blocks);
        if (!done) failed = true;
    }
    void finish(const Sums &sums, int64_t row) {
        if (sums.row * LANES + row < dy_images.channels) filter_gradient(kernel, x_images.channels, sums, row, dw);
    }

    void by_shares() {
        int64_t tiles = most(RUN_TILES, RUN_NUMBERS / (ELEMENTS * blocks() * LANES));
        int64_t runs = up(count(), tiles), shares = least(runs, SHARES);
        Sums sums{nullptr, 0, dy_images.blocks(), 0, x_images.blocks()};
        int64_t size = sums.size();
        sums.values = scratch(SUMS, shares * size);
        if (!sums.values) {
            failed = true;
            return;
        }
        parallel_for(threads, shares, [&](int64_t share) {
            float *values = scratch(INPUTS, run_size(tiles));
            if (!values) {
                failed = true;
                return;
            }
            Sums own = sums;
            own.values += share * size;
            int64_t begin = runs * share / shares, end = runs * (share + 1) / shares;
            for (int64_t number = begin; number < end; ++number) {
                Run run = run_at(values, number * tiles, tiles);
                for (int64_t block = 0; block < blocks(); ++block) transform(run, block);
                for (int64_t e = 0; e < ELEMENTS; ++e) correlate(run.dy, run.x, own, e, number == begin);
            }
        });
        parallel_for(threads, dy_images.channels, [&](int64_t row) {
            for (int64_t share = 1; share < shares; ++share)
                for (int64_t e = 0; e < ELEMENTS; ++e) {
                    float *to = sums.values + e * sums.element() + row * sums.pitch(), *from = to + share * size;
                    for (int64_t i = 0; i < sums.pitch(); i += LANES) store(to + i, load(to + i) + load(from + i));
                }
            finish(sums, row);
        });
    }

    void together() {
        int64_t runs = up(count(), MOST_TILES), tiles = up(count(), runs), size = run_size(tiles);
        int64_t at_once = least(runs, most(1, TOGETHER / size));
        // Blocks of outputs of a task's sums: the more, the less often tiles are read, as long as there are tasks.
        int64_t rows = x_images.blocks() * dy_images.blocks() < 512 ? 4 : 8;
        int64_t across = up(x_images.blocks(), COLUMNS), groups = up(dy_images.blocks(), rows) * across;
        int64_t sums_size = Sums{nullptr, 0, rows, 0, COLUMNS}.size();
        bool kept = at_once < runs;  // the sums wait for more tiles
        float *values = scratch(INPUTS, at_once * size), *all = kept ? scratch(GRADIENTS, groups * sums_size) : nullptr;
        if (!values || (kept && !all)) {
            failed = true;
            return;
        }
        for (int64_t begin = 0; begin < runs; begin += at_once) {
            int64_t number = least(at_once, runs - begin);
            auto run = [&](int64_t i) { return run_at(values + i * size, (begin + i) * tiles, tiles); };
            parallel_for(threads, number * blocks(),
                         [&](int64_t task) { transform(run(task / blocks()), task % blocks()); });
            parallel_for(threads, groups, [&](int64_t group) {
                int64_t row = group / across * rows, column = group % across * COLUMNS;
                Sums sums{kept ? all + group * sums_size : scratch(SUMS, sums_size), row,
                          least(rows, dy_images.blocks() - row), column, least(COLUMNS, x_images.blocks() - column)};
                if (!sums.values) {
                    failed = true;
                    return;
                }
                for (int64_t i = 0; i < number; ++i)
                    for (int64_t e = 0; e < ELEMENTS; ++e) correlate(run(i).dy, run(i).x, sums, e, begin + i == 0);
                if (begin + number == runs)
                    for (int64_t i = 0; i < sums.rows * LANES; ++i) finish(sums, i);
            });
        }
    }
};

}  // namespace
}  // namespace winograd

using namespace winograd;

// dw (k, c, kernel, kernel) from dy (n, k, p, q) and x (n, c, h, w).
GPUCNN_EXPORT int gpucnn_winograd_backward_filter(
    int threads, int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, int64_t p, int64_t q, int64_t kernel,
    int64_t top, int64_t left, const float *dy, const float *x, float *dw) {
    int64_t step = TILE + 1 - kernel, high = up(p, step), wide = up(q, step);
    Gradient work{threads, static_cast<int>(kernel), {n, c, h, w, top, left, high, wide},
                  {n, k, p, q, 0, 0, high, wide}, x, dy, dw};
    if (ELEMENTS * c * k <= SUMS_LIMIT) work.by_shares();
    else work.together();
    return work.failed;
}

}  // namespace gpucnn
