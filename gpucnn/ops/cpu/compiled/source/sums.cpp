// Sums over whole arrays and over all axes but one. Limit: each number read once. Sums of a channel are added in single
// precision over a thousand numbers at most, then in double; the others in double throughout. The order is fixed.
#include "double_sums.h"
#include "elementwise.h"
#include "rows.h"
#include "threads.h"
#include "vector.h"

namespace gpucnn {
namespace {

constexpr int64_t COLUMNS = 4 * LANES;  // of a matrix that one task adds

}  // namespace

// The sum of squares of each range of ELEMENTS numbers, in double throughout.
GPUCNN_EXPORT int gpucnn_sums_of_squares(int threads, int64_t count, const float *x, double *sums) {
    over_ranges(threads, count, [&](int64_t begin, int64_t end) {
        DoubleSums sum[4];
        over_row(end - begin, [&](int64_t i, int slot, auto access) GPUCNN_BODY {
            sum[slot].add_squares(access.load(x + begin + i));
        });
        double total = (sum[0].total() + sum[1].total()) + (sum[2].total() + sum[3].total());
        sums[begin / ELEMENTS] = total;
    });
    return 0;
}

// sums[c] = the sum of x (N, C, pixels) over images and pixels.
GPUCNN_EXPORT int gpucnn_channel_sums(int threads, int64_t n, int64_t channels, int64_t pixels, const float *x,
                                      float *sums) {
    constexpr int64_t PIECE = 1024;
    parallel_for(threads, channels, [&](int64_t c) {
        double total = 0;
        Sums sum;
        int64_t added = 0;
        for (int64_t image = 0; image < n; ++image) {
            const float *row = x + (image * channels + c) * pixels;
            for (int64_t first = 0; first < pixels; first += PIECE) {
                int64_t count = first + PIECE < pixels ? PIECE : pixels - first;
                over_row(count, [&](int64_t i, int slot, auto access) GPUCNN_BODY {
                    sum.slot[slot] += access.load(row + first + i);
                });
                added += count;
                if (added >= PIECE) total += sum.total(), sum = Sums{}, added = 0;
            }
        }
        sums[c] = static_cast<float>(total + sum.total());
    });
    return 0;
}

// sums[column] of a matrix (rows, columns): neighboring columns in the lanes of vectors.
GPUCNN_EXPORT int gpucnn_column_sums(int threads, int64_t rows, int64_t columns, const float *x, float *sums) {
    parallel_for(threads, (columns + COLUMNS - 1) / COLUMNS, [&](int64_t number) {
        int64_t start = number * COLUMNS, count = start + COLUMNS < columns ? COLUMNS : columns - start;
        const float *from = x + start;
        DoubleSums sum[4];
        for (int64_t row = 0; row < rows; ++row, from += columns) {
            if (count == COLUMNS)
                for (int slot = 0; slot < 4; ++slot) sum[slot].add(load(from + slot * LANES));
            else
                for (int slot = 0; slot * LANES < count; ++slot) {
                    int64_t rest = count - slot * LANES;
                    sum[slot].add(load_first(from + slot * LANES, rest < LANES ? static_cast<int>(rest) : LANES));
                }
        }
        for (int64_t i = 0; i < count; ++i) sums[start + i] = static_cast<float>(sum[i / LANES][i % LANES]);
    });
    return 0;
}

}  // namespace gpucnn
