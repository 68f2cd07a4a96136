// Winograd's filters: transformed before the products, and transformed back in the filter gradient. Each call does
// LANES output channels, or one.
//
// 36 numbers are made of 9, so that writing them (and reading them again, where there are too many for the cache)
// is what this costs: 38 MB for 512 to 512 channels.
#include "transpose.h"
#include "winograd_transforms.h"

namespace gpucnn {
namespace winograd {
namespace {

constexpr int64_t STRETCH = 16;  // of the depth, transposed at once

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
void filters(bool turned, const float *weight, const Filters &to, int64_t part) {
    int64_t stretches = up(to.depth, STRETCH), block = part / stretches, begin = part % stretches * STRETCH;
    int64_t count = least(STRETCH, to.depth - begin), panel = block / PANEL, width = to.vectors(panel) * LANES;
    int lanes = static_cast<int>(least(LANES, to.outputs - block * LANES));
    float *target = to.at(0, panel) + block % PANEL * LANES;
    alignas(64) float kernels[STRETCH * K * K * LANES];
    if (turned) {
        for (int64_t d = 0; d < count; ++d)
            planes_to_places(weight + ((begin + d) * to.outputs + block * LANES) * K * K, K * K, lanes, K * K,
                             kernels + d * K * K * LANES);
    } else {
        planes_to_places(weight + (block * LANES * to.depth + begin) * K * K, to.depth * K * K, lanes, count * K * K,
                         kernels);
    }
    for (int64_t d = 0; d < count; ++d)
        transform<K>(kernels + d * K * K * LANES, turned, target + (begin + d) * width, to.element());
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

int64_t filter_parts(const Filters &to) { return to.blocks() * up(to.depth, STRETCH); }

void filters_of(int kernel, bool turned, const float *weight, const Filters &to, int64_t part) {
    if (kernel == 3) filters<3>(turned, weight, to, part);
    else filters<5>(turned, weight, to, part);
}

void filter_gradient(int kernel, int64_t outputs, int64_t inputs, const float *sums, int64_t k, float *dw) {
    int64_t element = sums_element(outputs, inputs);
    const float *row = sums + k * up(inputs, LANES) * LANES;
    float *target = dw + k * inputs * kernel * kernel;
    if (kernel == 3) gradient<3>(inputs, row, element, target);
    else gradient<5>(inputs, row, element, target);
}

}  // namespace winograd
}  // namespace gpucnn
