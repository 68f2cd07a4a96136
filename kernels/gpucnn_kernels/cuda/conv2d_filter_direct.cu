// The gradient of a convolution's weight where a group has few input channels (first layers): C / groups <= 8. The
// matrix product of conv2d_filter_gradient would look up every window of x, number by number, for as few output
// channels as there are; here a block brings a piece of the image to shared memory once and all its windows read it.
//
// A column is a kernel position of an input channel, and a thread sums up TAPS columns for OUTPUTS output channels,
// in registers, over the positions of its share of a tile: rows x row_quads quads, a quad being four neighbouring
// positions of an output row. For each quad it reads 16 bytes of dy for each output channel and 16 bytes of x for
// each column and does 4 * TAPS * OUTPUTS multiply-adds: 224 of some 250 instructions, for 15 reads, of which
// neighbouring lanes share most. So that each column's four pixels lie together, x is staged by its column modulo
// the stride, and so that they start at a multiple of 16 bytes wherever the column starts, in up to four copies,
// each a number further on. Any kernel, stride and dilation will do.
//
// A bias's gradient is one column more, which meets nothing but ones, where a place is free among those of the last
// thread: there mostly is, and then it costs one instruction a quad.
//
// Limit: memory, dy and x read once, for 3 -> 64 channels of 3 x 3 (27 multiply-adds for each number of dy) as for
// 1 -> 6 of 5 x 5 (25); arithmetic from there on. Staging takes some 5 instructions for each number of dy, fewer
// where it can be read 16 bytes at a time, and 20 for each of x.
//
// The tiles are split into parts, as in conv2d_filter_gradient, whose filter_gradient_finish adds them up. All sums
// are in an order of the shape alone.
#include "scalar.cuh"

constexpr int TAPS = 7;                                      // columns of a thread
constexpr int OUTPUTS = sizeof(accumulate_t) == 8 ? 2 : 8;   // and output channels
constexpr int TOGETHER = 2;                                  // of those that are added up at a time at the end
constexpr int BATCH = 4;                                     // pixels that a thread loads at a time
constexpr int QUAD_PITCH = 4 * OUTPUTS + 4;                  // from quad to quad: neighbours meet other banks

struct __align__(4 * sizeof(accumulate_t)) Quad {
    accumulate_t v[4];
};

struct __align__(4 * sizeof(scalar_t)) StoredQuad {
    scalar_t v[4];
};

struct FilterPatch {
    long long x_n, dy_n, tiles, part;       // strides in elements; tiles of positions, and those of a part
    int x_c, x_h, x_w, dy_k, dy_p, dy_q;    // strides, in elements
    int groups, K, C, columns;              // of a group: output channels, input channels, C * R * S
    int H, W, R, S, P, Q;
    int stride_h, stride_w, top, left, dilation_h, dilation_w;
    int output_blocks, output_units;        // blocks across the output channels, and threads across those of a block
    int column_blocks, column_units;        // the same of columns
    int splits, neighbours;                 // threads that share out a tile; those of them that lie side by side
    int rows, row_quads, tiles_down, tiles_across;  // of a tile of positions; of an image
    int x_rows, x_indices, x_pitch, copies;  // of x in shared memory; by each column modulo the stride
    int dy_pitch;                           // numbers from a thread's output channels to the next one's
    int bias_slot;                          // of all slots for columns, the one for the bias's gradient, or -1
    int lanes;                              // threads that add up a number at the end
    // 2^32 divided by the number, rounded up; 0 for 1.
    unsigned by_stride, by_x_rows, by_row_quads;
    bool channels_fastest;                  // columns run r, s, c
    bool dy_across, dy_quads;               // neighbours in memory are channels; quads start at their own multiples
};

// Exact where value * divisor < 2^32.
__device__ __forceinline__ int divided(int value, unsigned reciprocal) {
    return reciprocal ? (int)__umulhi((unsigned)value, reciprocal) : value;
}

// Where column ``j`` of a group looks, relative to a window's first pixel.
struct Column {
    int c, down, right;
};

