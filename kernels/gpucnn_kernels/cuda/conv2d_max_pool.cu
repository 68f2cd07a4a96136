// Convolution, bias, activation and max pooling in one kernel, for small networks: the convolution's result, several
// times larger than what is left of it, never goes through memory.
//
// A block makes the sums of a patch of the convolution's positions as conv2d_direct.cu does (conv2d_direct.cuh says
// how), where the patch is what a patch of pooled pixels needs: (rows - 1) * stride + extent. Where windows overlap,
// neighbouring blocks make what their windows share, each for itself. The quads of a thread are pairs, one below the
// other. So where windows are 2 x 2 and lie side by side, a pair is two windows of each channel, and what is left of
// its 8 sums is found in registers. Other windows are looked at in shared memory, some channels at a time, after the
// sums were put there. Where a patch for whole windows does not fit there, windows come in parts: some rows of
// places, or some places of a row, at a time; what was the largest so far is then read from y.
//
// Before they are compared, sums are rounded as the convolution would store them: the winner, and on ties the first
// one, is the one that max_pool_forward finds in the stored result.
//
// Limit: as conv2d_direct.cu's, without the convolution's result. LeNet's first layer (1 -> 6, 5 x 5, 28 x 28, halved)
// does 50 operations for each of its 4704 sums an image, on 3136 bytes read and 4704 written (float32): 30 a byte,
// where two kernels write and read another 18816 bytes, 5 a byte. So arithmetic is the limit, not memory.
//
// By the code compiled for sm_90 (counted, not measured) four taps of a row are 256 multiply-adds of 294 instructions
// for 8 channels, 87 %, 192 of 234 for 6, and 128 of 162 for 4, the way for few blocks. Finding the largest is some
// 5 instructions for each sum where windows are 2 x 2, and in shared memory some 34 for a place of four channels.
// By the counting in conv2d_max_pool.py an H200 takes 8.3 us for LeNet's first layer and 512 images, of which a
// launch is 3, and 13 us for its second.
#include "conv2d_direct.cuh"
#include "fused.cuh"
#include "pooling_windows.cuh"

// The pooling's windows over the convolution's result; P and Q are how many there are.
struct Pool {
    int P, Q, R, S, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
    int rows, columns;               // pooled pixels of a block, for each of its images
    int places_down, places_across;  // of a window at a time: some whole rows, or some places of one
};

// What the blocks of a launch fill; ``argmax`` lies as y does, or is null.
struct Pooled {
    scalar_t *y;
    unsigned char *argmax;
    Strides strides;
};

// The first pooled pixel of a block, and the first channel of a thread's team with how many there are of it.
struct Corner { int image, row, column, channel, outputs; };

constexpr int PAIR = 2;  // quads of a thread, one below the other

// Which quad of a block's patch is ``quad`` of the thread ``member`` of a team.
__device__ __forceinline__ int number_of_quad(const Patch &patch, int member, int quad) {
    const int pair = member + quad / PAIR * patch.threads;
    return (pair / patch.quads * PAIR + quad % PAIR) * patch.quads + pair % patch.quads;
}

__device__ __forceinline__ accumulate_t least_of_all() { return -__int_as_float(0x7f800000); }

// As stored: the value that max_pool_forward would read.
__device__ __forceinline__ accumulate_t rounded(accumulate_t value) { return load(store(value)); }

// ---------------------------------------------------------------- 2 x 2, in registers

// The largest of the four places of a window: from the last to the first, so the first of the largest wins.
__device__ __forceinline__ void find_largest(const accumulate_t (&values)[4], accumulate_t &largest, int &winner) {
    largest = values[3];
    winner = 3;
#pragma unroll
    for (int place = 2; place >= 0; --place) {
        const bool taken = values[place] >= largest;
        largest = taken ? values[place] : largest;
        winner = taken ? place : winner;
    }
}

// The first NaN wins over all.
__device__ __forceinline__ void find_nan(const accumulate_t (&values)[4], accumulate_t &largest, int &winner) {
#pragma unroll
    for (int place = 3; place >= 0; --place) {
        const bool taken = values[place] != values[place];
        largest = taken ? values[place] : largest;
        winner = taken ? place : winner;
    }
}

// Whether ``COUNT`` neighbouring numbers of y and argmax may be written at once, at places made of these steps.
template <int COUNT>
__device__ __forceinline__ bool may_write(const Pooled &to, long long a, long long b, long long c) {
    return on_pack_boundary<COUNT>(to.y) && on_pack_boundary<COUNT>(to.argmax) && ((a | b | c) & (COUNT - 1)) == 0;
}

