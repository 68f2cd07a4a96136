// What a kernel may touch. Shared memory begins as 0xFF in every block. In a sanitized launch every argument is
// copied to a place of its own with nothing around it, and the compiler's address instrumentation
// (-fsanitize=kernel-address) asks here before every access: so this is the whole address sanitizer, inside the
// module, and what it finds ends the launch and not the process.
#pragma once

#include "runtime_schedule.h"

extern "C" {
// The linker's: where this shared library begins and ends in memory.
extern GPUCNN_HOST_HIDDEN char __ehdr_start[];
extern GPUCNN_HOST_HIDDEN char _end[];
}

namespace gpucnn_host {

Indices indices;
unsigned long long block_serial = 0;
bool in_atomic_operation = false;
constexpr size_t DYNAMIC_ARENA_BYTES = 256 << 10;
alignas(1024) unsigned char dynamic_shared_memory[DYNAMIC_ARENA_BYTES];

// ---- shared memory ----

struct SharedVariable {
    unsigned char *address;
    size_t size;
};
constexpr unsigned MAXIMUM_VARIABLES = 128;
constexpr size_t MAXIMUM_STATIC_BYTES = 48 << 10;
static SharedVariable permanent_variables[MAXIMUM_VARIABLES];  // declared outside of any function
static SharedVariable block_variables[MAXIMUM_VARIABLES];      // that this block has come upon
static unsigned permanent_count, block_variable_count;
static size_t block_static_bytes;

static void enter_variable(unsigned char *address, size_t size) {
    memset(address, 0xff, size);
    if (block_variable_count == MAXIMUM_VARIABLES) {
        fault(0, "a block comes upon more than %u __shared__ variables", MAXIMUM_VARIABLES);
    }
    block_variables[block_variable_count++] = {address, size};
    block_static_bytes += size;
}

static void fill_permanent_shared() {
    block_variable_count = 0;
    block_static_bytes = 0;
    for (unsigned index = 0; index < permanent_count; ++index) {
        enter_variable(permanent_variables[index].address, permanent_variables[index].size);
    }
}

void first_use_of_shared(SharedSlot &slot, void *address, unsigned long size) {
    unsigned char *bytes = static_cast<unsigned char *>(address);
    slot.block_serial = block_serial;
    if (block_serial == 0) {  // the library is being loaded
        if (permanent_count < MAXIMUM_VARIABLES) permanent_variables[permanent_count++] = {bytes, size};
        return;
    }
    enter_variable(bytes, size);
    if (block_static_bytes > MAXIMUM_STATIC_BYTES) {
        fault(
            0, "the __shared__ variables take %zu bytes; static ones can have %zu, more must be dynamic (extern "
            "__shared__)", block_static_bytes, MAXIMUM_STATIC_BYTES
        );
    }
    if (block_static_bytes + schedule.launch->shared_bytes > MAXIMUM_SHARED_BYTES) {
        fault(
            0, "the __shared__ variables take %zu bytes beside %lu dynamic ones; a block can have %lu",
            block_static_bytes, schedule.launch->shared_bytes, MAXIMUM_SHARED_BYTES
        );
    }
}

static bool in_shared_memory(const void *address, size_t size) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    const uintptr_t dynamic = reinterpret_cast<uintptr_t>(dynamic_shared_memory);
    if (begin >= dynamic && begin + size <= dynamic + schedule.launch->shared_bytes) return true;
    static unsigned found;  // most often it is the one of the time before
    for (unsigned tried = 0; tried < block_variable_count; ++tried, ++found) {
        if (found >= block_variable_count) found = 0;
        const uintptr_t variable = reinterpret_cast<uintptr_t>(block_variables[found].address);
        if (begin >= variable && begin + size <= variable + block_variables[found].size) return true;
    }
    return false;
}

// ---- what may be touched, in a sanitized launch ----

