// What a training step decides where nothing may look at its numbers: a step captured as a graph runs to its end
// without the host. Limit: one launch each for what is judged; memory for the average, 3 elements a weight.
#include "last_block.cuh"
#include "squares.cuh"

// The sum of ``count`` numbers, rounded once: Shewchuk, "Adaptive precision floating-point arithmetic", 1997, as
// Python's math.fsum, whose bits it has. ``partials`` is room for 64, more than doubles can need. By one thread.
__device__ double exact_sum(const double *numbers, int count, double *partials) {
    double plain = 0;
    int used = 0;
    for (int i = 0; i < count; ++i) {
        double value = numbers[i];
        plain += value;
        int kept = 0;
        for (int j = 0; j < used; ++j) {
            double other = partials[j];
            if (fabs(value) < fabs(other)) {
                const double swapped = value;
                value = other;
                other = swapped;
            }
            const double high = value + other, low = other - (high - value);
            if (low != 0) partials[kept++] = low;
            value = high;
        }
        used = kept;
        partials[used++] = value;
    }
    if (!isfinite(plain) || used == 0) return plain;
    double high = partials[--used], low = 0;
    while (used > 0) {
        const double before = high, next = partials[--used];
        high = before + next;
        low = next - (high - before);
        if (low != 0) break;
    }
    // Halfway between two numbers, what is left below decides.
    if (used > 0 && ((low < 0 && partials[used - 1] < 0) || (low > 0 && partials[used - 1] > 0))) {
        const double twice = low * 2, moved = high + twice;
        if (twice == moved - high) high = moved;
    }
    return high;
}

__device__ __forceinline__ void judge(
    double total, const scalar_t *loss, const long long *correct, double *verdict
) {
    const double norm = sqrt(total), value = (double)load(*loss);
    verdict[0] = isfinite(value) && isfinite(norm) ? 1 : 0;
    verdict[1] = value;
    verdict[2] = norm;
    verdict[3] = (double)*correct;
    verdict[4] = total;
}

// verdict: 0 whether to proceed (1, or 0 where the loss or the gradient's norm is not finite), 1 the loss, 2 the
// norm, 3 how many were classified rightly, 4 the norm's square. One thread: there is next to nothing to do.
extern "C" __global__ void __launch_bounds__(32) judge_step(
    const double *squares, int count, const scalar_t *loss, const long long *correct, double *verdict
) {
    __shared__ double partials[64];
    if (threadIdx.x != 0) return;
    judge(exact_sum(squares, count, partials), loss, correct, verdict);
}

// One part of a gradient: the sum of its squares, as sum_of_squares.cu makes it and with the same bits, into the
// ``place`` of all ``parts`` sums. Where ``verdict`` is not null, the others are there, and the last block judges.
// Limit: memory, every element read once.
extern "C" __global__ void __launch_bounds__(256) judge_gradient(
    const scalar_t *gradient, long long count, double *partial, int *done, double *squares, int place, int parts,
    const scalar_t *loss, const long long *correct, double *verdict
) {
    __shared__ double warps[8];
    __shared__ double partials[64];
    __shared__ int last;
    double total = squares_of_block(gradient, count, warps);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
    if (!is_last_block(done, &last)) return;
    total = sum_of_parts(partial, gridDim.x, warps);
    if (threadIdx.x != 0) return;
    squares[place] = total;
    if (verdict) judge(exact_sum(squares, parts, partials), loss, correct, verdict);
}

// Rounded by themselves, and never fused with a sum: the average has the bits that three operations give it.
__device__ __forceinline__ float product(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double product(double x, double y) { return __dmul_rn(x, y); }

// average += share * (live - average), unless ``proceed`` points to 0.
extern "C" __global__ void __launch_bounds__(256) average_elements(
    const scalar_t *live, scalar_t *average, long long count, const double *share, const double *proceed
) {
    if (proceed && *proceed == 0) return;
    const accumulate_t part = (accumulate_t)*share;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const accumulate_t before = load(average[i]);
        average[i] = store(before + product(load(live[i]) - before, part));
    }
}
