// Winograd's convolution, of which docs and formulas are in conv2d_winograd.py: what its parts share.
//
// Lanes are channels throughout: a vector holds LANES channels of one place of one tile. An image comes as planes,
// so its rows are transposed on the way in and out (64 shuffles for 16 pixels of 16 channels), and in between there
// is nothing but whole, aligned vectors, for images of any width. Element e = i * TILE + j of transformed tiles is
//
//     [channels / LANES][tiles, a multiple of TILE_ROWS][LANES]       ("tiles" below, a part for each element)
//
// so that a product over channels finds its TILE_ROWS rows of a LANES numbers apart, a constant of the instruction.
#pragma once

#include "threads.h"
#include "vector.h"

namespace gpucnn {
namespace winograd {

constexpr int TILE = 6;  // inputs of a tile, along each axis
constexpr int ELEMENTS = TILE * TILE;

// A product's block of sums, in registers: TILE_ROWS tiles by up to PANEL vectors of output channels.
constexpr int TILE_ROWS = 6;
constexpr int PANEL = REGISTERS == 32 ? 4 : 2;

constexpr int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Images (n, channels, height, width), cut into tiles that begin `step` apart, the first one `top` above and `left`
// left of the image: `high` rows of `wide` tiles an image, counted through the batch.
struct Images {
    int64_t n, channels, height, width, top, left, high, wide;
    int64_t count() const { return n * high * wide; }
    int64_t blocks() const { return up(channels, LANES); }
};

// Transformed tiles first .. first + count - 1 of all channels, in memory as above.
struct Tiles {
    float *values;
    int64_t first, count, blocks;
    int64_t rows() const { return up(count, TILE_ROWS) * TILE_ROWS; }
    // An odd number of cache lines from one element to the next: a multiple of 4 KiB would put all of a tile's
    // elements into one set of the first-level cache.
    int64_t element() const { return blocks * rows() * LANES + LANES; }
    int64_t size() const { return ELEMENTS * element(); }
    float *at(int64_t e, int64_t block) const { return values + e * element() + block * rows() * LANES; }
};

// Transformed filters: for each element, panels of PANEL * LANES outputs (the last is as wide as what is left), and
// in each [depth][width].
struct Filters {
    float *values;
    int64_t depth, outputs;
    int64_t blocks() const { return up(outputs, LANES); }
    int64_t panels() const { return up(blocks(), PANEL); }
    int64_t vectors(int64_t panel) const { return least(PANEL, blocks() - panel * PANEL); }
    int64_t element() const { return blocks() * LANES * depth + LANES; }
    int64_t size() const { return ELEMENTS * element(); }
    float *at(int64_t e, int64_t panel) const { return values + e * element() + panel * PANEL * LANES * depth; }
};

// winograd_tiles.cpp. For 3x3 kernels and (kernel = 5) 5x5 ones; each works on one block of LANES channels.
bool input_tiles(int kernel, const Images &images, const float *x, const Tiles &to, int64_t block);
bool gradient_tiles(int kernel, const Images &images, const float *dy, const Tiles &to, int64_t block);
bool place_tiles(int kernel, const Images &images, const Tiles &from, int64_t block, const float *bias, float *y);

// winograd_filters.cpp. Filters (outputs, depth, kernel, kernel); where `turned`, of (depth, outputs, ...) rotated
// by 180 degrees. `part` is one of filter_parts().
int64_t filter_parts(const Filters &to);
void filters_of(int kernel, bool turned, const float *weight, const Filters &to, int64_t part);
// dw (k, c, kernel, kernel) of output channel k from sums (ELEMENTS, k, c padded to LANES).
void filter_gradient(int kernel, int64_t outputs, int64_t inputs, const float *sums, int64_t k, float *dw);

// winograd_product.cpp
// to[e] = from[e] * filters[e], panels by tiles.
void multiply(const Tiles &from, const Filters &filters, const Tiles &to, int64_t e, int64_t panel);
// sums[e] (k, c padded to LANES), of LANES rows k from block * LANES on: the sum over tiles of dy * x, added to
// what is there unless `first`.
void correlate(const Tiles &dy, const Tiles &x, float *sums, bool first, int64_t e, int64_t block);
constexpr int64_t sums_size(int64_t outputs, int64_t inputs) {
    return ELEMENTS * (up(outputs, LANES) * LANES * up(inputs, LANES) * LANES + LANES);
}
constexpr int64_t sums_element(int64_t outputs, int64_t inputs) { return sums_size(outputs, inputs) / ELEMENTS; }

}  // namespace winograd
}  // namespace gpucnn
