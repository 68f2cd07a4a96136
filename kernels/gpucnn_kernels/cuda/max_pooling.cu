// Max pooling. Limit: memory. Forward reads the image once (windows overlap in the caches) and writes an output
// and one byte of argmax for each window; backward reads those and writes the image.
//
// The argmax is the place r * S + s in the window: one byte up to 256 places, and with the shapes enough to
// gather. Backward, each pixel looks at the windows around it and adds the gradients of those that chose it, in a
// fixed order: no atomics, no clearing of the image beforehand, and the same bits every time. With the pooled result
// y, whose number is its window's winner, a gradient also goes back through the activation before the pooling, by its
// result: y is read besides, a quarter of the image where windows are 2 x 2, and a launch and three passes over the
// image are saved.
//
// Windows of 2 x 2 and 3 x 3 (for the gradients: with a stride of 2) have kernels of their own where all arrays have
// one layout: ``planes`` for contiguous images, ``packs`` for channels-last ones.
#include "max_pooling_small.cuh"
#include "pooling.cuh"

// Padding never wins, the first place wins a tie, the first NaN wins over all. A dilated window may step over the
// image on both sides: minus infinity, place 0. On a GPU subnormal float32 numbers compare as 0, as CuPy compiles
// for speed (-ftz=true); the winner is copied as it is.
template <typename place_t>
__device__ __forceinline__ void largest_of_windows(
    const scalar_t *x, scalar_t *y, place_t *argmax, const Pooling &pooling, const Strides &x_strides,
    const Strides &y_strides, const Strides &argmax_strides
) {
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= positions(pooling, pooling.P, pooling.Q)) return;
    const long long step = (long long)gridDim.y * blockDim.y;
    for (long long row = (long long)blockIdx.y * blockDim.y + threadIdx.y; row < pooling.rows; row += step) {
        const Place output = place_of(pooling, pooling.P, pooling.Q, position, row);
        const int top = output.y * pooling.stride_h - pooling.padding_h;
        const int left = output.x * pooling.stride_w - pooling.padding_w;
        const Range r_range = places_inside(top, pooling.R, pooling.dilation_h, pooling.H);
        const Range s_range = places_inside(left, pooling.S, pooling.dilation_w, pooling.W);
        const scalar_t *plane = x + output.n * x_strides.n + output.c * x_strides.c;
        accumulate_t best = -__int_as_float(0x7f800000);  // minus infinity
        const bool any = r_range.first < r_range.end && s_range.first < s_range.end;
        int best_place = any ? r_range.first * pooling.S + s_range.first : 0;
        for (int r = r_range.first; r < r_range.end; ++r) {
            const scalar_t *line = plane + (top + r * pooling.dilation_h) * x_strides.h;
            for (int s = s_range.first; s < s_range.end; ++s) {
                const accumulate_t value = load(line[(left + s * pooling.dilation_w) * x_strides.w]);
                if (value > best || (value != value && best == best)) {
                    best = value;
                    best_place = r * pooling.S + s;
                }
            }
        }
        y[offset_of(y_strides, output)] = store(best);
        argmax[offset_of(argmax_strides, output)] = (place_t)best_place;
    }
}

template <typename place_t>
__device__ __forceinline__ void gradients_of_choices(
    const scalar_t *dy, const place_t *argmax, scalar_t *dx, const Pooling &pooling, const Strides &dy_strides,
    const Strides &argmax_strides, const Strides &dx_strides, const Before &before
) {
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= positions(pooling, pooling.H, pooling.W)) return;
    const long long step = (long long)gridDim.y * blockDim.y;
    for (long long row = (long long)blockIdx.y * blockDim.y + threadIdx.y; row < pooling.rows; row += step) {
        const Place pixel = place_of(pooling, pooling.H, pooling.W, position, row);
        const int h = pixel.y + pooling.padding_h, w = pixel.x + pooling.padding_w;
        const Range p_range = windows_around(h, pooling.R, pooling.stride_h, pooling.dilation_h, pooling.P);
        const Range q_range = windows_around(w, pooling.S, pooling.stride_w, pooling.dilation_w, pooling.Q);
        const scalar_t *gradients = dy + pixel.n * dy_strides.n + pixel.c * dy_strides.c;
        const scalar_t *results = before.y ? before.y + (gradients - dy) : nullptr;
        const place_t *places = argmax + pixel.n * argmax_strides.n + pixel.c * argmax_strides.c;
        accumulate_t total = NUMBER(0);
        for (int p = p_range.first; p < p_range.end; ++p) {
            const int below = h - p * pooling.stride_h, r = below / pooling.dilation_h;
            if (r * pooling.dilation_h != below) continue;  // between the places of a dilated window
            for (int q = q_range.first; q < q_range.end; ++q) {
                const int right = w - q * pooling.stride_w, s = right / pooling.dilation_w;
                if (s * pooling.dilation_w != right) continue;
                if (places[p * argmax_strides.h + q * argmax_strides.w] == r * pooling.S + s) {
                    const long long at = p * dy_strides.h + q * dy_strides.w;
                    const scalar_t given = gradients[at];
                    total += load(before.y ? before.through(given, results[at]) : given);
                }
            }
        }
        dx[offset_of(dx_strides, pixel)] = store(total);
    }
}

