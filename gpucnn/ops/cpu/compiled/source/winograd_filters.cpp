// Winograd's filters: transformed before the products, and transformed back in the filter gradient.
//
// 36 numbers are made of 9, so that writing them is what this costs, and the less the sooner they are used: all of
// them are 38 MB for 512 to 512 channels.
#include "transpose.h"
#include "winograd_transforms.h"

namespace gpucnn {
namespace winograd {
namespace {

constexpr int64_t AT_ONCE = 16;  // inputs that are transposed at once

template <int K>
void transform(const float *kernel, bool turned, float *to, int64_t element) {
    Vector half[TILE][K];
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
        Vector part[K], whole[TILE];
#pragma GCC unroll 8
        for (int i = 0; i < K; ++i) {
            int place = i * K + j;
            part[i] = load(kernel + (turned ? K * K - 1 - place : place) * LANES);
        }
        of_filter(part, whole);
#pragma GCC unroll 8
        for (int i = 0; i < TILE; ++i) half[i][j] = whole[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) {
        Vector whole[TILE];
        of_filter(half[i], whole);
#pragma GCC unroll 8
        for (int j = 0; j < TILE; ++j) store(to + (i * TILE + j) * element, whole[j]);
    }
}

template <int K>
void filters(const Weight &weight, int64_t block, int64_t first, const Panel &to, int64_t vector, int64_t input,
             int64_t count) {
    int lanes = static_cast<int>(least(LANES, weight.outputs - block * LANES));
    alignas(64) float kernels[AT_ONCE * K * K * LANES];
    for (int64_t end = input + count; input < end; input += AT_ONCE) {
        int64_t some = least(AT_ONCE, end - input);
        if (weight.turned) {
            const float *from = weight.values + ((first + input) * weight.outputs + block * LANES) * K * K;
            for (int64_t i = 0; i < some; ++i, from += weight.outputs * K * K)
                planes_to_places(from, K * K, lanes, K * K, kernels + i * K * K * LANES);
        } else {
            const float *from = weight.values + (block * LANES * weight.inputs + first + input) * K * K;
            planes_to_places(from, weight.inputs * K * K, lanes, some * K * K, kernels);
        }
        for (int64_t i = 0; i < some; ++i)
            transform<K>(kernels + i * K * K * LANES, weight.turned, to.at(0, input + i) + vector * LANES,
                         to.element());
    }
}

template <int K>
void gradient(int64_t inputs, const float *sums, int64_t element, float *dw) {
    for (int64_t c = 0; c < inputs; c += LANES, sums += LANES, dw += LANES * K * K) {
        Vector half[K][TILE];
#pragma GCC unroll 8
        for (int j = 0; j < TILE; ++j) {
            Vector whole[TILE], less[K];
#pragma GCC unroll 8
            for (int i = 0; i < TILE; ++i) whole[i] = load(sums + (i * TILE + j) * element);
            of_sums(whole, less);
#pragma GCC unroll 8
            for (int i = 0; i < K; ++i) half[i][j] = less[i];
        }
        constexpr int64_t PLACES = up(K * K, LANES) * LANES;  // of which the last are read, and not used
        alignas(64) float kernels[PLACES * LANES];
        for (int64_t i = K * K; i < PLACES; ++i) store(kernels + i * LANES, Vector{});
#pragma GCC unroll 8
        for (int i = 0; i < K; ++i) {
            Vector less[K];
            of_sums(half[i], less);
#pragma GCC unroll 8
            for (int j = 0; j < K; ++j) store(kernels + (i * K + j) * LANES, less[j]);
        }
        places_to_planes(kernels, dw, K * K, static_cast<int>(least(LANES, inputs - c)), K * K);
    }
}

}  // namespace

void filters_of(const Weight &weight, int64_t block, int64_t first, const Panel &to, int64_t vector, int64_t input,
                int64_t count) {
    if (weight.kernel == 3) filters<3>(weight, block, first, to, vector, input, count);
    else filters<5>(weight, block, first, to, vector, input, count);
}

void filter_gradient(int kernel, int64_t inputs, const Sums &sums, int64_t row, float *dw) {
    int64_t first = sums.column * LANES, count = least(sums.columns * LANES, inputs - first);
    const float *from = sums.values + row * sums.pitch();
    float *to = dw + ((sums.row * LANES + row) * inputs + first) * kernel * kernel;
    if (kernel == 3) gradient<3>(count, from, sums.element(), to);
    else gradient<5>(count, from, sums.element(), to);
}

}  // namespace winograd
}  // namespace gpucnn
