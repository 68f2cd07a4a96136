// The sums of a convolution with few channels, directly: what conv2d_direct.cu and conv2d_max_pool.cu share.
//
// A block makes a patch of positions (images x rows x columns) of one or several groups of OUTPUTS channels. What
// its positions read of the source lies in shared memory, channel by channel and row by row, with zeros where the
// padding is, and so do the filters, tap by tap: no multiply-add has a bounds test, a global address or a division.
// Both come in slices (channels, filter rows, filter columns) where they do not fit at once.
//
// A thread makes QUADS quads, each four neighbouring positions of a row, of OUTPUTS channels. Eight neighbouring
// columns of a quad, two reads of 16 bytes, serve four taps; the OUTPUTS weights of a tap, which all threads of a
// warp read from the same place, serve all quads. For columns to be neighbours where the stride is larger than one,
// a row lies as planes: column m + j * stride is number j of plane m. Where the filter is dilated there is a plane
// for each of its columns, and a tap of each.
//
// The input gradient is the same sum, see conv2d.cuh: each stride phase is a convolution of dy with stride 1 and a
// part of the filter, here read from its far end so that rows and columns of dy rise.
//
// Sums are taken in the order of the loops here, whatever the patch, unless it comes in slices.
#include "activation_packs.cuh"
#include "conv2d.cuh"
#include "packs.cuh"

constexpr int QUAD = 4;

// What a block makes, and what of it lies in shared memory at a time; planned in conv2d_direct.py.
struct Patch {
    int images, rows, quads;  // positions of a block
    int threads;              // that make them, for each group of OUTPUTS channels; a multiple of 32
    int channels, taps_down, taps_across;  // a slice: source channels, rows and columns of the filter
    int planes, height, pitch;             // of a channel in shared memory: planes a row, rows, numbers of a plane's row
    int lanes;                             // neighbouring threads that copy a row, a power of two up to 32
    int blocks_down, blocks_across;        // patches that cover an image
    int parts;                             // blocks that share the channels of a group
};

// One axis of one stride phase (forward has one): output first_output + i * phases, for i < outputs, meets source
// start + i * advance + j * step with filter row filter_first + j * filter_step, for j < taps. step is positive.
struct Side { int outputs, first_output, phases, taps, filter_first, filter_step, start, advance, step; };

__device__ __forceinline__ Side side_of(Axis axis, int transposed, int phase) {
    const Line line = line_of(axis, transposed, phase);
    Side side;
    side.phases = line.phases;
    side.first_output = phase;
    side.outputs = (axis.output - phase + line.phases - 1) / line.phases;
    side.taps = line.taps;
    side.advance = line.advance;
    // Backwards: the last tap first.
    const int last = transposed ? max(line.taps, 1) - 1 : 0;
    side.filter_first = line.first + last * line.tap_step;
    side.filter_step = transposed ? -line.tap_step : line.tap_step;
    side.start = line.start + last * line.step;
    side.step = transposed ? -line.step : line.step;
    return side;
}

// Four numbers of shared memory, at a multiple of 16 bytes.
__device__ __forceinline__ void read_quad(accumulate_t *to, const accumulate_t *from) {
#if defined(SCALAR_FLOAT64)
    const double2 low = reinterpret_cast<const double2 *>(from)[0], high = reinterpret_cast<const double2 *>(from)[1];
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
#else
    const float4 all = *reinterpret_cast<const float4 *>(from);
    to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
#endif
}

// The weights of a tap: at a multiple of 16 bytes where they are quads, otherwise of 8 (float64: 16).
template <int OUTPUTS>
__device__ __forceinline__ void read_weights(accumulate_t (&to)[OUTPUTS], const accumulate_t *from) {
    constexpr int WIDTH = OUTPUTS % QUAD == 0 ? QUAD : 2;
    static_assert(OUTPUTS % WIDTH == 0, "weights are read in quads or pairs");
#pragma unroll
    for (int k = 0; k < OUTPUTS; k += WIDTH) {
        if (WIDTH == QUAD) {
            read_quad(to + k, from + k);
        } else {
            const Pack<accumulate_t, 2> pair = load_pack<2>(from + k);
            to[k] = pair.number[0], to[k + 1] = pair.number[1];
        }
    }
}

// Numbers of a tap's weights in shared memory. The four more let threads that write one channel of neighbouring
// taps meet different banks.
__device__ __forceinline__ int weight_pitch(int outputs) { return outputs + QUAD; }

