// The threads of a block: each runs until it ends or has to wait, then the next one runs on the same processor.
//
// A fiber takes a thread that has not begun, runs it to its end and takes the next; only a thread that waits keeps
// its fiber, and another one goes on with the threads that have not begun. A phase is what happens between two
// barriers: its threads run in the order that the launch asks for. When nothing can run, either the block has
// ended, or all its threads wait at one barrier and the next phase begins, or somebody waits for what will never
// come.
#pragma once

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "runtime_fibers.h"

namespace gpucnn_host {

enum State : unsigned char { NOT_BEGUN, READY, RUNNING, AT_BARRIER, IN_WARP_OPERATION, EXITED };

// cp.async: what a thread has asked for and not yet waited for. See runtime_ptx.h.
struct PendingCopy {
    unsigned char *destination;
    unsigned char data[16];
    int size;
    int group;
};

struct Thread {
    Fiber *fiber;
    uint3 index;
    int line;               // of what it waits at
    const char *operation;  // of a warp, or the name of the barrier
    unsigned mask;
    void *data;
    Resolve resolve;
    PendingCopy *copies;
    int copy_count, copy_capacity, copy_group;
};

constexpr unsigned NONE = ~0u;

// xorshift64*, after Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled" (2016).
struct Generator {
    uint64_t state;
    uint64_t next() {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return state * 0x2545f4914f6cdd1dull;
    }
    unsigned below(unsigned bound) { return unsigned((next() >> 32) * bound >> 32); }
};

struct Schedule {
    Launch *launch;
    unsigned thread_count, warp_count;
    uint64_t block_count, block_number;     // of all blocks, and how many have been begun
    uint64_t block_multiplier, block_start;  // their order: (number * multiplier + start) modulo count
    bool shuffled, reversed;
    Generator generator;

