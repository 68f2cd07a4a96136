// Winograd's tiles: cut from images and transformed, transformed back and put into images. Each call does the tiles
// of LANES channels.
//
// A tile of 36 elements takes 24 transforms along an axis of 12 operations, 288 multiply-adds' time for 16
// channels; its products with 64 outputs take 2304. What could cost more is writing 36 elements to 36 places of the
// second-level cache, so images are worked on in pieces that leave the first-level cache to that.
#include "transpose.h"
#include "winograd_transforms.h"

namespace gpucnn {
namespace winograd {
namespace {

constexpr int SLOT = 7;          // of scratch memory
constexpr int64_t PIECE = 16;    // tiles of a piece, as far as a row of tiles is not longer
constexpr int64_t SIDE_MOST = 4 * PIECE + 2;

// Consecutive tiles of one image that are a rectangle: some of a row, or whole rows.
struct Piece {
    int64_t image, row, rows, column, columns;
};

// function(piece, number of its first tile within the range) for all pieces of tiles [first, first + count).
template <class Function>
GPUCNN_INLINE void for_pieces(const Images &images, int64_t first, int64_t count, Function function) {
    for (int64_t done = 0; done < count;) {
        int64_t tile = first + done, row = tile / images.wide, column = tile % images.wide;
        int64_t image = row / images.high;
        row %= images.high;
        int64_t whole = least((count - done) / images.wide, least(images.high - row, PIECE / images.wide));
        Piece piece{image, row, 1, column, least(least(images.wide - column, count - done), PIECE)};
        if (column == 0 && whole > 0) piece.rows = whole, piece.columns = images.wide;
        function(piece, done);
        done += piece.rows * piece.columns;
    }
}

// Rows of `channels` channels from `plane` on, transposed into [height][width][LANES], zeros outside the image; the
// rectangle begins at (top, left) of the image.
void cut(const Images &images, const float *plane, int lanes, int64_t top, int64_t left, int64_t height,
         int64_t width, float *to) {
    int64_t begin = most(0, left), end = most(begin, least(images.width, left + width));
    for (int64_t y = top; y < top + height; ++y, to += width * LANES) {
        if (y < 0 || y >= images.height || begin >= end) {
            std::memset(to, 0, width * LANES * sizeof(float));
            continue;
        }
        if (begin > left) std::memset(to, 0, (begin - left) * LANES * sizeof(float));
        float *inside = to + (begin - left) * LANES;
        planes_to_places(plane + y * images.width + begin, images.height * images.width, lanes, end - begin, inside);
        if (end < left + width)
            std::memset(to + (end - left) * LANES, 0, (left + width - end) * LANES * sizeof(float));
    }
}

// Tiles of SIZE x SIZE places every STEP, transformed by `transform` (SIZE to TILE numbers) along both axes.
template <int SIZE, int STEP, class Transform>
bool tiles_of(const Images &images, const float *from, const Tiles &to, int64_t block, Transform transform) {
    constexpr int64_t OVERLAP = SIZE - STEP;
    // A piece of whole rows has up to PIECE tiles in rows of at least one.
    constexpr int64_t MOST = (STEP * PIECE + OVERLAP) * (STEP + OVERLAP) * LANES;
    constexpr int64_t COLUMNS = (STEP * PIECE + OVERLAP) * TILE * LANES;
    float *rectangle = scratch(SLOT, MOST + COLUMNS);
    if (!rectangle) return false;
    float *columns = rectangle + MOST;
    int64_t plane = images.height * images.width, element = to.element();
    int lanes = static_cast<int>(least(LANES, images.channels - block * LANES));
    for_pieces(images, to.first, to.count, [&](const Piece &piece, int64_t number) {
        int64_t height = STEP * piece.rows + OVERLAP, width = STEP * piece.columns + OVERLAP;
        cut(images, from + (piece.image * images.channels + block * LANES) * plane, lanes,
            STEP * piece.row - images.top, STEP * piece.column - images.left, height, width, rectangle);
        float *target = to.at(0, block) + number * LANES;
        for (int64_t row = 0; row < piece.rows; ++row) {
            const float *source = rectangle + STEP * row * width * LANES;
            for (int64_t x = 0; x < width; ++x) {
                Vector part[SIZE], whole[TILE];
#pragma GCC unroll 8
                for (int i = 0; i < SIZE; ++i) part[i] = load(source + (i * width + x) * LANES);
                transform(part, whole);
#pragma GCC unroll 8
                for (int i = 0; i < TILE; ++i) store(columns + (x * TILE + i) * LANES, whole[i]);
            }
            for (int64_t column = 0; column < piece.columns; ++column, target += LANES) {
                const float *tile = columns + column * STEP * TILE * LANES;
                for (int i = 0; i < TILE; ++i) {
                    Vector part[SIZE], whole[TILE];
#pragma GCC unroll 8
                    for (int j = 0; j < SIZE; ++j) part[j] = load(tile + (j * TILE + i) * LANES);
                    transform(part, whole);
#pragma GCC unroll 8
                    for (int j = 0; j < TILE; ++j) store(target + (i * TILE + j) * element, whole[j]);
                }
            }
        }
    });
    // What the products read beyond the last tile: zeros.
    for (int64_t e = 0; e < ELEMENTS; ++e)
        std::memset(to.at(e, block) + to.count * LANES, 0, (to.rows() - to.count) * LANES * sizeof(float));
    return true;
}

template <int OUT>
bool place(const Images &images, const Tiles &from, int64_t origin, const float *bias, float *y, int64_t block) {
    // Rows of up to OUT * PIECE places, of which places_to_planes reads whole vectors.
    constexpr int64_t MOST = (OUT * OUT * PIECE + LANES) * LANES;
    float *rectangle = scratch(SLOT, MOST);
    if (!rectangle) return false;
    int64_t plane = images.height * images.width, element = from.element();
    int lanes = static_cast<int>(least(LANES, images.channels - block * LANES));
    Vector offset = bias ? load_first(bias + block * LANES, lanes) : Vector{};
    for_pieces(images, from.first, from.count, [&](const Piece &piece, int64_t number) {
        const float *source = from.at(0, origin) + number * LANES;
        int64_t width = OUT * piece.columns;
        for (int64_t row = 0; row < piece.rows; ++row) {
            for (int64_t column = 0; column < piece.columns; ++column, source += LANES) {
                Vector half[OUT][TILE];
#pragma GCC unroll 8
                for (int j = 0; j < TILE; ++j) {
                    Vector part[TILE], less[OUT];
#pragma GCC unroll 8
                    for (int i = 0; i < TILE; ++i) part[i] = load(source + (i * TILE + j) * element);
                    of_output(part, less);
#pragma GCC unroll 8
                    for (int i = 0; i < OUT; ++i) half[i][j] = less[i];
                }
                float *target = rectangle + (row * OUT * width + column * OUT) * LANES;
#pragma GCC unroll 8
                for (int i = 0; i < OUT; ++i) {
                    Vector less[OUT];
                    of_output(half[i], less);
#pragma GCC unroll 8
                    for (int j = 0; j < OUT; ++j) store(target + (i * width + j) * LANES, less[j] + offset);
                }
            }
        }
        int64_t top = OUT * piece.row, left = OUT * piece.column;
        int64_t height = least(OUT * piece.rows, images.height - top);
        float *to = y + (piece.image * images.channels + block * LANES) * plane + left;
        for (int64_t i = 0; i < height; ++i)
            places_to_planes(rectangle + i * width * LANES, to + (top + i) * images.width, plane, lanes,
                             least(width, images.width - left));
    });
    return true;
}

}  // namespace

bool input_tiles(int kernel, const Images &images, const float *x, const Tiles &to, int64_t block) {
    auto transform = [](const Vector(&d)[TILE], Vector(&e)[TILE]) { of_input(d, e); };
    return kernel == 3 ? tiles_of<TILE, 4>(images, x, to, block, transform)
                       : tiles_of<TILE, 2>(images, x, to, block, transform);
}

bool gradient_tiles(int kernel, const Images &images, const float *dy, const Tiles &to, int64_t block) {
    return kernel == 3 ? tiles_of<4, 4>(images, dy, to, block,
                                        [](const Vector(&d)[4], Vector(&e)[TILE]) { of_gradient(d, e); })
                       : tiles_of<2, 2>(images, dy, to, block,
                                        [](const Vector(&d)[2], Vector(&e)[TILE]) { of_gradient(d, e); });
}

bool place_tiles(int kernel, const Images &images, const Tiles &from, int64_t source, const float *bias, float *y,
                 int64_t block) {
    return kernel == 3 ? place<4>(images, from, source, bias, y, block)
                       : place<2>(images, from, source, bias, y, block);
}

}  // namespace winograd
}  // namespace gpucnn
