// The instructions of cuda/ptx_warpgroup.cuh: "wgmma" of the PTX ISA manual.
//
// A product is done as late as it may be, when its group is waited for, and until then its sums are not what they
// will be: a kernel that overwrites a factor, or looks at the sums, too early, shows it. Lanes of a warp must agree
// in what they ask for; that the four warps of a group do is not looked at.
#pragma once

#include "runtime_ptx.h"

namespace gpucnn_host {

constexpr int WARPGROUP_DEPTH = 16, WARPGROUP_ROWS = 64;
constexpr int PENDING_PRODUCTS = 64;
constexpr uintptr_t ROW_BYTES = 128, EIGHT_ROWS = 8 * ROW_BYTES;
// The fields of a descriptor: rows of 128 bytes with exchanged chunks, eight rows to the next eight.
constexpr unsigned long long FACTOR_FORM = 1ull << 62 | (EIGHT_ROWS >> 4) << 32 | 1ull << 16;

struct PendingProduct {
    float *sums;
    unsigned long long left, right;
    int columns, group;
    MatrixFormat format;
};

struct ProductsOfThread {
    unsigned long long block;  // its serial number: another block begins anew
    PendingProduct pending[PENDING_PRODUCTS];
    int count, group;
    bool begun;
};
static ProductsOfThread products_of_threads[MAXIMUM_THREADS];

static ProductsOfThread &products_of_thread() {
    ProductsOfThread &products = products_of_threads[schedule.current];
    if (products.block != block_serial) {
        products.block = block_serial;
        products.count = products.group = 0;
        products.begun = false;
    }
    return products;
}

unsigned long long factor_at(const void *rows, int depth, int line) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(rows) - reinterpret_cast<uintptr_t>(dynamic_shared_memory);
    if (offset >= schedule.launch->shared_bytes) {
        fault(line, "the factor of a product of warpgroups is not in the dynamic shared memory");
    }
    if (offset % EIGHT_ROWS) {
        fault(line, "the rows of a factor begin at multiples of 1024 bytes, these 0x%03x behind", unsigned(offset % 1024));
    }
    if (depth < 0 || depth % WARPGROUP_DEPTH || depth * 2 >= int(ROW_BYTES)) {
        fault(line, "a product takes numbers 0, 16, 32 or 48 of a row and those behind them, got %d", depth);
    }
    return FACTOR_FORM | (offset + 2 * unsigned(depth)) >> 4;
}

// Where number ``depth`` of a factor's row lies: bits 4 to 6 of an address are exchanged by bits 7 to 9.
static const unsigned short *number_of_factor(unsigned long long factor, int row, int depth) {
    uintptr_t offset = (factor & 0x3fff) << 4;
    offset += uintptr_t(row / 8) * EIGHT_ROWS + uintptr_t(row % 8) * ROW_BYTES + 2 * unsigned(depth);
    offset ^= (offset >> 7 & 7) << 4;
    return reinterpret_cast<const unsigned short *>(dynamic_shared_memory + offset);
}

static void check_factor(unsigned long long factor, int rows, int line) {
    for (int row = 0; row < rows; ++row) {
        for (int depth = 0; depth < WARPGROUP_DEPTH; depth += 8) {
            const unsigned short *chunk = number_of_factor(factor, row, depth);
            if (!in_shared_memory(chunk, 16)) {
                fault(line, "wgmma: row %d of a factor is not all in the block's shared memory", row);
            }
            if (is_unshown(chunk)) {
                fault(
                    line, "wgmma: row %d of a factor was copied by a thread that has not shown it to products "
                    "(fence.proxy.async) since", row
                );
            }
            check_access(chunk, 16, false, line);
        }
    }
}

void begin_products(int line) {
    warp_operation("wgmma.fence", ALL_LANES, line, nullptr, [](void *const *, unsigned) {});
    products_of_thread().begun = true;
}

static void resolve_agreement(void *const *data, unsigned) {
    const PendingProduct *const *lanes = reinterpret_cast<const PendingProduct *const *>(data);
    for (unsigned lane = 1; lane < WARP_LANES; ++lane) {
        if (lanes[lane]->left != lanes[0]->left || lanes[lane]->right != lanes[0]->right) {
            fault(0, "wgmma: lanes 0 and %u of a warp name different factors", lane);
        }
    }
}

