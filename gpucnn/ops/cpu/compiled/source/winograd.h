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

// Transformed filters of `depth` inputs and `vectors` * LANES outputs (a panel): [depth][outputs] for each element.
struct Panel {
    float *values;
    int64_t depth, vectors;
    int64_t element() const { return depth * vectors * LANES + LANES; }
    int64_t size() const { return ELEMENTS * element(); }
    float *at(int64_t e, int64_t input) const { return values + e * element() + input * vectors * LANES; }
};

// A part of the filter gradient: sums over tiles for `rows` outputs and `columns` inputs, in blocks of LANES, from
// the given blocks on: [rows][columns] for each element.
struct Sums {
    float *values;
    int64_t row, rows, column, columns;
    int64_t pitch() const { return columns * LANES; }
    int64_t element() const { return rows * LANES * pitch() + LANES; }
    int64_t size() const { return ELEMENTS * element(); }
};

// winograd_tiles.cpp: tiles of LANES channels, `block` of the images. For kernels of 3x3 and of 5x5. False where
// there is no memory.
bool input_tiles(int kernel, const Images &images, const float *x, const Tiles &to, int64_t block);
bool gradient_tiles(int kernel, const Images &images, const float *dy, const Tiles &to, int64_t block);
// Block `source` of the tiles becomes block `block` of the images.
bool place_tiles(int kernel, const Images &images, const Tiles &from, int64_t source, const float *bias, float *y,
                 int64_t block);

// winograd_filters.cpp
struct Weight {
    const float *values;  // (outputs, inputs, kernel, kernel), or (inputs, outputs, ...) to be rotated by 180 degrees
    int64_t inputs, outputs;
    int kernel;
    bool turned;
};
// Inputs input .. input + count - 1 (from first + input on in the weight) of vector `vector`, which is block `block`
// of the weight's outputs.
void filters_of(const Weight &weight, int64_t block, int64_t first, const Panel &to, int64_t vector, int64_t input,
                int64_t count);
// Row `row` of the sums becomes a part of dw (outputs, inputs, kernel, kernel).
void filter_gradient(int kernel, int64_t inputs, const Sums &sums, int64_t row, float *dw);

// winograd_product.cpp
constexpr int64_t DEPTH = 128;  // input channels of a stretch, a multiple of LANES
// Blocks to .. of `to`, element e, become (or, unless `first`, grow by) the tiles' inputs from begin on times the
// panel's from `input` on, `depth` of them.
void multiply(const Tiles &from, int64_t begin, const Panel &panel, int64_t input, int64_t depth, const Tiles &to,
              int64_t block, int64_t e, bool first);
// The sums of element e become (or, unless `first`, grow by) the sum over tiles of dy times x.
void correlate(const Tiles &dy, const Tiles &x, const Sums &sums, int64_t e, bool first);

}  // namespace winograd
}  // namespace gpucnn
