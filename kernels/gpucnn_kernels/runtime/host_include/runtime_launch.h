// A launch from beginning to end, on the stack of whoever asked for it.
#pragma once

#include <errno.h>
#include <signal.h>

#include "runtime_global_races.h"

#if defined(__x86_64__) || defined(__aarch64__)
#include <ucontext.h>
#endif

namespace gpucnn_host {

// Signals that a kernel's own mistakes raise: while a kernel runs they are faults of the launch. Others go to
// whoever handled them before.
static const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
constexpr int SIGNAL_COUNT = sizeof SIGNALS / sizeof *SIGNALS;
static struct sigaction previous_actions[SIGNAL_COUNT];
alignas(16) static char signal_stack[64 << 10];

static uintptr_t program_counter(void *context) {
#if defined(__x86_64__)
    return uintptr_t(static_cast<ucontext_t *>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
    return uintptr_t(static_cast<ucontext_t *>(context)->uc_mcontext.pc);
#else
    (void)context;
    return 0;
#endif
}

static void on_signal(int signal, siginfo_t *information, void *context) {
    if (!schedule.running) {
        for (int index = 0; index < SIGNAL_COUNT; ++index) {
            if (SIGNALS[index] == signal) sigaction(signal, &previous_actions[index], nullptr);
        }
        return;  // and the instruction raises it again
    }
    const uintptr_t code = program_counter(context) - image_begin();
    // One past, as a return address would be.
    schedule.launch->code_offset = code < image_bytes() ? code : 0;
    const uintptr_t address = reinterpret_cast<uintptr_t>(information->si_addr);
    const uintptr_t stack = reinterpret_cast<uintptr_t>(threads[schedule.current].fiber->stack);
    const int line = runtime_line;
    if (signal == SIGFPE) fault(0, "an integer division by zero, or of the lowest integer by -1");
    if (signal == SIGILL) fault(0, "an instruction that this processor does not have");
    if (address < stack && address >= stack - GUARD_BYTES) {
        fault(0, "the thread's stack of %zu bytes overflows (local arrays, or recursion)", STACK_BYTES);
    }
    if (address == 0 || information->si_code > SEGV_ACCERR) {  // the processor names no address for these
        fault(line, "an access to the null pointer, to no address at all, or misaligned for its type");
    }
    fault(
        line, "an access to the address 0x%llx, where nothing is (or nothing that can be written)",
        (unsigned long long)address
    );
}

class SignalGuard {
public:
    SignalGuard() {
        stack_t stack = {};
        stack.ss_sp = signal_stack;
        stack.ss_size = sizeof signal_stack;
        stack_changed_ = sigaltstack(&stack, &previous_stack_) == 0;
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int index = 0; index < SIGNAL_COUNT; ++index) {
            sigaction(SIGNALS[index], &action, &previous_actions[index]);
        }
    }
    ~SignalGuard() {
        for (int index = 0; index < SIGNAL_COUNT; ++index) {
            sigaction(SIGNALS[index], &previous_actions[index], nullptr);
        }
        if (stack_changed_) sigaltstack(&previous_stack_, nullptr);
    }

private:
    stack_t previous_stack_;
    bool stack_changed_;
};

static uint64_t greatest_common_divisor(uint64_t x, uint64_t y) {
    while (y) {
        const uint64_t rest = x % y;
        x = y, y = rest;
    }
    return x;
}

static void set_order(long long order) {
    schedule.shuffled = order != 0 && order != -1;
    schedule.reversed = order == -1;
    schedule.block_multiplier = 1;
    schedule.block_start = 0;
    if (schedule.reversed) {
        schedule.block_multiplier = schedule.block_count - 1;  // -1, modulo the count
        schedule.block_start = schedule.block_count - 1;
        if (schedule.block_count == 1) schedule.block_multiplier = 1, schedule.block_start = 0;
    }
    if (!schedule.shuffled) return;
    schedule.generator.state = uint64_t(order) * 0x9e3779b97f4a7c15ull | 1;
    for (int discarded = 0; discarded < 8; ++discarded) schedule.generator.next();
    for (unsigned thread = 0; thread < schedule.thread_count; ++thread) phase_order[thread] = thread;
    if (schedule.block_count > 2) {
        // Stepping by a number that has no divisor in common with the count visits every block once.
        schedule.block_start = schedule.generator.next() % schedule.block_count;
        do {
            schedule.block_multiplier = 1 + schedule.generator.next() % (schedule.block_count - 1);
        } while (greatest_common_divisor(schedule.block_multiplier, schedule.block_count) != 1);
    } else {
        schedule.block_start = schedule.generator.next() % schedule.block_count;
    }
}

static void run_blocks(Launch *launch) {
    schedule.launch = launch;
    indices.block_size = dim3(launch->block[0], launch->block[1], launch->block[2]);
    indices.grid_size = dim3(launch->grid[0], launch->grid[1], launch->grid[2]);
    schedule.thread_count = launch->block[0] * launch->block[1] * launch->block[2];
    schedule.block_count = uint64_t(launch->grid[0]) * launch->grid[1] * launch->grid[2];
    schedule.block_number = 0;
    memset(warp_phase, 0, sizeof warp_phase);
    for (unsigned thread = 0; thread < schedule.thread_count; ++thread) {
        threads[thread].index.x = thread % launch->block[0];
        threads[thread].index.y = thread / launch->block[0] % launch->block[1];
        threads[thread].index.z = thread / launch->block[0] / launch->block[1];
        threads[thread].copy_count = threads[thread].copy_group = 0;
    }
    set_order(launch->order);
    in_atomic_operation = false;
    runtime_line = 0;
    Fiber *fiber = pool.take(fiber_main);
    if (!fiber) {
        launch->faulted = 1;
        snprintf(launch->message, sizeof launch->message, "no memory for a thread's stack");
        return;
    }
    SignalGuard guard;
    begin_block();
    const unsigned first = next_thread();
    schedule.current = first;
    indices.thread = threads[first].index;
    states[first] = RUNNING;
    threads[first].fiber = fiber;
    schedule.running = true;
    switch_context(schedule.main, fiber->context);
    if (launch->faulted) pool.reset(fiber_main);
}

// A number that any change of the bytes changes, almost surely. (Multiply and fold, by 8 bytes.)
static uint64_t fingerprint(const Memory &memory) {
    const unsigned char *bytes = reinterpret_cast<const unsigned char *>(memory.address);
    uint64_t result = 0x9e3779b97f4a7c15ull, word = 0;
    size_t offset = 0;
    for (; offset + 8 <= memory.size; offset += 8) {
        memcpy(&word, bytes + offset, 8);
        result = (result ^ word) * 0xff51afd7ed558ccdull;
        result ^= result >> 32;
    }
    word = 0;
    memcpy(&word, bytes + offset, memory.size - offset);
    return (result ^ word) * 0xff51afd7ed558ccdull;
}

static bool must_stay(const Launch *launch, size_t index) {
    const Memory &memory = launch->memory[index];
    if (memory.writable) return false;
    for (size_t other = 0; other < launch->memory_count; ++other) {
        const Memory &writable = launch->memory[other];
        if (writable.writable && memory.address < writable.address + writable.size &&
            writable.address < memory.address + memory.size) {
            return false;
        }
    }
    return true;
}

static void run_plain(Launch *launch) {
    uint64_t *before = static_cast<uint64_t *>(calloc(launch->memory_count + 1, sizeof *before));
    for (size_t index = 0; index < launch->memory_count; ++index) {
        if (must_stay(launch, index)) before[index] = fingerprint(launch->memory[index]);
    }
    run_blocks(launch);
    for (size_t index = 0; index < launch->memory_count && !launch->faulted; ++index) {
        if (must_stay(launch, index) && before[index] != fingerprint(launch->memory[index])) {
            launch->faulted = 1;
            snprintf(
                launch->message, sizeof launch->message,
                "argument %d is read-only, and the kernel has written to it (a sanitized module says where)",
                launch->memory[index].argument
            );
        }
    }
    free(before);
}

static void run_sanitized(Launch *launch) {
    const uintptr_t dynamic = reinterpret_cast<uintptr_t>(dynamic_shared_memory);
    if (copy_in(launch)) {
        mark_image(dynamic, dynamic + DYNAMIC_ARENA_BYTES, 0);
        mark_image(dynamic + launch->shared_bytes, dynamic + DYNAMIC_ARENA_BYTES, 1);
        begin_global_races();
        run_blocks(launch);
        end_global_races();
    } else {
        launch->faulted = 1;
        snprintf(launch->message, sizeof launch->message, "no memory for the copies of the arguments");
    }
    copy_out(!launch->faulted);
}

}  // namespace gpucnn_host

extern "C" GPUCNN_HOST_VISIBLE void gpucnn_host_launch(gpucnn_host::Launch *launch) {
    if (launch->sanitize) {
        gpucnn_host::run_sanitized(launch);
    } else {
        gpucnn_host::run_plain(launch);
    }
}