// As the compiler describes a global variable.
struct CompilerGlobal {
    uintptr_t begin, size, size_with_red_zone;
    const char *name;
    const char *module_name;
    uintptr_t has_dynamic_initialization;
    const void *location;
    uintptr_t indicator;
};

struct Array {  // an argument's own memory
    uintptr_t begin;  // in the arena
    Memory original;
};

constexpr unsigned GRANULE = 8;
enum ArenaCode : unsigned char { UNTOUCHABLE, WRITABLE, READ_ONLY, MIXED };

static unsigned char *image_shadow;  // a byte a granule: 1 where a part of the granule lies in a red zone
static CompilerGlobal *globals;
static size_t global_count;
static unsigned char *arena, *arena_shadow;
static size_t arena_bytes;
static Array *arrays;
static size_t array_count;

static uintptr_t image_begin() { return reinterpret_cast<uintptr_t>(__ehdr_start); }
static size_t image_bytes() { return size_t(_end - __ehdr_start); }

static void mark_image(uintptr_t begin, uintptr_t end, unsigned char code) {
    if (!image_shadow) image_shadow = static_cast<unsigned char *>(reserve(image_bytes() / GRANULE + 2));
    if (!image_shadow || begin >= end) return;
    const size_t first = (begin - image_begin()) / GRANULE, last = (end - 1 - image_begin()) / GRANULE;
    memset(image_shadow + first, code, last - first + 1);
}

static void register_globals(const CompilerGlobal *registered, size_t count) {
    globals = static_cast<CompilerGlobal *>(realloc(globals, (global_count + count) * sizeof *globals));
    for (size_t index = 0; index < count; ++index) {
        const CompilerGlobal &global = registered[index];
        globals[global_count++] = global;
        mark_image(global.begin + global.size, global.begin + global.size_with_red_zone, 1);
    }
}

static bool intersects(uintptr_t begin, uintptr_t size, uintptr_t other_begin, uintptr_t other_end) {
    return begin < other_end && begin + size > other_begin;
}

static bool image_allows(uintptr_t address, size_t size) {
    if (image_shadow) {
        const uintptr_t offset = address - image_begin();
        const size_t first = offset / GRANULE, last = (offset + size - 1) / GRANULE;
        bool marked = false;
        for (size_t granule = first; granule <= last; ++granule) marked |= image_shadow[granule] != 0;
        if (!marked) return true;
    }
    for (size_t index = 0; index < global_count; ++index) {
        const CompilerGlobal &global = globals[index];
        const uintptr_t end = global.begin + global.size;
        if (intersects(address, size, end, global.begin + global.size_with_red_zone)) return false;
    }
    const uintptr_t dynamic = reinterpret_cast<uintptr_t>(dynamic_shared_memory);
    return !intersects(address, size, dynamic + schedule.launch->shared_bytes, dynamic + DYNAMIC_ARENA_BYTES);
}

static bool arena_allows(uintptr_t address, size_t size, bool write) {
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(arena);
    if (offset + size > arena_bytes) return false;
    for (size_t granule = offset / GRANULE; granule <= (offset + size - 1) / GRANULE; ++granule) {
        switch (arena_shadow[granule]) {
            case WRITABLE: continue;
            case READ_ONLY:
                if (write) return false;
                continue;
            case MIXED: break;
            default: return false;
        }
        // Byte by byte, since here an array begins or ends or changes from read-only to writable.
        for (uintptr_t byte = address; byte < address + size; ++byte) {
            bool allowed = false;
            for (size_t index = 0; index < array_count && !allowed; ++index) {
                const Array &array = arrays[index];
                allowed = byte - array.begin < array.original.size && (array.original.writable || !write);
            }
            if (!allowed) return false;
        }
        return true;
    }
    return true;
}

static bool allows(uintptr_t address, size_t size, bool write) {
    if (address - reinterpret_cast<uintptr_t>(arena) < arena_bytes) return arena_allows(address, size, write);
    if (address - image_begin() < image_bytes()) return image_allows(address, size);
    const uintptr_t stack = reinterpret_cast<uintptr_t>(threads[schedule.current].fiber->stack);
    return address >= stack && address + size <= stack + STACK_BYTES;
}

