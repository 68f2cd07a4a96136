// Races in shared memory, in a sanitized launch: two threads touch the same byte between two barriers, one of them
// writes, and nothing orders them. Every access is noted, so a race is found whatever order the threads run in.
//
// Lanes of one warp are also ordered by any operation that the warp does together in between. Two writes are not
// reported: threads that set a flag to the same value are right, and others show when the order is shuffled.
// Atomic operations are held against plain accesses before them, and not against each other.
#pragma once

#include "runtime_memory.h"

namespace gpucnn_host {

constexpr unsigned short SEVERAL = 0xffff;

struct Access {
    unsigned phase, warp_phase;
    unsigned short thread, warp;
};

struct Cell {
    Access read, written;
};

// Of four bytes. Accesses to all of them are noted in ``whole``, accesses to fewer in the cell of each byte.
struct Word {
    Cell whole;
    unsigned bytes_phase;  // when bytes were last accessed
};

static Word *words;   // of this library's whole image; made real by the first access
static Cell *byte_cells;  // likewise

static bool unordered(const Access &before, unsigned thread, unsigned warp) {
    if (before.phase != schedule.phase || before.thread == thread) return false;
    return before.warp != warp || before.warp_phase == warp_phase[warp];
}

static void note(Access &access, unsigned thread, unsigned warp) {
    const bool together = unordered(access, thread, warp);
    access.thread = together ? SEVERAL : (unsigned short)thread;
    access.warp = together && access.warp != warp ? SEVERAL : (unsigned short)warp;
    access.phase = schedule.phase;
    access.warp_phase = warp_phase[warp];
}

[[noreturn]] static void report_race(
    uintptr_t address, bool write, bool written_before, unsigned other, int line, const void *code
) {
    char where[300], who[60];
    describe_address(where, sizeof where, address, 1, write);
    if (other == SEVERAL) {
        snprintf(who, sizeof who, "other threads have");
    } else {
        const uint3 index = threads[other].index;
        snprintf(who, sizeof who, "thread (%u, %u, %u) has", index.x, index.y, index.z);
    }
    schedule.launch->code_offset = code ? reinterpret_cast<uintptr_t>(code) - 1 - image_begin() : 0;
    fault(
        line, "race in shared memory: the thread %s %s, which %s %s, with no barrier in between",
        write ? "writes" : "reads", where, who, written_before ? "written" : "read"
    );
}

struct Accessing {
    unsigned thread, warp;
    bool write;
    int line;
    const void *code;

    void check(const Cell &cell, uintptr_t address) const {
        if (!write && unordered(cell.written, thread, warp)) {
            report_race(address, write, true, cell.written.thread, line, code);
        }
        if (write && unordered(cell.read, thread, warp)) {
            report_race(address, write, false, cell.read.thread, line, code);
        }
    }
    void enter(Cell &cell) const {
        if (!in_atomic_operation) note(write ? cell.written : cell.read, thread, warp);
    }
};

// To be called before an allowed access.
static void note_access(uintptr_t address, size_t size, bool write, int line, const void *code) {
    if (address - image_begin() >= image_bytes()) return;
    if (!in_shared_memory(reinterpret_cast<const void *>(address), size)) return;
    if (!words) {
        words = static_cast<Word *>(reserve((image_bytes() / 4 + 8) * sizeof *words));
        byte_cells = static_cast<Cell *>(reserve((image_bytes() + 32) * sizeof *byte_cells));
    }
    if (!words || !byte_cells) return;
    const Accessing accessing = {schedule.current, schedule.current / WARP_LANES, write, line, code};
    const uintptr_t begin = address - image_begin(), end = begin + size;
    for (uintptr_t place = begin; place < end;) {
        Word &word = words[place / 4];
        accessing.check(word.whole, image_begin() + place);
        if (place % 4 == 0 && place + 4 <= end) {
            for (unsigned byte = 0; word.bytes_phase == schedule.phase && byte < 4; ++byte) {
                accessing.check(byte_cells[place + byte], image_begin() + place + byte);
            }
            accessing.enter(word.whole);
            place += 4;
        } else {
            accessing.check(byte_cells[place], image_begin() + place);
            accessing.enter(byte_cells[place]);
            word.bytes_phase = schedule.phase;
            ++place;
        }
    }
}

}  // namespace gpucnn_host
