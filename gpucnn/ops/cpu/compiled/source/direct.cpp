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

constexpr int64_t DEPTH = 384;           // products before a sum is put down: a panel fits the first-level cache,
                                         // and rounding grows with this length, not with the whole depth
constexpr int64_t STAGED = 96 << 10;     // numbers of staged pixels at most, 384 KiB: the second-level cache
constexpr int64_t BUFFERED = 16 << 10;   // numbers of one panel's results, 64 KiB
constexpr int64_t TASKS = 16;            // from so many images and bands on, the outputs are not cut as well

enum Slot { WEIGHTS, TABLE, PIXELS, RESULTS, LINE };

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

int correlate(
    int threads, const Correlation &c, const float *source, const float *weights, const float *bias, float *out) {
    const Staging &staging = c.staging;
    int64_t panels = ceiling(c.outputs, ROWS), positions = c.kernel_h * c.kernel_w;
    int64_t band = staging.rows - c.shift_h, bands = ceiling(c.rows, band);
    int64_t cuts = larger(1, smaller(panels, TASKS / (c.groups * c.images * bands)));
    int64_t apart = (ceiling(band * staging.pitch, LANES) + WIDEST) * LANES;  // from phase to phase of the results
    int64_t pitch = apart * c.spread_w;                                       // from row to row of a panel
    int64_t pixels = c.channels * staging.channel();

    Table table;
    float *packed = scratch(WEIGHTS, c.groups * panels * ROWS * c.channels * positions);
    if (!packed || !make_table(c, table)) return 1;
    pack(threads, c, table, weights, packed);

    std::atomic<int> failed{0};
    parallel_for(threads, c.groups * c.images * bands * cuts, [&](int64_t task) {
        int64_t cut = task % cuts, y = task / cuts % bands * band, image = task / cuts / bands % c.images;
        int64_t group = task / cuts / bands / c.images, rows = smaller(band, c.rows - y);
        int64_t vectors = ceiling((rows - 1) * staging.pitch + c.columns, LANES);
        float *staged = scratch(PIXELS, pixels + STAGING_END), *results = scratch(RESULTS, ROWS * pitch);
        float *line = scratch(LINE, (c.columns + 2 * LANES) * c.spread_w);
        if (!staged || !results || !line) {
            failed.store(1);
            return;
        }
        int64_t plane = image * c.groups + group;
        stage(staging, source + plane * c.channels * staging.height * staging.width, c.channels, y, staged);
        fill_zeros(staged + pixels, STAGING_END);
        for (int64_t p = panels * cut / cuts; p < panels * (cut + 1) / cuts; ++p) {
            int64_t left = c.outputs - p * ROWS, there = smaller(left, ROWS);
            int m = panel_rows(left);
            float start[ROWS] = {};
            for (int64_t i = 0; bias && i < there; ++i) start[i] = bias[group * c.outputs + p * ROWS + i];
            float *planes = out + (plane * c.outputs + p * ROWS) * c.height * c.width;
            for (int64_t a = 0; a < c.spread_h; ++a) {
                for (int64_t b = 0; b < c.spread_w; ++b) {
                    int64_t first = table.first[a * c.spread_w + b], last = table.first[a * c.spread_w + b + 1];
                    int64_t depth = (last - first) * c.channels, parts = ceiling(depth, DEPTH);
                    const float *weight =
                        packed + (group * positions + first) * c.channels * panels * ROWS + p * ROWS * depth;
                    const int32_t *offset = table.offset + first * c.channels;
                    float *to = results + b * apart;
                    if (depth == 0)
                        for (int i = 0; i < m; ++i)
                            for (int64_t v = 0; v < vectors; ++v) store(to + i * pitch + v * LANES, broadcast(start[i]));
                    for (int64_t part = 0; part < parts; ++part) {
                        int64_t from = depth * part / parts, end = depth * (part + 1) / parts;
                        any_panel(
                            m, end - from, weight + from * m, staged, offset + from, part ? nullptr : start, to,
                            pitch, vectors);
                    }
                }
                for (int64_t i = 0; i < there; ++i)
                    for (int64_t j = 0; j < rows; ++j) {
                        int64_t h = (y + j) * c.spread_h + a + c.row;
                        if (h >= 0 && h < c.height)
                            write_row(
                                c, results + i * pitch + j * staging.pitch, apart, line,
                                planes + (i * c.height + h) * c.width);
                    }
            }
        }
    });
    return failed.load();
}

// The rows a task takes: as many as keep the staged pixels and one panel's results in the cache, evenly cut.
int64_t band(const Correlation &c) {
    int64_t a_row = c.channels * c.staging.phases_h * c.staging.phases_w * c.staging.pitch;
    int64_t rows = larger(1, smaller(STAGED / a_row - c.shift_h, BUFFERED / (ROWS * c.spread_w * c.staging.pitch)));
    return ceiling(c.rows, ceiling(c.rows, smaller(rows, c.rows)));
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
    staging.rows = band(c) + c.shift_h;
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
    staging.rows = band(c) + c.shift_h;
    return correlate(threads, c, dy, weight, nullptr, out);
}

}  // namespace gpucnn