__device__ __forceinline__ Column column_of(int j, const FilterPatch &patch) {
    const int places = patch.R * patch.S;
    const int c = patch.channels_fastest ? j % patch.C : j / places;
    const int place = patch.channels_fastest ? j / patch.C : j - c * places;
    const int r = place / patch.S;
    return {c, r * patch.dilation_h, (place - r * patch.S) * patch.dilation_w};
}

// ---------------------------------------------------------------- from memory to shared memory

template <bool QUADS>
__device__ __forceinline__ Quad quad_at(const scalar_t *from, int step, int there) {
    Quad quad;
    if (QUADS) {
        const StoredQuad stored = *reinterpret_cast<const StoredQuad *>(from);
        #pragma unroll
        for (int j = 0; j < 4; ++j) quad.v[j] = load(stored.v[j]);
    } else {
        #pragma unroll
        for (int j = 0; j < 4; ++j) quad.v[j] = j < there ? load(from[j * step]) : NUMBER(0);
    }
    return quad;
}

// A tile's dy as [OUTPUTS channels][quad][channel][position], zeros beyond the last position of a row. Of channels
// beyond the last one nothing is staged, for what is made of them is stored nowhere.
template <bool QUADS>
__device__ __forceinline__ void stage_dy(
    const scalar_t *dy, accumulate_t *dy_tile, int outputs, int rows, int positions, const FilterPatch &patch
) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int channels = min(patch.output_units * OUTPUTS, outputs), quads = rows * patch.row_quads;
    if (patch.dy_across) {
        for (int k = lane; k < channels; k += 32) {
            const scalar_t *from = dy + k * patch.dy_k;
            accumulate_t *to = dy_tile + k / OUTPUTS * patch.dy_pitch + k % OUTPUTS * 4;
            #pragma unroll 2
            for (int quad = warp; quad < quads; quad += warps) {
                const int row = divided(quad, patch.by_row_quads), q = 4 * (quad - row * patch.row_quads);
                *reinterpret_cast<Quad *>(to + quad * QUAD_PITCH) =
                    quad_at<false>(from + (row * patch.dy_p + q * patch.dy_q), patch.dy_q, positions - q);
            }
        }
        return;
    }
    for (int quad = lane; quad < quads; quad += 32) {
        const int row = divided(quad, patch.by_row_quads), q = 4 * (quad - row * patch.row_quads);
        const scalar_t *from = dy + (row * patch.dy_p + q * patch.dy_q);
        accumulate_t *to = dy_tile + quad * QUAD_PITCH;
        #pragma unroll 2
        for (int k = warp; k < channels; k += warps) {
            if (QUADS && positions <= q) break;
            *reinterpret_cast<Quad *>(to + k / OUTPUTS * patch.dy_pitch + k % OUTPUTS * 4) =
                quad_at<QUADS>(from + k * patch.dy_k, patch.dy_q, positions - q);
        }
    }
}

// What the windows of a tile look at: [copy][channel][row][column modulo the stride][column / stride], zeros outside
// of the image. ``top`` and ``left`` are the pixel of the first row and column.
__device__ __forceinline__ void stage_x(
    const scalar_t *x, accumulate_t *x_tile, int top, int left, const FilterPatch &patch
) {
    const int lines = patch.C * patch.x_rows, width = patch.x_indices * patch.stride_w;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int line_pitch = patch.stride_w * patch.x_pitch, step = lines * line_pitch - 1;
    for (int column = threadIdx.x % 32; column < width; column += 32) {
        const int index = divided(column, patch.by_stride), phase = column - index * patch.stride_w;
        const int w = left + column;
        const bool across = w >= 0 && w < patch.W;
        const int copies = min(patch.copies, index + 1);
        for (int first = warp; first < lines; first += BATCH * warps) {
            accumulate_t values[BATCH];
            #pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int line = first + i * warps;
                const int c = divided(line, patch.by_x_rows), h = top + line - c * patch.x_rows;
                const bool inside = across && line < lines && h >= 0 && h < patch.H;
                values[i] = inside ? load(x[c * patch.x_c + h * patch.x_h + w * patch.x_w]) : NUMBER(0);
            }
            accumulate_t *to = x_tile + first * line_pitch + phase * patch.x_pitch + index;
            const int stored = (lines - first + warps - 1) / warps;
            for (int m = 0; m < copies; ++m) {
                #pragma unroll
                for (int i = 0; i < BATCH; ++i) {
                    if (i < stored) to[i * warps * line_pitch] = values[i];
                }
                to += step;
            }
        }
    }
}

