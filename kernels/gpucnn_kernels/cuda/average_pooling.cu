// Average pooling over windows of one size, and adaptive: windows floor(i * H / P) .. ceil((i + 1) * H / P).
// Limit: memory. Forward reads the image once and writes the outputs, backward the other way round.
//
// Forward, a thread sums a window, line by line. Of a contiguous image with large windows (the mean of whole
// planes at the end of a network) neighbouring threads would read far apart: there a warp sums a window together.
// Backward, each pixel adds the shares of the windows around it, in a fixed order: no atomics.
//
// Where all arrays have one layout, windows of 2 x 2 and 3 x 3, and the gradients of windows that do not overlap,
// have kernels of their own: ``planes`` for contiguous images, where a thread works out its window once for several
// planes, ``packs`` for channels-last ones, where it does so for 16 bytes of channels. By the compiled code for
// sm_90, not measured, their loops have, with the division that windows of 2 x 2 skip,
//
//                                  planes: float32  bfloat16     packs: float32  bfloat16     time for
//   an output of 2 x 2                         51        52                  59        54     155 and 78
//   a pixel of its gradient                    30        35                  52        37      39 and 19
//
// instructions, where the kernels for any window have some 250. "Time for" is how many an H200 can start while its
// memory moves the element's bytes.
#include "packs.cuh"
#include "pooling.cuh"

struct Average {
    int adaptive;
    int count_include_pad;
};

// A window along one axis: the pixels that it covers, and by how many places the sum is divided.
struct Window {
    int first, end, places;
};

__device__ __forceinline__ Window window_of(
    const Average &average, int index, int count, int size, int length, int stride, int padding
) {
    if (average.adaptive) {
        const int first = (int)((long long)index * size / count);
        const int end = (int)(((long long)(index + 1) * size + count - 1) / count);
        return {first, end, end - first};
    }
    const int start = index * stride - padding;
    const int padded_end = start + length < size + padding ? start + length : size + padding;
    const int first = start > 0 ? start : 0, end = padded_end < size ? padded_end : size;
    return {first, end, average.count_include_pad ? padded_end - start : end - first};
}

__device__ __forceinline__ Window rows_of(const Average &average, const Pooling &pooling, int p) {
    return window_of(average, p, pooling.P, pooling.H, pooling.R, pooling.stride_h, pooling.padding_h);
}

__device__ __forceinline__ Window columns_of(const Average &average, const Pooling &pooling, int q) {
    return window_of(average, q, pooling.Q, pooling.W, pooling.S, pooling.stride_w, pooling.padding_w);
}

// Which of ``count`` windows hold the pixel ``index``.
__device__ __forceinline__ Range windows_over(
    const Average &average, int index, int count, int size, int length, int stride, int padding
) {
    if (average.adaptive) {
        const int first = (int)((long long)index * count / size);
        return {first, (int)(((long long)(index + 1) * count + size - 1) / size)};
    }
    return windows_around(index + padding, length, stride, 1, count);
}

// Two factors of up to 2^31 each, so not multiplied as integers.
__device__ __forceinline__ accumulate_t divisor_of(const Window &rows, const Window &columns) {
    return (accumulate_t)rows.places * (accumulate_t)columns.places;
}

extern "C" __global__ void __launch_bounds__(256) average_pool_forward(
    const scalar_t *__restrict__ x, scalar_t *__restrict__ y, Pooling pooling, Average average, Strides x_strides,
    Strides y_strides
) {
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= positions(pooling, pooling.P, pooling.Q)) return;
    const long long step = (long long)gridDim.y * blockDim.y;
    for (long long row = (long long)blockIdx.y * blockDim.y + threadIdx.y; row < pooling.rows; row += step) {
        const Place output = place_of(pooling, pooling.P, pooling.Q, position, row);
        const Window rows = rows_of(average, pooling, output.y), columns = columns_of(average, pooling, output.x);
        const scalar_t *plane = x + output.n * x_strides.n + output.c * x_strides.c;
        accumulate_t total = NUMBER(0);
        for (int h = rows.first; h < rows.end; ++h) {
            accumulate_t across = NUMBER(0);
            for (int w = columns.first; w < columns.end; ++w) {
                across += load(plane[h * x_strides.h + w * x_strides.w]);
            }
            total += across;
        }
        y[offset_of(y_strides, output)] = store(total / divisor_of(rows, columns));
    }
}

