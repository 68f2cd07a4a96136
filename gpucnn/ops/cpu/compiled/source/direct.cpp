// Convolution and its input gradient without im2col: both are sums over (channel, kernel position) of a weight times
// shifted pixels, so both are offset_product.h over staged rows (direct.h).
//
// The input gradient reads dy instead of x, and the weights turned around. With a stride, input pixels whose place
// modulo the stride differs meet different kernel positions: each such phase of the input is a convolution of stride
// 1 with a part of the kernel, and their results are put together row by row.
//
// The limit is the processor's multiply-adds, from about 16 outputs and a depth of 64 on; with less, the copies.
#include <atomic>

#include "direct_panels.h"

namespace gpucnn {
namespace {

// Products before a sum is put down: a tile's pixels stay in the first-level cache while all panels of weights meet
// them, and rounding grows with this length, not with the whole depth.
constexpr int64_t DEPTH = 192;
constexpr int64_t STAGED = 160 << 10;   // numbers of staged pixels at most, 640 KiB,
constexpr int64_t RESULTS_AT_MOST = 64 << 10;  // of results, 256 KiB,
constexpr int64_t OUTPUTS = 512;        // and rows of weights in a task: DEPTH of them are 384 KiB
constexpr int64_t COLUMNS_TOGETHER = 384;  // pixels of small images that are put together, about
constexpr int64_t TASKS = 8;            // from so many images and bands on, the outputs are not cut as well

enum Slot { WEIGHTS, TABLE, PIXELS, RESULTS, LINE, TILES };

struct Correlation {
    Staging staging;  // of the source, whose channels are summed over
    int64_t images, groups, channels, outputs;           // channels and outputs of a group
    int64_t height, width;                               // of an output plane
    int64_t rows, columns;                               // of one phase of an output plane
    int64_t spread_h, spread_w, row, column;             // y of phase a is output row y * spread_h + a + row
    int64_t kernel_h, kernel_w, dilation_h, dilation_w;
    int64_t shift_h, shift_w;                            // the largest
    bool turned;                                         // whether shifts fall as kernel positions rise
    int64_t output_weights, channel_weights;             // weights from one output, and channel, to the next
    int64_t group_weights;
};

int64_t shift(int64_t place, int64_t step, int64_t spread, int64_t largest, bool turned) {
    return turned ? largest - place / spread : place / step;
}

// For each phase of the output, the kernel positions that meet it.
template <class Visit>
void visit_positions(const Correlation &c, int64_t phase, Visit visit) {
    for (int64_t r = 0; r < c.kernel_h; ++r) {
        if (r * c.dilation_h % c.spread_h != phase / c.spread_w) continue;
        for (int64_t s = 0; s < c.kernel_w; ++s)
            if (s * c.dilation_w % c.spread_w == phase % c.spread_w) visit(r, s);
    }
}

struct Table {
    int32_t *first;     // [phases + 1]: where a phase's positions begin among all
    int32_t *offset;    // [phase][channel][position]: from a pixel to the one that the weight is multiplied with
    int32_t *position;  // [phase][position]: r * kernel_w + s
};

bool make_table(const Correlation &c, Table &table) {
    int64_t phases = c.spread_h * c.spread_w, positions = c.kernel_h * c.kernel_w;
    float *memory = scratch(TABLE, phases + 1 + positions * (c.channels + 1));
    if (!memory) return false;
    table.first = reinterpret_cast<int32_t *>(memory);
    table.position = table.first + phases + 1;
    table.offset = table.position + positions;
    int64_t count = 0;
    const Staging &staging = c.staging;
    for (int64_t phase = 0; phase < phases; ++phase) {
        int64_t first = count;
        table.first[phase] = static_cast<int32_t>(first);
        visit_positions(c, phase, [&](int64_t r, int64_t s) {
            table.position[count++] = static_cast<int32_t>(r * c.kernel_w + s);
        });
        for (int64_t channel = 0; channel < c.channels; ++channel)
            for (int64_t i = first; i < count; ++i) {
                int64_t y = table.position[i] / c.kernel_w * c.dilation_h;
                int64_t x = table.position[i] % c.kernel_w * c.dilation_w;
                int64_t plane = y % staging.step_h * staging.phases_w + x % staging.step_w;
                int64_t down = shift(y, staging.step_h, c.spread_h, c.shift_h, c.turned);
                int64_t right = shift(x, staging.step_w, c.spread_w, c.shift_w, c.turned);
                table.offset[c.channels * first + channel * (count - first) + i - first] = static_cast<int32_t>(
                    channel * staging.channel() + plane * staging.plane() + down * staging.pitch + right);
            }
    }
    table.first[phases] = static_cast<int32_t>(count);
    return true;
}

// Weights in the order of the product: [group][phase][panel][channel][position][row of the panel].
void pack(int threads, const Correlation &c, const Table &table, const float *weights, float *packed) {
    int64_t positions = c.kernel_h * c.kernel_w, panels = ceiling(c.outputs, ROWS);
    parallel_for(threads, c.groups * panels, [&](int64_t task) {
        int64_t group = task / panels, panel = task % panels, left = c.outputs - panel * ROWS;
        int rows = panel_rows(left), there = static_cast<int>(smaller(left, ROWS));
        const float *from = weights + group * c.group_weights + panel * ROWS * c.output_weights;
        for (int64_t phase = 0; phase < c.spread_h * c.spread_w; ++phase) {
            int64_t first = table.first[phase], end = table.first[phase + 1];
            float *to = packed + (group * positions + first) * c.channels * panels * ROWS +
                        panel * ROWS * (end - first) * c.channels;
            for (int64_t channel = 0; channel < c.channels; ++channel)
                for (int64_t i = first; i < end; ++i) {
                    const float *weight = from + channel * c.channel_weights + table.position[i];
                    for (int m = 0; m < there; ++m) *to++ = weight[m * c.output_weights];
                    for (int m = there; m < rows; ++m) *to++ = 0;
                }
        }
    });
}

// A row of an output plane from the rows of its phases, [phase][pitch] apart.
void write_row(const Correlation &c, const float *phases, int64_t apart, float *line, float *to) {
    if (c.spread_w == 1) return copy(to, phases - c.column, c.width);
    if (c.spread_w == 2) {
        for (int64_t x = 0; x < c.columns; x += LANES) {
            Vector a = load(phases + x), b = load(phases + apart + x);
            store(line + 2 * x, zip_first(a, b));
            store(line + 2 * x + LANES, zip_second(a, b));
        }
    } else {
        for (int64_t b = 0; b < c.spread_w; ++b)
            for (int64_t x = 0; x < c.columns; ++x) line[x * c.spread_w + b] = phases[b * apart + x];
    }
    copy(to, line - c.column, c.width);
}

// What a task does: a band of rows of one image, or a few whole images whose pixels are put together without the
// columns between rows that are computed in vain.
struct Cut {
    int64_t images, rows, outputs;  // of a task
    bool together;
    int64_t sets, bands, cuts;      // how many tasks along each
    int64_t pitch, image;           // of results: from row to row, from image to image
    int64_t length;                 // of a row of results
};

// How much longer vectors are than the pixels they are for.
double waste(int64_t columns, int64_t pixels) {
    return static_cast<double>(ceiling(columns, LANES) * LANES) / static_cast<double>(pixels);
}

Cut cut(const Correlation &c) {
    const Staging &s = c.staging;
    Cut cut = {};
    int64_t pixels = c.rows * c.columns, a_row = c.channels * s.phases_h * s.phases_w * s.pitch;
    cut.cuts = ceiling(c.outputs, OUTPUTS);
    cut.outputs = ceiling(ceiling(c.outputs, cut.cuts), ROWS) * ROWS;
    // Putting together costs a copy of each column for each kernel position, about 4 cycles a vector of which
    // `outputs` / 2 cycles of products are made.
    cut.images = larger(1, smaller(COLUMNS_TOGETHER / pixels, c.images / TASKS));
    while (cut.images < c.images && cut.images * pixels < 8 * LANES) ++cut.images;
    double apart = waste((c.rows - 1) * s.pitch + c.columns, pixels), dense = waste(cut.images * pixels, pixels);
    double products = static_cast<double>(cut.outputs) / 2;
    cut.together = pixels <= COLUMNS_TOGETHER && apart * products > dense / cut.images * products + 6;
    if (cut.together) {
        cut.sets = ceiling(c.images, cut.images);
        cut.images = ceiling(c.images, cut.sets);
        cut.rows = c.rows, cut.bands = 1;
        cut.pitch = c.columns, cut.image = pixels;
        cut.length = cut.images * pixels;
    } else {
        cut.images = 1, cut.sets = c.images;
        int64_t results = RESULTS_AT_MOST / (cut.outputs * c.spread_w * s.pitch);
        int64_t rows = larger(1, smaller(c.rows, smaller(STAGED / a_row - c.shift_h, results)));
        cut.bands = ceiling(c.rows, rows);
        cut.rows = ceiling(c.rows, cut.bands);
        cut.bands = ceiling(c.rows, cut.rows);
        cut.pitch = s.pitch;
        cut.length = (cut.rows - 1) * s.pitch + c.columns;
    }
    int64_t tasks = c.groups * cut.sets * cut.bands;
    cut.cuts = larger(cut.cuts, smaller(ceiling(c.outputs, 4 * ROWS), TASKS / tasks));
    cut.outputs = ceiling(ceiling(c.outputs, cut.cuts), ROWS) * ROWS;
    cut.cuts = ceiling(c.outputs, cut.outputs);
    return cut;
}

// Columns of pixels of several images, in the order of the product: to[tile][k][column of the tile].
void put_together(
    const Correlation &c, int64_t images, int64_t depth, const float *staged, const int32_t *offset, int step,
    int64_t vectors, float *line, float *to) {
    int64_t image = c.channels * c.staging.channel();
    fill_zeros(line, (vectors + step) * LANES);  // what lies there by chance may be subnormal, 100 times as slow
    for (int64_t k = 0; k < depth; ++k) {
        float *at = line;
        for (int64_t i = 0; i < images; ++i) {
            const float *row = staged + i * image + offset[k];
            if (c.columns <= LANES)
                for (int64_t y = 0; y < c.rows; ++y, at += c.columns, row += c.staging.pitch) store(at, load(row));
            else
                for (int64_t y = 0; y < c.rows; ++y, at += c.columns, row += c.staging.pitch)
                    for (int64_t x = 0; x < c.columns; x += LANES) store(at + x, load(row + x));
        }
        for (int64_t v = 0; v < vectors; v += step)
            for (int i = 0; i < step; ++i)
                store(to + (v / step * DEPTH + k) * step * LANES + i * LANES, load(line + (v + i) * LANES));
    }
}

int correlate(
    int threads, Correlation &c, const float *source, const float *weights, const float *bias, float *out) {
    Staging &staging = c.staging;
    const Cut cut = gpucnn::cut(c);
    staging.rows = cut.rows + c.shift_h;
    int64_t panels = ceiling(c.outputs, ROWS), positions = c.kernel_h * c.kernel_w;
    int64_t apart = (ceiling(cut.length, LANES) + WIDEST) * LANES;  // from phase to phase of a row of results
    apart += apart % 1024 == 0 ? LANES : 0;                         // rows 4 KiB apart would share a few cache lines
    int64_t pitch = apart * c.spread_w, image = c.channels * staging.channel();
    int64_t count = c.groups * panels * ROWS * c.channels * positions;

    Table table;
    float *packed = scratch(WEIGHTS, count + c.groups * panels * ROWS);
    if (!packed || !make_table(c, table)) return 1;
    float *starts = packed + count;
    pack(threads, c, table, weights, packed);
    for (int64_t group = 0; group < c.groups; ++group)
        for (int64_t i = 0; i < panels * ROWS; ++i)
            starts[group * panels * ROWS + i] = bias && i < c.outputs ? bias[group * c.outputs + i] : 0;

    std::atomic<int> failed{0};
    parallel_for(threads, c.groups * cut.sets * cut.bands * cut.cuts, [&](int64_t task) {
        int64_t output = task % cut.cuts * cut.outputs, y = task / cut.cuts % cut.bands * cut.rows;
        int64_t first = task / cut.cuts / cut.bands % cut.sets * cut.images;
        int64_t group = task / cut.cuts / cut.bands / cut.sets;
        int64_t rows = smaller(cut.rows, c.rows - y), images = smaller(cut.images, c.images - first);
        int64_t outputs = smaller(cut.outputs, c.outputs - output);
        int64_t length = cut.together ? images * cut.image : (rows - 1) * cut.pitch + c.columns;
        int64_t vectors = ceiling(length, LANES);
        float *staged = scratch(PIXELS, images * image + STAGING_END);
        float *results = scratch(RESULTS, cut.outputs * pitch + LANES);
        int64_t longest = larger(larger((c.columns + 2 * LANES) * c.spread_w, apart + LANES), staging.line());
        float *line = scratch(LINE, longest);
        float *columns = staged;
        int32_t *dense = nullptr;
        if (cut.together) {
            columns = scratch(TILES, DEPTH * (apart + 1));
            dense = reinterpret_cast<int32_t *>(columns + DEPTH * apart);
        }
        if (!staged || !results || !line || !columns) {
            failed.store(1);
            return;
        }
        const int step = widest_tile(panel_rows(outputs), outputs <= ROWS);
        for (int64_t k = 0; dense && k < DEPTH; ++k) dense[k] = static_cast<int32_t>(k * step * LANES);
        for (int64_t i = 0; i < images; ++i)
            stage(
                staging, source + ((first + i) * c.groups + group) * c.channels * staging.height * staging.width,
                c.channels, y, line, staged + i * image);
        fill_zeros(staged + images * image, STAGING_END);

        // What the next task but the other threads' will read, and what this one will write, spread over the tiles.
        int64_t tasks = c.groups * cut.sets * cut.bands * cut.cuts, next = task + threads;
        const float *coming = source;
        int64_t coming_numbers = 0;
        if (next < tasks && cut.cuts == 1 && cut.images == 1) {
            int64_t next_y = next % cut.bands * cut.rows * staging.step_h - staging.top;
            int64_t next_image = next / cut.bands % cut.sets, next_group = next / cut.bands / cut.sets;
            int64_t begin = larger(0, next_y), end = smaller(staging.height, next_y + staging.rows * staging.step_h);
            coming += ((next_image * c.groups + next_group) * c.channels * staging.height + begin) * staging.width;
            coming_numbers = (end - begin) * staging.width;
        }
        Ahead reads(coming, c.channels, staging.height * staging.width, coming_numbers);
        int64_t tiles = larger(1, vectors / step * ceiling(outputs, ROWS) * c.spread_w * c.spread_h);
        int64_t reads_a_tile = ceiling(reads.lines(), tiles);
        Ahead writes(
            out + ((first * c.groups + group) * c.outputs + output) * c.height * c.width + y * c.spread_h * c.width,
            outputs, c.height * c.width, smaller(rows * c.spread_h, c.height - y * c.spread_h) * c.width);
        int64_t writes_a_tile = ceiling(writes.lines(), tiles);

        auto multiply = [&](int64_t phase, int64_t b) {
            int64_t begin = table.first[phase], last = table.first[phase + 1];
            int64_t depth = (last - begin) * c.channels, parts = ceiling(depth, DEPTH);
            const float *weight = packed + (group * positions + begin) * c.channels * panels * ROWS + output * depth;
            const float *start = starts + group * panels * ROWS + output;
            const int32_t *offset = table.offset + begin * c.channels;
            for (int64_t i = 0; parts == 0 && i < outputs; ++i)
                for (int64_t v = 0; v < vectors; ++v)
                    store(results + i * pitch + b * apart + v * LANES, broadcast(start[i]));
            for (int64_t part = 0; part < parts; ++part) {
                int64_t from = depth * part / parts, end = depth * (part + 1) / parts;
                if (cut.together) 
                    put_together(c, images, end - from, staged, offset + from, step, vectors, line, columns);
                for (int64_t v = 0; v < vectors; v += step)
                    for (int64_t i = 0; i < outputs; i += ROWS) {
                        int m = panel_rows(outputs - i);
                        any_tile(
                            m, static_cast<int>(smaller(step, vectors - v)),
                            {end - from, weight + i * depth + from * m, columns + v * LANES * (cut.together ? DEPTH : 1),
                             cut.together ? dense : offset + from, part ? nullptr : start + i,
                             results + i * pitch + b * apart + v * LANES, pitch});
                        reads.ask<false>(reads_a_tile);
                        writes.ask<true>(writes_a_tile);
                    }
            }
        };
        // Results lie as the output does, row behind row.
        bool whole = c.spread_h * c.spread_w == 1 && cut.pitch == c.width && c.row == 0 && c.column == 0;
        for (int64_t a = 0; a < c.spread_h; ++a) {
            for (int64_t b = 0; b < c.spread_w; ++b) multiply(a * c.spread_w + b, b);
            for (int64_t n = 0; n < images; ++n)
                for (int64_t i = 0; i < outputs; ++i) {
                    float *plane =
                        out + (((first + n) * c.groups + group) * c.outputs + output + i) * c.height * c.width;
                    const float *from = results + i * pitch + n * cut.image;
                    if (whole) {
                        copy(plane + y * c.width, from, smaller(rows, c.height - y) * c.width);
                        continue;
                    }
                    for (int64_t j = 0; j < rows; ++j, from += cut.pitch) {
                        int64_t h = (y + j) * c.spread_h + a + c.row;
                        if (h >= 0 && h < c.height) write_row(c, from, apart, line, plane + h * c.width);
                    }
                }
        }
    });
    return failed.load();
}

// 1x1 of stride 1 without padding: where a row ends has no meaning, and longer rows are copied faster.
void join_rows(Correlation &c) {
    Staging &s = c.staging;
    bool plain = c.kernel_h * c.kernel_w == 1 && s.step_h * s.step_w * c.spread_h * c.spread_w == 1 &&
                 s.top == 0 && s.left == 0 && s.height == c.height && s.width == c.width;
    for (int64_t rows = 2; plain && rows <= c.height && rows * c.width <= 4096; ++rows)
        if (c.height % rows == 0 && (rows == c.height || rows * c.width >= 384)) {
            s.height = c.height = c.rows = c.height / rows;
            s.width = s.pitch = c.width = c.columns = c.width * rows;
            return;
        }
}

}  // namespace

// out = the convolution of x with weight, plus bias where there is one.
GPUCNN_EXPORT int gpucnn_direct_forward(
    int threads, const Problem *problem, const float *x, const float *weight, const float *bias, float *out) {
    const Problem &p = *problem;
    Correlation c = {};
    c.images = p.n, c.groups = p.groups, c.channels = p.c / p.groups, c.outputs = p.k / p.groups;
    c.height = c.rows = p.p, c.width = c.columns = p.q;
    c.spread_h = c.spread_w = 1;
    c.kernel_h = p.r, c.kernel_w = p.s, c.dilation_h = p.dilation_h, c.dilation_w = p.dilation_w;
    c.shift_h = (p.r - 1) * p.dilation_h / p.stride_h, c.shift_w = (p.s - 1) * p.dilation_w / p.stride_w;
    c.channel_weights = p.r * p.s, c.output_weights = c.channels * c.channel_weights;
    c.group_weights = c.outputs * c.output_weights;
    Staging &staging = c.staging;
    staging.height = p.h, staging.width = p.w, staging.step_h = p.stride_h, staging.step_w = p.stride_w;
    staging.top = p.top, staging.left = p.left;
    staging.phases_h = phases(p.r, p.dilation_h, p.stride_h);
    staging.phases_w = phases(p.s, p.dilation_w, p.stride_w);
    staging.pitch = staging_pitch(staging, p.q, c.shift_w);
    join_rows(c);
    return correlate(threads, c, x, weight, bias, out);
}

// out = the gradient for x of the convolution with weight, from dy.
GPUCNN_EXPORT int gpucnn_direct_backward_data(
    int threads, const Problem *problem, const float *dy, const float *weight, float *out) {
    const Problem &p = *problem;
    Correlation c = {};
    c.images = p.n, c.groups = p.groups, c.channels = p.k / p.groups, c.outputs = p.c / p.groups;
    c.height = p.h, c.width = p.w, c.spread_h = p.stride_h, c.spread_w = p.stride_w;
    c.kernel_h = p.r, c.kernel_w = p.s, c.dilation_h = p.dilation_h, c.dilation_w = p.dilation_w;
    c.shift_h = (p.r - 1) * p.dilation_h / p.stride_h, c.shift_w = (p.s - 1) * p.dilation_w / p.stride_w;
    c.turned = true;
    c.output_weights = p.r * p.s, c.channel_weights = c.outputs * c.output_weights;
    c.group_weights = c.channels * c.channel_weights;
    // x[h] met the kernel's row r for y[(h + top - r * dilation) / stride]: u = (h + top) / stride less the shift.
    int64_t u = p.top / p.stride_h, v = p.left / p.stride_w;  // the smallest: of h = 0, w = 0
    c.row = u * p.stride_h - p.top, c.column = v * p.stride_w - p.left;
    c.rows = (p.h - 1 - c.row) / p.stride_h + 1, c.columns = (p.w - 1 - c.column) / p.stride_w + 1;
    Staging &staging = c.staging;
    staging.height = p.p, staging.width = p.q;
    staging.step_h = staging.step_w = staging.phases_h = staging.phases_w = 1;
    staging.top = c.shift_h - u, staging.left = c.shift_w - v;
    staging.pitch = staging_pitch(staging, c.columns, c.shift_w);
    join_rows(c);
    return correlate(threads, c, dy, weight, nullptr, out);
}

}  // namespace gpucnn
