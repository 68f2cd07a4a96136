// The filter gradient: dw[k][c][r][s] is the sum over images and output pixels of dy[k][pixel] times the input pixel
// that the weight met there. Both are staged rows (direct.h) of the same pitch, so each weight's gradient is a scalar
// product of two contiguous runs. FILTERS runs of dy times POSITIONS runs of x are done together, in vectors of
// partial sums that are summed across once they have met a whole chunk of pixels.
//
// Pixels beyond a row's end count for nothing since dy is zero there; a NaN or infinity in x would make a NaN of that,
// so that the caller is told of NaNs and looks into them.
#include <atomic>

#include "direct.h"

namespace gpucnn {
namespace {

constexpr int FILTERS = REGISTERS == 32 ? 4 : 2;
constexpr int POSITIONS = REGISTERS == 32 ? 6 : 4;
constexpr int64_t RUN = 1536;          // pixels of a chunk, about: FILTERS runs of dy stay in the first-level cache
constexpr int64_t STAGED = 96 << 10;   // numbers of staged x at most, 384 KiB
constexpr int64_t FILTER_BLOCK = 128;  // filters a task
constexpr int64_t POSITION_BLOCK = 640;  // and channels times kernel positions, about
constexpr int64_t TASKS = 8;           // from so many blocks of weights on, the images are not cut as well

constexpr int64_t FEW = 4;               // fewer tasks leave threads without work
constexpr int64_t WORTH = 4 << 20;       // products from which on another thread is of use
constexpr int64_t TOGETHER = 400;       // pixels of an image at most for which images are put together

enum Slot { PARTIAL, TABLE, PIXELS, GRADIENTS, SUMS, LINE, TILES };

struct Chunk {  // runs of `vectors` vectors, one an image
    int64_t images, vectors, x_image, dy_image;
};

// to[m][n] += the product of dy's run m and the run of x at offset[n], n < positions; the other offsets are repeats.
template <int M>
void multiply(
    const Chunk &chunk, const float *dy, int64_t dy_pitch, const float *x, const int32_t *offset, int positions,
    float *to, int64_t pitch) {
    constexpr int N = POSITIONS;
    Vector sum[M * N] = {};
    const float *run[N];
    for (int n = 0; n < N; ++n) run[n] = x + offset[n];
    for (int64_t image = 0; image < chunk.images; ++image) {
        for (int64_t i = 0; i < chunk.vectors * LANES; i += LANES) {
            Vector row[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) row[m] = load(dy + m * dy_pitch + i);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                Vector column = load(run[n] + i);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) sum[m * N + n] += row[m] * column;
            }
        }
        dy += chunk.dy_image;
        for (int n = 0; n < N; ++n) run[n] += chunk.x_image;
    }
    constexpr int WHOLE = M * N / LANES * LANES, REST = M * N - WHOLE;
    float total[WHOLE + LANES] = {};
#pragma GCC unroll 8
    for (int i = 0; i < WHOLE; i += LANES) store(total + i, sums_of<LANES>(sum + i));
    if constexpr (REST > 0) store(total + WHOLE, sums_of<REST>(sum + WHOLE));
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < positions; ++n) to[m * pitch + n] += total[m * N + n];
}

// The rows of a plane of dy with the pitch of x, zeros in between and up to `length`.
void stage_gradient(
    const float *dy, int64_t rows, int64_t columns, int64_t pitch, int64_t length, float *to) {
    for (int64_t y = 0; y < rows; ++y) stage_row(dy + y * columns, columns, 0, pitch, to + y * pitch);
    fill_zeros(to + rows * pitch, length - rows * pitch);
}

// From an output pixel of a staged plane to the one that the j-th (channel, kernel position) is multiplied with.
int64_t place(const Problem &p, const Staging &staging, int64_t j) {
    int64_t kernel = p.r * p.s, r = j % kernel / p.s * p.dilation_h, s = j % p.s * p.dilation_w;
    int64_t plane = r % p.stride_h * staging.phases_w + s % p.stride_w;
    return j / kernel * staging.channel() + plane * staging.plane() + r / p.stride_h * staging.pitch + s / p.stride_w;
}