template <int COUNT>
__device__ __forceinline__ void write_pooled(
    const Pooled &to, long long place, const accumulate_t (&largest)[COUNT], const int (&winners)[COUNT]
) {
    Pack<scalar_t, COUNT> values;
    Pack<unsigned char, COUNT> chosen;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        values.number[i] = store(largest[i]);
        chosen.number[i] = (unsigned char)winners[i];
    }
    store_pack<COUNT>(to.y + place, values);
    if (to.argmax != nullptr) store_pack<COUNT>(to.argmax + place, chosen);
}

// The two windows of a pair of quads, of all channels of a thread.
template <int OUTPUTS>
__device__ __forceinline__ void pool_pair(
    const accumulate_t (&upper)[OUTPUTS][QUAD], const accumulate_t (&lower)[OUTPUTS][QUAD], const Pooled &to,
    long long base, int outputs, int channels_of_group, int windows, bool below, int columns
) {
    constexpr int WINDOWS = QUAD / 2;
    constexpr int SIDE_BY_SIDE = OUTPUTS % 4 == 0 ? 4 : 2;  // channels that are written at once
    accumulate_t largest[OUTPUTS][WINDOWS];
    int winners[OUTPUTS][WINDOWS];
#pragma unroll
    for (int k = 0; k < OUTPUTS; ++k) {
        // Places beyond the convolution's result have minus infinity, over which the first place, always inside, wins.
        accumulate_t values[WINDOWS][4];
        accumulate_t zero = NUMBER(0);  // unless there is an infinity or a NaN
#pragma unroll
        for (int i = 0; i < WINDOWS; ++i) {
            const bool right = 2 * i + 1 < columns;
            values[i][0] = rounded(upper[k][2 * i]);
            values[i][1] = right ? rounded(upper[k][2 * i + 1]) : least_of_all();
            values[i][2] = below ? rounded(lower[k][2 * i]) : least_of_all();
            values[i][3] = right && below ? rounded(lower[k][2 * i + 1]) : least_of_all();
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                zero = fused(upper[k][2 * i + j], NUMBER(0), zero);
                zero = fused(lower[k][2 * i + j], NUMBER(0), zero);
            }
            find_largest(values[i], largest[k][i], winners[k][i]);
        }
        if (zero != NUMBER(0)) {
#pragma unroll
            for (int i = 0; i < WINDOWS; ++i) find_nan(values[i], largest[k][i], winners[k][i]);
        }
    }
    const Strides &strides = to.strides;
    if (strides.w == 1 && windows == WINDOWS && may_write<WINDOWS>(to, strides.n, strides.c, strides.h)) {
#pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) {
            if (k >= outputs) break;
            write_pooled<WINDOWS>(to, base + k * strides.c, largest[k], winners[k]);
        }
        return;
    }
    if (strides.c == 1 && channels_of_group % SIDE_BY_SIDE == 0 &&
        may_write<SIDE_BY_SIDE>(to, strides.n, strides.h, strides.w)) {
#pragma unroll
        for (int i = 0; i < WINDOWS; ++i) {
            if (i >= windows) break;
#pragma unroll
            for (int k = 0; k < OUTPUTS; k += SIDE_BY_SIDE) {
                if (k >= outputs) break;
                accumulate_t values[SIDE_BY_SIDE];
                int chosen[SIDE_BY_SIDE];
#pragma unroll
                for (int next = 0; next < SIDE_BY_SIDE; ++next) {
                    values[next] = largest[k + next][i];
                    chosen[next] = winners[k + next][i];
                }
                write_pooled<SIDE_BY_SIDE>(to, base + i * strides.w + k, values, chosen);
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < WINDOWS; ++i) {
        if (i >= windows) break;
#pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) {
            if (k >= outputs) break;
            const long long place = base + i * strides.w + k * strides.c;
            to.y[place] = store(largest[k][i]);
            if (to.argmax != nullptr) to.argmax[place] = (unsigned char)winners[k][i];
        }
    }
}

