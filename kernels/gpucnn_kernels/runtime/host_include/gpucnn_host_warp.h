// Barriers, shuffles and votes. The line of each call goes along: threads that wait for each other must wait at
// the same one. A lane that reads from outside of a shuffle's mask gets undefined values on hardware; here it gets
// bytes of 0xFF.
#pragma once

namespace gpucnn_host {

struct Exchange {
    unsigned char value[16];
    unsigned source;  // the lane to read from
    unsigned char result[16];
};

GPUCNN_HOST_NOT_INSTRUMENTED inline void resolve_exchange(void *const *data, unsigned mask) {
    for (unsigned lane = 0; lane < WARP_LANES; ++lane) {
        if (!(mask >> lane & 1)) continue;
        Exchange *mine = static_cast<Exchange *>(data[lane]);
        const Exchange *source = static_cast<const Exchange *>(data[mine->source]);
        if (source) {
            __builtin_memcpy(mine->result, source->value, sizeof mine->result);
        } else {
            __builtin_memset(mine->result, 0xff, sizeof mine->result);
        }
    }
}

template <class T> T exchange(const char *name, unsigned mask, int line, const T &value, unsigned source) {
    static_assert(sizeof(T) <= 16, "shuffles move at most 16 bytes");
    Exchange exchange;
    __builtin_memset(&exchange, 0, sizeof exchange);
    __builtin_memcpy(exchange.value, &value, sizeof value);
    exchange.source = source;
    warp_operation(name, mask, line, &exchange, resolve_exchange);
    T result;
    __builtin_memcpy(&result, exchange.result, sizeof result);
    return result;
}

inline void check_width(const char *name, int line, int width) {
    if (width < 1 || width > 32 || (width & (width - 1))) {
        fault(line, "%s: width must be a power of two from 1 to 32, got %d", name, width);
    }
}

struct Vote {
    unsigned long long value;
    unsigned long long result;
};

template <class Combine> GPUCNN_HOST_NOT_INSTRUMENTED void resolve_vote(void *const *data, unsigned mask) {
    unsigned long long result = Combine::start();
    for (unsigned lane = 0; lane < WARP_LANES; ++lane) {
        if (mask >> lane & 1) result = Combine::combine(result, static_cast<Vote *>(data[lane])->value, lane);
    }
    for (unsigned lane = 0; lane < WARP_LANES; ++lane) {
        if (mask >> lane & 1) static_cast<Vote *>(data[lane])->result = result;
    }
}

template <class Combine>
unsigned long long vote(const char *name, unsigned mask, int line, unsigned long long value) {
    Vote vote = {value, 0};
    warp_operation(name, mask, line, &vote, resolve_vote<Combine>);
    return vote.result;
}

inline void resolve_nothing(void *const *, unsigned) {}

typedef unsigned long long Word;
struct Ballot {
    static Word start() { return 0; }
    static Word combine(Word all, Word value, unsigned lane) { return all | (value ? Word(1) << lane : 0); }
};
struct Sum {
    static Word start() { return 0; }
    static Word combine(Word all, Word value, unsigned) { return unsigned(all) + unsigned(value); }
};
struct BitAnd {
    static Word start() { return ~Word(0); }
    static Word combine(Word all, Word value, unsigned) { return all & value; }
};
struct BitOr {
    static Word start() { return 0; }
    static Word combine(Word all, Word value, unsigned) { return all | value; }
};
struct BitXor {
    static Word start() { return 0; }
    static Word combine(Word all, Word value, unsigned) { return all ^ value; }
};
struct UnsignedMaximum {
    static Word start() { return 0; }
    static Word combine(Word all, Word value, unsigned) { return value > all ? value : all; }
};
struct UnsignedMinimum {
    static Word start() { return ~Word(0); }
    static Word combine(Word all, Word value, unsigned) { return value < all ? value : all; }
};

constexpr unsigned SIGN = 0x80000000u;  // turns the order of signed integers into that of unsigned ones

}  // namespace gpucnn_host

#define GPUCNN_HOST_LINE int line = __builtin_LINE()