// Where a block is: its first position and image, and its first output channel within the group.
struct Place { int group, phase_down, phase_across, image, row, column, channel; };

// The next of ``count`` numbers that ``rest`` is made of.
__device__ __forceinline__ int next_of(unsigned &rest, int count) {
    const unsigned number = rest % (unsigned)count;
    rest /= (unsigned)count;
    return (int)number;
}

// Blocks that read the same source follow each other.
__device__ __forceinline__ Place place_of_block(
    const Patch &patch, int outputs, int groups, int phases_down, int phases_across
) {
    unsigned rest = blockIdx.x;
    Place place;
    place.channel = next_of(rest, patch.parts) * outputs;
    place.phase_across = next_of(rest, phases_across);
    place.phase_down = next_of(rest, phases_down);
    place.column = next_of(rest, patch.blocks_across) * patch.quads * QUAD;
    place.row = next_of(rest, patch.blocks_down) * patch.rows;
    place.group = next_of(rest, groups);
    place.image = (int)rest * patch.images;
    return place;
}

// Where what a quad reads begins in shared memory, for the quad of this number among a block's; of those beyond the
// last one that is the first one's.
__device__ __forceinline__ int place_of_quad(const Patch &patch, int number, int rows_between) {
    if (number >= patch.images * patch.rows * patch.quads) number = 0;
    const int line = number / patch.quads;
    const int row = line / patch.rows * patch.channels * patch.height + line % patch.rows * rows_between;
    return row * patch.planes * patch.pitch + number % patch.quads * QUAD;
}

// Where a slice of the sum begins, and how much it is.
struct Slice { int channel, row, column, channels, rows, columns; };

constexpr int COPIES = 4;  // of a line by a thread, before the next line

// Rows from ``top`` and columns from ``left`` on into shared memory, as [image][channel][row][plane][number]. Of
// images beyond the last one nothing is copied: what is made of them is not written.
__device__ __forceinline__ void stage_source(
    accumulate_t *to, const scalar_t *source, Strides strides, const Patch &patch, int first_image,
    const Slice &slice, int images, int top, int left, Axis vertical, Axis horizontal, int advance, int plane_step
) {
    const int lane = threadIdx.x & (patch.lanes - 1);
    const int copier = threadIdx.x / patch.lanes, copiers = blockDim.x / patch.lanes;
    const int line = patch.planes * patch.pitch, there = min(patch.images, images - first_image);
    source += first_image * strides.n + slice.channel * strides.c + (top + copier) * strides.h;
    for (int plane = 0; plane < patch.planes; ++plane) {
        for (int begin = lane; begin < patch.pitch; begin += COPIES * patch.lanes) {
            // The same for all lines.
            int offsets[COPIES];
            bool seen[COPIES];
#pragma unroll
            for (int copy = 0; copy < COPIES; ++copy) {
                const int column = left + plane * plane_step + (begin + copy * patch.lanes) * advance;
                seen[copy] = inside(column, horizontal.source);
                offsets[copy] = column * (int)strides.w;
            }
            for (int image = 0; image < there; ++image) {
                for (int channel = 0; channel < slice.channels; ++channel) {
                    const scalar_t *from = source + image * strides.n + channel * strides.c;
                    accumulate_t *target = to + ((image * patch.channels + channel) * patch.height + copier) * line +
                                           plane * patch.pitch + begin;
                    for (int row = copier; row < patch.height; row += copiers) {
                        const bool inside_row = inside(top + row, vertical.source);
                        accumulate_t numbers[COPIES];
#pragma unroll
                        for (int copy = 0; copy < COPIES; ++copy) {
                            numbers[copy] = inside_row && seen[copy] ? load(from[offsets[copy]]) : NUMBER(0);
                        }
#pragma unroll
                        for (int copy = 0; copy < COPIES; ++copy) {
                            if (begin + copy * patch.lanes < patch.pitch) target[copy * patch.lanes] = numbers[copy];
                        }
                        from += copiers * strides.h;
                        target += copiers * line;
                    }
                }
            }
        }
    }
}