template <int QUADS, int OUTPUTS>
__device__ __forceinline__ void pool_halves(
    const accumulate_t (&sums)[QUADS][OUTPUTS][QUAD], const Patch &patch, const Pool &pool, const Corner &corner,
    const Pooled &to, const Channels &channels, int channel_of_output, int rows, int columns, int member
) {
#pragma unroll
    for (int quad = 0; quad < QUADS; quad += PAIR) {
        const int pair = member + quad / PAIR * patch.threads, line = pair / patch.quads;
        const int image = corner.image + line / pool.rows, row = corner.row + line % pool.rows;
        const int column = corner.column + pair % patch.quads * (QUAD / 2);
        const bool there = line < patch.images * pool.rows && image < channels.images && row < pool.P;
        const int windows = there ? min(QUAD / 2, pool.Q - column) : 0;
        if (windows <= 0) continue;
        const long long base = image * to.strides.n + channel_of_output * to.strides.c + row * to.strides.h +
                               column * to.strides.w;
        pool_pair<OUTPUTS>(
            sums[quad], sums[quad + 1], to, base, corner.outputs, channels.output, windows, 2 * row + 1 < rows,
            columns - 2 * column
        );
    }
}

// ---------------------------------------------------------------- windows of any size, in shared memory

// In float64 registers and shared memory are enough for half as much.
constexpr int HALF = sizeof(accumulate_t) == 8 ? 2 : 1;
constexpr int TOGETHER = 4 / HALF;  // channels of a thread that are in shared memory at a time

// Some places of windows, from row ``r`` and column ``s`` on.
struct Part { int r, s, rows, columns; };

// A thread's pooled pixels of the TOGETHER channels from ``first`` of its team on, over a part of their windows.
__device__ __forceinline__ void pool_from_shared(
    const accumulate_t *sums, const Patch &patch, const Pool &pool, const Part &part, const Corner &corner,
    const Pooled &to, const Channels &channels, int channel_of_output, int first, int rows, int columns, int member
) {
    const int width = patch.quads * QUAD, plane = patch.images * patch.rows * width;
    const int of_image = pool.rows * pool.columns;
    for (int pixel = member; pixel < patch.images * of_image; pixel += patch.threads) {
        const int number = pixel / of_image, line = pixel % of_image / pool.columns, across = pixel % pool.columns;
        const int image = corner.image + number, row = corner.row + line, column = corner.column + across;
        if (image >= channels.images || row >= pool.P || column >= pool.Q) continue;
        const int top = row * pool.stride_h - pool.padding_h, left = column * pool.stride_w - pool.padding_w;
        const long long place = image * to.strides.n + (channel_of_output + first) * to.strides.c +
                                row * to.strides.h + column * to.strides.w;
        accumulate_t largest[TOGETHER];
        int winners[TOGETHER];
        if (part.r == 0 && part.s == 0) {
            // The first place inside wins where nothing is larger than minus infinity.
            const Range down = places_inside(top, pool.R, pool.dilation_h, rows);
            const Range right = places_inside(left, pool.S, pool.dilation_w, columns);
            const bool any = down.first < down.end && right.first < right.end;
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k) {
                largest[k] = least_of_all();
                winners[k] = any ? down.first * pool.S + right.first : 0;
            }
        } else {
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k) {
                const bool there = first + k < corner.outputs;
                largest[k] = there ? load(to.y[place + k * to.strides.c]) : NUMBER(0);
                winners[k] = there && to.argmax != nullptr ? to.argmax[place + k * to.strides.c] : 0;
            }
        }
        const Range down = places_inside(top + part.r * pool.dilation_h, part.rows, pool.dilation_h, rows);
        const Range right = places_inside(left + part.s * pool.dilation_w, part.columns, pool.dilation_w, columns);
        const accumulate_t *window =
            sums + (number * patch.rows + line * pool.stride_h) * width + across * pool.stride_w;
        for (int r = down.first; r < down.end; ++r) {
            for (int s = right.first; s < right.end; ++s) {
                const accumulate_t *from = window + r * pool.dilation_h * width + s * pool.dilation_w;
#pragma unroll
                for (int k = 0; k < TOGETHER; ++k) {
                    const accumulate_t value = from[k * plane];
                    // The first NaN wins over all.
                    if (value > largest[k] || (value != value && largest[k] == largest[k])) {
                        largest[k] = value;
                        winners[k] = (part.r + r) * pool.S + part.s + s;
                    }
                }
            }
        }
#pragma unroll
        for (int k = 0; k < TOGETHER; ++k) {
            if (first + k >= corner.outputs) break;
            to.y[place + k * to.strides.c] = store(largest[k]);
            if (to.argmax != nullptr) to.argmax[place + k * to.strides.c] = (unsigned char)winners[k];
        }
    }
}

