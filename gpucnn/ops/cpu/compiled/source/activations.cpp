// Activations and their gradients, element by element.
#include "threads.h"
#include "vector.h"

namespace gpucnn {
namespace {

constexpr int64_t BLOCK = 1 << 15;  // numbers a task

// out[i] = function(x[i]) for vectors; the last numbers go through one vector of which a part is used.
template <class Function>
void map(int threads, int64_t count, const float *x, float *out, Function function) {
    parallel_for(threads, (count + BLOCK - 1) / BLOCK, [&](int64_t task) {
        int64_t i = task * BLOCK, end = i + BLOCK < count ? i + BLOCK : count;
        for (; i + LANES <= end; i += LANES) store(out + i, function(load(x + i)));
        if (i < end) store_first(out + i, function(load_first(x + i, end - i)), end - i);
    });
}

}  // namespace

GPUCNN_EXPORT int gpucnn_relu_forward(int threads, int64_t count, const float *x, float *out) {
    map(threads, count, x, out, [](Vector v) { return v <= 0 ? Vector{} : v; });  // a NaN stays a NaN
    return 0;
}

}  // namespace gpucnn
