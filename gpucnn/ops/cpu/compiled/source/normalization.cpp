// Batch norm of (N, C, H W) images: a task takes a channel or a few, whose numbers stay in the second-level cache
// between the passes. Limit: x read and y written, and dy read backward, once from beyond that cache.
//
// Statistics are made of pieces that fit the first-level cache: the sum of a piece, then the sums of its distances
// from that mean and of their squares. Pieces are joined in float64 (Chan, Golub and LeVeque, The American
// Statistician 37, 1983), so neither a large mean nor images of different means cost digits.
#include <cmath>

#include "rows.h"
#include "threads.h"
#include "vector.h"

namespace gpucnn {
namespace {

constexpr int64_t PIECE = 1024;    // numbers added in single precision: 16 a lane of four vectors
constexpr int64_t TASK = 1 << 14;  // numbers a task takes at least, where channels are short

// (N, C, pixels) in C order.
struct Images {
    int64_t n, channels, pixels;
    int64_t stride() const { return channels * pixels; }
    int64_t count() const { return n * pixels; }
    // Images of one piece: several where they are small. A larger one is cut by pixels_a_piece.
    int64_t images_a_piece() const { return pixels >= PIECE ? 1 : PIECE / pixels; }
    int64_t pixels_a_piece() const { return pixels >= 2 * PIECE ? PIECE : pixels; }
};

// task(channel) for every channel, neighbors on one thread: where images are small they share pages and cache lines.
template <class Task>
void over_channels(int threads, const Images &size, Task &&task) {
    int64_t count = size.count() ? size.count() : 1, block = count >= TASK ? 1 : TASK / count;
    parallel_for(threads, (size.channels + block - 1) / block, [&](int64_t number) {
        int64_t first = number * block, last = first + block < size.channels ? first + block : size.channels;
        for (int64_t channel = first; channel < last; ++channel) task(channel);
    });
}

// piece(offset of its first row from the channel's, rows, numbers a row), in a fixed order.
template <class Piece>
GPUCNN_INLINE void over_pieces(const Images &size, Piece &&piece) {
    int64_t images = size.images_a_piece(), pixels = size.pixels_a_piece();
    for (int64_t image = 0; image < size.n; image += images) {
        int64_t rows = image + images < size.n ? images : size.n - image;
        for (int64_t first = 0; first < size.pixels; first += pixels)
            piece(image * size.stride() + first, rows, first + pixels < size.pixels ? pixels : size.pixels - first);
    }
}

struct Statistics {
    double count = 0, mean = 0, squares = 0;  // squares: the sum of squared distances from the mean

