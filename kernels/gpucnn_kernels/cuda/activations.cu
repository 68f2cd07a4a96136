// Activations element by element: each reads and writes every element once, so memory is the only limit.
//
// A thread moves two packs of 16 bytes of each array, all loads before the first is waited for: 32 bytes an array
// and thread under way. By the compiled code for sm_90, not measured: ReLU's backward pass takes about 11
// instructions an element in float32 and 10 in bfloat16, where element by element they were 36, with loads of 4
// and 2 bytes and the choice of the function anew for every one; an H200's memory leaves time for some 90 and 45.
#include "activation_packs.cuh"
#include "packs.cuh"

struct Forward {
    const scalar_t *x;
    scalar_t *y;
    int function;
    accumulate_t negative_slope;
    template <typename Tile>
    __device__ __forceinline__ void operator()(const Tile &tile) const {
        accumulate_t values[Tile::elements];
        tile.fetch(x, values);
        activate_all(function, values, negative_slope);
        tile.put(y, values);
    }
};

struct Backward {
    const scalar_t *dy, *value;
    scalar_t *dx;
    int function;
    accumulate_t negative_slope;
    template <typename Tile>
    __device__ __forceinline__ void operator()(const Tile &tile) const {
        accumulate_t gradients[Tile::elements], values[Tile::elements];
        tile.fetch(dy, gradients);
        tile.fetch(value, values);
        slope_all(function, gradients, values, negative_slope);
        tile.put(dx, gradients);
    }
};

extern "C" __global__ void __launch_bounds__(256) activation_forward(
    const scalar_t *x, scalar_t *y, long long count, int function, accumulate_t negative_slope
) {
    const bool aligned = on_pack_boundary<PACK>(x) && on_pack_boundary<PACK>(y);
    over_tiles<PACK, 2>(count, aligned, Forward{x, y, function, negative_slope});
}

// No __restrict__: dx may be dy, and y may be x.
extern "C" __global__ void __launch_bounds__(256) activation_backward(
    const scalar_t *dy, const scalar_t *value, scalar_t *dx, long long count, int function,
    accumulate_t negative_slope
) {
    const bool aligned = on_pack_boundary<PACK>(dy) && on_pack_boundary<PACK>(value) && on_pack_boundary<PACK>(dx);
    over_tiles<PACK, 2>(count, aligned, Backward{dy, value, dx, function, negative_slope});
}
