// The functions that instrumented code calls: before every access (-fsanitize=kernel-address), and where it meets
// undefined behaviour (-fsanitize=undefined). Their names and arguments are the compilers' convention.
#pragma once

#include "runtime_global_races.h"

namespace gpucnn_host {

struct SourceLocation {
    const char *file;
    unsigned line, column;
};

[[noreturn]] static void undefined(const void *data, const char *what) {
    // Every kind of report begins with the place.
    const SourceLocation *location = static_cast<const SourceLocation *>(data);
    fault(int(location->line), "undefined behaviour: %s", what);
}

static inline void instrumented_access(uintptr_t address, size_t size, bool write, const void *code) {
    if (!size || !schedule.running) return;  // while the library is loaded, variables are initialized
    if (address - reinterpret_cast<uintptr_t>(&indices) < sizeof indices && !write) return;  // threadIdx and the like
    if (!allows(address, size, write)) report_access(address, size, write, 0, code);
    note_access(address, size, write, 0, code);
    note_global_access(address, size, write, 0, code);
}

}  // namespace gpucnn_host

#define GPUCNN_HOST_HOOK extern "C" GPUCNN_HOST_HIDDEN
#define GPUCNN_HOST_ACCESS(SIZE) \
    GPUCNN_HOST_HOOK void __asan_load##SIZE##_noabort(uintptr_t address) { \
        gpucnn_host::instrumented_access(address, SIZE, false, __builtin_return_address(0)); \
    } \
    GPUCNN_HOST_HOOK void __asan_store##SIZE##_noabort(uintptr_t address) { \
        gpucnn_host::instrumented_access(address, SIZE, true, __builtin_return_address(0)); \
    }
GPUCNN_HOST_ACCESS(1)
GPUCNN_HOST_ACCESS(2)
GPUCNN_HOST_ACCESS(4)
GPUCNN_HOST_ACCESS(8)
GPUCNN_HOST_ACCESS(16)
GPUCNN_HOST_HOOK void __asan_loadN_noabort(uintptr_t address, size_t size) {
    gpucnn_host::instrumented_access(address, size, false, __builtin_return_address(0));
}
GPUCNN_HOST_HOOK void __asan_storeN_noabort(uintptr_t address, size_t size) {
    gpucnn_host::instrumented_access(address, size, true, __builtin_return_address(0));
}
GPUCNN_HOST_HOOK void __asan_register_globals(const gpucnn_host::CompilerGlobal *registered, size_t count) {
    gpucnn_host::register_globals(registered, count);
}
GPUCNN_HOST_HOOK void __asan_unregister_globals(const void *, size_t) {}
GPUCNN_HOST_HOOK void __asan_handle_no_return() {}
GPUCNN_HOST_HOOK void __asan_before_dynamic_init(const char *) {}
GPUCNN_HOST_HOOK void __asan_after_dynamic_init() {}

#define GPUCNN_HOST_UNDEFINED(NAME, WHAT) \
    GPUCNN_HOST_HOOK void __ubsan_handle_##NAME(const void *data) { gpucnn_host::undefined(data, WHAT); } \
    GPUCNN_HOST_HOOK void __ubsan_handle_##NAME##_abort(const void *data) { gpucnn_host::undefined(data, WHAT); }
GPUCNN_HOST_UNDEFINED(add_overflow, "an addition of signed integers overflows")
GPUCNN_HOST_UNDEFINED(sub_overflow, "a subtraction of signed integers overflows")
GPUCNN_HOST_UNDEFINED(mul_overflow, "a multiplication of signed integers overflows")
GPUCNN_HOST_UNDEFINED(negate_overflow, "the lowest integer is negated")
GPUCNN_HOST_UNDEFINED(divrem_overflow, "a division by zero, or of the lowest integer by -1")
GPUCNN_HOST_UNDEFINED(shift_out_of_bounds, "a shift by less than 0, by the width and more, or over the sign")
GPUCNN_HOST_UNDEFINED(out_of_bounds, "an index is outside of its array")
GPUCNN_HOST_UNDEFINED(builtin_unreachable, "an unreachable place is reached")
GPUCNN_HOST_UNDEFINED(missing_return, "a function ends without returning its value")
GPUCNN_HOST_UNDEFINED(vla_bound_not_positive, "an array's length is not positive")
GPUCNN_HOST_UNDEFINED(load_invalid_value, "a bool or an enumeration holds a value that it cannot have")
GPUCNN_HOST_UNDEFINED(float_cast_overflow, "a floating-point number does not fit into the integer type")
GPUCNN_HOST_UNDEFINED(nonnull_arg, "a null pointer where none is allowed")
GPUCNN_HOST_UNDEFINED(nonnull_return_v1, "a null pointer is returned where none is allowed")
GPUCNN_HOST_UNDEFINED(pointer_overflow, "pointer arithmetic leaves the address space")
GPUCNN_HOST_UNDEFINED(invalid_builtin, "a bit is searched in zero")
GPUCNN_HOST_UNDEFINED(alignment_assumption, "a pointer is not aligned as was promised")
GPUCNN_HOST_UNDEFINED(implicit_conversion, "an implicit conversion changes the value")
GPUCNN_HOST_UNDEFINED(function_type_mismatch, "a function is called through a pointer of another type")

namespace gpucnn_host {

struct TypeMismatch {
    SourceLocation location;
    const void *type;
    unsigned char alignment_logarithm;
    unsigned char kind;
};

static void mismatch(const void *data, uintptr_t pointer) {
    const TypeMismatch *what = static_cast<const TypeMismatch *>(data);
    const uintptr_t alignment = uintptr_t(1) << what->alignment_logarithm;
    if (pointer == 0) fault(int(what->location.line), "a null pointer is used");
    if (pointer & (alignment - 1)) {
        fault(
            int(what->location.line),
            "misaligned access: the address ends in 0x%02x, its type needs a multiple of %u",
            unsigned(pointer & 0xff), unsigned(alignment)
        );
    }
    // The access that follows is checked too, and what is said then tells more.
    if (!allows(pointer, 1, false)) return;
    fault(int(what->location.line), "an object is accessed that has not enough room for its type");
}

}  // namespace gpucnn_host

GPUCNN_HOST_HOOK void __ubsan_handle_type_mismatch_v1(const void *data, uintptr_t pointer) {
    gpucnn_host::mismatch(data, pointer);
}
GPUCNN_HOST_HOOK void __ubsan_handle_type_mismatch_v1_abort(const void *data, uintptr_t pointer) {
    gpucnn_host::mismatch(data, pointer);
}