namespace {

inline void __syncthreads(GPUCNN_HOST_LINE) { gpucnn_host::block_barrier(line, gpucnn_host::BARRIER, 0); }
inline int __syncthreads_count(int predicate, GPUCNN_HOST_LINE) {
    return gpucnn_host::block_barrier(line, gpucnn_host::BARRIER_COUNT, predicate);
}
inline int __syncthreads_and(int predicate, GPUCNN_HOST_LINE) {
    return gpucnn_host::block_barrier(line, gpucnn_host::BARRIER_AND, predicate);
}
inline int __syncthreads_or(int predicate, GPUCNN_HOST_LINE) {
    return gpucnn_host::block_barrier(line, gpucnn_host::BARRIER_OR, predicate);
}
inline void __syncwarp(unsigned mask = gpucnn_host::ALL_LANES, GPUCNN_HOST_LINE) {
    char nothing;
    gpucnn_host::warp_operation("__syncwarp", mask, line, &nothing, gpucnn_host::resolve_nothing);
}

// The lane read from, after the PTX manual's shfl.sync: within segments of ``width`` lanes; a lane whose source
// would lie outside of its segment reads itself (for the indexed form, the source is taken modulo the width).
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, GPUCNN_HOST_LINE) {
    gpucnn_host::check_width("__shfl_sync", line, width);
    const unsigned within = unsigned(width - 1), segment = gpucnn_host::lane() & ~within;
    return gpucnn_host::exchange("__shfl_sync", mask, line, value, segment | (unsigned(source) & within));
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, GPUCNN_HOST_LINE) {
    gpucnn_host::check_width("__shfl_up_sync", line, width);
    const unsigned self = gpucnn_host::lane(), segment = self & ~unsigned(width - 1);
    const bool inside = delta <= self - segment;
    return gpucnn_host::exchange("__shfl_up_sync", mask, line, value, inside ? self - delta : self);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, GPUCNN_HOST_LINE) {
    gpucnn_host::check_width("__shfl_down_sync", line, width);
    const unsigned self = gpucnn_host::lane(), last = self | unsigned(width - 1);
    const bool inside = delta <= last - self;
    return gpucnn_host::exchange("__shfl_down_sync", mask, line, value, inside ? self + delta : self);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, GPUCNN_HOST_LINE) {
    gpucnn_host::check_width("__shfl_xor_sync", line, width);
    const unsigned self = gpucnn_host::lane(), last = self | unsigned(width - 1);
    const unsigned source = self ^ unsigned(lanes);
    return gpucnn_host::exchange("__shfl_xor_sync", mask, line, value, source <= last ? source : self);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, GPUCNN_HOST_LINE) {
    return unsigned(gpucnn_host::vote<gpucnn_host::Ballot>("__ballot_sync", mask, line, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate, GPUCNN_HOST_LINE) {
    return gpucnn_host::vote<gpucnn_host::Ballot>("__any_sync", mask, line, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, GPUCNN_HOST_LINE) {
    return unsigned(gpucnn_host::vote<gpucnn_host::Ballot>("__all_sync", mask, line, predicate != 0)) == mask;
}

#define GPUCNN_HOST_REDUCE(NAME, COMBINE) \
    inline unsigned NAME(unsigned mask, unsigned value, GPUCNN_HOST_LINE) { \
        return unsigned(gpucnn_host::vote<gpucnn_host::COMBINE>(#NAME, mask, line, value)); \
    }
GPUCNN_HOST_REDUCE(__reduce_add_sync, Sum)
GPUCNN_HOST_REDUCE(__reduce_min_sync, UnsignedMinimum)
GPUCNN_HOST_REDUCE(__reduce_max_sync, UnsignedMaximum)
GPUCNN_HOST_REDUCE(__reduce_and_sync, BitAnd)
GPUCNN_HOST_REDUCE(__reduce_or_sync, BitOr)
GPUCNN_HOST_REDUCE(__reduce_xor_sync, BitXor)
#undef GPUCNN_HOST_REDUCE
inline int __reduce_add_sync(unsigned mask, int value, GPUCNN_HOST_LINE) {
    return int(__reduce_add_sync(mask, unsigned(value), line));
}
inline int __reduce_min_sync(unsigned mask, int value, GPUCNN_HOST_LINE) {
    return int(__reduce_min_sync(mask, unsigned(value) ^ gpucnn_host::SIGN, line) ^ gpucnn_host::SIGN);
}
inline int __reduce_max_sync(unsigned mask, int value, GPUCNN_HOST_LINE) {
    return int(__reduce_max_sync(mask, unsigned(value) ^ gpucnn_host::SIGN, line) ^ gpucnn_host::SIGN);
}

__attribute__((error("__activemask() depends on how the hardware schedules: pass the mask of the lanes you mean")))
unsigned __activemask();

inline void __threadfence() { gpucnn_host::thread_fence(); }
inline void __threadfence_block() {}
inline void __threadfence_system() { gpucnn_host::thread_fence(); }
inline void __nanosleep(unsigned) {}

template <class T> T __ldg(const T *address) { return *address; }
template <class T> T __ldcg(const T *address) { return *address; }
template <class T> T __ldca(const T *address) { return *address; }
template <class T> T __ldcs(const T *address) { return *address; }
template <class T> void __stcg(T *address, T value) { *address = value; }
template <class T> void __stcs(T *address, T value) { *address = value; }

}  // namespace
