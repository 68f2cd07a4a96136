// Fibers: a stack each, with a guard page below it, and a switch that keeps what a called function must keep.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

// GPUCNN_HOST_UCONTEXT takes the C library's contexts where the switches below could be had: for tests.
#if defined(__x86_64__) && !defined(GPUCNN_HOST_UCONTEXT)
#define GPUCNN_HOST_SWITCH_X86_64 1
#elif defined(__aarch64__) && !defined(GPUCNN_HOST_UCONTEXT)
#define GPUCNN_HOST_SWITCH_AARCH64 1
#else
#include <ucontext.h>
#endif

namespace gpucnn_host {

constexpr size_t STACK_BYTES = 256 << 10;  // reserved; pages become real when touched
constexpr size_t GUARD_BYTES = 64 << 10;   // a multiple of every page size

// Memory that takes no room until it is written to. Null where there is none.
inline void *reserve(size_t size) {
    const int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, kind, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

struct Context {
    void *stack_pointer = nullptr;
#if !defined(GPUCNN_HOST_SWITCH_X86_64) && !defined(GPUCNN_HOST_SWITCH_AARCH64)
    ucontext_t machine;
#endif
};

struct Fiber {
    Context context;
    char *stack = nullptr;  // its lowest usable byte
    Fiber *next = nullptr;  // of the idle ones
};

#if defined(GPUCNN_HOST_SWITCH_X86_64)
extern "C" GPUCNN_HOST_HIDDEN void gpucnn_host_switch(void **save_stack_pointer, void *stack_pointer);
asm(R"(
    .text
    .hidden gpucnn_host_switch
    .globl gpucnn_host_switch
    .type gpucnn_host_switch, @function
    .p2align 4
gpucnn_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    retq
    .size gpucnn_host_switch, .-gpucnn_host_switch
)");
inline void prepare(Context &context, char *stack, void (*start)()) {
    void **top = reinterpret_cast<void **>(stack + STACK_BYTES);
    *--top = nullptr;                                // where start would return to, and the alignment of a call
    *--top = reinterpret_cast<void *>(start);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    context.stack_pointer = top;
}
#elif defined(GPUCNN_HOST_SWITCH_AARCH64)
extern "C" GPUCNN_HOST_HIDDEN void gpucnn_host_switch(void **save_stack_pointer, void *stack_pointer);
asm(R"(
    .text
    .hidden gpucnn_host_switch
    .globl gpucnn_host_switch
    .type gpucnn_host_switch, %function
    .p2align 4
gpucnn_host_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size gpucnn_host_switch, .-gpucnn_host_switch
)");
inline void prepare(Context &context, char *stack, void (*start)()) {
    void **top = reinterpret_cast<void **>(stack + STACK_BYTES) - 20;
    for (int saved = 0; saved < 20; ++saved) top[saved] = nullptr;
    top[11] = reinterpret_cast<void *>(start);  // x30, the return address
    context.stack_pointer = top;
}
#else
inline void prepare(Context &context, char *stack, void (*start)()) {
    getcontext(&context.machine);
    context.machine.uc_stack.ss_sp = stack;
    context.machine.uc_stack.ss_size = STACK_BYTES;
    context.machine.uc_link = nullptr;
    makecontext(&context.machine, start, 0);
}
#endif

inline void switch_context(Context &from, Context &to) {
#if defined(GPUCNN_HOST_SWITCH_X86_64) || defined(GPUCNN_HOST_SWITCH_AARCH64)
    gpucnn_host_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.machine, &to.machine);
#endif
}

// All the fibers of this module. A launch takes them from here and gives them back; a launch that ends by a fault
// leaves its fibers wherever they stand, and ``reset`` makes them all fresh.
class FiberPool {
public:
    // Null where the memory is exhausted.
    Fiber *take(void (*start)()) {
        if (idle_) {
            Fiber *fiber = idle_;
            idle_ = fiber->next;
            return fiber;
        }
        if (count_ == MAXIMUM_THREADS + 1) return nullptr;
        void *memory = reserve(GUARD_BYTES + STACK_BYTES);
        if (!memory) return nullptr;
        mprotect(memory, GUARD_BYTES, PROT_NONE);
        Fiber &fiber = fibers_[count_++];
        fiber.stack = static_cast<char *>(memory) + GUARD_BYTES;
        prepare(fiber.context, fiber.stack, start);
        return &fiber;
    }
    void give_back(Fiber *fiber) {
        fiber->next = idle_;
        idle_ = fiber;
    }
    void reset(void (*start)()) {
        idle_ = nullptr;
        for (size_t index = count_; index-- > 0;) {
            prepare(fibers_[index].context, fibers_[index].stack, start);
            give_back(&fibers_[index]);
        }
    }

private:
    Fiber fibers_[MAXIMUM_THREADS + 1];
    size_t count_ = 0;
    Fiber *idle_ = nullptr;
};

}  // namespace gpucnn_host
