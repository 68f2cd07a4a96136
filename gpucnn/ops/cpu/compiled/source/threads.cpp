// The pool of threads: they stay awake for a millisecond after a job, since the next operation of a network follows
// at once, and sleep then.
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <new>

namespace gpucnn {
namespace {

constexpr int MAXIMUM_HELPERS = 255;
constexpr int64_t SPIN_NANOSECONDS = 30000;
constexpr int64_t YIELD_NANOSECONDS = 1000000;
constexpr size_t HUGE_PAGE = 2 << 20;
constexpr int64_t KEPT_SCRATCH = 64 << 20;  // bytes: a larger buffer is given back when the call is done

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

// How many buffers there are beyond KEPT_SCRATCH, of all threads: mostly none, and then nobody looks for them.
std::atomic<int> large_buffers{0};

struct Scratch {
    float *memory[SCRATCH_SLOTS] = {};
    int64_t size[SCRATCH_SLOTS] = {};

    bool large(int slot) const { return size[slot] * static_cast<int64_t>(sizeof(float)) > KEPT_SCRATCH; }
    void release(int slot) {
        if (large(slot)) large_buffers.fetch_sub(1);
        free(memory[slot]);
        memory[slot] = nullptr;
        size[slot] = 0;
    }
    void release_large() {
        for (int slot = 0; slot < SCRATCH_SLOTS; ++slot)
            if (large(slot)) release(slot);
    }
    ~Scratch() {
        for (int slot = 0; slot < SCRATCH_SLOTS; ++slot) release(slot);
    }
};
thread_local Scratch kept;

struct Pool {
    pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;  // of the job, while there is one
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;  // of what follows here
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
    int helpers = 0;

    std::atomic<uint64_t> generation{0};  // counts jobs
    std::atomic<bool> open{false};        // whether helpers may enter the job
    std::atomic<int> inside{0};           // helpers in the job
    std::atomic<int> sleeping{0};

    void (*task)(void *, int64_t) = nullptr;
    void *context = nullptr;
    int64_t count = 0;
    int wanted = 0;  // helpers that may enter
    std::atomic<int64_t> next{0};

    void work() {
        for (;;) {
            int64_t number = next.fetch_add(1);
            if (number >= count) return;
            task(context, number);
        }
    }
};

Pool *pool = new Pool;  // never freed: its threads live as long as the process
thread_local bool working = false;

// Waits for a job after generation `seen` and returns its generation.
uint64_t await(Pool &pool, uint64_t seen) {
    int64_t began = now();
    for (int64_t passed = 0; passed < YIELD_NANOSECONDS; passed = now() - began) {
        for (int i = 0; i < 16; ++i) {
            if (pool.generation.load() != seen) return pool.generation.load();
            relax();
        }
        if (passed > SPIN_NANOSECONDS) sched_yield();  // whoever else wants the core gets it
    }
    pthread_mutex_lock(&pool.mutex);
    pool.sleeping.fetch_add(1);
    while (pool.generation.load() == seen) pthread_cond_wait(&pool.wake, &pool.mutex);
    pool.sleeping.fetch_sub(1);
    pthread_mutex_unlock(&pool.mutex);
    return pool.generation.load();
}

struct Start {
    Pool *pool;
    int index;
    uint64_t seen;
};

void *help(void *argument) {
    Start start = *static_cast<Start *>(argument);
    delete static_cast<Start *>(argument);
    working = true;
    Pool &pool = *start.pool;
    for (uint64_t seen = start.seen;;) {
        seen = await(pool, seen);
        // Entering before looking whether the job is open: run_tasks closes it before it waits for those inside.
        pool.inside.fetch_add(1);
        if (pool.open.load() && start.index < pool.wanted) pool.work();
        if (large_buffers.load()) kept.release_large();
        pool.inside.fetch_sub(1);
    }
    return nullptr;
}

// Starts helpers until there are `wanted`, and returns how many there are; fewer where the system gives no more.
int start_helpers(Pool &pool, int wanted) {
    while (pool.helpers < wanted) {
        sigset_t all, before;  // signals are for Python's threads
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        Start *start = new (std::nothrow) Start{&pool, pool.helpers, pool.generation.load()};
        pthread_t thread;
        bool started = start && pthread_create(&thread, nullptr, help, start) == 0;
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        if (!started) {
            delete start;
            break;
        }
        pthread_detach(thread);
        ++pool.helpers;
    }
    return pool.helpers < wanted ? pool.helpers : wanted;
}

// Threads do not survive a fork, and a lock may have been held by one of them: the child starts anew.
void after_fork() {
    pool = new Pool;
    large_buffers.store(0);
}
const int registered = pthread_atfork(nullptr, nullptr, after_fork);

}  // namespace

void run_tasks(int threads, int64_t count, void (*task)(void *, int64_t), void *context) {
    (void)registered;
    int wanted = threads - 1 < count - 1 ? threads - 1 : static_cast<int>(count - 1);
    if (wanted > MAXIMUM_HELPERS) wanted = MAXIMUM_HELPERS;
    Pool &pool = *gpucnn::pool;
    if (wanted <= 0 || working || pthread_mutex_trylock(&pool.owner) != 0) {
        bool outside = !working;
        working = true;  // or a task's own tasks would find the pool free
        for (int64_t number = 0; number < count; ++number) task(context, number);
        if (outside) working = false;
        return;
    }
    working = true;
    pool.task = task;
    pool.context = context;
    pool.count = count;
    pool.next.store(0);
    pthread_mutex_lock(&pool.mutex);
    pool.wanted = start_helpers(pool, wanted);
    pool.open.store(true);
    pool.generation.fetch_add(1);
    if (pool.sleeping.load()) pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);
    pool.work();
    pool.open.store(false);
    int64_t spin_until = now() + SPIN_NANOSECONDS;
    while (pool.inside.load()) {
        // A helper that lost its core would never finish while this thread holds it.
        if (now() < spin_until) relax();
        else sched_yield();
    }
    working = false;
    pthread_mutex_unlock(&pool.owner);
}

float *scratch(int slot, int64_t count) {
    if (!kept.memory[slot] || kept.size[slot] < count) {
        kept.release(slot);
        if (count < 1) count = 1;
        void *memory = nullptr;
        // From half a huge page on, whole ones: work that goes through many places at once is bound by how many
        // pages the processor remembers (measured: a product of blocks of 36 places, 6 to 8 percent).
        size_t bytes = count * sizeof(float);
        bool huge = bytes >= HUGE_PAGE / 2;
        if (huge) bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        if (posix_memalign(&memory, huge ? HUGE_PAGE : 64, bytes) != 0) memory = nullptr;
#if defined(MADV_HUGEPAGE)
        if (memory && huge) madvise(memory, bytes, MADV_HUGEPAGE);  // a wish, no more
#endif
        kept.memory[slot] = static_cast<float *>(memory);
        kept.size[slot] = memory ? count : 0;
        if (kept.large(slot)) large_buffers.fetch_add(1);
    }
    return kept.memory[slot];
}

// What Python asks for after a call: whether there are large buffers, this thread's then given back.
GPUCNN_EXPORT const void *gpucnn_large_scratch() { return &large_buffers; }

GPUCNN_EXPORT void gpucnn_release_large_scratch() { kept.release_large(); }

}  // namespace gpucnn