void multiply_warpgroup(
    float *sums, int columns, unsigned long long left, unsigned long long right, MatrixFormat format, int line
) {
    ProductsOfThread &products = products_of_thread();
    if (!products.begun) fault(line, "wgmma: products were not begun (wgmma.fence) since the last wait for some");
    if (products.count == PENDING_PRODUCTS) fault(line, "more than %d products are not waited for", PENDING_PRODUCTS);
    PendingProduct &product = products.pending[products.count++];
    product = {sums, left, right, columns, products.group, format};
    warp_operation("wgmma.mma_async", ALL_LANES, line, &product, resolve_agreement);
    if (lane() == 0) {
        check_factor(left, WARPGROUP_ROWS, line);
        check_factor(right, columns, line);
    }
}

static void do_product(const PendingProduct &product, int warp_of_group);

// The same, done when it is asked for: where the sums are registers, which no pointer can name.
void multiply_warpgroup_at_once(
    float *sums, int columns, unsigned long long left, unsigned long long right, MatrixFormat format, int line
) {
    const unsigned long long factors[] = {left, right};
    for (const unsigned long long factor : factors) {
        if ((factor & ~0x3fffull) != FACTOR_FORM) {
            fault(line, "wgmma: the descriptor 0x%016llx is not of rows of 128 bytes with exchanged chunks", factor);
        }
        const unsigned behind = unsigned((factor & 0x3fff) << 4) % EIGHT_ROWS;
        if (behind % 32 || behind >= ROW_BYTES) {
            fault(line, "the rows of a factor begin at multiples of 1024 bytes, these 0x%03x behind", behind);
        }
    }
    multiply_warpgroup(sums, columns, left, right, format, line);
    ProductsOfThread &products = products_of_thread();
    do_product(products.pending[--products.count], int(schedule.current / WARP_LANES % 4));
}

void commit_products(int line) {
    warp_operation("wgmma.commit_group", ALL_LANES, line, nullptr, [](void *const *, unsigned) {});
    ++products_of_thread().group;
}

// This thread's part of a product: the sums of two rows.
static void do_product(const PendingProduct &product, int warp_of_group) {
    const int group = int(lane()) / 4, in_group = int(lane()) % 4;
    auto widened = [&product](const unsigned short *bits) {
        return product.format == HALF ? Format<5>::widen(*bits) : Format<8>::widen(*bits);
    };
    double rows[2][WARPGROUP_DEPTH];
    for (int half = 0; half < 2; ++half) {
        for (int depth = 0; depth < WARPGROUP_DEPTH; ++depth) {
            const int row = warp_of_group * 16 + group + 8 * half;
            rows[half][depth] = widened(number_of_factor(product.left, row, depth));
        }
    }
    for (int index = 0; index < product.columns / 2; index += 4) {
        for (int side = 0; side < 2; ++side) {
            const int column = index / 4 * 8 + in_group * 2 + side;
            double numbers[WARPGROUP_DEPTH];
            for (int depth = 0; depth < WARPGROUP_DEPTH; ++depth) {
                numbers[depth] = widened(number_of_factor(product.right, column, depth));
            }
            for (int half = 0; half < 2; ++half) {
                double sum = product.sums[index + 2 * half + side];
                for (int depth = 0; depth < WARPGROUP_DEPTH; ++depth) sum += rows[half][depth] * numbers[depth];
                product.sums[index + 2 * half + side] = float(sum);
            }
        }
    }
}

void wait_for_products(int groups_left, int line) {
    warp_operation("wgmma.wait_group", ALL_LANES, line, nullptr, [](void *const *, unsigned) {});
    ProductsOfThread &products = products_of_thread();
    const int through = products.group - 1 - groups_left;
    int kept = 0;
    for (int index = 0; index < products.count; ++index) {
        const PendingProduct product = products.pending[index];
        if (product.group <= through) {
            do_product(product, int(schedule.current / WARP_LANES % 4));
        } else {
            products.pending[kept++] = product;
        }
    }
    products.count = kept;
    products.begun = false;
}

}  // namespace gpucnn_host