template <int QUADS, int OUTPUTS>
__device__ __forceinline__ void pool_windows(
    const accumulate_t (&sums)[QUADS][OUTPUTS][QUAD], accumulate_t *numbers, const Patch &patch, const Pool &pool,
    const Part &part, const Corner &corner, const Pooled &to, const Channels &channels, int channel_of_output,
    int rows, int columns, int member
) {
    const int plane = patch.images * patch.rows * patch.quads * QUAD;
    accumulate_t *of_team = numbers + threadIdx.x / patch.threads * TOGETHER * plane;
#pragma unroll
    for (int first = 0; first < OUTPUTS; first += TOGETHER) {
        __syncthreads();  // what lay there has been read
#pragma unroll
        for (int quad = 0; quad < QUADS; ++quad) {
            const int number = number_of_quad(patch, member, quad);
            if (number * QUAD >= plane) continue;
#pragma unroll
            for (int k = 0; k < TOGETHER; ++k) {
                if (first + k >= OUTPUTS) break;
#pragma unroll
                for (int i = 0; i < QUAD; ++i) {
                    of_team[k * plane + number * QUAD + i] = rounded(sums[quad][first + k][i]);
                }
            }
        }
        __syncthreads();
        if (first < corner.outputs) {
            pool_from_shared(
                of_team, patch, pool, part, corner, to, channels, channel_of_output, first, rows, columns, member
            );
        }
    }
}

// ---------------------------------------------------------------- the kernels

template <int QUADS>
__device__ __forceinline__ void find_places(int (&places)[QUADS], const Patch &patch, int advance, int member) {
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) {
        places[quad] = place_of_quad(patch, number_of_quad(patch, member, quad), advance);
    }
}

// The sums of a patch, with bias and activation.
template <int QUADS, int OUTPUTS>
__device__ __forceinline__ void convolve(
    accumulate_t (&sums)[QUADS][OUTPUTS][QUAD], accumulate_t *numbers, const scalar_t *x, Strides x_strides,
    const scalar_t *filter, FilterStrides filter_strides, const scalar_t *bias, const Patch &patch,
    const Place &place, int outputs, int channel, Channels channels, Axis vertical, Axis horizontal,
    Epilogue epilogue
) {
    const Side down = side_of(vertical, 0, 0), across = side_of(horizontal, 0, 0);
    int places[QUADS];
    find_places<QUADS>(places, patch, down.advance, threadIdx.x % patch.threads);
    add_patch<QUADS, OUTPUTS>(
        sums, numbers, x + (long long)place.group * channels.source * x_strides.c, x_strides,
        filter + place.group * filter_strides.group + place.channel * filter_strides.output, filter_strides, patch,
        place, places, down, across, channels, vertical, horizontal
    );
    const bool compared = straight(epilogue.function);
    if (outputs > 0) {  // the same for a whole warp
        scale_and_compare<QUADS, OUTPUTS>(sums, {nullptr, bias, nullptr}, channel, outputs, compared, epilogue);
    }
    if (!compared) {
        long long nowhere[QUADS] = {};
        int no_columns[QUADS] = {};
        add_and_activate<QUADS, OUTPUTS>(sums, nullptr, nowhere, no_columns, outputs, 0, 0, epilogue);
    }
}

template <int QUADS, int OUTPUTS>
__device__ __forceinline__ void convolve_and_pool_halves(
    const scalar_t *x, Strides x_strides, const scalar_t *filter, FilterStrides filter_strides, const scalar_t *bias,
    Pooled to, Channels channels, Axis vertical, Axis horizontal, Pool pool, Epilogue epilogue, Patch patch
) {
    extern __shared__ __align__(16) accumulate_t numbers[];
    const int teams = blockDim.x / patch.threads;
    const Place place = place_of_block(patch, teams * OUTPUTS, channels.groups, 1, 1);
    Corner corner;
    corner.image = place.image;
    corner.row = place.row / 2;
    corner.column = place.column / 2;
    corner.channel = place.channel + threadIdx.x / patch.threads * OUTPUTS;
    corner.outputs = min(OUTPUTS, channels.output - corner.channel);
    const int channel = place.group * channels.output + corner.channel;
    accumulate_t sums[QUADS][OUTPUTS][QUAD];
    convolve<QUADS, OUTPUTS>(
        sums, numbers, x, x_strides, filter, filter_strides, bias, patch, place, corner.outputs, channel, channels,
        vertical, horizontal, epilogue
    );
    pool_halves<QUADS, OUTPUTS>(
        sums, patch, pool, corner, to, channels, channel, vertical.output, horizontal.output,
        threadIdx.x % patch.threads
    );
}

