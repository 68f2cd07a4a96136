// One function of vectors, applied to arrays of equal length: spread over threads, the last few numbers included.
#pragma once

#include "threads.h"
#include "vector.h"

namespace gpucnn {

constexpr int64_t ELEMENTS = 1 << 15;  // numbers a task: 128 KiB an array, so that tasks are few and ends even

// task(begin, end) over 0 .. count in pieces of ELEMENTS.
template <class Task>
inline void over_ranges(int threads, int64_t count, Task &&task) {
    parallel_for(threads, (count + ELEMENTS - 1) / ELEMENTS, [&](int64_t number) {
        int64_t begin = number * ELEMENTS, end = begin + ELEMENTS < count ? begin + ELEMENTS : count;
        task(begin, end);
    });
}

// out[i] = function(inputs[i]...); out may be one of the inputs. The last numbers go through a vector used in part.
template <class Function, class... Inputs>
inline void map(int threads, int64_t count, float *out, Function function, Inputs... inputs) {
    over_ranges(threads, count, [&](int64_t i, int64_t end) {
        for (; i + LANES <= end; i += LANES) store(out + i, function(load(inputs + i)...));
        if (i < end) {
            int rest = static_cast<int>(end - i);
            store_first(out + i, function(load_first(inputs + i, rest)...), rest);
        }
    });
}

}  // namespace gpucnn