extern "C" __global__ void __launch_bounds__(256) max_pool_forward(
    const scalar_t *__restrict__ x, scalar_t *__restrict__ y, unsigned char *__restrict__ argmax, Pooling pooling,
    Strides x_strides, Strides y_strides, Strides argmax_strides
) {
    largest_of_windows(x, y, argmax, pooling, x_strides, y_strides, argmax_strides);
}

extern "C" __global__ void __launch_bounds__(256) max_pool_forward_large_window(
    const scalar_t *__restrict__ x, scalar_t *__restrict__ y, int *__restrict__ argmax, Pooling pooling,
    Strides x_strides, Strides y_strides, Strides argmax_strides
) {
    largest_of_windows(x, y, argmax, pooling, x_strides, y_strides, argmax_strides);
}

extern "C" __global__ void __launch_bounds__(256) max_pool_backward(
    const scalar_t *__restrict__ dy, const unsigned char *__restrict__ argmax, scalar_t *__restrict__ dx,
    Pooling pooling, Strides dy_strides, Strides argmax_strides, Strides dx_strides, const scalar_t *__restrict__ y,
    int function, accumulate_t negative_slope
) {
    gradients_of_choices(
        dy, argmax, dx, pooling, dy_strides, argmax_strides, dx_strides, Before{y, function, negative_slope}
    );
}

extern "C" __global__ void __launch_bounds__(256) max_pool_backward_large_window(
    const scalar_t *__restrict__ dy, const int *__restrict__ argmax, scalar_t *__restrict__ dx,
    Pooling pooling, Strides dy_strides, Strides argmax_strides, Strides dx_strides, const scalar_t *__restrict__ y,
    int function, accumulate_t negative_slope
) {
    gradients_of_choices(
        dy, argmax, dx, pooling, dy_strides, argmax_strides, dx_strides, Before{y, function, negative_slope}
    );
}

extern "C" __global__ void __launch_bounds__(256, 3) max_pool_forward_planes(
    const scalar_t *__restrict__ x, scalar_t *__restrict__ y, unsigned char *__restrict__ argmax, Pooling pooling
) {
    if (pooling.R == 2) {
        largest_of_planes<2>(x, y, argmax, pooling);
    } else {
        largest_of_planes<3>(x, y, argmax, pooling);
    }
}

// Here ``rows`` is N * P, fewer than 2^31, the channels fill packs, and the arrays begin on boundaries of packs.
extern "C" __global__ void __launch_bounds__(256, 3) max_pool_forward_packs(
    const scalar_t *__restrict__ x, scalar_t *__restrict__ y, unsigned char *__restrict__ argmax, Pooling pooling
) {
    if (pooling.R == 2) {
        largest_of_packs<2>(x, y, argmax, pooling);
    } else {
        largest_of_packs<3>(x, y, argmax, pooling);
    }
}

extern "C" __global__ void __launch_bounds__(256, 3) max_pool_backward_planes(
    const scalar_t *__restrict__ dy, const unsigned char *__restrict__ argmax, scalar_t *__restrict__ dx,
    Pooling pooling, const scalar_t *__restrict__ y, int function, accumulate_t negative_slope
) {
    const Before before = {y, function, negative_slope};
    if (pooling.R == 2) {
        gradients_of_planes<2>(dy, argmax, dx, pooling, before);
    } else {
        gradients_of_planes<3>(dy, argmax, dx, pooling, before);
    }
}

// Here ``rows`` is N times the pairs of rows, fewer than 2^31; otherwise as forward.
extern "C" __global__ void __launch_bounds__(256, 3) max_pool_backward_packs(
    const scalar_t *__restrict__ dy, const unsigned char *__restrict__ argmax, scalar_t *__restrict__ dx,
    Pooling pooling, const scalar_t *__restrict__ y, int function, accumulate_t negative_slope
) {
    const Before before = {y, function, negative_slope};
    if (pooling.R == 2) {
        gradients_of_packs<2>(dy, argmax, dx, pooling, before);
    } else {
        gradients_of_packs<3>(dy, argmax, dx, pooling, before);
    }
}
