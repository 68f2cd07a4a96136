// Tasks spread over threads. What a task computes must not depend on the number of threads.
#pragma once

#include <cstdint>
#include <type_traits>

#define GPUCNN_EXPORT extern "C" __attribute__((visibility("default")))

namespace gpucnn {

void run_tasks(int threads, int64_t count, void (*task)(void *, int64_t), void *context);

// task(0) .. task(count - 1), on this thread and up to `threads` - 1 others, in any order; all are done on return.
// Within a task, and while another call is under way, the tasks are done one by one on the calling thread.
template <class Task>
inline void parallel_for(int threads, int64_t count, Task &&task) {
    using Plain = std::remove_reference_t<Task>;
    run_tasks(threads, count, [](void *context, int64_t number) { (*static_cast<Plain *>(context))(number); }, &task);
}

// Memory of the calling thread, aligned to 64 bytes, uninitialized, good until the thread asks for the same `slot`
// again: memory fresh from the system costs a page fault every 4 KiB, more than most work on it. Null where there
// is none left. Slots are small numbers that the caller of one operation keeps apart. A buffer beyond 64 MiB goes back
// to the system when the call is done, so that one large problem does not cost its memory for ever.
float *scratch(int slot, int64_t count);
constexpr int SCRATCH_SLOTS = 8;

}  // namespace gpucnn
