// Convolution as a matrix product whose second matrix, im2col's, is never made: "implicit GEMM". Forward, and as
// stride phases in one launch the input gradient (conv2d.cuh says how they are the same sum).
//
//   output[channel, position] = sum over terms (source channel, tap) of filter[channel, term]
//                                                                       * input[term, position]
//
// Positions are the output's pixels of all images. A block makes a tile of channels x positions of one group and
// one phase, a thread 8 x 8 numbers of it in registers, as two by two pieces of 4 x 4 (4 x 4 numbers in the small
// tile). It goes through the sum in steps of DEPTH terms: both factors' parts are fetched from memory into
// registers while the step before is multiplied, then put into shared memory, of which there are two stages, so
// that one barrier a step is enough.
//
// The terms are in the order in which a contiguous image's filter lies, channels of taps, or a channels-last
// one's, taps of channels. Where a term's pixels and weights lie beside its first tap's and channel's is the same
// for all positions and output channels: a table in shared memory says it, made for 64 terms at a time ahead of
// their use (the only divisions of the main loop), so that a number costs one addition of an address, and a pixel
// two comparisons with the borders. Only the last step of the whole sum is filled up with zeros. A thread fetches
// 4 terms of one position or one channel, as one pack where four terms are neighbours in memory and aligned.
//
// Limit: 2 * N * K * P * Q * (C / groups) * R * S operations at the rate of FFMA, or input, filter and output once
// through memory. A step of the large tile takes 2 * 128 * 128 * 8 operations on (128 + 128) * 8 fetched numbers:
// 128 operations a number, in float32 32 a byte (64 x 128: 85, 21; 32 x 64: 43, 11), so with the caches' help the
// arithmetic is the limit. From shared memory a thread reads 16 numbers, four loads, for 64 multiply-adds (8 for
// 16 in the small tile). Counted in the compiled code for sm_90, not measured: a thread's step of the large tile
// takes 600 to 655 instructions, of which 512 are FFMA, by how filter and image lie, of the medium one 640 to 700;
// two steps of eight terms of the small one 390 to 445, of which 256 are FFMA. The table takes 120 more of two
// warps every 64 terms. Positions and channels are rounded up to the tile: see conv2d_direct.cu for few channels.
#include "conv2d.cuh"

constexpr int FRAGMENT = 16 / sizeof(accumulate_t);  // numbers that are read from shared memory at once
constexpr int QUAD = 4;                              // terms that a thread fetches together
constexpr int TERMS = 64;                            // that the table is extended by
constexpr int OUTSIDE = (int)0x80000000u;  // the move of a term behind the last: no row of an image is there

// Where the first tap of a position lies in the image that is read: bytes from the beginning, row and column.
struct alignas(16) Place { long long bytes; int row, column; };

// What the threads of a block share beside the stages.
template <typename Tile> struct Table {
    // Of the terms of this step and the next ones, two times TERMS that are extended in turn: how many bytes a
    // term lies from a position's first tap, in how many rows and columns, and from an output channel's first
    // weight (-1: behind the last term). ``slow`` and ``fast`` are the term that each thread enters next, as the
    // order has them.
    long long source[2 * TERMS], filter[2 * TERMS];
    int2 moves[2 * TERMS];
    unsigned slow[TERMS], fast[TERMS];
    // The tile's positions, their pixels in the image that is written (-1: beyond the last), its output channels'
    // weights in bytes. All of it, and the unit's sizes, is read again where it is needed: registers are scarce.
    Place places[Tile::COLUMNS];
    long long pixels[Tile::COLUMNS], weights[Tile::ROWS];
    Line down, across;
    int group, output_in_packs;
};

// What lies ``bytes`` from an element.
__device__ __forceinline__ const scalar_t *moved(const scalar_t *place, long long bytes) {
    return reinterpret_cast<const scalar_t *>(reinterpret_cast<const char *>(place) + bytes);
}