// ---------------------------------------------------------------- a thread's share of a tile

// ``taps`` is where each of the thread's columns begins in ``memory``, in bytes; those of the last one are counted on
// by as much as ``moving`` lets through, nothing or all. RAGGED is with rows that do not fill the quads: what
// positions beyond the last one meet is made zero, for it may be infinite, and their dy is no more than zero.
template <bool RAGGED>
__device__ __forceinline__ void add_tile(
    accumulate_t (&sums)[TAPS][OUTPUTS], const unsigned char *memory, const int (&taps)[TAPS], int moving, int slopes,
    int split, int rows, int positions, const FilterPatch &patch
) {
    constexpr int SIZE = sizeof(accumulate_t);
    const int row_step = patch.stride_h * patch.stride_w * patch.x_pitch * SIZE;
    const int down = divided(patch.splits, patch.by_row_quads), right = patch.splits - down * patch.row_quads;
    int row = divided(split, patch.by_row_quads), quad = split - row * patch.row_quads;
    while (row < rows) {
        const int there = positions - 4 * quad;
        if (!RAGGED || there > 0) {
            const int at = row * row_step + quad * (4 * SIZE);
            const unsigned char *dy = memory + (slopes + (row * patch.row_quads + quad) * (QUAD_PITCH * SIZE));
            Quad factors[OUTPUTS];
            #pragma unroll
            for (int k = 0; k < OUTPUTS; ++k) factors[k] = reinterpret_cast<const Quad *>(dy)[k];
            #pragma unroll
            for (int i = 0; i < TAPS; ++i) {
                const int offset = taps[i] + (i + 1 < TAPS ? at : at & moving);
                Quad pixels = *reinterpret_cast<const Quad *>(memory + offset);
                #pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if (RAGGED && j > 0) pixels.v[j] = j < there ? pixels.v[j] : NUMBER(0);
                    #pragma unroll
                    for (int k = 0; k < OUTPUTS; ++k) sums[i][k] += pixels.v[j] * factors[k].v[j];
                }
            }
        }
        quad += right;
        const int over = quad >= patch.row_quads;
        quad -= over ? patch.row_quads : 0;
        row += down + over;
    }
}

// ---------------------------------------------------------------- the kernel

