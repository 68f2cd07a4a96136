// Atomic operations: one thread runs at a time and is never interrupted, so plain reads and writes are atomic.
// Overloads are exactly CUDA's; each returns the old value.
#pragma once

namespace {

#define GPUCNN_HOST_ATOMIC(NAME, TYPE, NEW) \
    inline TYPE NAME(TYPE *address, TYPE value) { \
        gpucnn_host::AtomicAccess atomic; \
        const TYPE old = *address; \
        *address = NEW; \
        return old; \
    }
#define GPUCNN_HOST_ATOMIC_INTEGERS(NAME, NEW) \
    GPUCNN_HOST_ATOMIC(NAME, int, NEW) \
    GPUCNN_HOST_ATOMIC(NAME, unsigned int, NEW) \
    GPUCNN_HOST_ATOMIC(NAME, unsigned long long, NEW)

GPUCNN_HOST_ATOMIC(atomicAdd, int, int(unsigned(old) + unsigned(value)))
GPUCNN_HOST_ATOMIC(atomicAdd, unsigned int, old + value)
GPUCNN_HOST_ATOMIC(atomicAdd, unsigned long long, old + value)
GPUCNN_HOST_ATOMIC(atomicAdd, float, old + value)
GPUCNN_HOST_ATOMIC(atomicAdd, double, old + value)
GPUCNN_HOST_ATOMIC(atomicSub, int, int(unsigned(old) - unsigned(value)))
GPUCNN_HOST_ATOMIC(atomicSub, unsigned int, old - value)
GPUCNN_HOST_ATOMIC_INTEGERS(atomicMax, old > value ? old : value)
GPUCNN_HOST_ATOMIC_INTEGERS(atomicMin, old < value ? old : value)
GPUCNN_HOST_ATOMIC_INTEGERS(atomicAnd, old & value)
GPUCNN_HOST_ATOMIC_INTEGERS(atomicOr, old | value)
GPUCNN_HOST_ATOMIC_INTEGERS(atomicXor, old ^ value)
GPUCNN_HOST_ATOMIC_INTEGERS(atomicExch, value)
GPUCNN_HOST_ATOMIC(atomicMax, long long, old > value ? old : value)
GPUCNN_HOST_ATOMIC(atomicMin, long long, old < value ? old : value)
GPUCNN_HOST_ATOMIC(atomicExch, float, value)
GPUCNN_HOST_ATOMIC(atomicInc, unsigned int, old >= value ? 0 : old + 1)
GPUCNN_HOST_ATOMIC(atomicDec, unsigned int, old == 0 || old > value ? value : old - 1)

#define GPUCNN_HOST_ATOMIC_CAS(TYPE) \
    inline TYPE atomicCAS(TYPE *address, TYPE expected, TYPE value) { \
        gpucnn_host::AtomicAccess atomic; \
        const TYPE old = *address; \
        if (old == expected) *address = value; \
        return old; \
    }
GPUCNN_HOST_ATOMIC_CAS(int)
GPUCNN_HOST_ATOMIC_CAS(unsigned int)
GPUCNN_HOST_ATOMIC_CAS(unsigned long long)
GPUCNN_HOST_ATOMIC_CAS(unsigned short)
#undef GPUCNN_HOST_ATOMIC_CAS
#undef GPUCNN_HOST_ATOMIC_INTEGERS

}  // namespace