// A warp for each output of a contiguous image; ``planes`` is N * C.
extern "C" __global__ void __launch_bounds__(256) average_pool_forward_large_window(
    const scalar_t *__restrict__ x, scalar_t *__restrict__ y, Pooling pooling, Average average, long long planes,
    Strides y_strides
) {
    const int lane = threadIdx.x % 32;
    const long long step = (long long)gridDim.x * (blockDim.x / 32), outputs = planes * pooling.P * pooling.Q;
    for (long long i = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; i < outputs; i += step) {
        const long long line = i / pooling.Q, plane = line / pooling.P, n = plane / pooling.C;
        const Place output = {
            n, (int)(plane - n * pooling.C), (int)(line - plane * pooling.P), (int)(i - line * pooling.Q)
        };
        const Window rows = rows_of(average, pooling, output.y), columns = columns_of(average, pooling, output.x);
        const scalar_t *source = x + (plane * pooling.H + rows.first) * pooling.W + columns.first;
        accumulate_t total = NUMBER(0);
        if (columns.end - columns.first == pooling.W) {  // whole lines follow each other without a gap
            const long long run = (long long)(rows.end - rows.first) * pooling.W;
            for (long long place = lane; place < run; place += 32) total += load(source[place]);
        } else {
            for (int h = rows.first; h < rows.end; ++h, source += pooling.W) {
                for (int w = lane; w < columns.end - columns.first; w += 32) total += load(source[w]);
            }
        }
        for (int distance = 16; distance > 0; distance /= 2) {
            total += __shfl_down_sync(0xffffffffu, total, distance);
        }
        if (lane == 0) y[offset_of(y_strides, output)] = store(total / divisor_of(rows, columns));
    }
}

extern "C" __global__ void __launch_bounds__(256, 1) average_pool_backward(
    const scalar_t *__restrict__ dy, scalar_t *__restrict__ dx, Pooling pooling, Average average,
    Strides dy_strides, Strides dx_strides
) {
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= positions(pooling, pooling.H, pooling.W)) return;
    const long long step = (long long)gridDim.y * blockDim.y;
    for (long long row = (long long)blockIdx.y * blockDim.y + threadIdx.y; row < pooling.rows; row += step) {
        const Place pixel = place_of(pooling, pooling.H, pooling.W, position, row);
        const Range p_range = windows_over(
            average, pixel.y, pooling.P, pooling.H, pooling.R, pooling.stride_h, pooling.padding_h
        );
        const Range q_range = windows_over(
            average, pixel.x, pooling.Q, pooling.W, pooling.S, pooling.stride_w, pooling.padding_w
        );
        const scalar_t *gradients = dy + pixel.n * dy_strides.n + pixel.c * dy_strides.c;
        accumulate_t total = NUMBER(0);
        for (int p = p_range.first; p < p_range.end; ++p) {
            const Window rows = rows_of(average, pooling, p);
            #pragma unroll 1  // unrolled, it spills
            for (int q = q_range.first; q < q_range.end; ++q) {
                const Window columns = columns_of(average, pooling, q);
                total += load(gradients[p * dy_strides.h + q * dy_strides.w]) / divisor_of(rows, columns);
            }
        }
        dx[offset_of(dx_strides, pixel)] = store(total);
    }
}

// ---------------------------------------------------------------- small windows, and windows apart

// What a sum is divided by, to the last bit: where the divisor is a power of two its reciprocal is exact, and quicker.
struct Divisor {
    accumulate_t number, reciprocal;
    bool power_of_two;

    __device__ __forceinline__ Divisor(const Window &rows, const Window &columns) {
        number = divisor_of(rows, columns);
        reciprocal = NUMBER(1) / number;
        power_of_two = (rows.places & (rows.places - 1)) == 0 && (columns.places & (columns.places - 1)) == 0;
    }
    __device__ __forceinline__ accumulate_t into(accumulate_t total) const {
        return power_of_two ? total * reciprocal : total / number;
    }
    __device__ __forceinline__ Pack<scalar_t, PACK> into(const accumulate_t (&totals)[PACK]) const {
        Pack<scalar_t, PACK> shares;
        if (power_of_two) {
#pragma unroll
            for (int k = 0; k < PACK; ++k) shares.number[k] = store(totals[k] * reciprocal);
        } else {
#pragma unroll
            for (int k = 0; k < PACK; ++k) shares.number[k] = store(totals[k] / number);
        }
        return shares;
    }
};

