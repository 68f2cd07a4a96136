// Races in global memory, in a sanitized launch: a thread reads what another one has written, or writes what another
// one has read, and nothing orders the two. Within a block that is a barrier, or within a warp any operation that it
// does together, as in runtime_races.h. Between blocks it is what CUDA's memory model asks for: the one that wrote
// made a __threadfence and then an atomic operation, the one that reads an atomic operation and then a
// __threadfence, each by the thread itself or before a barrier (cuda/last_block.cuh is such a pair).
//
// Blocks run one after another here, so without this a kernel that forgets a fence, or takes for granted that
// another block has ended, gives the right numbers. Two writes are not reported, as in shared memory, and accesses
// to single bytes are not looked at: there is a cell for two bytes.
#pragma once

#include "runtime_races.h"

namespace gpucnn_host {

constexpr size_t CELL_BYTES = 2;
constexpr unsigned short ANYBODY = 0xffff, ANY_OF_WARP = 0x8000;  // the latter with the warp's number

struct GlobalAccess {
    unsigned phase;  // phases count through blocks, so it says which block's it is; 0: never
    unsigned short who, warp_phase;
};

struct GlobalCell {
    GlobalAccess read, written;
};

// What a block did to be seen by others: all of before ``fence``, and of that phase what ``thread`` did.
struct Release {
    unsigned first_phase, fence, thread;
};

static GlobalCell *global_cells;  // of the arena
static size_t global_cell_bytes;
static Release *releases;
static size_t release_count, release_capacity;
// By the number of a phase, so that what was in an earlier block is known as such.
static unsigned fenced[MAXIMUM_THREADS];    // a thread's latest __threadfence
static unsigned acquired[MAXIMUM_THREADS];  // a thread's latest one behind an atomic operation of its block
static unsigned block_acquired;             // the first of these
static unsigned atomic_phase, atomic_thread;  // the block's first atomic operation in global memory

static bool of_this_block(unsigned phase) { return phase >= schedule.first_phase; }

static void begin_global_races() {
    global_cell_bytes = (arena_bytes / CELL_BYTES + 1) * sizeof *global_cells;
    global_cells = static_cast<GlobalCell *>(reserve(global_cell_bytes));  // none: no check
    release_count = 0;
    block_acquired = atomic_phase = 0;
}

static void end_global_races() {
    if (global_cells) munmap(global_cells, global_cell_bytes);
    global_cells = nullptr;
}

void thread_fence() {
    const unsigned thread = schedule.current, phase = schedule.phase;
    fenced[thread] = phase;
    if (!of_this_block(atomic_phase) || (atomic_phase == phase && atomic_thread != thread)) return;
    acquired[thread] = phase;
    if (!of_this_block(block_acquired)) block_acquired = phase;
}

static void note_global_atomic() {
    const unsigned thread = schedule.current;
    if (!of_this_block(atomic_phase)) atomic_phase = schedule.phase, atomic_thread = thread;
    if (!of_this_block(fenced[thread])) return;
    if (!release_count || releases[release_count - 1].first_phase != schedule.first_phase) {
        if (release_count == release_capacity) {
            release_capacity = release_capacity ? 2 * release_capacity : 64;
            void *larger = realloc(releases, release_capacity * sizeof *releases);
            if (!larger) fault(0, "no memory for what %zu blocks have released", release_capacity);
            releases = static_cast<Release *>(larger);
        }
        ++release_count;
    }
    releases[release_count - 1] = {schedule.first_phase, fenced[thread], thread};
}

static bool released(const GlobalAccess &access) {
    size_t first = 0, end = release_count;  // the last one that does not begin behind the access
    while (first < end) {
        const size_t middle = (first + end) / 2;
        if (releases[middle].first_phase <= access.phase) first = middle + 1; else end = middle;
    }
    if (!first) return false;
    const Release &release = releases[first - 1];
    return access.phase < release.fence || (access.phase == release.fence && access.who == release.thread);
}

static bool in_disorder(const GlobalAccess &before) {
    if (!before.phase) return false;
    const unsigned thread = schedule.current, warp = thread / WARP_LANES;
    if (of_this_block(before.phase)) {
        if (before.phase != schedule.phase || before.who == thread) return false;
        const bool same_warp = before.who < MAXIMUM_THREADS ? before.who / WARP_LANES == warp
                                                            : before.who == (ANY_OF_WARP | warp);
        return !same_warp || before.warp_phase == (unsigned short)warp_phase[warp];
    }
    const bool own_fence = of_this_block(acquired[thread]);
    const bool fence_of_block = of_this_block(block_acquired) && block_acquired < schedule.phase;
    return !(own_fence || fence_of_block) || !released(before);
}

static void note_global(GlobalAccess &access) {
    const unsigned thread = schedule.current, warp = thread / WARP_LANES;
    unsigned short who = (unsigned short)thread;
    if (access.phase == schedule.phase && access.who != thread) {
        const bool same_warp = access.who < MAXIMUM_THREADS ? access.who / WARP_LANES == warp
                                                            : access.who == (ANY_OF_WARP | warp);
        const bool together = !same_warp || access.warp_phase == (unsigned short)warp_phase[warp];
        if (together) who = same_warp ? (unsigned short)(ANY_OF_WARP | warp) : ANYBODY;
    }
    access = {schedule.phase, who, (unsigned short)warp_phase[warp]};
}

[[noreturn]] static void report_global_race(
    uintptr_t address, bool write, const GlobalAccess &before, bool written, int line, const void *code
) {
    char where[300], who[80];
    describe_address(where, sizeof where, address, 1, write);
    const char *did = written ? "written" : "read";
    if (!of_this_block(before.phase)) {
        snprintf(who, sizeof who, "another block has %s it", did);
    } else if (before.who < MAXIMUM_THREADS) {
        const uint3 index = threads[before.who].index;
        snprintf(who, sizeof who, "thread (%u, %u, %u) has %s it", index.x, index.y, index.z, did);
    } else {
        snprintf(who, sizeof who, "other threads have %s it", did);
    }
    schedule.launch->code_offset = code ? reinterpret_cast<uintptr_t>(code) - 1 - image_begin() : 0;
    fault(
        line, "race in global memory: the thread %s %s; %s, and no %s the two", write ? "writes" : "reads",
        where, who, of_this_block(before.phase) ? "barrier orders" : "fences and atomic operations order"
    );
}

// To be called before an allowed access.
static void note_global_access(uintptr_t address, size_t size, bool write, int line, const void *code) {
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(arena);
    if (offset >= arena_bytes || !global_cells) return;
    if (in_atomic_operation) note_global_atomic();
    if (size < CELL_BYTES || arena_shadow[offset / GRANULE] == READ_ONLY) return;
    for (uintptr_t place = offset / CELL_BYTES; place <= (offset + size - 1) / CELL_BYTES; ++place) {
        GlobalCell &cell = global_cells[place];
        const uintptr_t byte = reinterpret_cast<uintptr_t>(arena) + place * CELL_BYTES;
        if (!write && in_disorder(cell.written)) report_global_race(byte, write, cell.written, true, line, code);
        if (write && in_disorder(cell.read)) report_global_race(byte, write, cell.read, false, line, code);
        if (!in_atomic_operation) note_global(write ? cell.written : cell.read);
    }
}

// For the runtime's own accesses on behalf of a thread.
static void check_access(const void *address, size_t size, bool write, int line) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    if (!schedule.launch->sanitize) return;
    if (!allows(begin, size, write)) report_access(begin, size, write, line, nullptr);
    note_access(begin, size, write, line, nullptr);
    note_global_access(begin, size, write, line, nullptr);
}

}  // namespace gpucnn_host
