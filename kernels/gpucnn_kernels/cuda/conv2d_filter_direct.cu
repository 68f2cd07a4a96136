// The gradient of a convolution's weight where a group has few input channels (first layers): C / groups <= 8. The
// matrix product of conv2d_filter_gradient would look up every window of x, number by number, for as few output
// channels as there are; here a block brings a piece of the image to shared memory once and all its windows read it.
//
// A column is a kernel position of an input channel, and a thread sums up TAPS columns for OUTPUTS output channels,
// in registers, over the positions of its share of a tile: rows x row_quads quads, a quad being four neighbouring
// positions of an output row. For each quad it reads 16 bytes of dy for each output channel and 16 bytes of x for
// each column and does 4 * TAPS * OUTPUTS multiply-adds: 224 of 267 instructions compiled for sm_90 (302 where rows
// do not fill the quads), for 15 reads, of which neighbouring lanes share most. So that each column's four pixels lie
// together, x is staged by its column modulo the stride, and so that they start at a multiple of 16 bytes wherever
// the column starts, in up to four copies, each a number further on. Any kernel, stride and dilation will do.
//
// A bias's gradient is one column more, which meets nothing but ones, where a place is free among those of the last
// thread: there mostly is, and then it costs one instruction a quad.
//
// Limit: memory, dy and x read once, for 3 -> 64 channels of 3 x 3 (27 multiply-adds for each number of dy) as for
// 1 -> 6 of 5 x 5 (25); arithmetic from there on. Of a warp's instructions, counted for sm_90, staging takes 114 for
// 128 numbers of x with four copies and 81 with two, 21 for 128 of dy read 16 bytes at a time and 36 otherwise. A
// small problem has two or three tiles for a block, so that what comes before and after counts: some 700 instructions
// before, and 200 to 400 after, by neighbours that share out what they add up; both fewer than a tile takes.
//
// The tiles are split into parts, as in conv2d_filter_gradient, whose filter_gradient_finish adds them up. All sums
// are in an order of the shape alone.
#include "ptx.cuh"
#include "scalar.cuh"

constexpr int TAPS = 7;                                      // columns of a thread
constexpr int OUTPUTS = sizeof(accumulate_t) == 8 ? 2 : 8;   // and output channels
constexpr int COPIES = 4;                                    // of x at most, each a number further on
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
    int splits, neighbours;                 // threads that share out a tile; side by side: a power of two, up to OUTPUTS
    int rows, row_quads, tiles_down, tiles_across;  // of a tile of positions; of an image
    int x_rows, x_indices, x_pitch, copies;  // of x in shared memory; by each column modulo the stride
    int x_copy, dy_begin;                   // numbers of a copy, and in front of dy
    int dy_pitch;                           // numbers from a thread's output channels to the next one's
    int bias_slot;                          // of all slots for columns, the one for the bias's gradient, or -1
    // 2^32 divided by the number, rounded up; 0 for 1. The last two by the quads of a row of x in shared memory, and
    // of those of one column modulo the stride.
    unsigned by_stride, by_x_rows, by_row_quads, by_x_quads, by_x_pitch;
    bool channels_fastest;                  // columns run r, s, c
    bool dy_across, dy_quads;               // neighbours in memory are channels; quads start at their own multiples
};

// Exact where value * divisor < 2^32.
__device__ __forceinline__ int divided(int value, unsigned reciprocal) {
    return reciprocal ? (int)__umulhi((unsigned)value, reciprocal) : value;
}

// A column of a group: its input channel and kernel position.
struct Column {
    int c, r, s;
};

__device__ __forceinline__ Column column_of(int j, const FilterPatch &patch) {
    const int places = patch.R * patch.S;
    const int c = patch.channels_fastest ? j % patch.C : j / places;
    const int place = patch.channels_fastest ? j / patch.C : j - c * places;
    const int r = place / patch.S;
    return {c, r, place - r * patch.S};
}

// The column behind it: a division for each would take more than all else that a thread does before its first tile.
__device__ __forceinline__ Column next_column(Column column, const FilterPatch &patch) {
    const bool next_place = !patch.channels_fastest || column.c + 1 == patch.C;
    column.s += next_place;
    const bool next_row = column.s == patch.S;
    column.s = next_row ? 0 : column.s;
    column.r += next_row;
    const bool next_channel = column.r == patch.R;
    if (patch.channels_fastest) {
        column.c = next_place ? 0 : column.c + 1;
    } else {
        column.r = next_channel ? 0 : column.r;
        column.c += next_channel;
    }
    return column;
}

// ---------------------------------------------------------------- from memory to shared memory