// to[j][image][row][column] for the first `count` (channel, kernel position), zeros behind.
void put_together(
    const Problem &p, const Staging &staging, int64_t count, int64_t images, const float *pixels, int64_t image,
    float *to, int64_t columns) {
    for (int64_t j = 0; j < count; ++j, to += columns) {
        float *at = to;
        for (int64_t i = 0; i < images; ++i) {
            const float *row = pixels + i * image + place(p, staging, j);
            for (int64_t y = 0; y < p.p; ++y, at += p.q, row += staging.pitch)
                for (int64_t x = 0; x < p.q; x += LANES) store(at + x, load(row + x));
        }
        store(at, Vector{});
    }
}

}  // namespace

// out = the gradient for the weight, from dy and x. `nan` is 1 where a number of it is NaN, and 0 elsewhere.
GPUCNN_EXPORT int gpucnn_direct_backward_filter(
    int threads, const Problem *problem, const float *dy, const float *x, float *out, int64_t *nan) {
    Problem p = *problem;
    if (p.r * p.s == 1 && p.stride_h * p.stride_w == 1 && p.h == p.p && p.w == p.q && p.top == 0 && p.left == 0)
        p.w = p.q = p.h * p.w, p.h = p.p = 1;  // 1x1: where a row ends has no meaning
    // A long row is cut into short ones that have the pixels in the same order.
    for (int64_t rows = 2; p.h == 1 && p.p == 1 && p.r * p.s == 1 && p.w == p.q && p.w / rows >= RUN / 4; ++rows)
        if (p.w % rows == 0 && p.w / rows <= RUN) {
            p.h = p.p = rows, p.w = p.q = p.w / rows;
            break;
        }
    int64_t channels = p.c / p.groups, filters = p.k / p.groups, kernel = p.r * p.s;
    int64_t shift_h = (p.r - 1) * p.dilation_h / p.stride_h, shift_w = (p.s - 1) * p.dilation_w / p.stride_w;
    Staging staging = {};
    staging.height = p.h, staging.width = p.w, staging.step_h = p.stride_h, staging.step_w = p.stride_w;
    staging.top = p.top, staging.left = p.left;
    staging.phases_h = phases(p.r, p.dilation_h, p.stride_h);
    staging.phases_w = phases(p.s, p.dilation_w, p.stride_w);
    staging.pitch = staging_pitch(staging, p.q, shift_w);
    int64_t pitch = staging.pitch;

    // A chunk is a band of rows of one image, or a few whole images.
    int64_t band = larger(1, smaller(p.p, RUN / pitch));
    int64_t bands = ceiling(p.p, band);
    band = ceiling(p.p, bands);
    staging.rows = band + shift_h;
    int64_t most = bands > 1 ? 1 : larger(1, smaller(p.n, RUN / (band * pitch)));
    int64_t sets = ceiling(p.n, most), images = ceiling(p.n, sets), chunks = sets * bands;
    int64_t length = ceiling(band * pitch, LANES) * LANES;  // of an image's run of dy

    // A task is a block of filters times a block of channels, over all chunks or a share of them.
    int64_t filter_block = smaller(filters, FILTER_BLOCK), filter_blocks = ceiling(filters, filter_block);
    filter_block = ceiling(ceiling(filters, filter_blocks), FILTERS) * FILTERS;
    filter_blocks = ceiling(filters, filter_block);
    int64_t channel_block = smaller(channels, larger(1, POSITION_BLOCK / kernel));
    int64_t channel_blocks = ceiling(channels, channel_block), cuts = p.groups * filter_blocks * channel_blocks * chunks;
    // A few small images are one chunk: the channels are cut, then, for which each task stages the same dy again.
    if (cuts < FEW && p.k * channels * kernel * p.n * p.p * p.q > WORTH) channel_blocks *= ceiling(FEW, cuts);
    channel_block = ceiling(channels, smaller(channels, channel_blocks));
    channel_blocks = ceiling(channels, channel_block);
    // Small images are put together without what is computed in vain between rows and at their ends, where that costs
    // more than another copy of x: about 6 cycles a vector of which filters / 2 cycles of products are made.
    int64_t run = ceiling((band - 1) * pitch + p.q, LANES) * LANES;
    double apart = static_cast<double>(run) / static_cast<double>(band * p.q);
    bool together = p.p * p.q <= TOGETHER && bands == 1 && (apart - 1.02) * static_cast<double>(filter_block) > 12;
    int64_t columns = ceiling(images * p.p * p.q, LANES) * LANES;  // of images put together
    // The channels staged at a time.
    int64_t staged = larger(1, smaller(channel_block, STAGED / (staging.channel() * images)));
    if (together) staged = larger(1, smaller(staged, STAGED / (kernel * columns)));
    int64_t blocks = p.groups * filter_blocks * channel_blocks;
    int64_t shares = larger(1, smaller(chunks, TASKS / blocks));
    int64_t positions = staged * kernel, width = ceiling(positions, POSITIONS) * POSITIONS;
    int64_t row = channel_block * kernel;  // of a filter's sums
    int64_t count = p.k * channels * kernel;

    float *partial = shares > 1 ? scratch(PARTIAL, shares * count) : out;
    float *memory = scratch(TABLE, width);
    if (!partial || !memory) return 1;
    int32_t *offset = reinterpret_cast<int32_t *>(memory);
    for (int64_t i = 0; i < width; ++i) {
        int64_t j = smaller(i, positions - 1);
        offset[i] = static_cast<int32_t>(together ? j * columns : place(p, staging, j));
    }

    std::atomic<int> failed{0};
    parallel_for(threads, blocks * shares, [&](int64_t task) {
        int64_t share = task / blocks, block = task % blocks, group = block / (filter_blocks * channel_blocks);
        int64_t k = block / channel_blocks % filter_blocks * filter_block, c = block % channel_blocks * channel_block;
        int64_t many_k = smaller(filter_block, filters - k), many_c = smaller(channel_block, channels - c);
        int64_t dy_pitch = together ? columns : length * images;
        float *pixels = scratch(PIXELS, images * staged * staging.channel() + STAGING_END + LANES);
        float *gradients = scratch(GRADIENTS, filter_block * dy_pitch + LANES);
        float *sums = scratch(SUMS, filter_block * row), *line = scratch(LINE, staging.line());
        float *tiles = together ? scratch(TILES, positions * columns + LANES) : pixels;
        if (!pixels || !gradients || !sums || !line || !tiles) {
            failed.store(1);
            return;
        }
        fill_zeros(sums, filter_block * row);
        for (int64_t chunk = chunks * share / shares; chunk < chunks * (share + 1) / shares; ++chunk) {
            int64_t y = chunk % bands * band, rows = smaller(band, p.p - y), first = chunk / bands * images;
            int64_t many = smaller(images, p.n - first), used = together ? ceiling(many * p.p * p.q, LANES) : 0;
            for (int64_t m = 0; m < many_k; ++m) {  // in this order, since a row is written a little beyond its end
                float *to = gradients + m * dy_pitch;
                for (int64_t i = 0; i < many; ++i) {
                    int64_t plane = ((first + i) * p.groups + group) * filters + k + m;
                    const float *from = dy + (plane * p.p + y) * p.q;
                    if (together) copy(to + i * p.p * p.q, from, p.p * p.q);
                    else stage_gradient(from, rows, p.q, pitch, length, to + i * length);
                }
                if (together) fill_zeros(to + many * p.p * p.q, used * LANES - many * p.p * p.q);
            }
            int64_t coming = chunk + 1 < chunks * (share + 1) / shares ? chunk + 1 : chunk;
            int64_t coming_y = coming % bands * band, coming_plane = coming / bands * images * p.groups + group;
            int64_t from = larger(0, coming_y * p.stride_h - p.top);
            int64_t end = smaller(p.h, (coming_y + staging.rows) * p.stride_h - p.top);
            int64_t steps = ceiling(many_k, FILTERS) * ceiling(many_c * kernel, POSITIONS);
            int64_t again = coming == chunk ? 0 : 1;  // of some whole images, only the first is asked for
            Ahead next_x(
                x + ((coming_plane * channels + c) * p.h + from) * p.w, again * many_c, p.h * p.w, (end - from) * p.w);
            Ahead next_dy(
                dy + ((coming_plane * filters + k) * p.p + coming_y) * p.q, again * many_k, p.p * p.q,
                smaller(band, p.p - coming_y) * p.q);
            int64_t x_lines = ceiling(next_x.lines(), steps), dy_lines = ceiling(next_dy.lines(), steps);

            for (int64_t part = 0; part < many_c; part += staged) {
                int64_t here = smaller(staged, many_c - part), x_image = here * staging.channel();
                for (int64_t i = 0; i < many; ++i)
                    stage(
                        staging, x + (((first + i) * p.groups + group) * channels + c + part) * p.h * p.w, here, y,
                        line, pixels + i * x_image);
                // Zeros times what lies behind must be zeros, so that it has to be numbers.
                fill_zeros(pixels + many * x_image, STAGING_END + LANES);
                Chunk runs = {many, ceiling((rows - 1) * pitch + p.q, LANES), x_image, length};
                if (together) {
                    put_together(p, staging, here * kernel, many, pixels, x_image, tiles, columns);
                    runs = {1, used, 0, 0};
                }
                auto block = [&](int64_t m, int64_t i) {
                    int there = static_cast<int>(smaller(POSITIONS, here * kernel - i));
                    const float *rows_of_dy = gradients + m * dy_pitch;
                    float *to = sums + m * row + part * kernel + i;
                    int64_t left = many_k - m;
                    if (left >= FILTERS) {
                        multiply<FILTERS>(runs, rows_of_dy, dy_pitch, tiles, offset + i, there, to, row);
                    } else {
                        for (; left >= 2; left -= 2, rows_of_dy += 2 * dy_pitch, to += 2 * row)
                            multiply<2>(runs, rows_of_dy, dy_pitch, tiles, offset + i, there, to, row);
                        if (left) multiply<1>(runs, rows_of_dy, dy_pitch, tiles, offset + i, there, to, row);
                    }
                    next_x.ask<false>(x_lines);
                    next_dy.ask<false>(dy_lines);
                };
                // What the inner loop passes over comes from the second-level cache: the rows of x where kernel
                // positions share them, otherwise those of dy, which are fewer.
                if (kernel > 1 && !together) {
                    for (int64_t m = 0; m < many_k; m += FILTERS)
                        for (int64_t i = 0; i < here * kernel; i += POSITIONS) block(m, i);
                } else {
                    for (int64_t i = 0; i < here * kernel; i += POSITIONS)
                        for (int64_t m = 0; m < many_k; m += FILTERS) block(m, i);
                }
            }
        }
        for (int64_t m = 0; m < many_k; ++m)
            copy(
                partial + share * count + ((group * filters + k + m) * channels + c) * kernel, sums + m * row,
                many_c * kernel);
    });
    if (failed.load()) return 1;

    constexpr int64_t PART = 1 << 14;
    std::atomic<int64_t> found{0};
    parallel_for(threads, ceiling(count, PART), [&](int64_t task) {
        int64_t end = smaller(count, (task + 1) * PART);
        bool any = false;
        for (int64_t i = task * PART; i < end; ++i) {
            float sum = partial[i];
            for (int64_t share = 1; share < shares; ++share) sum += partial[share * count + i];
            out[i] = sum;
            any |= sum != sum;
        }
        if (any) found.store(1);
    });
    *nan = found.load();
    return 0;
}

}  // namespace gpucnn