// A tile of ROWS channels x COLUMNS positions, of which a thread makes HIGH x WIDE. The lanes of a warp are 4 x 8.
template <int ROWS_, int COLUMNS_, int HIGH_, int WIDE_, int DEPTH_> struct Tile {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, HIGH = HIGH_, WIDE = WIDE_, DEPTH = DEPTH_;
    static constexpr int THREADS = ROWS / HIGH * (COLUMNS / WIDE);
    static constexpr int WARPS_ACROSS = COLUMNS / (8 * WIDE);
    // Rows in shared memory are a fragment longer than they are wide: what the threads of a warp put there, of
    // four neighbouring terms, then falls into different banks, and rows still begin at multiples of 16 bytes.
    static constexpr int FILTER_PITCH = ROWS + FRAGMENT, SOURCE_PITCH = COLUMNS + FRAGMENT;
    static constexpr int STAGE = DEPTH * (FILTER_PITCH + SOURCE_PITCH);
    // Where sums are written by way of shared memory: as many positions at a time as fragments of a warp cover.
    static constexpr int PART = 8 * FRAGMENT, PART_PITCH = PART + FRAGMENT;
    // A thread's row i and column j, from its first ones: fragments of neighbours, spread over what its warp
    // makes.
    __host__ __device__ static constexpr int row(int i) { return i / FRAGMENT * (4 * FRAGMENT) + i % FRAGMENT; }
    __host__ __device__ static constexpr int column(int j) { return j / FRAGMENT * (8 * FRAGMENT) + j % FRAGMENT; }
    static constexpr int SHARED = 2 * STAGE > ROWS * PART_PITCH ? 2 * STAGE : ROWS * PART_PITCH;
};

// Which numbers of LENGTH lines (positions, or output channels) x DEPTH terms a thread fetches: QUADS times four
// terms of one line, every FOR_LINE threads the same. Of either kind of neighbours in memory, terms or lines, a
// warp then has whole sectors of 32 bytes.
template <int LENGTH, int DEPTH, int THREADS> struct Share {
    static constexpr int FOR_LINE = THREADS / LENGTH < DEPTH / QUAD ? THREADS / LENGTH : DEPTH / QUAD;
    static constexpr int QUADS = DEPTH / QUAD / FOR_LINE;
    static constexpr int APART = QUAD * FOR_LINE;  // terms from one of a thread's quads to the next
    static constexpr bool ALL = LENGTH * FOR_LINE == THREADS;  // whether every thread has a share
    __device__ __forceinline__ static int line() { return threadIdx.x / FOR_LINE; }
    __device__ __forceinline__ static int term() { return threadIdx.x % FOR_LINE * QUAD; }
    __device__ __forceinline__ static bool any() { return ALL || threadIdx.x < LENGTH * FOR_LINE; }
};

// Enters the next TERMS terms into one half of the table.
template <typename Tile>
__device__ __forceinline__ void extend(
    Table<Tile> &table, int half, int sources, bool by_channel, Strides input_strides, FilterStrides filter_strides
) {
    if (threadIdx.x >= TERMS) return;
    const Line down = table.down, across = table.across;
    const unsigned taps = down.taps * across.taps;
    const unsigned length = max(1u, by_channel ? sources : taps), times = by_channel ? taps : sources;
    unsigned slow = table.slow[threadIdx.x], fast = table.fast[threadIdx.x];
    const long long channel = by_channel ? fast : slow;
    const unsigned tap = by_channel ? slow : fast;
    const int i = tap / max(1, across.taps), j = tap - i * across.taps;
    const int entry = half * TERMS + threadIdx.x;
    const bool there = slow < times && taps != 0;
    const int2 move = {i * down.step, j * across.step};
    const long long source = channel * input_strides.c + move.x * input_strides.h + move.y * input_strides.w;
    const long long weight = channel * filter_strides.source +
                             (down.first + i * down.tap_step) * filter_strides.r +
                             (across.first + j * across.tap_step) * filter_strides.s;
    table.source[entry] = source * (int)sizeof(scalar_t);
    table.filter[entry] = there ? weight * (int)sizeof(scalar_t) : -1;
    table.moves[entry] = there ? move : make_int2(OUTSIDE, 0);
    slow += TERMS / length;
    fast += TERMS % length;
    if (fast >= length) {
        fast -= length;
        ++slow;
    }
    table.slow[threadIdx.x] = slow;
    table.fast[threadIdx.x] = fast;
}