// What the compiler knows nothing of but its value: it would count from the kernel's argument for each number, in 64
// bits, which are four instructions, not one.
__device__ __forceinline__ const scalar_t *kept(const scalar_t *array) {
    const char *place = reinterpret_cast<const char *>(array);
    keep(place);
    return reinterpret_cast<const scalar_t *>(place);
}

template <bool QUADS>
__device__ __forceinline__ Quad quad_at(const scalar_t *dy, int at, int step, int there) {
    Quad quad;
    if (QUADS) {
        const StoredQuad stored = *reinterpret_cast<const StoredQuad *>(dy + at);
        #pragma unroll
        for (int j = 0; j < 4; ++j) quad.v[j] = load(stored.v[j]);
    } else {
        #pragma unroll
        for (int j = 0; j < 4; ++j) quad.v[j] = j < there ? load(__ldg(dy + (at + j * step))) : NUMBER(0);
    }
    return quad;
}

// A tile's dy as [OUTPUTS channels][quad][channel][position], zeros beyond the last position of a row. Of channels
// beyond the last one nothing is staged, for what is made of them is stored nowhere.
template <bool QUADS>
__device__ __forceinline__ void stage_dy(
    const scalar_t *dy, accumulate_t *dy_tile, int outputs, int rows, int positions, const FilterPatch &patch
) {
    if (!QUADS) dy = kept(dy);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int channels = min(patch.output_units * OUTPUTS, outputs), quads = rows * patch.row_quads;
    if (patch.dy_across) {
        for (int k = lane; k < channels; k += 32) {
            accumulate_t *to = dy_tile + k / OUTPUTS * patch.dy_pitch + k % OUTPUTS * 4;
            #pragma unroll 2
            for (int quad = warp; quad < quads; quad += warps) {
                const int row = divided(quad, patch.by_row_quads), q = 4 * (quad - row * patch.row_quads);
                *reinterpret_cast<Quad *>(to + quad * QUAD_PITCH) =
                    quad_at<false>(dy, k * patch.dy_k + row * patch.dy_p + q * patch.dy_q, patch.dy_q, positions - q);
            }
        }
        return;
    }
    for (int quad = lane; quad < quads; quad += 32) {
        const int row = divided(quad, patch.by_row_quads), q = 4 * (quad - row * patch.row_quads);
        const int at = row * patch.dy_p + q * patch.dy_q;
        accumulate_t *to = dy_tile + quad * QUAD_PITCH;
        #pragma unroll 2
        for (int k = warp; k < channels; k += warps) {
            if (QUADS && positions <= q) break;
            *reinterpret_cast<Quad *>(to + k / OUTPUTS * patch.dy_pitch + k % OUTPUTS * 4) =
                quad_at<QUADS>(dy, at + k * patch.dy_k, patch.dy_q, positions - q);
        }
    }
}

// What the windows of a tile look at: [copy][channel][row][column modulo the stride][column / stride], zeros outside
// of the image. ``top`` and ``left`` are the pixel of the first row and column. A thread brings four numbers of each
// copy, of which there are MOST or fewer.
template <int MOST>
__device__ __forceinline__ void stage_x(
    const scalar_t *x, accumulate_t *x_tile, int top, int left, const FilterPatch &patch
) {
    const int quads_of_line = patch.stride_w * patch.x_pitch / 4, quads = patch.C * patch.x_rows * quads_of_line;
    const int step = patch.stride_w * patch.x_w;
    x = kept(x);
    for (int number = threadIdx.x; number < quads; number += blockDim.x) {
        const int line = divided(number, patch.by_x_quads), quad = number - line * quads_of_line;
        const int phase = divided(quad, patch.by_x_pitch), first = 4 * quad - phase * patch.x_pitch;
        const int c = divided(line, patch.by_x_rows), h = top + line - c * patch.x_rows;
        const bool down = (unsigned)h < (unsigned)patch.H;
        int w = left + phase + first * patch.stride_w;
        unsigned offset = (unsigned)w * patch.x_w + (down ? c * patch.x_c + h * patch.x_h : 0);  // may wrap outside
        const unsigned width = down ? patch.W : 0;
        accumulate_t pixels[4 + MOST - 1];
        #pragma unroll
        for (int i = 0; i < 4 + MOST - 1; ++i) {
            pixels[i] = (unsigned)w < width ? load(__ldg(x + (int)offset)) : NUMBER(0);
            w += patch.stride_w;
            offset += step;
        }
        accumulate_t *to = x_tile + 4 * number;
        #pragma unroll
        for (int m = 0; m < MOST; ++m) {
            const Quad quad = {pixels[m], pixels[m + 1], pixels[m + 2], pixels[m + 3]};
            if (m < patch.copies) *reinterpret_cast<Quad *>(to + m * patch.x_copy) = quad;
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
            Quad pixels[TAPS];
            #pragma unroll
            for (int i = 0; i < TAPS; ++i) {
                const int offset = taps[i] + (i + 1 < TAPS ? at : at & moving);
                pixels[i] = *reinterpret_cast<const Quad *>(memory + offset);
                #pragma unroll
                for (int j = 1; j < 4; ++j) {
                    if (RAGGED) pixels[i].v[j] = j < there ? pixels[i].v[j] : NUMBER(0);
                }
            }
            #pragma unroll
            for (int k = 0; k < OUTPUTS; ++k) {
                const Quad factors = reinterpret_cast<const Quad *>(dy)[k];
                #pragma unroll
                for (int j = 0; j < 4; ++j) {
                    #pragma unroll
                    for (int i = 0; i < TAPS; ++i) sums[i][k] += pixels[i].v[j] * factors.v[j];
                }
            }
        }
        quad += right;
        const int over = quad >= patch.row_quads;
        quad -= over ? patch.row_quads : 0;
        row += down + over;
    }
}