// A bit for each place of a window that begins at row ``top`` and column ``left``: whether the image has it.
template <int size>
__device__ __forceinline__ unsigned places_in_image(const Window &rows, const Window &columns, int top, int left) {
    unsigned places = 0;
#pragma unroll
    for (int k = 0; k < size * size; ++k) {
        const int h = top + k / size, w = left + k % size;
        if (h >= rows.first && h < rows.end && w >= columns.first && w < columns.end) places |= 1u << k;
    }
    return places;
}

// Sums line by line, as average_pool_forward's; places outside of the image count as 0.

template <int size>
__device__ __forceinline__ void averages_of_planes(
    const scalar_t *x, scalar_t *y, const Pooling &pooling, const Average &average
) {
    const int pixels = pooling.H * pooling.W, outputs = pooling.P * pooling.Q;
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= outputs) return;
    const int p = position / pooling.Q, q = position - p * pooling.Q;
    const Window rows = rows_of(average, pooling, p), columns = columns_of(average, pooling, q);
    const int top = p * pooling.stride_h - pooling.padding_h, left = q * pooling.stride_w - pooling.padding_w;
    const unsigned inside = places_in_image<size>(rows, columns, top, left);
    const Divisor divisor(rows, columns);
    const int step = gridDim.y * blockDim.y;
    long long row = (long long)blockIdx.y * blockDim.y + threadIdx.y;
    const scalar_t *first = x + row * pixels + (long long)top * pooling.W + left;
    scalar_t *output = y + row * outputs + position;
#pragma unroll 1
    for (; row < pooling.rows; row += step) {
        scalar_t values[size * size];
#pragma unroll
        for (int r = 0; r < size; ++r) {
            const scalar_t *line = first + r * pooling.W;
#pragma unroll
            for (int s = 0; s < size; ++s) {
                values[r * size + s] = inside >> (r * size + s) & 1 ? line[s] : store(NUMBER(0));
            }
        }
        accumulate_t total = NUMBER(0);
#pragma unroll
        for (int r = 0; r < size; ++r) {
            accumulate_t across = NUMBER(0);
#pragma unroll
            for (int s = 0; s < size; ++s) across += load(values[r * size + s]);
            total += across;
        }
        *output = store(divisor.into(total));
        first += (long long)step * pixels;
        output += (long long)step * outputs;
    }
}

template <int size>
__device__ __forceinline__ void averages_of_packs(
    const scalar_t *x, scalar_t *y, const Pooling &pooling, const Average &average
) {
    const int packs = pooling.C / PACK;
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= (unsigned)pooling.Q * packs) return;
    const int q = position / packs, channel = (position - q * packs) * PACK;
    const Window columns = columns_of(average, pooling, q);
    const int left = q * pooling.stride_w - pooling.padding_w;
    const unsigned step = gridDim.y * blockDim.y, lines = (unsigned)pooling.rows;
#pragma unroll 1
    for (unsigned row = blockIdx.y * blockDim.y + threadIdx.y; row < lines; row += step) {
        const int n = row / pooling.P, p = row - n * pooling.P, top = p * pooling.stride_h - pooling.padding_h;
        const Window rows = rows_of(average, pooling, p);
        const unsigned inside = places_in_image<size>(rows, columns, top, left);
        const scalar_t *first = x + (((long long)n * pooling.H + top) * pooling.W + left) * pooling.C + channel;
        Pack<scalar_t, PACK> values[size * size];
#pragma unroll
        for (int k = 0; k < size * size; ++k) {
#pragma unroll
            for (int number = 0; number < PACK; ++number) values[k].number[number] = store(NUMBER(0));
            if (inside >> k & 1) {
                values[k] = load_pack<PACK>(first + (long long)(k / size * pooling.W + k % size) * pooling.C);
            }
        }
        const Divisor divisor(rows, columns);
        accumulate_t totals[PACK];
#pragma unroll
        for (int number = 0; number < PACK; ++number) {
            totals[number] = NUMBER(0);
#pragma unroll
            for (int r = 0; r < size; ++r) {
                accumulate_t across = NUMBER(0);
#pragma unroll
                for (int s = 0; s < size; ++s) across += load(values[r * size + s].number[number]);
                totals[number] += across;
            }
        }
        store_pack<PACK>(y + ((long long)row * pooling.Q + q) * pooling.C + channel, divisor.into(totals));
    }
}