// The filters of ``outputs`` channels from ``filter`` on into shared memory, as [tap][channel]: taps by source
// channel, filter row and, within a row, plane by plane. Those of channels beyond the last one are zero.
__device__ __forceinline__ void stage_filter(
    accumulate_t *to, int pitch, const scalar_t *filter, FilterStrides strides, const Slice &slice, const Side &down,
    const Side &across, int planes, int outputs, int there
) {
    const int taps = slice.channels * slice.rows * slice.columns;
    const int each = slice.columns / planes, rest = slice.columns % planes;  // taps of a plane; so many have one more
    const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const long long step = warps * strides.output;
    for (int tap = threadIdx.x & 31; tap < taps; tap += 32) {
        const int line = tap / slice.columns, column = tap % slice.columns;
        const int channel = line / slice.rows, row = line % slice.rows;
        const int plane = column % planes;
        accumulate_t *target =
            to + (line * slice.columns + plane * each + min(plane, rest) + column / planes) * pitch;
        const scalar_t *from = filter + warp * strides.output + (slice.channel + channel) * strides.source +
                               (down.filter_first + (slice.row + row) * down.filter_step) * strides.r +
                               (across.filter_first + (slice.column + column) * across.filter_step) * strides.s;
#pragma unroll 4
        for (int k = warp; k < outputs; k += warps) {
            target[k] = k < there ? load(*from) : NUMBER(0);
            from += step;
        }
    }
}

// Up to four taps of a row of the filter: where the first one's numbers are, counted from a quad's place.
struct Window { int place, taps; };

__device__ __forceinline__ int windows_of_row(const Patch &patch, int columns) {
    const int each = columns / patch.planes, rest = columns % patch.planes;
    return rest * ((each + QUAD) / QUAD) + (patch.planes - rest) * ((each + QUAD - 1) / QUAD);
}

// All windows of a slice, in the order of its taps.
__device__ __forceinline__ void make_windows(Window *windows, const Patch &patch, const Slice &slice, int row_step) {
    const int each = slice.columns / patch.planes, rest = slice.columns % patch.planes;
    const int long_plane = (each + QUAD) / QUAD, short_plane = (each + QUAD - 1) / QUAD;
    const int of_row = windows_of_row(patch, slice.columns);
    for (int number = threadIdx.x; number < slice.channels * slice.rows * of_row; number += blockDim.x) {
        const int line = number / of_row, within = number % of_row;
        const int beyond = within - rest * long_plane;  // the planes that have a tap more come first
        const int plane = beyond < 0 ? within / long_plane : rest + beyond / max(1, short_plane);
        const int first = (beyond < 0 ? within % long_plane : beyond % max(1, short_plane)) * QUAD;
        const int row = line / slice.rows * patch.height + line % slice.rows * row_step;
        windows[number].place = (row * patch.planes + plane) * patch.pitch + first;
        windows[number].taps = min(QUAD, (plane < rest ? each + 1 : each) - first);
    }
}

// Adds a slice to the sums of a thread's quads, which begin at ``places`` of the patch that ``numbers`` begins with;
// the weights of its channels begin at number ``weights``.
template <int QUADS, int OUTPUTS>
__device__ __forceinline__ void add_slice(
    accumulate_t (&sums)[QUADS][OUTPUTS][QUAD], const accumulate_t *numbers, const int (&places)[QUADS], int weights,
    int pitch, const Window *windows, int count
) {
    for (int number = 0; number < count; ++number) {
        const Window window = windows[number];
        accumulate_t pixels[QUADS][2 * QUAD];
#pragma unroll
        for (int quad = 0; quad < QUADS; ++quad) {
            read_quad(pixels[quad], numbers + places[quad] + window.place);
            read_quad(pixels[quad] + QUAD, numbers + places[quad] + window.place + QUAD);
        }
#pragma unroll
        for (int tap = 0; tap < QUAD; ++tap) {
            if (tap < window.taps) {
                accumulate_t weight[OUTPUTS];
                read_weights<OUTPUTS>(weight, numbers + weights);
                weights += pitch;
#pragma unroll
                for (int quad = 0; quad < QUADS; ++quad) {
#pragma unroll
                    for (int k = 0; k < OUTPUTS; ++k) {
#pragma unroll
                        for (int i = 0; i < QUAD; ++i) sums[quad][k][i] += pixels[quad][tap + i] * weight[k];
                    }
                }
            }
        }
    }
}

