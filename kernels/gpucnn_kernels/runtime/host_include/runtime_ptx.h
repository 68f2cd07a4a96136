// The instructions of cuda/ptx.cuh. Sections of the PTX ISA manual: "cp.async", "ldmatrix", "mma".
#pragma once

#include "gpucnn_host_sixteen_bit_format.h"
#include "runtime_global_races.h"

namespace gpucnn_host {

// ---- what products of warpgroups may not read yet ----
// They read shared memory by another way than threads do: what a thread's copies have brought is there for them
// once the thread has shown it (fence.proxy.async). A chunk of 16 bytes is unshown from its copy to that.

constexpr size_t CHUNK_BYTES = 16, CHUNK_COUNT = DYNAMIC_ARENA_BYTES / CHUNK_BYTES;
static unsigned short unshown_by[CHUNK_COUNT];  // 1 + the thread whose copy it was; 0: it is there for products

static size_t chunk_of(const void *shared) {
    return (reinterpret_cast<uintptr_t>(shared) - reinterpret_cast<uintptr_t>(dynamic_shared_memory)) / CHUNK_BYTES;
}

static void mark_unshown(const void *shared) {
    const size_t chunk = chunk_of(shared);
    if (chunk < CHUNK_COUNT) unshown_by[chunk] = (unsigned short)(1 + schedule.current);  // else a variable's
}

static bool is_unshown(const void *shared) {
    const size_t chunk = chunk_of(shared);
    return chunk < CHUNK_COUNT && unshown_by[chunk];
}

void show_to_products() {
    const size_t chunks = (schedule.launch->shared_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
    for (size_t chunk = 0; chunk < chunks; ++chunk) {
        if (unshown_by[chunk] == 1 + schedule.current) unshown_by[chunk] = 0;
    }
}

// ---- cp.async ----
// The data is taken when the copy is asked for, and put in its place when its group is waited for: until then the
// place holds bytes of 0xFF, for on hardware nobody knows what is there.

void copy_async(void *shared, const void *global, int bytes, int source_bytes, int line) {
    if (source_bytes < 0 || source_bytes > bytes) {
        fault(line, "cp.async of %d bytes cannot take %d of them from its source", bytes, source_bytes);
    }
    if (!in_shared_memory(shared, size_t(bytes))) {
        fault(line, "cp.async: the destination's %d bytes are not all in the block's shared memory", bytes);
    }
    const uintptr_t to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
    if (to % unsigned(bytes) || from % unsigned(bytes)) {
        fault(
            line, "cp.async of %d bytes: both addresses must be multiples of that, the shared one ends in 0x%02x "
            "and the global one in 0x%02x", bytes, unsigned(to & 0xff), unsigned(from & 0xff)
        );
    }
    check_access(shared, size_t(bytes), true, line);
    if (source_bytes) check_access(global, size_t(source_bytes), false, line);
    Thread &thread = threads[schedule.current];
    if (thread.copy_count == thread.copy_capacity) {
        thread.copy_capacity = thread.copy_capacity ? 2 * thread.copy_capacity : 16;
        void *larger = realloc(thread.copies, size_t(thread.copy_capacity) * sizeof *thread.copies);
        if (!larger) fault(line, "no memory for %d pending copies", thread.copy_capacity);
        thread.copies = static_cast<PendingCopy *>(larger);
    }
    PendingCopy &copy = thread.copies[thread.copy_count++];
    copy.destination = static_cast<unsigned char *>(shared);
    copy.size = bytes;
    copy.group = thread.copy_group;
    memset(copy.data, 0, sizeof copy.data);
    runtime_line = line;
    memcpy(copy.data, global, size_t(source_bytes));
    runtime_line = 0;
    memset(shared, 0xff, size_t(bytes));
}

void commit_copies() { ++threads[schedule.current].copy_group; }

void wait_for_copies(int groups_left, int line) {
    Thread &thread = threads[schedule.current];
    // Groups are numbered from 0; the uncommitted copies bear the number of the group to come.
    const int through = groups_left < 0 ? thread.copy_group : thread.copy_group - 1 - groups_left;
    int kept = 0;
    for (int index = 0; index < thread.copy_count; ++index) {
        const PendingCopy &copy = thread.copies[index];
        if (copy.group <= through) {
            check_access(copy.destination, size_t(copy.size), true, line);
            memcpy(copy.destination, copy.data, size_t(copy.size));
            mark_unshown(copy.destination);
        } else {
            thread.copies[kept++] = copy;
        }
    }
    thread.copy_count = kept;
}

// ---- ldmatrix ----
// Lane 8 m + r names row r of matrix m: 8 numbers of 16 bits. Lane l then receives, of each matrix, numbers
// 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed, of column l / 4.

struct MatrixLoad {
    unsigned *fragment;
    const unsigned short *row;
    int count;
    bool transposed;
};

static void resolve_load(void *const *data, unsigned) {
    const MatrixLoad *const *lanes = reinterpret_cast<const MatrixLoad *const *>(data);
    for (unsigned lane = 0; lane < WARP_LANES; ++lane) {
        for (int matrix = 0; matrix < lanes[lane]->count; ++matrix) {
            unsigned word = 0;
            for (unsigned half = 0; half < 2; ++half) {
                const unsigned along = lane % 4 * 2 + half, across = lane / 4;
                const unsigned row = lanes[lane]->transposed ? along : across;
                const unsigned column = lanes[lane]->transposed ? across : along;
                word |= unsigned(lanes[8 * unsigned(matrix) + row]->row[column]) << (16 * half);
            }
            lanes[lane]->fragment[matrix] = word;
        }
    }
}

void load_matrices(unsigned *fragment, const void *row, int count, bool transposed, int line) {
    if (lane() < 8 * unsigned(count)) {
        if (reinterpret_cast<uintptr_t>(row) % 16) {
            fault(
                line, "ldmatrix: a row's address must be a multiple of 16, lane %u's ends in 0x%02x", lane(),
                unsigned(reinterpret_cast<uintptr_t>(row) & 0xff)
            );
        }
        if (!in_shared_memory(row, 16)) {
            fault(line, "ldmatrix: lane %u's row of 16 bytes is not all in the block's shared memory", lane());
        }
        check_access(row, 16, false, line);
    }
    MatrixLoad load = {fragment, static_cast<const unsigned short *>(row), count, transposed};
    static const char *const NAMES[2][5] = {
        {"", "ldmatrix.x1", "ldmatrix.x2", "", "ldmatrix.x4"},
        {"", "ldmatrix.x1.trans", "ldmatrix.x2.trans", "", "ldmatrix.x4.trans"},
    };
    warp_operation(NAMES[transposed][count], ALL_LANES, line, &load, resolve_load);
}

// ---- mma.sync ----
// D = A B + C, A 16 x depth, B depth x 8, C 16 x 8 in float. Products are exact and sums taken in double, rounded
// once: hardware keeps fewer bits in between, so it may differ in the last place.

struct MatrixProduct {
    float *accumulator;
    const unsigned *a, *b;
};

static double number(MatrixFormat format, const unsigned *words, int element) {
    if (format == TF32) {
        const unsigned bits = words[element] & 0xffffe000u;  // hardware reads the upper 19 bits
        float value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    const unsigned short bits = (unsigned short)(words[element / 2] >> (element % 2 * 16));
    return format == HALF ? Format<5>::widen(bits) : Format<8>::widen(bits);
}

template <MatrixFormat format, int DEPTH> static void resolve_product(void *const *data, unsigned) {
    const MatrixProduct *const *lanes = reinterpret_cast<const MatrixProduct *const *>(data);
    double a[16][DEPTH], b[DEPTH][8];
    for (int lane = 0; lane < int(WARP_LANES); ++lane) {
        const int group = lane / 4, in_group = lane % 4;
        for (int element = 0; element < 16 * DEPTH / 32; ++element) {
            int row, column;
            if (format == TF32) {
                row = group + 8 * (element % 2);
                column = in_group + 4 * (element / 2);
            } else {
                row = group + 8 * (element / 2 % 2);
                column = in_group * 2 + element % 2 + 8 * (element / 4);
            }
            a[row][column] = number(format, lanes[lane]->a, element);
        }
        for (int element = 0; element < 8 * DEPTH / 32; ++element) {
            const int half_row = in_group * 2 + element % 2 + 8 * (element / 2);
            const int row = format == TF32 ? in_group + 4 * element : half_row;
            b[row][group] = number(format, lanes[lane]->b, element);
        }
    }
    for (int lane = 0; lane < int(WARP_LANES); ++lane) {
        for (int element = 0; element < 4; ++element) {
            const int row = lane / 4 + 8 * (element / 2), column = lane % 4 * 2 + element % 2;
            double sum = lanes[lane]->accumulator[element];
            for (int k = 0; k < DEPTH; ++k) sum += a[row][k] * b[k][column];
            lanes[lane]->accumulator[element] = float(sum);
        }
    }
}

void multiply_matrices(
    float *accumulator, const unsigned *a, const unsigned *b, MatrixFormat format, int depth, int line
) {
    MatrixProduct product = {accumulator, a, b};
    if (format == TF32 && depth == 4) {
        warp_operation("mma.m16n8k4.tf32", ALL_LANES, line, &product, resolve_product<TF32, 4>);
    } else if (format == TF32) {
        warp_operation("mma.m16n8k8.tf32", ALL_LANES, line, &product, resolve_product<TF32, 8>);
    } else if (format == HALF && depth == 8) {
        warp_operation("mma.m16n8k8.f16", ALL_LANES, line, &product, resolve_product<HALF, 8>);
    } else if (format == HALF) {
        warp_operation("mma.m16n8k16.f16", ALL_LANES, line, &product, resolve_product<HALF, 16>);
    } else if (depth == 8) {
        warp_operation("mma.m16n8k8.bf16", ALL_LANES, line, &product, resolve_product<BFLOAT16, 8>);
    } else {
        warp_operation("mma.m16n8k16.bf16", ALL_LANES, line, &product, resolve_product<BFLOAT16, 16>);
    }
}

}  // namespace gpucnn_host