// Where an address lies; one that may not be touched: by the nearest thing that it may have been meant for.
static void describe_address(char *text, size_t size, uintptr_t address, size_t bytes, bool write) {
    const uintptr_t dynamic = reinterpret_cast<uintptr_t>(dynamic_shared_memory);
    if (address < 4096) {
        snprintf(text, size, "the null pointer%s", address ? " (and a small offset)" : "");
        return;
    }
    if (address - reinterpret_cast<uintptr_t>(arena) < arena_bytes) {
        const Array *nearest = nullptr;
        uintptr_t distance = ~uintptr_t(0);
        for (size_t index = 0; index < array_count; ++index) {
            const Array &array = arrays[index];
            const uintptr_t end = array.begin + array.original.size;
            const bool inside = address >= array.begin && address + bytes <= end;
            if (inside && !array.original.writable && write) {
                snprintf(
                    text, size, "byte %zu of argument %d, which is read-only", size_t(address - array.begin),
                    array.original.argument
                );
                return;
            }
            const uintptr_t away = inside ? 0 : address < array.begin ? array.begin - address : address + bytes - end;
            if (away < distance) distance = away, nearest = &array;
        }
        if (nearest && address < nearest->begin) {
            snprintf(
                text, size, "%zu bytes before argument %d (of %llu bytes)", size_t(nearest->begin - address),
                nearest->original.argument, nearest->original.size
            );
        } else if (nearest) {
            const int shown = snprintf(
                text, size, "byte %zu of argument %d", size_t(address - nearest->begin), nearest->original.argument
            );
            if (distance) snprintf(text + shown, size - size_t(shown), ", which has %llu bytes", nearest->original.size);
        }
        return;
    }
    if (address >= dynamic && address + bytes <= dynamic + schedule.launch->shared_bytes) {
        snprintf(text, size, "byte %zu of the dynamic shared memory", size_t(address - dynamic));
        return;
    }
    if (address >= dynamic && address < dynamic + DYNAMIC_ARENA_BYTES) {
        snprintf(
            text, size, "byte %zu of the dynamic shared memory, which has %lu bytes", size_t(address - dynamic),
            schedule.launch->shared_bytes
        );
        return;
    }
    for (size_t index = 0; index < global_count; ++index) {
        const CompilerGlobal &global = globals[index];
        if (address + bytes > global.begin && address < global.begin + global.size_with_red_zone) {
            const size_t offset = address - global.begin;
            const int shown = snprintf(text, size, "byte %zu of the variable '%s'", offset, global.name);
            if (offset + bytes > global.size && shown > 0 && size_t(shown) < size) {
                snprintf(text + shown, size - size_t(shown), ", which has %zu bytes", size_t(global.size));
            }
            return;
        }
    }
    snprintf(
        text, size, "the address 0x%llx, which is no argument's, no shared memory and no variable of this thread",
        (unsigned long long)address
    );
}

[[noreturn]] static void report_access(uintptr_t address, size_t size, bool write, int line, const void *code) {
    char where[300];
    describe_address(where, sizeof where, address, size, write);
    schedule.launch->code_offset = code ? reinterpret_cast<uintptr_t>(code) - 1 - image_begin() : 0;
    fault(line, "%s of %zu byte%s at %s", write ? "write" : "read", size, size == 1 ? "" : "s", where);
}

// ---- a sanitized launch's copies of its arguments ----

static int by_address(const void *left, const void *right) {
    const auto &x = static_cast<const Array *>(left)->original, &y = static_cast<const Array *>(right)->original;
    return x.address < y.address ? -1 : x.address > y.address;
}

static size_t red_zone(size_t size) { return (64 << 10) + size / 4096 * 4096; }