extern "C" __global__ void __launch_bounds__(256, 3) average_pool_forward_planes(
    const scalar_t *__restrict__ x, scalar_t *__restrict__ y, Pooling pooling, bool count_include_pad
) {
    const Average average = {0, count_include_pad};
    if (pooling.R == 2) {
        averages_of_planes<2>(x, y, pooling, average);
    } else {
        averages_of_planes<3>(x, y, pooling, average);
    }
}

// Here ``rows`` is N * P, fewer than 2^31, the channels fill packs, and the arrays begin on boundaries of packs.
extern "C" __global__ void __launch_bounds__(256, 2) average_pool_forward_packs(
    const scalar_t *__restrict__ x, scalar_t *__restrict__ y, Pooling pooling, bool count_include_pad
) {
    const Average average = {0, count_include_pad};
    if (pooling.R == 2) {
        averages_of_packs<2>(x, y, pooling, average);
    } else {
        averages_of_packs<3>(x, y, pooling, average);
    }
}

// For windows of which no two hold the same pixel.
extern "C" __global__ void __launch_bounds__(256, 3) average_pool_backward_planes(
    const scalar_t *__restrict__ dy, scalar_t *__restrict__ dx, Pooling pooling, bool count_include_pad
) {
    const Average average = {0, count_include_pad};
    const int pixels = pooling.H * pooling.W, outputs = pooling.P * pooling.Q;
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= pixels) return;
    const int h = position / pooling.W, w = position - h * pooling.W;
    const Range p = windows_over(average, h, pooling.P, pooling.H, pooling.R, pooling.stride_h, pooling.padding_h);
    const Range q = windows_over(average, w, pooling.Q, pooling.W, pooling.S, pooling.stride_w, pooling.padding_w);
    const bool any = p.first < p.end && q.first < q.end;
    const int place = any ? p.first * pooling.Q + q.first : 0;
    const Divisor divisor(
        rows_of(average, pooling, any ? p.first : 0), columns_of(average, pooling, any ? q.first : 0)
    );
    const int step = gridDim.y * blockDim.y;
    long long row = (long long)blockIdx.y * blockDim.y + threadIdx.y;
    const scalar_t *gradient = dy + row * outputs + place;
    scalar_t *pixel = dx + row * pixels + position;
#pragma unroll 4
    for (; row < pooling.rows; row += step) {
        *pixel = store(any ? divisor.into(load(*gradient)) : NUMBER(0));
        gradient += (long long)step * outputs;
        pixel += (long long)step * pixels;
    }
}

// Here ``rows`` is N * H, fewer than 2^31; otherwise as forward.
extern "C" __global__ void __launch_bounds__(256, 3) average_pool_backward_packs(
    const scalar_t *__restrict__ dy, scalar_t *__restrict__ dx, Pooling pooling, bool count_include_pad
) {
    const Average average = {0, count_include_pad};
    const int packs = pooling.C / PACK;
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= (unsigned)pooling.W * packs) return;
    const int w = position / packs, channel = (position - w * packs) * PACK;
    const Range q = windows_over(average, w, pooling.Q, pooling.W, pooling.S, pooling.stride_w, pooling.padding_w);
    const unsigned step = gridDim.y * blockDim.y, lines = (unsigned)pooling.rows;
#pragma unroll 1
    for (unsigned row = blockIdx.y * blockDim.y + threadIdx.y; row < lines; row += step) {
        const int n = row / pooling.H, h = row - n * pooling.H;
        const Range p =
            windows_over(average, h, pooling.P, pooling.H, pooling.R, pooling.stride_h, pooling.padding_h);
        Pack<scalar_t, PACK> shares;
#pragma unroll
        for (int number = 0; number < PACK; ++number) shares.number[number] = store(NUMBER(0));
        if (p.first < p.end && q.first < q.end) {
            const long long window = ((long long)n * pooling.P + p.first) * pooling.Q + q.first;
            const Pack<scalar_t, PACK> gradients = load_pack<PACK>(dy + window * pooling.C + channel);
            const Divisor divisor(rows_of(average, pooling, p.first), columns_of(average, pooling, q.first));
            accumulate_t totals[PACK];
#pragma unroll
            for (int number = 0; number < PACK; ++number) totals[number] = load(gradients.number[number]);
            shares = divisor.into(totals);
        }
        store_pack<PACK>(dx + ((long long)row * pooling.W + w) * pooling.C + channel, shares);
    }
}