    unsigned current;           // the running thread
    unsigned phase;             // counts through all blocks and launches
    unsigned first_phase;       // of this block
    unsigned next_in_phase;     // how far the phase's order has been handed out
    unsigned woken_begin, woken_end;  // counts; taken modulo the ring's length
    unsigned exited, at_barrier;
    int barrier_line;
    BarrierKind barrier_kind;
    bool barriers_differ;
    int vote_count, vote_and, vote_or;
    int vote_result[4];
    bool running;               // a kernel's code is on the processor, so a signal is its fault
    Context main;
};

static Schedule schedule;
static int runtime_line;  // of the call whose work the runtime does, for signals; else 0
static Thread threads[MAXIMUM_THREADS];
static State states[MAXIMUM_THREADS];
static unsigned phase_order[MAXIMUM_THREADS];  // of a shuffled launch
static unsigned woken[MAXIMUM_THREADS];         // lanes whose operation has been done, to run before the others
static unsigned warp_waiting[WARP_LANES], warp_exited[WARP_LANES];  // bits of lanes, a word a warp
static unsigned warp_phase[WARP_LANES];  // counts the operations that each warp has done together
static FiberPool pool;

static void fiber_main();
static void begin_block();
static void fill_permanent_shared();
static const char *const BARRIER_NAMES[] = {
    "__syncthreads", "__syncthreads_count", "__syncthreads_and", "__syncthreads_or"
};

static void describe_fault(Launch *launch, int line, const char *format, va_list arguments) {
    launch->faulted = 1;
    launch->line = line;
    vsnprintf(launch->message, sizeof launch->message, format, arguments);
    launch->fault_block[0] = indices.block.x, launch->fault_block[1] = indices.block.y;
    launch->fault_block[2] = indices.block.z;
    launch->fault_thread[0] = indices.thread.x, launch->fault_thread[1] = indices.thread.y;
    launch->fault_thread[2] = indices.thread.z;
    launch->fault_has_thread = 1;
}

[[noreturn]] static void leave_for_main() {
    schedule.running = false;
    Context abandoned;
    switch_context(abandoned, schedule.main);
    __builtin_unreachable();
}

void fault(int line, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    describe_fault(schedule.launch, line, format, arguments);
    va_end(arguments);
    leave_for_main();
}

unsigned lane() { return schedule.current % WARP_LANES; }

static void shuffle(unsigned *values, unsigned count) {
    for (unsigned index = count; index > 1; --index) {
        const unsigned other = schedule.generator.below(index), value = values[index - 1];
        values[index - 1] = values[other];
        values[other] = value;
    }
}

static void begin_phase() {
    ++schedule.phase;
    schedule.next_in_phase = 0;
    schedule.woken_begin = schedule.woken_end = 0;
    schedule.at_barrier = 0;
    schedule.barriers_differ = false;
    schedule.vote_count = 0, schedule.vote_and = 1, schedule.vote_or = 0;
    if (schedule.shuffled) shuffle(phase_order, schedule.thread_count);
}

static unsigned in_order(unsigned position) {
    if (schedule.shuffled) return phase_order[position];
    return schedule.reversed ? schedule.thread_count - 1 - position : position;
}

// The next thread that can run. Each thread is handed out once by a phase's order, and then again whenever an
// operation of its warp that it waited in is done.
static unsigned next_thread() {
    if (schedule.woken_begin != schedule.woken_end) return woken[schedule.woken_begin++ % MAXIMUM_THREADS];
    if (schedule.next_in_phase < schedule.thread_count) return in_order(schedule.next_in_phase++);
    return NONE;
}

// Appends "0-31, 40" for the threads that ``selects`` picks; returns how many.
template <class Selects> static unsigned list_threads(char *text, size_t size, Selects selects) {
    unsigned total = 0;
    size_t used = strlen(text);
    for (unsigned first = 0; first < schedule.thread_count; ++first) {
        if (!selects(first)) continue;
        unsigned last = first;
        while (last + 1 < schedule.thread_count && selects(last + 1)) ++last;
        if (used + 40 < size) {
            used += size_t(snprintf(text + used, size - used, total ? ", %u" : "%u", first));
            if (last > first) used += size_t(snprintf(text + used, size - used, "-%u", last));
        } else if (used + 6 < size && text[used - 1] != '.') {
            used += size_t(snprintf(text + used, size - used, ", ..."));
        }
        total += last - first + 1;
        first = last;
    }
    return total;
}

// Nothing can run and nothing will: says who waits where, by place, and who has ended.
[[noreturn]] static void report_standstill() {
    static char text[2048];
    snprintf(text, sizeof text, "the block stands still:");
    int line = 0;
    bool listed[MAXIMUM_THREADS] = {};
    for (unsigned thread = 0; thread < schedule.thread_count; ++thread) {
        if (listed[thread] || states[thread] == EXITED) continue;
        const Thread &waiting = threads[thread];
        const State state = states[thread];
        const auto same = [&](unsigned other) {
            const bool together = states[other] == state && threads[other].line == waiting.line &&
                strcmp(threads[other].operation, waiting.operation) == 0 &&
                (state == AT_BARRIER || threads[other].mask == waiting.mask);
            return together;
        };
        size_t used = strlen(text);
        if (used + 200 > sizeof text) break;
        snprintf(text + used, sizeof text - used, "%s threads ", line ? ";" : "");
        list_threads(text, sizeof text, same);
        used = strlen(text);
        if (state == AT_BARRIER) {
            snprintf(text + used, sizeof text - used, " wait in %s at line %d", waiting.operation, waiting.line);
        } else {
            snprintf(
                text + used, sizeof text - used, " wait in %s at line %d for all lanes of the mask 0x%08x",
                waiting.operation, waiting.line, waiting.mask
            );
        }
        for (unsigned other = thread; other < schedule.thread_count; ++other) listed[other] |= same(other);
        if (!line) line = waiting.line;
    }
    if (schedule.exited) {
        const size_t used = strlen(text);
        snprintf(text + used, sizeof text - used, "; threads ");
        list_threads(text, sizeof text, [](unsigned thread) { return states[thread] == EXITED; });
        strncat(text, " have ended", sizeof text - strlen(text) - 1);
    }
    for (unsigned thread = 0; thread < schedule.thread_count; ++thread) {
        if (states[thread] != EXITED) {
            indices.thread = threads[thread].index;
            break;
        }
    }
    fault(line, "%s", text);
}

// Called when no thread can run: the first thread of the next phase or of the next block. Ends the launch where
// there is none.
static unsigned next_after_all(Fiber *free_fiber) {
    if (schedule.exited == schedule.thread_count) {
        if (schedule.block_number == schedule.block_count) {
            schedule.running = false;
            pool.give_back(free_fiber);
            switch_context(free_fiber->context, schedule.main);
            return NONE;  // another launch has taken this fiber and given it a thread
        }
        begin_block();
        return next_thread();
    }
    if (schedule.at_barrier < schedule.thread_count || schedule.barriers_differ) report_standstill();
    schedule.vote_result[BARRIER_COUNT] = schedule.vote_count;
    schedule.vote_result[BARRIER_AND] = schedule.vote_and;
    schedule.vote_result[BARRIER_OR] = schedule.vote_or;
    begin_phase();
    memset(states, READY, schedule.thread_count);
    return next_thread();
}

// Hands the processor on. Returns when the thread of the calling fiber runs again, or, where that one has ended
// (``ended``), when the fiber has another thread to begin, which is then the current one.
static void run_next(Fiber *self, bool ended) {
    unsigned thread = next_thread();
    if (thread == NONE) thread = next_after_all(self);
    if (thread == NONE) return;
    schedule.current = thread;
    indices.thread = threads[thread].index;
    if (states[thread] == NOT_BEGUN) {
        states[thread] = RUNNING;
        if (ended) {
            threads[thread].fiber = self;
            return;
        }
        Fiber *fiber = pool.take(fiber_main);
        if (!fiber) fault(0, "no memory for the stacks of %u waiting threads", thread);
        threads[thread].fiber = fiber;
        switch_context(self->context, fiber->context);
        return;
    }
    states[thread] = RUNNING;
    if (threads[thread].fiber == self) return;
    if (ended) pool.give_back(self);
    switch_context(self->context, threads[thread].fiber->context);
}

static void fiber_main() {
    for (;;) {
        const unsigned thread = schedule.current;
        schedule.launch->kernel->call(schedule.launch->arguments);
        states[thread] = EXITED;
        threads[thread].copy_count = threads[thread].copy_group = 0;
        warp_exited[thread / WARP_LANES] |= 1u << (thread % WARP_LANES);
        ++schedule.exited;
        run_next(threads[thread].fiber, true);
    }
}

int block_barrier(int line, BarrierKind kind, int predicate) {
    Thread &thread = threads[schedule.current];
    thread.line = line;
    thread.operation = BARRIER_NAMES[kind];
    states[schedule.current] = AT_BARRIER;
    if (schedule.at_barrier++ == 0) {
        schedule.barrier_line = line;
        schedule.barrier_kind = kind;
    } else if (schedule.barrier_line != line || schedule.barrier_kind != kind) {
        schedule.barriers_differ = true;
    }
    schedule.vote_count += predicate != 0;
    schedule.vote_and &= predicate != 0;
    schedule.vote_or |= predicate != 0;
    run_next(thread.fiber, false);
    return schedule.vote_result[kind];
}

static void check_mask(const char *name, unsigned mask, int line) {
    const unsigned warp = schedule.current / WARP_LANES, self = lane();
    const unsigned present = schedule.thread_count - warp * WARP_LANES;
    const unsigned present_mask = present >= WARP_LANES ? ALL_LANES : (1u << present) - 1;
    if (!(mask >> self & 1)) {
        fault(line, "%s: the mask 0x%08x leaves out lane %u, which calls it", name, mask, self);
    }
    if (mask & ~present_mask) {
        fault(
            line, "%s: the mask 0x%08x names lanes 0x%08x, but the block ends at lane %u of this warp", name, mask,
            mask & ~present_mask, present - 1
        );
    }
    if (mask & warp_exited[warp]) {
        fault(
            line, "%s: the mask 0x%08x names lanes 0x%08x, whose threads have ended", name, mask,
            mask & warp_exited[warp]
        );
    }
}

void warp_operation(const char *name, unsigned mask, int line, void *data, Resolve resolve) {
    check_mask(name, mask, line);
    const unsigned self = schedule.current, warp = self / WARP_LANES, first = warp * WARP_LANES;
    Thread &thread = threads[self];
    thread.line = line;
    thread.operation = name;
    thread.mask = mask;
    thread.data = data;
    thread.resolve = resolve;
    states[self] = IN_WARP_OPERATION;
    warp_waiting[warp] |= 1u << (self - first);
    if ((warp_waiting[warp] & mask) == mask) {
        void *all_data[WARP_LANES] = {};
        unsigned waking[WARP_LANES], count = 0;
        bool together = true;
        for (unsigned lane = 0; lane < WARP_LANES; ++lane) {
            if (!(mask >> lane & 1)) continue;
            const Thread &other = threads[first + lane];
            if (other.line != line || other.mask != mask || strcmp(other.operation, name) != 0) {
                together = false;
                if (other.mask >> (self - first) & 1) {
                    fault(
                        line, "lane %u waits in %s (mask 0x%08x), but lane %u of the same warp waits in %s (mask "
                        "0x%08x) at line %d: neither can go on", self - first, name, mask, lane, other.operation,
                        other.mask, other.line
                    );
                }
                continue;
            }
            all_data[lane] = other.data;
            waking[count++] = first + lane;
        }
        if (together) {
            resolve(all_data, mask);
            if (schedule.shuffled) shuffle(waking, count);
            for (unsigned index = 0; index < count; ++index) {
                const unsigned wakes = waking[schedule.reversed ? count - 1 - index : index];
                states[wakes] = READY;
                woken[schedule.woken_end++ % MAXIMUM_THREADS] = wakes;
            }
            warp_waiting[warp] &= ~mask;
            ++warp_phase[warp];
        }
    }
    run_next(thread.fiber, false);
}

static void begin_block() {
    const uint64_t number = schedule.block_number++;
    const uint64_t block = uint64_t(
        ((unsigned __int128)number * schedule.block_multiplier + schedule.block_start) % schedule.block_count
    );
    const dim3 grid = indices.grid_size;
    indices.block.x = unsigned(block % grid.x);
    indices.block.y = unsigned(block / grid.x % grid.y);
    indices.block.z = unsigned(block / grid.x / grid.y);
    ++block_serial;
    if (schedule.launch->shared_bytes) memset(dynamic_shared_memory, 0xff, schedule.launch->shared_bytes);
    fill_permanent_shared();
    memset(states, NOT_BEGUN, schedule.thread_count);
    memset(warp_waiting, 0, sizeof warp_waiting);
    memset(warp_exited, 0, sizeof warp_exited);
    schedule.exited = 0;
    begin_phase();
    schedule.first_phase = schedule.phase;
}

}  // namespace gpucnn_host