static void mark_arena(uintptr_t begin, uintptr_t end, bool writable) {
    const unsigned char code = writable ? WRITABLE : READ_ONLY;
    for (uintptr_t granule = begin / GRANULE; granule <= (end - 1) / GRANULE; ++granule) {
        const bool whole = granule * GRANULE >= begin && (granule + 1) * GRANULE <= end;
        unsigned char &mark = arena_shadow[granule - reinterpret_cast<uintptr_t>(arena) / GRANULE];
        mark = whole && (mark == UNTOUCHABLE || mark == code) ? code : (unsigned char)MIXED;
    }
}

void check_unwritten(const void *address, unsigned long size, int line) {
    const Launch *launch = schedule.launch;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    for (size_t index = 0; index < launch->memory_count; ++index) {
        const Memory &memory = launch->memory[index];
        if (!memory.writable) continue;
        const uintptr_t there = *static_cast<const uintptr_t *>(launch->arguments[memory.argument]);
        if (begin < there + memory.size && there < begin + size) {
            fault(
                line, "a load by the way of constants (ld.global.nc) from argument %d, which the kernel may write to",
                memory.argument
            );
        }
    }
}

// Copies what the pointer arguments point to into the arena, each array (with those that overlap it) alone between
// red zones at least as long as itself, at the same offset from a 256-byte boundary. False: out of memory.
static bool copy_in(Launch *launch) {
    array_count = launch->memory_count;
    arrays = static_cast<Array *>(calloc(array_count + 1, sizeof *arrays));
    size_t total = 64 << 10;
    for (size_t index = 0; index < array_count; ++index) {
        arrays[index].original = launch->memory[index];
        total += 2 * red_zone(arrays[index].original.size) + arrays[index].original.size + 512;
    }
    qsort(arrays, array_count, sizeof *arrays, by_address);
    arena_bytes = total;
    arena = static_cast<unsigned char *>(reserve(total));
    arena_shadow = static_cast<unsigned char *>(reserve(total / GRANULE + 2));
    if (!arena || !arena_shadow) return false;
    uintptr_t place = reinterpret_cast<uintptr_t>(arena);
    for (size_t first = 0; first < array_count;) {
        const unsigned long long begin = arrays[first].original.address;
        unsigned long long end = begin + arrays[first].original.size;
        size_t last = first + 1;
        for (; last < array_count && arrays[last].original.address < end; ++last) {
            const unsigned long long other_end = arrays[last].original.address + arrays[last].original.size;
            if (other_end > end) end = other_end;
        }
        place += red_zone(end - begin);
        place = (place + 255) / 256 * 256 + begin % 256;
        for (size_t index = first; index < last; ++index) {
            Array &array = arrays[index];
            array.begin = place + (array.original.address - begin);
            const uintptr_t array_end = array.begin + array.original.size;
            if (array.original.size) mark_arena(array.begin, array_end, array.original.writable);
        }
        memcpy(reinterpret_cast<void *>(place), reinterpret_cast<const void *>(begin), end - begin);
        place += end - begin + red_zone(end - begin);
        first = last;
    }
    for (size_t index = 0; index < array_count; ++index) {
        *static_cast<uintptr_t *>(launch->arguments[arrays[index].original.argument]) = arrays[index].begin;
    }
    return true;
}

static void copy_out(bool results) {
    for (size_t index = 0; results && index < array_count; ++index) {
        const Memory &original = arrays[index].original;
        if (!original.writable || !original.size) continue;
        const void *result = reinterpret_cast<const void *>(arrays[index].begin);
        memcpy(reinterpret_cast<void *>(original.address), result, original.size);
    }
    if (arena) munmap(arena, arena_bytes);
    if (arena_shadow) munmap(arena_shadow, arena_bytes / GRANULE + 2);
    free(arrays);
    arena = arena_shadow = nullptr;
    arrays = nullptr;
    arena_bytes = array_count = 0;
}

}  // namespace gpucnn_host