extern "C" __global__ void __launch_bounds__(256) filter_gradient_direct(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, accumulate_t *bias_partial, FilterPatch patch
) {
    extern __shared__ __align__(128) unsigned char memory[];
    // Four ones, what the windows look at, and dy; at the end the sums.
    accumulate_t *numbers = reinterpret_cast<accumulate_t *>(memory);
    accumulate_t *x_tile = numbers + 4;
    const int copy = patch.C * patch.x_rows * patch.stride_w * patch.x_pitch, slopes = 4 + patch.copies * copy;

    unsigned block = blockIdx.x;
    const int first_unit = block % patch.column_blocks * patch.column_units;
    block /= patch.column_blocks;
    const int first_output = block % patch.output_blocks * patch.output_units * OUTPUTS;
    block /= patch.output_blocks;
    const int group = block % patch.groups;
    const long long part = block / patch.groups;

    int thread = threadIdx.x;
    const int neighbour = thread % patch.neighbours;
    thread /= patch.neighbours;
    const int output_unit = thread % patch.output_units;
    thread /= patch.output_units;
    const int column_unit = thread % patch.column_units;
    const int split = thread / patch.column_units * patch.neighbours + neighbour;
    const bool busy = split < patch.splits;

    const int first_slot = (first_unit + column_unit) * TAPS;
    const int moving = first_slot + TAPS - 1 == patch.bias_slot ? 0 : -1;
    int taps[TAPS];
    accumulate_t sums[TAPS][OUTPUTS];
    #pragma unroll
    for (int i = 0; i < TAPS; ++i) {
        const Column column = column_of(first_slot + i < patch.columns ? first_slot + i : 0, patch);
        const int index = column.right / patch.stride_w, phase = column.right - index * patch.stride_w;
        const int line = column.c * patch.x_rows + column.down, m = index % 4;
        taps[i] = (4 + m * copy + (line * patch.stride_w + phase) * patch.x_pitch + index - m) * sizeof(accumulate_t);
        #pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) sums[i][k] = NUMBER(0);
    }
    if (!moving) taps[TAPS - 1] = 0;  // the ones
    if (threadIdx.x < 4) numbers[threadIdx.x] = NUMBER(1);

    const long long end = min((part + 1) * patch.part, patch.tiles);
    for (long long tile = part * patch.part; tile < end; ++tile) {
        const int in_image = patch.tiles_down * patch.tiles_across;
        const long long n = tile / in_image;
        const int place = (int)(tile - n * in_image);
        const int p = place / patch.tiles_across * patch.rows;
        const int q = place % patch.tiles_across * patch.row_quads * 4;
        const int rows = min(patch.rows, patch.P - p), positions = patch.Q - q;
        const int channel = group * patch.K + first_output;
        __syncthreads();  // the tile before has been read
        const scalar_t *from = dy + n * patch.dy_n + (channel * patch.dy_k + p * patch.dy_p + q * patch.dy_q);
        if (patch.dy_quads) {
            stage_dy<true>(from, numbers + slopes, patch.K - first_output, rows, positions, patch);
        } else {
            stage_dy<false>(from, numbers + slopes, patch.K - first_output, rows, positions, patch);
        }
        stage_x(
            x + n * patch.x_n + group * patch.C * patch.x_c, x_tile, p * patch.stride_h - patch.top,
            q * patch.stride_w - patch.left, patch
        );
        __syncthreads();
        if (busy) {
            const int mine = (slopes + output_unit * patch.dy_pitch) * sizeof(accumulate_t);
            if (patch.Q % (4 * patch.row_quads)) {
                add_tile<true>(sums, memory, taps, moving, mine, split, rows, positions, patch);
            } else {
                add_tile<false>(sums, memory, taps, moving, mine, split, rows, positions, patch);
            }
        }
    }

    // What the threads of the same columns and channels have lies side by side, and ``lanes`` threads add it up.
    const int units = patch.column_units * patch.output_units, unit = column_unit * patch.output_units + output_unit;
    const int lane = threadIdx.x % patch.lanes;
    #pragma unroll
    for (int first = 0; first < OUTPUTS; first += TOGETHER) {
        __syncthreads();
        if (busy) {
            #pragma unroll
            for (int i = 0; i < TAPS * TOGETHER; ++i) {
                numbers[(i * units + unit) * patch.splits + split] = sums[i % TAPS][first + i / TAPS];
            }
        }
        __syncthreads();
        for (int done = 0; done < units * TAPS * TOGETHER * patch.lanes; done += blockDim.x) {
            const int item = (done + threadIdx.x) / patch.lanes, kind = item / units, of = item - kind * units;
            const bool there = kind < TAPS * TOGETHER;
            accumulate_t sum = NUMBER(0);
            if (there) {
                #pragma unroll 4
                for (int i = lane; i < patch.splits; i += patch.lanes) sum += numbers[item * patch.splits + i];
            }
            for (int half = patch.lanes / 2; half > 0; half /= 2) sum += __shfl_down_sync(0xffffffffu, sum, half);
            const int slot = (first_unit + of / patch.output_units) * TAPS + kind % TAPS;
            const int k = first_output + of % patch.output_units * OUTPUTS + first + kind / TAPS;
            if (there && lane == 0 && k < patch.K) {
                const long long row = (part * patch.groups + group) * patch.K + k;
                if (slot < patch.columns) partial[row * patch.columns + slot] = sum;
                if (slot == patch.bias_slot) bias_partial[row] = sum;
            }
        }
    }
}