    void join(double n, double other_mean, double other_squares) {
        double distance = other_mean - mean, all = count + n;
        squares += other_squares + distance * distance * (count * n / all);
        mean += distance * (n / all);
        count = all;
    }
};

Statistics statistics(const Images &size, const float *channel) {
    Statistics result;
    over_pieces(size, [&](int64_t offset, int64_t rows, int64_t numbers) {
        const float *x = channel + offset;
        double n = static_cast<double>(rows * numbers);
        Sums sum;
        for (int64_t row = 0; row < rows; ++row)
            over_row(numbers, [&](int64_t i, int slot, auto access) GPUCNN_BODY {
                sum.slot[slot] += access.load(x + row * size.stride() + i);
            });
        float middle = static_cast<float>(sum.total() / n);
        Sums distance, square;
        for (int64_t row = 0; row < rows; ++row)
            over_row(numbers, [&](int64_t i, int slot, auto access) GPUCNN_BODY {
                Vector d = access.keep(access.load(x + row * size.stride() + i) - middle, 0);
                distance.slot[slot] += d;
                square.slot[slot] += d * d;
            });
        double left = distance.total();  // what the middle's own rounding left
        result.join(n, middle + left / n, square.total() - left * left / n);
    });
    return result;
}

void move_towards(float *running, double value, double momentum) {
    *running += static_cast<float>(momentum * (value - *running));
}

}  // namespace

GPUCNN_EXPORT int gpucnn_batch_norm_forward(int threads, int64_t n, int64_t channels, int64_t pixels, const float *x,
                                            const float *weight, const float *bias, float *running_mean,
                                            float *running_var, double momentum, double epsilon, float *y,
                                            float *mean, float *inverse_std) {
    Images size{n, channels, pixels};
    over_channels(threads, size, [&](int64_t c) {
        const float *from = x + c * pixels;
        float *to = y + c * pixels;
        Statistics found = statistics(size, from);
        double variance = found.squares < 0 ? 0 : found.squares / found.count;
        double inverse = 1 / std::sqrt(variance + epsilon), scale = weight ? inverse * weight[c] : inverse;
        mean[c] = static_cast<float>(found.mean);
        inverse_std[c] = static_cast<float>(inverse);
        if (running_mean) move_towards(running_mean + c, found.mean, momentum);
        if (running_var) {
            double others = found.count > 1 ? found.count - 1 : 1;
            move_towards(running_var + c, variance * (found.count / others), momentum);
        }
        // The mean as a float, and what its rounding left out in the offset.
        float middle = mean[c], factor = static_cast<float>(scale);
        float offset = static_cast<float>((middle - found.mean) * scale + (bias ? bias[c] : 0.0));
        for (int64_t image = 0; image < n; ++image) {
            const float *source = from + image * size.stride();
            float *target = to + image * size.stride();
            over_row(pixels, [&](int64_t i, int, auto access) GPUCNN_BODY {
                access.store(target + i, (access.load(source + i) - middle) * factor + offset);
            });
        }
    });
    return 0;
}

GPUCNN_EXPORT int gpucnn_batch_norm_backward(int threads, int64_t n, int64_t channels, int64_t pixels,
                                             const float *dy, const float *x, const float *weight, const float *mean,
                                             const float *inverse_std, float *dx, float *dweight, float *dbias) {
    Images size{n, channels, pixels};
    over_channels(threads, size, [&](int64_t c) {
        const float *values = x + c * pixels, *slopes = dy + c * pixels;
        float *to = dx + c * pixels;
        float middle = mean[c];
        double total = 0, product = 0, left = 0;
        over_pieces(size, [&](int64_t offset, int64_t rows, int64_t numbers) {
            Sums slope, share, distance;
            for (int64_t row = 0; row < rows; ++row) {
                int64_t start = offset + row * size.stride();
                over_row(numbers, [&](int64_t i, int slot, auto access) GPUCNN_BODY {
                    Vector d = access.keep(access.load(values + start + i) - middle, 0);
                    Vector g = access.load(slopes + start + i);
                    slope.slot[slot] += g;
                    share.slot[slot] += g * d;
                    distance.slot[slot] += d;
                });
            }
            total += slope.total(), product += share.total(), left += distance.total();
        });
        // dx = scale (dy - total / n - (x - mean) inverse^2 product / n), where the float mean is off by `left`.
        double count = static_cast<double>(size.count()), inverse = inverse_std[c];
        left /= count;
        product = (product - left * total) * inverse;
        dweight[c] = static_cast<float>(product);
        dbias[c] = static_cast<float>(total);
        double scale = weight ? inverse * weight[c] : inverse, slant = -scale * inverse * product / count;
        float factor = static_cast<float>(scale), lean = static_cast<float>(slant);
        float offset = static_cast<float>(-scale * total / count - slant * left);
        for (int64_t image = 0; image < n; ++image) {
            int64_t start = image * size.stride();
            over_row(pixels, [&](int64_t i, int, auto access) GPUCNN_BODY {
                Vector d = access.load(values + start + i) - middle, g = access.load(slopes + start + i);
                access.store(to + start + i, g * factor + (d * lean + offset));
            });
        }
    });
    return 0;
}

GPUCNN_EXPORT int gpucnn_batch_norm_inference(int threads, int64_t n, int64_t channels, int64_t pixels,
                                              const float *x, const float *weight, const float *bias,
                                              const float *running_mean, const float *running_var, double epsilon,
                                              float *y) {
    int64_t rows = n * channels, block = pixels >= TASK ? 1 : TASK / (pixels ? pixels : 1);
    parallel_for(threads, (rows + block - 1) / block, [&](int64_t number) {
        int64_t first = number * block, last = first + block < rows ? first + block : rows;
        for (int64_t row = first; row < last; ++row) {
            int64_t c = row % channels;
            double inverse = 1 / std::sqrt(running_var[c] + epsilon);
            float factor = static_cast<float>(weight ? inverse * weight[c] : inverse);
            float middle = running_mean[c], offset = bias ? bias[c] : 0.0f;
            const float *from = x + row * pixels;
            float *to = y + row * pixels;
            over_row(pixels, [&](int64_t i, int, auto access) GPUCNN_BODY {
                access.store(to + i, (access.load(from + i) - middle) * factor + offset);
            });
        }
    });
    return 0;
}

}  // namespace gpucnn