// The whole sums of a patch. What lies in shared memory: the source, then the weights, then the windows.
template <int QUADS, int OUTPUTS>
__device__ __forceinline__ void add_patch(
    accumulate_t (&sums)[QUADS][OUTPUTS][QUAD], accumulate_t *numbers, const scalar_t *source, Strides source_strides,
    const scalar_t *filter, FilterStrides filter_strides, const Patch &patch, const Place &place,
    const int (&places)[QUADS], const Side &down, const Side &across, Channels channels, Axis vertical,
    Axis horizontal
) {
    const int teams = blockDim.x / patch.threads, team = threadIdx.x / patch.threads;
    const int pitch = weight_pitch(teams * OUTPUTS);
    const int weights = patch.images * patch.channels * patch.height * patch.planes * patch.pitch;
    const int taps = patch.channels * patch.taps_down * patch.taps_across;
    Window *windows = reinterpret_cast<Window *>(numbers + weights + taps * pitch);
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) {
#pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) {
#pragma unroll
            for (int i = 0; i < QUAD; ++i) sums[quad][k][i] = NUMBER(0);
        }
    }
    Slice slice;
    for (slice.channel = 0; slice.channel < channels.source; slice.channel += patch.channels) {
        slice.channels = min(patch.channels, channels.source - slice.channel);
        for (slice.row = 0; slice.row < down.taps; slice.row += patch.taps_down) {
            slice.rows = min(patch.taps_down, down.taps - slice.row);
            for (slice.column = 0; slice.column < across.taps; slice.column += patch.taps_across) {
                slice.columns = min(patch.taps_across, across.taps - slice.column);
                __syncthreads();  // what was there has been read
                stage_source(
                    numbers, source, source_strides, patch, place.image, slice, channels.images,
                    down.start + place.row * down.advance + slice.row * down.step,
                    across.start + place.column * across.advance + slice.column * across.step, vertical, horizontal,
                    across.advance, across.step
                );
                stage_filter(
                    numbers + weights, pitch, filter, filter_strides, slice, down, across, patch.planes,
                    teams * OUTPUTS, channels.output - place.channel
                );
                // Those of fewer channels are the first of those of more.
                if (slice.channel == 0 || patch.taps_down < down.taps || patch.taps_across < across.taps) {
                    make_windows(windows, patch, slice, down.step);
                }
                __syncthreads();
                add_slice<QUADS, OUTPUTS>(
                    sums, numbers, places, weights + team * OUTPUTS, pitch, windows,
                    slice.channels * slice.rows * windows_of_row(patch, slice.columns)
                );
            }
        }
    }
}

// ---------------------------------------------------------------- what happens to the sums, in registers

// The sums times their channels' scale, plus their bias, and through a function that is straight.
template <int QUADS, int OUTPUTS>
__device__ __forceinline__ void scale_and_compare(
    accumulate_t (&sums)[QUADS][OUTPUTS][QUAD], Terms terms, int channel, int outputs, bool compared,
    Epilogue epilogue
) {
    if (terms.scale != nullptr || terms.bias != nullptr) {
#pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) {
            const ChannelTerms of = terms_of(terms, channel + max(0, min(k, outputs - 1)));
#pragma unroll
            for (int quad = 0; quad < QUADS; ++quad) {
#pragma unroll
                for (int i = 0; i < QUAD; ++i) sums[quad][k][i] = scaled(sums[quad][k][i], of);
            }
        }
    }
    if (!compared || epilogue.function == IDENTITY) return;
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) {
#pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) {
            activate_straight(epilogue.function, sums[quad][k], epilogue.negative_slope);
        }
    }
}

// The others, and what a residual is added before: the first quad's first channel is taken, and all move on by one,
// until each is at its place again.
template <int QUADS, int OUTPUTS>
__device__ __forceinline__ void add_and_activate(
    accumulate_t (&sums)[QUADS][OUTPUTS][QUAD], const scalar_t *residual, long long (&bases)[QUADS],
    int (&columns)[QUADS], int outputs, long long channel_step, long long column_step, Epilogue epilogue
) {
#pragma unroll 1
    for (int quad = 0; quad < QUADS; ++quad) {
        long long place = bases[0];
#pragma unroll 1
        for (int k = 0; k < OUTPUTS; ++k) {
            accumulate_t values[QUAD];
#pragma unroll
            for (int i = 0; i < QUAD; ++i) values[i] = sums[0][0][i];
            long long at = place;
#pragma unroll 1
            for (int i = 0; i < QUAD; ++i) {
                accumulate_t value = values[0];
                if (residual != nullptr && k < outputs && i < columns[0]) value += load(residual[at]);
                at += column_step;
#pragma unroll
                for (int next = 1; next < QUAD; ++next) values[next - 1] = values[next];
                values[QUAD - 1] = activate(epilogue.function, value, epilogue.negative_slope);
            }
#pragma unroll
            for (int next = 1; next < QUADS * OUTPUTS; ++next) {
#pragma unroll
                for (int i = 0; i < QUAD; ++i) {
                    sums[(next - 1) / OUTPUTS][(next - 1) % OUTPUTS][i] = sums[next / OUTPUTS][next % OUTPUTS][i];
                }
            }
#pragma unroll
            for (int i = 0; i < QUAD; ++i) sums[QUADS - 1][OUTPUTS - 1][i] = values[i];
            place += channel_step;
        }
        const long long base = bases[0];
        const int there = columns[0];
#pragma unroll
        for (int next = 1; next < QUADS; ++next) {
            bases[next - 1] = bases[next];
            columns[next - 1] = columns[next];
        }
        bases[QUADS - 1] = base;
        columns[QUADS - 1] = there;
    }
}