template <int QUADS, int OUTPUTS>
__device__ __forceinline__ void convolve_and_pool_windows(
    const scalar_t *x, Strides x_strides, const scalar_t *filter, FilterStrides filter_strides, const scalar_t *bias,
    Pooled to, Channels channels, Axis vertical, Axis horizontal, Pool pool, Epilogue epilogue, Patch patch
) {
    extern __shared__ __align__(16) accumulate_t numbers[];
    const int teams = blockDim.x / patch.threads;
    Place place = place_of_block(patch, teams * OUTPUTS, channels.groups, 1, 1);
    Corner corner;
    corner.image = place.image;
    corner.row = place.row / patch.rows * pool.rows;
    corner.column = place.column / (patch.quads * QUAD) * pool.columns;
    corner.channel = place.channel + threadIdx.x / patch.threads * OUTPUTS;
    corner.outputs = min(OUTPUTS, channels.output - corner.channel);
    const int channel = place.group * channels.output + corner.channel;
    Part part;
    for (part.r = 0; part.r < pool.R; part.r += pool.places_down) {
        part.rows = min(pool.places_down, pool.R - part.r);
        for (part.s = 0; part.s < pool.S; part.s += pool.places_across) {
            part.columns = min(pool.places_across, pool.S - part.s);
            place.row = corner.row * pool.stride_h - pool.padding_h + part.r * pool.dilation_h;
            place.column = corner.column * pool.stride_w - pool.padding_w + part.s * pool.dilation_w;
            accumulate_t sums[QUADS][OUTPUTS][QUAD];
            convolve<QUADS, OUTPUTS>(
                sums, numbers, x, x_strides, filter, filter_strides, bias, patch, place, corner.outputs, channel,
                channels, vertical, horizontal, epilogue
            );
            pool_windows<QUADS, OUTPUTS>(
                sums, numbers, patch, pool, part, corner, to, channels, channel, vertical.output, horizontal.output,
                threadIdx.x % patch.threads
            );
        }
    }
}

// Two blocks of 256 threads have 128 registers a thread, a few too few on Blackwell and in float64.
#if __CUDA_ARCH__ >= 1000 || defined(SCALAR_FLOAT64)
constexpr int RESIDENT = 1;
#else
constexpr int RESIDENT = 2;
#endif

extern "C" __global__ void __launch_bounds__(256, RESIDENT) conv2d_max_pool_halves_wide(
    const scalar_t *x, Strides x_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *bias, scalar_t *y, Strides y_strides, unsigned char *argmax, Channels channels, Axis vertical,
    Axis horizontal, Pool pool, Epilogue epilogue, Patch patch
) {
    convolve_and_pool_halves<2, 8 / HALF>(
        x, x_strides, filter, filter_strides, bias, {y, argmax, y_strides}, channels, vertical, horizontal, pool,
        epilogue, patch
    );
}

extern "C" __global__ void __launch_bounds__(256, RESIDENT) conv2d_max_pool_halves_medium(
    const scalar_t *x, Strides x_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *bias, scalar_t *y, Strides y_strides, unsigned char *argmax, Channels channels, Axis vertical,
    Axis horizontal, Pool pool, Epilogue epilogue, Patch patch
) {
    convolve_and_pool_halves<2, HALF == 2 ? 2 : 6>(
        x, x_strides, filter, filter_strides, bias, {y, argmax, y_strides}, channels, vertical, horizontal, pool,
        epilogue, patch
    );
}

extern "C" __global__ void __launch_bounds__(256, RESIDENT) conv2d_max_pool_halves_narrow(
    const scalar_t *x, Strides x_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *bias, scalar_t *y, Strides y_strides, unsigned char *argmax, Channels channels, Axis vertical,
    Axis horizontal, Pool pool, Epilogue epilogue, Patch patch
) {
    convolve_and_pool_halves<2, 4 / HALF>(
        x, x_strides, filter, filter_strides, bias, {y, argmax, y_strides}, channels, vertical, horizontal, pool,
        epilogue, patch
    );
}

extern "C" __global__ void __launch_bounds__(256, 1) conv2d_max_pool_windows(
    const scalar_t *x, Strides x_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *bias, scalar_t *y, Strides y_strides, unsigned char *argmax, Channels channels, Axis vertical,
    Axis horizontal, Pool pool, Epilogue epilogue, Patch patch
) {
    convolve_and_pool_windows<2, 8 / HALF>(
        x, x_strides, filter, filter_strides, bias, {y, argmax, y_strides}, channels, vertical, horizontal, pool,
        epilogue, patch
    );
}
