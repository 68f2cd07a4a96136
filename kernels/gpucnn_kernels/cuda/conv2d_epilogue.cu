// Scale, bias, residual and activation behind the convolutions that a library's matrix product makes, where they
// cannot be fused. Memory is the only limit: every element is read and written once more. A thread takes a pack of
// neighbours and divides once for their channels.
#include "conv2d.cuh"

// The first ``left`` numbers of a pack, in the computing type.
template <typename T>
__device__ __forceinline__ void fetch(accumulate_t (&values)[PACK], const T *place, bool aligned, long long left) {
    if (aligned && left >= PACK) {
        const Pack<T, PACK> pack = load_pack<PACK>(place);
#pragma unroll
        for (int k = 0; k < PACK; ++k) values[k] = load(pack.number[k]);
    } else {
#pragma unroll
        for (int k = 0; k < PACK; ++k) values[k] = k < left ? load(place[k]) : NUMBER(0);
    }
}

// The sums are in ``wide`` where they have not been rounded to y's type yet, otherwise in y itself. The channel
// changes after ``run`` elements: P * Q in a contiguous array, 1 in a channels-last one.
extern "C" __global__ void __launch_bounds__(256) conv2d_finish(
    const accumulate_t *wide, scalar_t *y, const scalar_t *scale, const scalar_t *bias, const scalar_t *residual,
    int channels, long long run, long long count, Epilogue epilogue
) {
    const Terms terms = {scale, bias, residual};
    const bool aligned =
        on_pack_boundary<PACK>(y) && on_pack_boundary<PACK>(wide) && on_pack_boundary<PACK>(residual);
    const long long step = (long long)gridDim.x * blockDim.x * PACK;
    for (long long i = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PACK; i < count; i += step) {
        const long long left = count - i, line = i / run;
        accumulate_t sums[PACK];
        if (wide != nullptr) {
            fetch(sums, wide + i, aligned, left);
        } else {
            fetch(sums, y + i, aligned, left);
        }
        int channel = (int)(line % channels);
        long long place = i - line * run;
#pragma unroll
        for (int k = 0; k < PACK; ++k) {
            sums[k] = scaled(sums[k], terms, channel);
            if (++place == run) {
                place = 0;
                channel = channel + 1 == channels ? 0 : channel + 1;
            }
        }
        if (residual != nullptr) {
            accumulate_t more[PACK];
            fetch(more, residual + i, aligned, left);
#pragma unroll
            for (int k = 0; k < PACK; ++k) sums[k] += more[k];
        }
        activate_all(epilogue.function, sums, epilogue.negative_slope);
        if (aligned && left >= PACK) {
            Pack<scalar_t, PACK> pack;
#pragma unroll
            for (int k = 0; k < PACK; ++k) pack.number[k] = store(sums[k]);
            store_pack<PACK>(y + i, pack);
        } else {
#pragma unroll
            for (int k = 0; k < PACK; ++k) {
                if (k < left) y[i + k] = store(sums[k]);
            }
        }
    }
}
