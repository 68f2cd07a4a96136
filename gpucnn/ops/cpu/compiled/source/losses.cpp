// Softmax and the losses, with their gradients. Limit: logits read and probabilities written, probabilities read and
// gradients written; a row's three passes (largest, powers and their sum, quotients) meet it in the first-level cache.
#include <cmath>

#include "double_sums.h"
#include "elementwise.h"
#include "functions.h"
#include "rows.h"
#include "threads.h"

namespace gpucnn {
namespace {

// task(row) over the rows of a matrix, some ELEMENTS numbers a task.
template <class Task>
void over_rows(int threads, int64_t rows, int64_t columns, Task &&task) {
    int64_t block = columns < ELEMENTS ? ELEMENTS / (columns ? columns : 1) : 1;
    parallel_for(threads, (rows + block - 1) / block, [&](int64_t number) {
        int64_t first = number * block, last = first + block < rows ? first + block : rows;
        for (int64_t row = first; row < last; ++row) task(row);
    });
}

struct Softmax {
    float largest, total;
};

// out = softmax(x). A NaN, or an infinity less itself, makes the total and with it the whole row NaN.
Softmax softmax(int64_t columns, const float *x, float *out) {
    Vector most[4];
    for (Vector &each : most) each = broadcast(-INFINITY);
    over_row(columns, [&](int64_t i, int slot, auto access) GPUCNN_BODY {
        Vector v = access.keep(access.load(x + i), -INFINITY);
        most[slot] = v > most[slot] ? v : most[slot];
    });
    for (int slot = 1; slot < 4; ++slot) most[0] = most[slot] > most[0] ? most[slot] : most[0];
    float largest = most[0][0];
    for (int lane = 1; lane < LANES; ++lane) largest = most[0][lane] > largest ? most[0][lane] : largest;
    Sums sum;
    over_row(columns, [&](int64_t i, int slot, auto access) GPUCNN_BODY {
        Vector power = access.keep(exp(access.load(x + i) - largest), 0);
        sum.slot[slot] += power;
        access.store(out + i, power);
    });
    float total = sum.total(), share = 1 / total;
    over_row(columns, [&](int64_t i, int, auto access) GPUCNN_BODY {
        access.store(out + i, access.load(out + i) * share);
    });
    return {largest, total};
}

}  // namespace

GPUCNN_EXPORT int gpucnn_softmax_forward(int threads, int64_t rows, int64_t columns, const float *x, float *out) {
    over_rows(threads, rows, columns, [&](int64_t row) { softmax(columns, x + row * columns, out + row * columns); });
    return 0;
}

// y (dy - sum(dy y))
GPUCNN_EXPORT int gpucnn_softmax_backward(int threads, int64_t rows, int64_t columns, const float *dy, const float *y,
                                          float *out) {
    over_rows(threads, rows, columns, [&](int64_t row) {
        const float *slope = dy + row * columns, *value = y + row * columns;
        float *to = out + row * columns;
        Sums sum;
        over_row(columns, [&](int64_t i, int slot, auto access) GPUCNN_BODY {
            sum.slot[slot] += access.load(slope + i) * access.load(value + i);
        });
        float mean = sum.total();
        over_row(columns, [&](int64_t i, int, auto access) GPUCNN_BODY {
            access.store(to + i, access.load(value + i) * (access.load(slope + i) - mean));
        });
    });
    return 0;
}

// losses[row] = -log softmax(logits[row])[labels[row]]; the labels are within the row.
GPUCNN_EXPORT int gpucnn_cross_entropy_forward(int threads, int64_t rows, int64_t columns, const float *logits,
                                               const int64_t *labels, float *losses, float *probabilities) {
    over_rows(threads, rows, columns, [&](int64_t row) {
        const float *x = logits + row * columns;
        Softmax found = softmax(columns, x, probabilities + row * columns);
        double own = static_cast<double>(x[labels[row]]) - found.largest;
        losses[row] = static_cast<float>(std::log(static_cast<double>(found.total)) - own);
    });
    return 0;
}

// out = shares[row] (probabilities - 1 at the label)
GPUCNN_EXPORT int gpucnn_cross_entropy_backward(int threads, int64_t rows, int64_t columns,
                                                const float *probabilities, const int64_t *labels,
                                                const float *shares, float *out) {
    over_rows(threads, rows, columns, [&](int64_t row) {
        const float *from = probabilities + row * columns;
        float *to = out + row * columns, share = shares[row], own = (from[labels[row]] - 1) * share;
        over_row(columns, [&](int64_t i, int, auto access) GPUCNN_BODY {
            access.store(to + i, access.load(from + i) * share);
        });
        to[labels[row]] = own;
    });
    return 0;
}

// Binary cross-entropy with logits: -log s and -log(1 - s) share log(1 + exp(-|x|)); each is a sum of positive
// numbers. The terms are written where `terms` is not null, otherwise the sum of each range of ELEMENTS to `sums`.
GPUCNN_EXPORT int gpucnn_binary_cross_entropy_forward(int threads, int64_t count, const float *logits,
                                                      const float *targets, float *terms, double *sums) {
    over_ranges(threads, count, [&](int64_t begin, int64_t end) {
        DoubleSums sum;
        over_row(end - begin, [&](int64_t i, int, auto access) GPUCNN_BODY {
            Vector x = access.load(logits + begin + i), t = access.load(targets + begin + i);
            Vector tail = log_of_one_plus(exp(-absolute(x)));
            Vector term = t * (tail + at_least(-x, 0)) + (1.0f - t) * (tail + at_least(x, 0));
            if (terms) access.store(terms + begin + i, term);
            else sum.add(access.keep(term, 0));
        });
        if (!terms) sums[begin / ELEMENTS] = sum.total();
    });
    return 0;
}

// ((1 - t) s - t (1 - s)) share, with 1 - s as sigmoid(-x): both keep their digits.
GPUCNN_EXPORT int gpucnn_binary_cross_entropy_backward(int threads, int64_t count, float share, const float *logits,
                                                       const float *targets, float *out) {
    map(threads, count, out, [share](Vector x, Vector t) GPUCNN_BODY {
        return ((1.0f - t) * sigmoid(x) - t * sigmoid(-x)) * share;
    }, logits, targets);
    return 0;
}

// The sums of (prediction - target)^2 of each range of ELEMENTS numbers.
GPUCNN_EXPORT int gpucnn_squared_error_sums(int threads, int64_t count, const float *prediction, const float *target,
                                            double *sums) {
    over_ranges(threads, count, [&](int64_t begin, int64_t end) {
        DoubleSums sum[2];
        over_row(end - begin, [&](int64_t i, int slot, auto access) GPUCNN_BODY {
            sum[slot & 1].add_squares(access.load(prediction + begin + i) - access.load(target + begin + i));
        });
        sums[begin / ELEMENTS] = sum[0].total() + sum[1].total();
    });
    return 0;
}

GPUCNN_EXPORT int gpucnn_squared_error_backward(int threads, int64_t count, float share, const float *prediction,
                                                const float *target, float *out) {
    map(threads, count, out, [share](Vector p, Vector t) GPUCNN_BODY { return (p - t) * share; }, prediction, target);
    return 0;
}

}  // namespace gpucnn