// Whether a position's pixel of a term is inside of the image. Unsigned, because of OUTSIDE; both comparisons are
// made in any case, which costs less than a branch between them.
__device__ __forceinline__ bool reaches(const Place &place, int2 move, int height, int width) {
    const bool row = (unsigned)place.row + (unsigned)move.x < (unsigned)height;
    const bool column = (unsigned)place.column + (unsigned)move.y < (unsigned)width;
    return row & column;
}

// Four terms of a position.
template <typename Tile>
__device__ __forceinline__ void fetch_source(
    accumulate_t *numbers, const scalar_t *input, const Place &place, const Table<Tile> &table, int entry,
    int height, int width, bool packs
) {
#pragma unroll
    for (int i = 0; i < QUAD; ++i) numbers[i] = NUMBER(0);
    if (packs) {
        const scalar_t *pixels = moved(input, place.bytes + table.source[entry]);
        if (reaches(place, table.moves[entry], height, width)) {
            const Pack<scalar_t, QUAD> pack = load_pack<QUAD>(pixels);
#pragma unroll
            for (int i = 0; i < QUAD; ++i) numbers[i] = load(pack.number[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < QUAD; ++i) {
            const scalar_t *pixel = moved(input, place.bytes + table.source[entry + i]);
            if (reaches(place, table.moves[entry + i], height, width)) numbers[i] = load(*pixel);
        }
    }
}

// Four terms of an output channel, whose weights begin ``bytes`` from the first.
template <typename Tile>
__device__ __forceinline__ void fetch_filter(
    accumulate_t *numbers, const scalar_t *filter, long long bytes, const Table<Tile> &table, int entry, bool packs
) {
#pragma unroll
    for (int i = 0; i < QUAD; ++i) numbers[i] = NUMBER(0);
    if (packs) {
        const long long offset = table.filter[entry];
        if (offset >= 0) {
            const Pack<scalar_t, QUAD> pack = load_pack<QUAD>(moved(filter, bytes + offset));
#pragma unroll
            for (int i = 0; i < QUAD; ++i) numbers[i] = load(pack.number[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < QUAD; ++i) {
            const long long offset = table.filter[entry + i];
            if (offset >= 0) numbers[i] = load(*moved(filter, bytes + offset));
        }
    }
}

// Whether every four terms of an output channel, from the first on, are neighbours in memory and aligned.
__device__ __forceinline__ bool filter_in_packs(
    const scalar_t *filter, FilterStrides strides, Line down, Line across, int sources, bool by_channel
) {
    if (!on_pack_boundary<QUAD>(filter) || strides.group % QUAD != 0 || strides.output % QUAD != 0) return false;
    if (by_channel) {
        return strides.source == 1 && sources % QUAD == 0 && strides.r % QUAD == 0 && strides.s % QUAD == 0;
    }
    const long long taps = (long long)down.taps * across.taps;
    return across.tap_step == 1 && down.tap_step == 1 && strides.s == 1 && strides.r == across.taps &&
           strides.source == taps && taps * sources % QUAD == 0;
}

// The same of a position.
__device__ __forceinline__ bool source_in_packs(const scalar_t *input, Strides strides, int sources) {
    return on_pack_boundary<QUAD>(input) && strides.c == 1 && sources % QUAD == 0 && strides.n % QUAD == 0 &&
           strides.h % QUAD == 0 && strides.w % QUAD == 0;
}

// Whether the output and the residual can be written and read in fragments, of channels or of positions.
__device__ __forceinline__ bool output_in_packs(
    const scalar_t *output, const scalar_t *residual, Strides strides, int channels, Line down, Line across,
    int width, long long plane
) {
    if (!on_pack_boundary<FRAGMENT>(output) || !on_pack_boundary<FRAGMENT>(residual)) return false;
    if (strides.n % FRAGMENT != 0) return false;
    if (strides.c < strides.w) {
        return strides.c == 1 && channels % FRAGMENT == 0 && strides.h % FRAGMENT == 0 &&
               strides.w % FRAGMENT == 0;
    }
    return down.phases == 1 && across.phases == 1 && strides.w == 1 && strides.h == width &&
           strides.c % FRAGMENT == 0 && plane % FRAGMENT == 0;
}

// A thread's sums, fragment by fragment from where they are: plus the residual, activated. A fragment's channel is
// one of ``left_channels``, and its numbers are of as many channels, or of one and as many positions.
template <typename Tile, bool BY_CHANNEL>
__device__ __forceinline__ void write_packs(
    accumulate_t (&sums)[Tile::HIGH * Tile::WIDE], scalar_t *output, const scalar_t *residual,
    const long long *pixels, int top, int left, int left_channels, long long channel_stride, Epilogue epilogue
) {
    constexpr int ACROSS = BY_CHANNEL ? Tile::WIDE : Tile::WIDE / FRAGMENT;
#pragma unroll
    for (int number = 0; number < Tile::HIGH * Tile::WIDE / FRAGMENT; ++number) {
        const int i = number / ACROSS * (BY_CHANNEL ? FRAGMENT : 1);
        const int j = number % ACROSS * (BY_CHANNEL ? 1 : FRAGMENT);
        const long long pixel = pixels[left + Tile::column(j)];
        if (top + Tile::row(i) >= left_channels || pixel < 0) continue;
        const long long place = pixel + (top + Tile::row(i)) * channel_stride;
        accumulate_t values[FRAGMENT];
#pragma unroll
        for (int k = 0; k < FRAGMENT; ++k) {
            values[k] = sums[i * Tile::WIDE + j + (BY_CHANNEL ? k * Tile::WIDE : k)];
        }
        if (residual != nullptr) {
            const auto pack = load_pack<FRAGMENT>(residual + place);
#pragma unroll
            for (int k = 0; k < FRAGMENT; ++k) values[k] += load(pack.number[k]);
        }
        activate_straight(epilogue.function, values, epilogue.negative_slope);
        Pack<scalar_t, FRAGMENT> pack;
#pragma unroll
        for (int k = 0; k < FRAGMENT; ++k) pack.number[k] = store(values[k]);
        store_pack(output + place, pack);
    }
}

template <typename Tile>
__device__ __forceinline__ void convolve(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    Terms terms, scalar_t *output, Strides output_strides, Channels channels, Axis vertical, Axis horizontal,
    int transposed, Epilogue epilogue, int unit, accumulate_t *stages, Table<Tile> &table
) {
    constexpr int HIGH = Tile::HIGH, WIDE = Tile::WIDE;
    using FilterShare = Share<Tile::ROWS, Tile::DEPTH, Tile::THREADS>;
    using SourceShare = Share<Tile::COLUMNS, Tile::DEPTH, Tile::THREADS>;

    // The unit: a group of a phase. Some phases have fewer positions than blocks were started for.
    const int group = unit % channels.groups, phase = unit / channels.groups;
    const int phases_across = transposed ? min(horizontal.stride, horizontal.output) : 1;
    const int first_row = phase / phases_across, first_column = phase % phases_across;
    const Line down = line_of(vertical, transposed, first_row);
    const Line across = line_of(horizontal, transposed, first_column);
    const int height = (vertical.output - first_row + down.phases - 1) / down.phases;
    const int width = (horizontal.output - first_column + across.phases - 1) / across.phases;
    const long long plane = (long long)height * width;
    const long long first_position = (long long)blockIdx.x * Tile::COLUMNS;
    const long long positions = plane * channels.images;
    if (first_position >= positions) return;

    const bool by_channel = input_strides.c < input_strides.w;
    const long long sum_length = (long long)channels.source * (down.taps * across.taps);

    for (int column = threadIdx.x; column < Tile::COLUMNS; column += Tile::THREADS) {
        // Beyond the last position its numbers are made once more, and stored nowhere.
        const bool there = first_position + column < positions;
        const long long position = there ? first_position + column : positions - 1;
        const long long image = position / plane;
        const int i = (int)((position - image * plane) / width);
        const int j = (int)((position - image * plane) % width);
        const int row = down.start + i * down.advance, left_column = across.start + j * across.advance;
        const long long first = image * input_strides.n + (long long)group * channels.source * input_strides.c +
                                row * input_strides.h + left_column * input_strides.w;
        table.places[column] = {first * (int)sizeof(scalar_t), row, left_column};
        table.pixels[column] =
            there ? image * output_strides.n + (first_row + (long long)i * down.phases) * output_strides.h +
                        (first_column + (long long)j * across.phases) * output_strides.w
                  : -1;
    }
    const int first_channel = blockIdx.y * Tile::ROWS;
    for (int row = threadIdx.x; row < Tile::ROWS; row += Tile::THREADS) {
        // So are those beyond the last output channel.
        const int channel = min(first_channel + row, channels.output - 1);
        const long long first = group * filter_strides.group + channel * filter_strides.output;
        table.weights[row] = first * (int)sizeof(scalar_t);
    }
    if (threadIdx.x == 0) {
        table.down = down;
        table.across = across;
        table.group = group;
        table.output_in_packs = output_in_packs(
            output, terms.residual, output_strides, channels.output, down, across, width, plane
        );
    }
    if (threadIdx.x < TERMS) {
        const unsigned length = max(1, by_channel ? channels.source : down.taps * across.taps);
        table.slow[threadIdx.x] = threadIdx.x / length;
        table.fast[threadIdx.x] = threadIdx.x % length;
    }
    __syncthreads();
    extend(table, 0, channels.source, by_channel, input_strides, filter_strides);
    __syncthreads();

    const bool filter_packs =
        filter_in_packs(filter, filter_strides, down, across, channels.source, by_channel);
    const bool source_packs = by_channel && source_in_packs(input, input_strides, channels.source);
    accumulate_t from_filter[FilterShare::QUADS * QUAD], from_source[SourceShare::QUADS * QUAD];
    unsigned entry = 0;
    const auto fetch = [&]() {
        if (FilterShare::any()) {
            const long long bytes = table.weights[FilterShare::line()];
#pragma unroll
            for (int q = 0; q < FilterShare::QUADS; ++q) {
                const int term = entry + FilterShare::term() + q * FilterShare::APART;
                fetch_filter(from_filter + q * QUAD, filter, bytes, table, term, filter_packs);
            }
        }
        if (SourceShare::any()) {
            const Place place = table.places[SourceShare::line()];
#pragma unroll
            for (int q = 0; q < SourceShare::QUADS; ++q) {
                const int term = entry + SourceShare::term() + q * SourceShare::APART;
                fetch_source(
                    from_source + q * QUAD, input, place, table, term, vertical.source, horizontal.source,
                    source_packs
                );
            }
        }
    };
    const auto put = [&](accumulate_t *stage) {
        if (FilterShare::any()) {
            accumulate_t *place = stage + FilterShare::term() * Tile::FILTER_PITCH + FilterShare::line();
#pragma unroll
            for (int k = 0; k < FilterShare::QUADS * QUAD; ++k) {
                place[(k / QUAD * FilterShare::APART + k % QUAD) * Tile::FILTER_PITCH] = from_filter[k];
            }
        }
        if (SourceShare::any()) {
            accumulate_t *place = stage + Tile::DEPTH * Tile::FILTER_PITCH +
                                  SourceShare::term() * Tile::SOURCE_PITCH + SourceShare::line();
#pragma unroll
            for (int k = 0; k < SourceShare::QUADS * QUAD; ++k) {
                place[(k / QUAD * SourceShare::APART + k % QUAD) * Tile::SOURCE_PITCH] = from_source[k];
            }
        }
    };

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int top = warp / Tile::WARPS_ACROSS * (4 * HIGH) + lane / 8 * FRAGMENT;
    const int left = warp % Tile::WARPS_ACROSS * (8 * WIDE) + lane % 8 * FRAGMENT;
    accumulate_t sums[HIGH * WIDE];
#pragma unroll
    for (int k = 0; k < HIGH * WIDE; ++k) sums[k] = NUMBER(0);

    constexpr unsigned ROUND = TERMS / Tile::DEPTH;  // steps
    const unsigned steps = (unsigned)((sum_length + Tile::DEPTH - 1) / Tile::DEPTH);
    fetch();
    put(stages);
    __syncthreads();
#pragma unroll 1
    for (unsigned first = 0; first < steps; first += ROUND) {
        // The half of the table that was read last, for the steps that come after those of the other one.
        extend(table, entry < TERMS, channels.source, by_channel, input_strides, filter_strides);
#pragma unroll 1
        for (unsigned left_steps = min(ROUND, steps - first); left_steps != 0; --left_steps) {
            const int stage = entry / Tile::DEPTH % 2 * Tile::STAGE;
            entry = (entry + Tile::DEPTH) % (2 * TERMS);
            fetch();  // behind the last step: zeros
            const accumulate_t *left_factor = stages + stage + top;
            const accumulate_t *right_factor = stages + stage + Tile::DEPTH * Tile::FILTER_PITCH + left;
#pragma unroll
            for (int depth = 0; depth < Tile::DEPTH; ++depth) {
                accumulate_t weight[HIGH], number[WIDE];
#pragma unroll
                for (int i = 0; i < HIGH; i += FRAGMENT) {
                    const accumulate_t *place = left_factor + depth * Tile::FILTER_PITCH + Tile::row(i);
                    const auto pack = load_pack<FRAGMENT>(place);
#pragma unroll
                    for (int k = 0; k < FRAGMENT; ++k) weight[i + k] = pack.number[k];
                }
#pragma unroll
                for (int j = 0; j < WIDE; j += FRAGMENT) {
                    const accumulate_t *place = right_factor + depth * Tile::SOURCE_PITCH + Tile::column(j);
                    const auto pack = load_pack<FRAGMENT>(place);
#pragma unroll
                    for (int k = 0; k < FRAGMENT; ++k) number[j + k] = pack.number[k];
                }
#pragma unroll
                for (int i = 0; i < HIGH; ++i) {
#pragma unroll
                    for (int j = 0; j < WIDE; ++j) sums[i * WIDE + j] += weight[i] * number[j];
                }
            }
            put(stages + Tile::STAGE - stage);
            __syncthreads();
        }
    }

    // Scale and bias, a channel's for all of its sums.
    const int left_channels = channels.output - first_channel;
    const int channel_of_output = table.group * channels.output + first_channel;
#pragma unroll
    for (int i = 0; i < HIGH; ++i) {
        const int row = top + Tile::row(i);
        if (row < left_channels) {
            const ChannelTerms of = terms_of(terms, channel_of_output + row);
#pragma unroll
            for (int j = 0; j < WIDE; ++j) sums[i * WIDE + j] = scaled(sums[i * WIDE + j], of);
        }
    }

    const bool output_by_channel = output_strides.c < output_strides.w;
    if (straight(epilogue.function) && table.output_in_packs) {
        output += channel_of_output * output_strides.c;
        if (terms.residual != nullptr) terms.residual += channel_of_output * output_strides.c;
        if (output_by_channel) {
            write_packs<Tile, true>(
                sums, output, terms.residual, table.pixels, top, left, left_channels, output_strides.c, epilogue
            );
        } else {
            write_packs<Tile, false>(
                sums, output, terms.residual, table.pixels, top, left, left_channels, output_strides.c, epilogue
            );
        }
        return;
    }

    // Otherwise the sums go through shared memory, so that they too are written side by side.
#pragma unroll 1
    for (int part = 0; part < Tile::COLUMNS / Tile::PART; ++part) {
#pragma unroll
        for (int j = 0; j < WIDE; j += FRAGMENT) {
            if (left - lane % 8 * FRAGMENT + Tile::column(j) == part * Tile::PART) {
#pragma unroll
                for (int i = 0; i < HIGH; ++i) {
                    Pack<accumulate_t, FRAGMENT> pack;
#pragma unroll
                    for (int k = 0; k < FRAGMENT; ++k) pack.number[k] = sums[i * WIDE + j + k];
                    store_pack(stages + (top + Tile::row(i)) * Tile::PART_PITCH + lane % 8 * FRAGMENT, pack);
                }
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int element = threadIdx.x; element < Tile::ROWS * Tile::PART; element += Tile::THREADS) {
            const int row = output_by_channel ? element % Tile::ROWS : element / Tile::PART;
            const int column = output_by_channel ? element / Tile::ROWS : element % Tile::PART;
            const long long pixel = table.pixels[part * Tile::PART + column];
            if (row < left_channels && pixel >= 0) {
                const long long place = pixel + (channel_of_output + row) * output_strides.c;
                accumulate_t sum = stages[row * Tile::PART_PITCH + column];
                if (terms.residual != nullptr) sum += load(terms.residual[place]);
                output[place] = store(activate(epilogue.function, sum, epilogue.negative_slope));
            }
        }
        __syncthreads();
    }
}

#if defined(SCALAR_FLOAT64)
using Large = Tile<64, 128, 8, 4, 8>;
using Medium = Tile<64, 64, 8, 4, 8>;
constexpr int LARGE_BLOCKS = 1, MEDIUM_BLOCKS = 3;  // of a multiprocessor at least, as registers have room for
#else
using Large = Tile<128, 128, 8, 8, 8>;
using Medium = Tile<64, 128, 8, 8, 8>;
constexpr int LARGE_BLOCKS = 2, MEDIUM_BLOCKS = 4;
#endif
using Small = Tile<32, 64, 4, 4, 16>;

// Grid: x the positions' tiles, y the channels', z the units from the first on.
extern "C" __global__ void __launch_bounds__(256, LARGE_BLOCKS) conv2d_implicit_gemm_large(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int first_unit
) {
    __shared__ __align__(16) accumulate_t stages[Large::SHARED];
    __shared__ Table<Large> table;
    convolve<Large>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides,
        channels, vertical, horizontal, transposed, epilogue, first_unit + blockIdx.z, stages, table
    );
}

extern "C" __global__ void __launch_bounds__(128, MEDIUM_BLOCKS) conv2d_implicit_gemm_medium(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int first_unit
) {
    __shared__ __align__(16) accumulate_t stages[Medium::SHARED];
    __shared__ Table<Medium> table;
    convolve<Medium>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides,
        channels, vertical, horizontal, transposed, epilogue, first_unit + blockIdx.z, stages, table
    );
}

extern "C" __global__ void __launch_bounds__(128, 4) conv2d_implicit_gemm_small(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int first_unit
) {
    __shared__ __align__(16) accumulate_t stages[Small::SHARED];
    __shared__ Table<Small> table;
    convolve<Small>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides,
        channels, vertical, horizontal, transposed, epilogue, first_unit + blockIdx.z, stages, table
    );
}
