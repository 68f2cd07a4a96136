// What a kernel's translation unit and the runtime know of each other. The runtime (runtime.cpp) is compiled once,
// never instrumented, and linked into every module: each module is one shared library with a copy of everything.
#pragma once

#define GPUCNN_HOST_HIDDEN __attribute__((visibility("hidden")))
#define GPUCNN_HOST_VISIBLE __attribute__((visibility("default")))

// For the few functions of these headers that rightly reach beyond what a kernel may touch.
#if defined(__clang__)
#define GPUCNN_HOST_NOT_INSTRUMENTED __attribute__((no_sanitize("kernel-address", "undefined"), noinline))
#else
#define GPUCNN_HOST_NOT_INSTRUMENTED \
    __attribute__((no_sanitize_address, no_sanitize_undefined, no_sanitize("kernel-address"), noinline))
#endif

struct uint3 { unsigned int x, y, z; };

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr dim3(uint3 value) : x(value.x), y(value.y), z(value.z) {}
    constexpr operator uint3() const { return uint3{x, y, z}; }
};

namespace gpucnn_host {

constexpr unsigned WARP_LANES = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr unsigned MAXIMUM_THREADS = 1024;                // a block, as on every GPU
constexpr unsigned long MAXIMUM_SHARED_BYTES = 227 << 10;  // dynamic shared memory a block can have (sm_90)

struct Indices {
    uint3 thread, block;
    dim3 block_size, grid_size;
};

extern GPUCNN_HOST_HIDDEN Indices indices;  // of the thread that runs now
extern GPUCNN_HOST_HIDDEN unsigned char dynamic_shared_memory[];

// One kernel, as the Python side reads it.
struct Kernel {
    const char *name;
    void (*call)(void **arguments);
    int parameter_count;
    const unsigned long *sizes;
    const char *kinds;  // a letter a parameter: p pointer, i integer, f floating, s struct, w 8 bytes of either
};

struct Memory {
    unsigned long long address, size;
    int writable;
    int argument;  // its position in the argument list
};

// A launch, and what came of it.
struct Launch {
    const Kernel *kernel;
    void **arguments;  // addresses of the parameters' values, as cuLaunchKernel takes them
    unsigned grid[3];
    unsigned block[3];
    unsigned long shared_bytes;
    long long order;
    const Memory *memory;  // what the arguments point to
    unsigned long memory_count;
    int sanitize;
    int faulted;
    int line;                    // in the module's text, or 0
    unsigned long code_offset;   // of the instruction in the shared library, or 0
    unsigned fault_block[3];
    unsigned fault_thread[3];
    int fault_has_thread;
    char message[2048];
};

// Ends the launch; never returns to the kernel. ``line`` may be 0: not known.
[[noreturn]] GPUCNN_HOST_HIDDEN void fault(int line, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

enum BarrierKind { BARRIER, BARRIER_COUNT, BARRIER_AND, BARRIER_OR };
GPUCNN_HOST_HIDDEN int block_barrier(int line, BarrierKind kind, int predicate);

// Waits until every lane of ``mask`` has come to the same operation; ``resolve`` then computes all their results
// from the ``data`` that each lane brought (null for lanes outside the mask).
typedef void (*Resolve)(void *const *data, unsigned mask);
GPUCNN_HOST_HIDDEN void warp_operation(const char *name, unsigned mask, int line, void *data, Resolve resolve);

GPUCNN_HOST_HIDDEN unsigned lane();

// Static shared memory: every variable is filled with 0xFF when a block first comes upon it.
struct SharedSlot {
    unsigned long long block_serial;
};
extern GPUCNN_HOST_HIDDEN unsigned long long block_serial;  // 0 until the first launch
GPUCNN_HOST_HIDDEN void first_use_of_shared(SharedSlot &slot, void *address, unsigned long size);

struct SharedUse {
    template <class T>
    __attribute__((always_inline)) SharedUse(SharedSlot &slot, T &variable) {
        if (slot.block_serial != block_serial || block_serial == 0) {
            const volatile void *address = &variable;
            first_use_of_shared(slot, const_cast<void *>(address), sizeof variable);
        }
    }
};

// The instructions of cuda/ptx.cuh.
enum MatrixFormat { TF32, HALF, BFLOAT16 };

GPUCNN_HOST_HIDDEN void copy_async(void *shared, const void *global, int bytes, int source_bytes, int line);
GPUCNN_HOST_HIDDEN void commit_copies();
GPUCNN_HOST_HIDDEN void wait_for_copies(int groups_left, int line);  // -1: all, committed or not
GPUCNN_HOST_HIDDEN void load_matrices(unsigned *fragment, const void *row, int count, bool transposed, int line);
GPUCNN_HOST_HIDDEN void multiply_matrices(
    float *accumulator, const unsigned *a, const unsigned *b, MatrixFormat format, int depth, int line
);

// Those of cuda/ptx_warpgroup.cuh.
GPUCNN_HOST_HIDDEN unsigned long long factor_at(const void *rows, int depth, int line);
GPUCNN_HOST_HIDDEN void show_to_products();
GPUCNN_HOST_HIDDEN void begin_products(int line);
GPUCNN_HOST_HIDDEN void multiply_warpgroup(
    float *sums, int columns, unsigned long long left, unsigned long long right, MatrixFormat format, int line
);
GPUCNN_HOST_HIDDEN void multiply_warpgroup_at_once(
    float *sums, int columns, unsigned long long left, unsigned long long right, MatrixFormat format, int line
);
GPUCNN_HOST_HIDDEN void commit_products(int line);
GPUCNN_HOST_HIDDEN void wait_for_products(int groups_left, int line);

// A load by the way of constants (ld.global.nc): a fault where an argument that may be written to has these bytes.
GPUCNN_HOST_HIDDEN void check_unwritten(const void *address, unsigned long size, int line);

// While one lives, the accesses of its thread are one atomic operation: no race with another such.
#if defined(GPUCNN_HOST_SANITIZE)
extern GPUCNN_HOST_HIDDEN bool in_atomic_operation;
GPUCNN_HOST_HIDDEN void thread_fence();
struct AtomicAccess {
    AtomicAccess() { in_atomic_operation = true; }
    ~AtomicAccess() { in_atomic_operation = false; }
};
#else
inline void thread_fence() {}  // one thread runs at a time, so whatever it wrote is seen by the next one
struct AtomicAccess {
    AtomicAccess() {}
};
#endif

}  // namespace gpucnn_host
