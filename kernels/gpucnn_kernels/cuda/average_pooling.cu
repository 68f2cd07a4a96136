// Average pooling over windows of one size, and adaptive: windows floor(i * H / P) .. ceil((i + 1) * H / P).
// Limit: memory. Forward reads the image once and writes the outputs, backward the other way round.
//
// Forward, a thread sums a window, line by line. Of a contiguous image with large windows (the mean of whole
// planes at the end of a network) neighbouring threads would read far apart: there a warp sums a window together.
// Backward, each pixel adds the shares of the windows around it, in a fixed order: no atomics.
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