// ---------------------------------------------------------------- what the threads have, added up

// Neighbours that have sums of the same columns and channels share out the channels: what a thread then has in front
// of ``sums`` are the sums of all of them, of OUTPUTS / neighbours channels. Of its own and the other's numbers it
// gives away the half that the other one keeps.
__device__ __forceinline__ void share_out(accumulate_t (&sums)[TAPS][OUTPUTS], int neighbours) {
    #pragma unroll
    for (int half = OUTPUTS / 2; half > 0; half /= 2) {
        const int other = neighbours * half / OUTPUTS;
        if (other == 0) return;  // the same for all threads
        const bool upper = threadIdx.x & other;
        #pragma unroll
        for (int i = 0; i < TAPS; ++i) {
            #pragma unroll
            for (int k = 0; k < half; ++k) {
                const accumulate_t given = upper ? sums[i][k] : sums[i][k + half];
                const accumulate_t kept = upper ? sums[i][k + half] : sums[i][k];
                sums[i][k] = kept + __shfl_xor_sync(0xffffffffu, given, other);
            }
        }
    }
}

// What a block makes; row k of a part's sums is that of output channel k of the group.
struct Work {
    long long row;
    int x, dy;         // where the group, and the first output channel, begin in an image
    int slot, output;  // the first ones
};