// Four neighbours to memory at once, at a multiple of their size.
__device__ __forceinline__ void write_quad(
    scalar_t *to, accumulate_t first, accumulate_t second, accumulate_t third, accumulate_t fourth
) {
    store_pack<QUAD>(to, Pack<scalar_t, QUAD>{store(first), store(second), store(third), store(fourth)});
}

__device__ __forceinline__ bool is_quad_aligned(const scalar_t *array, long long a, long long b, long long c) {
    return on_pack_boundary<QUAD>(array) && ((a | b | c) & (QUAD - 1)) == 0;
}

// Sums to memory. Where quads lie along rows or channels of the output at multiples of 16 bytes (16-bit numbers: 8)
// they go there at once, otherwise through ``shared``, so that neighbouring threads write neighbouring columns.
template <int QUADS, int OUTPUTS>
__device__ __forceinline__ void write_sums(
    const accumulate_t (&sums)[QUADS][OUTPUTS][QUAD], scalar_t *output, Strides strides,
    const long long (&bases)[QUADS], const int (&columns)[QUADS], int outputs, int channels_of_group,
    long long column_step, accumulate_t *shared
) {
    if (column_step == 1 && is_quad_aligned(output, strides.n, strides.c, strides.h)) {
#pragma unroll
        for (int quad = 0; quad < QUADS; ++quad) {
            if (columns[quad] == 0) continue;
#pragma unroll
            for (int k = 0; k < OUTPUTS; ++k) {
                if (k >= outputs) break;
                const accumulate_t(&from)[QUAD] = sums[quad][k];
                scalar_t *to = output + bases[quad] + k * strides.c;
                if (columns[quad] == QUAD) {
                    write_quad(to, from[0], from[1], from[2], from[3]);
                } else {
#pragma unroll
                    for (int i = 0; i < QUAD - 1; ++i) {
                        if (i < columns[quad]) to[i] = store(from[i]);
                    }
                }
            }
        }
        return;
    }
    if (strides.c == 1 && channels_of_group % QUAD == 0 && is_quad_aligned(output, strides.n, strides.h, strides.w)) {
#pragma unroll
        for (int quad = 0; quad < QUADS; ++quad) {
#pragma unroll
            for (int i = 0; i < QUAD; ++i) {
                if (i >= columns[quad]) break;
                scalar_t *to = output + bases[quad] + i * column_step;
#pragma unroll
                for (int k = 0; k < OUTPUTS; k += QUAD) {
                    if (k < outputs) {
                        write_quad(
                            to + k, sums[quad][k][i], sums[quad][k + 1][i], sums[quad][k + 2][i], sums[quad][k + 3][i]
                        );
                    }
                }
            }
        }
        return;
    }
    __syncthreads();  // what lay in shared memory has been read
    const int lane = threadIdx.x & 31, column = lane & 3;
    accumulate_t *own = shared + (threadIdx.x >> 5) * 32 * QUAD;
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) {
        scalar_t *to[QUAD];
        bool there[QUAD];
#pragma unroll
        for (int i = 0; i < QUAD; ++i) {
            const int from = 8 * i + (lane >> 2);
            to[i] = output + __shfl_sync(0xffffffffu, bases[quad], from) + column * column_step;
            there[i] = column < __shfl_sync(0xffffffffu, columns[quad], from);
        }
#pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) {
            if (k >= outputs) break;  // the same for the whole warp
#pragma unroll
            for (int i = 0; i < QUAD; ++i) own[QUAD * lane + i] = sums[quad][k][i];
            __syncwarp();
#pragma unroll
            for (int i = 0; i < QUAD; ++i) {
                if (there[i]) to[i][k * strides.c] = store(own[32 * i + lane]);
            }
            __syncwarp();
        }
    }
}