// The sums of a block. A member is one of the threads that have sums of their own: a neighbour of a unit.
__device__ __forceinline__ void write_sums(
    accumulate_t (&sums)[TAPS][OUTPUTS], accumulate_t *numbers, accumulate_t *partial, accumulate_t *bias_partial,
    const Work &work, const FilterPatch &patch
) {
    share_out(sums, patch.neighbours);
    const int kept = OUTPUTS / patch.neighbours, turns = patch.splits / patch.neighbours;
    const int members = patch.column_units * patch.output_units * patch.neighbours;
    const int member = threadIdx.x % members, outputs = patch.K - work.output;
    const bool busy = (int)threadIdx.x < members * turns;
    partial += (work.row + work.output) * patch.columns;
    if (patch.bias_slot >= 0) bias_partial += work.row + work.output;
    if (turns == 1) {
        const int unit = member / patch.neighbours, column = unit / patch.output_units;
        const int output = (unit - column * patch.output_units) * OUTPUTS + member % patch.neighbours * kept;
        const int slot = work.slot + column * TAPS, columns = patch.columns - slot;
        #pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) {
            if (k == kept || !busy || output + k >= outputs) return;
            accumulate_t *to = partial + (long long)(output + k) * patch.columns + slot;
            #pragma unroll
            for (int i = 0; i < TAPS; ++i) {
                if (i < columns) to[i] = sums[i][k];
            }
            if (slot + TAPS - 1 == patch.bias_slot) bias_partial[output + k] = sums[TAPS - 1][k];
        }
        return;
    }
    // As [turn][channel][column][member].
    __syncthreads();  // the last tile has been read
    accumulate_t *own = numbers + (threadIdx.x - member) * (kept * TAPS) + member;
    #pragma unroll
    for (int k = 0; k < OUTPUTS; ++k) {
        if (k == kept || !busy) break;
        #pragma unroll
        for (int i = 0; i < TAPS; ++i) own[(k * TAPS + i) * members] = sums[i][k];
    }
    __syncthreads();
    const int count = kept * TAPS * members;
    for (int number = threadIdx.x; number < count; number += blockDim.x) {
        accumulate_t sum = numbers[number];
        #pragma unroll 4
        for (int turn = 1; turn < turns; ++turn) sum += numbers[turn * count + number];
        const int kind = number / members, k = kind / TAPS, of = number - kind * members;
        const int unit = of / patch.neighbours, column = unit / patch.output_units;
        const int slot = work.slot + column * TAPS + kind - k * TAPS;
        const int output =
            (unit - column * patch.output_units) * OUTPUTS + (of - unit * patch.neighbours) * kept + k;
        if (output >= outputs) continue;
        if (slot < patch.columns) partial[(long long)output * patch.columns + slot] = sum;
        if (slot == patch.bias_slot) bias_partial[output] = sum;
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

    // In shared memory, because the registers are for the sums.
    __shared__ Work work;
    unsigned block = blockIdx.x;
    const int first_unit = block % patch.column_blocks * patch.column_units;
    block /= patch.column_blocks;
    const int first_output = block % patch.output_blocks * patch.output_units * OUTPUTS;
    block /= patch.output_blocks;
    const int group = block % patch.groups;
    const long long part = block / patch.groups;
    if (threadIdx.x == 0) {
        work.row = (part * patch.groups + group) * patch.K;
        work.x = group * patch.C * patch.x_c;
        work.dy = (group * patch.K + first_output) * patch.dy_k;
        work.slot = first_unit * TAPS;
        work.output = first_output;
    }

    // Threads by neighbour, output unit, column unit, and what splits there are beyond the neighbours.
    const int member_units = patch.output_units * patch.column_units;
    const int neighbour = threadIdx.x % patch.neighbours, thread = threadIdx.x / patch.neighbours;
    const int turn = thread / member_units, unit = thread - turn * member_units;
    const int column_unit = unit / patch.output_units, output_unit = unit - column_unit * patch.output_units;
    const int split = turn * patch.neighbours + neighbour;
    const bool busy = split < patch.splits;

    const int first_slot = (first_unit + column_unit) * TAPS;
    const int moving = first_slot + TAPS - 1 == patch.bias_slot ? 0 : -1;
    int taps[TAPS];
    accumulate_t sums[TAPS][OUTPUTS];
    Column column = column_of(min(first_slot, patch.columns), patch);
    #pragma unroll
    for (int i = 0; i < TAPS; ++i) {
        if (first_slot + i >= patch.columns) column = {0, 0, 0};
        const int right = column.s * patch.dilation_w, index = divided(right, patch.by_stride), m = index % 4;
        const int line = column.c * patch.x_rows + column.r * patch.dilation_h;
        const int row = line * patch.stride_w + right - index * patch.stride_w;
        taps[i] = (4 + m * patch.x_copy + row * patch.x_pitch + index - m) * sizeof(accumulate_t);
        column = next_column(column, patch);
        #pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) sums[i][k] = NUMBER(0);
    }
    if (!moving) taps[TAPS - 1] = 0;  // the ones
    if (threadIdx.x < 4) numbers[threadIdx.x] = NUMBER(1);

    const long long first_tile = part * patch.part;
    int n = (int)(first_tile / (patch.tiles_down * patch.tiles_across));
    const int place = (int)(first_tile - (long long)n * (patch.tiles_down * patch.tiles_across));
    int p = place / patch.tiles_across;
    int q = (place - p * patch.tiles_across) * patch.row_quads * 4;
    p *= patch.rows;
    const int mine = (patch.dy_begin + output_unit * patch.dy_pitch) * sizeof(accumulate_t);
    for (int tiles = (int)min(patch.part, patch.tiles - first_tile); tiles > 0; --tiles) {
        const int rows = min(patch.rows, patch.P - p), positions = patch.Q - q;
        __syncthreads();  // the tile before has been read
        const scalar_t *from = dy + n * patch.dy_n + (work.dy + p * patch.dy_p + q * patch.dy_q);
        const int outputs = patch.K - work.output;
        if (patch.dy_quads) {
            stage_dy<true>(from, numbers + patch.dy_begin, outputs, rows, positions, patch);
        } else {
            stage_dy<false>(from, numbers + patch.dy_begin, outputs, rows, positions, patch);
        }
        const scalar_t *image = x + n * patch.x_n + work.x;
        const int top = p * patch.stride_h - patch.top, left = q * patch.stride_w - patch.left;
        if (patch.copies > 2) {
            stage_x<COPIES>(image, x_tile, top, left, patch);
        } else {
            stage_x<2>(image, x_tile, top, left, patch);
        }
        __syncthreads();
        if (busy) {
            if (patch.Q % (4 * patch.row_quads)) {
                add_tile<true>(sums, memory, taps, moving, mine, split, rows, positions, patch);
            } else {
                add_tile<false>(sums, memory, taps, moving, mine, split, rows, positions, patch);
            }
        }
        q += 4 * patch.row_quads;
        if (q >= patch.Q) {
            q = 0;
            p += patch.rows;
            if (p >= patch.P) {
                p = 0;
                ++n;
            }
        }
    }

    write_sums(sums, numbers, partial, bias_partial, work, patch);
}
