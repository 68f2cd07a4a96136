// What PTX instructions mean, after the PTX ISA manual: for the C++ that host_ptx.py makes of a kernel's PTX. Names
// are those of its sections; ``flushes`` is .ftz, which takes subnormal numbers of 32 bits, operands and results, as
// zeros of their sign.
#pragma once

#include "gpucnn_host.h"
#include "gpucnn_host_sixteen_bit_format.h"

namespace {

// ---- numbers as other numbers ----

template <class To, class From> inline __attribute__((always_inline)) To as(From value) {
    if constexpr (sizeof(To) == sizeof(From)) {
        To result;
        __builtin_memcpy(&result, &value, sizeof result);
        return result;
    } else {
        return static_cast<To>(value);  // integers: cut off, or extended as the type that it has says
    }
}

template <class Part, int INDEX, class Whole> inline Part part(Whole whole) {
    return static_cast<Part>(as<unsigned long>(whole) >> (8 * sizeof(Part) * INDEX));
}
template <> inline unsigned short part<unsigned short, 0, unsigned>(unsigned whole) { return (unsigned short)whole; }
template <> inline unsigned short part<unsigned short, 1, unsigned>(unsigned whole) {
    return (unsigned short)(whole >> 16);
}

template <class Whole, class... Parts> inline Whole joined(Parts... parts) {
    unsigned long bits = 0;
    int shift = 0;
    ((bits |= static_cast<unsigned long>(parts) << shift, shift += 8 * int(sizeof(parts))), ...);
    if constexpr (sizeof(Whole) == 8) return as<Whole>(bits);
    else return as<Whole>(static_cast<unsigned>(bits));
}

// ---- memory ----
// An address in shared memory is an offset from the dynamic shared memory; of variables that lie elsewhere in the
// module it is negative, and as 32 bits say it.

inline unsigned long shared_address(const void *pointer) {
    return (unsigned long)(static_cast<const unsigned char *>(pointer) - gpucnn_host::dynamic_shared_memory);
}
inline unsigned char *shared_pointer(unsigned long address) {
    return gpucnn_host::dynamic_shared_memory + static_cast<int>(static_cast<unsigned>(address));
}

inline void check_aligned(const void *pointer, unsigned bytes, int line) {
    const unsigned long address = reinterpret_cast<unsigned long>(pointer);
    if (__builtin_expect(address % bytes != 0, 0)) {
        gpucnn_host::fault(
            line, "an access of %u bytes at an address that is no multiple of them: it ends in 0x%02x", bytes,
            unsigned(address & 0xff)
        );
    }
}

template <class T, int COUNT> struct Loaded { T part[COUNT]; };

template <class T, int COUNT>
inline __attribute__((always_inline)) Loaded<T, COUNT> load_from(const unsigned char *place, int line) {
    check_aligned(place, sizeof(T) * COUNT, line);
    Loaded<T, COUNT> loaded;
    for (int index = 0; index < COUNT; ++index) loaded.part[index] = reinterpret_cast<const T *>(place)[index];
    return loaded;
}
// ld.global.nc: by a cache that is not told of writes, so nothing may write there during the launch.
template <class T, int COUNT>
inline __attribute__((always_inline)) Loaded<T, COUNT> load_constant(const unsigned char *place, int line) {
    gpucnn_host::check_unwritten(place, sizeof(T) * COUNT, line);
    return load_from<T, COUNT>(place, line);
}
template <class T, int COUNT>
inline __attribute__((always_inline)) void store_to(unsigned char *place, Loaded<T, COUNT> values, int line) {
    check_aligned(place, sizeof(T) * COUNT, line);
    for (int index = 0; index < COUNT; ++index) reinterpret_cast<T *>(place)[index] = values.part[index];
}
// Parameters lie outside of all that a kernel may touch.
GPUCNN_HOST_NOT_INSTRUMENTED inline unsigned long parameter_address(void **arguments, int index) {
    return reinterpret_cast<unsigned long>(arguments[index]);
}
template <class T> GPUCNN_HOST_NOT_INSTRUMENTED T load_parameter(const unsigned char *place) {
    T value;
    __builtin_memcpy(&value, place, sizeof value);
    return value;
}

// ---- integers ----

template <class T> struct Unsigned { typedef T type; };
template <> struct Unsigned<signed char> { typedef unsigned char type; };
template <> struct Unsigned<short> { typedef unsigned short type; };
template <> struct Unsigned<int> { typedef unsigned type; };
template <> struct Unsigned<long> { typedef unsigned long type; };

template <class T> inline T add_integer(T a, T b) {
    return T((unsigned long)(a) + (unsigned long)(b));
}
template <class T> inline T subtract_integer(T a, T b) { return T((unsigned long)(a) - (unsigned long)(b)); }
template <class T> inline T negate_integer(T a) { return T(0ul - (unsigned long)(a)); }
template <class T> inline T absolute_integer(T a) { return a < 0 ? negate_integer(a) : a; }
template <class T> inline T minimum_integer(T a, T b) { return a < b ? a : b; }
template <class T> inline T maximum_integer(T a, T b) { return a > b ? a : b; }
template <class T> inline T multiply_low(T a, T b) { return T((unsigned long)(a) * (unsigned long)(b)); }
template <class Wide, class T> inline Wide multiply_wide(T a, T b) { return Wide(a) * Wide(b); }
template <class T> inline T multiply_high(T a, T b) {
    typedef __int128 Signed;
    typedef unsigned __int128 Natural;
    if constexpr (T(-1) < T(0)) return T((Signed(a) * Signed(b)) >> (8 * sizeof(T)));
    else return T((Natural(a) * Natural(b)) >> (8 * sizeof(T)));
}
template <class T> inline T divide_integer(T a, T b, int line) {
    if (b == 0) gpucnn_host::fault(line, "an integer is divided by zero");
    if constexpr (T(-1) < T(0)) {
        if (b == T(-1)) return negate_integer(a);
    }
    return T(a / b);
}
template <class T> inline T remainder_integer(T a, T b, int line) {
    if (b == 0) gpucnn_host::fault(line, "the remainder of an integer by zero");
    if constexpr (T(-1) < T(0)) {
        if (b == T(-1)) return 0;
    }
    return T(a % b);
}

// Shifts by the width or more leave nothing, or copies of the sign.
template <class T> inline T shift_left(T value, unsigned by) {
    return by >= 8 * sizeof(T) ? T(0) : T((unsigned long)(value) << by);
}
template <class T> inline T shift_right(T value, unsigned by) {
    if (by >= 8 * sizeof(T)) return value < T(0) ? T(-1) : T(0);
    return T(value >> by);
}
template <class T> inline T insert_field(T field, T into, unsigned position, unsigned length) {
    position &= 0xff, length &= 0xff;
    constexpr unsigned BITS = 8 * sizeof(T);
    if (position >= BITS || length == 0) return into;
    const T ones = length >= BITS ? ~T(0) : T((T(1) << length) - 1);
    const T mask = T(ones << position);
    return T((into & ~mask) | ((field << position) & mask));
}
template <class T> inline T extract_field(T value, unsigned position, unsigned length) {
    position &= 0xff, length &= 0xff;
    constexpr unsigned BITS = 8 * sizeof(T);
    typedef typename Unsigned<T>::type Bits;
    if (length == 0) return 0;
    const bool sign = T(-1) < T(0) && (value >> (position + length - 1 < BITS ? position + length - 1 : BITS - 1) & 1);
    const Bits field = position >= BITS ? Bits(0) : Bits(Bits(value) >> position);
    const unsigned there = position >= BITS ? 0 : length < BITS - position ? length : BITS - position;
    const Bits ones = there >= BITS ? ~Bits(0) : Bits((Bits(1) << there) - 1);
    return T((field & ones) | (sign ? ~ones : Bits(0)));
}
template <class T> inline T permute(T low, T high, unsigned selection) {
    const unsigned long bytes = (unsigned long)(low) | (unsigned long)(high) << 32;
    T result = 0;
    for (unsigned index = 0; index < 4; ++index) {
        const unsigned chosen = selection >> (4 * index) & 15;
        unsigned byte = unsigned(bytes >> (8 * (chosen & 7))) & 0xff;
        if (chosen & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= T(byte) << (8 * index);
    }
    return result;
}
template <class T> inline unsigned count_ones(T bits) { return unsigned(__builtin_popcountl(bits)); }
template <class T> inline unsigned count_leading_zeros(T bits) {
    return bits ? unsigned(__builtin_clzl(bits)) - (64 - 8 * unsigned(sizeof(T))) : 8 * unsigned(sizeof(T));
}
// The place of the highest bit that is not the sign's, or how far to shift it to the left; all ones if there is none.
template <class T, bool shift> inline unsigned find_leading(T value) {
    typedef typename Unsigned<T>::type Bits;
    const Bits bits = value < T(0) ? Bits(~value) : Bits(value);
    if (!bits) return 0xffffffffu;
    const unsigned leading = count_leading_zeros(bits);
    return shift ? leading : 8 * unsigned(sizeof(T)) - 1 - leading;
}
template <class T> inline T reversed(T bits) {
    T result = 0;
    for (unsigned index = 0; index < 8 * sizeof(T); ++index) result |= T(bits >> index & 1) << (8 * sizeof(T) - 1 - index);
    return result;
}
template <class T> inline T logic(T a, T b, T c, unsigned table) {
    T result = 0;
    for (unsigned index = 0; index < 8; ++index) {
        if (table >> index & 1) result |= (index & 4 ? a : ~a) & (index & 2 ? b : ~b) & (index & 1 ? c : ~c);
    }
    return result;
}
template <class T> inline T funnel_l_wrap(T low, T high, unsigned by) {
    by &= 31;
    return T((((unsigned long)(high) << 32 | low) << by) >> 32);
}
template <class T> inline T funnel_r_wrap(T low, T high, unsigned by) {
    by &= 31;
    return T(((unsigned long)(high) << 32 | low) >> by);
}
template <class T> inline T funnel_l_clamp(T low, T high, unsigned by) {
    return by >= 32 ? low : funnel_l_wrap(low, high, by);
}
template <class T> inline T funnel_r_clamp(T low, T high, unsigned by) {
    return by >= 32 ? high : funnel_r_wrap(low, high, by);
}

// ---- floating-point numbers ----

template <class T, bool flushes> inline __attribute__((always_inline)) T flushed(T value) {
    if constexpr (flushes && sizeof(T) == 4) {
        const unsigned bits = as<unsigned>(value);
        return (bits & 0x7f800000u) == 0 ? as<T>(bits & 0x80000000u) : value;
    } else {
        return value;
    }
}
template <class T> inline T saturated(T value) { return value > T(0) ? (value < T(1) ? value : T(1)) : T(0); }

#define GPUCNN_NUMBER_1(NAME, EXPRESSION) \
    template <class T, bool flushes> inline __attribute__((always_inline)) T NAME(T a) { \
        a = flushed<T, flushes>(a); \
        return flushed<T, flushes>(EXPRESSION); \
    }
#define GPUCNN_NUMBER_2(NAME, EXPRESSION) \
    template <class T, bool flushes> inline __attribute__((always_inline)) T NAME(T a, T b) { \
        a = flushed<T, flushes>(a), b = flushed<T, flushes>(b); \
        return flushed<T, flushes>(EXPRESSION); \
    }
GPUCNN_NUMBER_2(add_number, a + b)
GPUCNN_NUMBER_2(subtract_number, a - b)
GPUCNN_NUMBER_2(multiply_number, a *b)
GPUCNN_NUMBER_2(divide_number, a / b)
GPUCNN_NUMBER_1(negate_number, -a)
inline float magnitude(float a) { return __builtin_fabsf(a); }
inline double magnitude(double a) { return __builtin_fabs(a); }
GPUCNN_NUMBER_1(absolute_number, magnitude(a))
template <class T> inline T with_sign(T sign, T value) {
    return __builtin_signbit(sign) ? -magnitude(value) : magnitude(value);
}
// Of a NaN and a number, the number; of zeros, the one whose sign says it.
template <class T> inline T smaller(T a, T b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return __builtin_signbit(a) ? a : b;
    return a < b ? a : b;
}
template <class T> inline T larger(T a, T b) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return __builtin_signbit(a) ? b : a;
    return a > b ? a : b;
}
GPUCNN_NUMBER_2(minimum_number, smaller(a, b))
GPUCNN_NUMBER_2(maximum_number, larger(a, b))

inline float fused_sum(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fused_sum(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <class T, bool flushes> inline __attribute__((always_inline)) T fused_number(T a, T b, T c) {
    a = flushed<T, flushes>(a), b = flushed<T, flushes>(b), c = flushed<T, flushes>(c);
    return flushed<T, flushes>(fused_sum(a, b, c));
}

// Rounded another way than to nearest: the exact sum of a double and of the rest that it left is known.
enum Rounding { TOWARD_ZERO, DOWN, UP };
template <Rounding rounding> inline float rounded(double sum, double rest) {
    float result = static_cast<float>(sum);
    if (!__builtin_isfinite(sum)) return result;
    const bool above = double(result) > sum || (double(result) == sum && rest < 0);
    const bool below = double(result) < sum || (double(result) == sum && rest > 0);
    const bool negative = sum < 0 || (sum == 0 && rest < 0);
    if (above && (rounding == DOWN || (rounding == TOWARD_ZERO && !negative))) {
        return __builtin_nextafterf(result, -__builtin_inff());
    }
    if (below && (rounding == UP || (rounding == TOWARD_ZERO && negative))) {
        return __builtin_nextafterf(result, __builtin_inff());
    }
    return result;
}
inline double rest_of_sum(double a, double b, double sum) {
    const double part = sum - a;
    return (a - (sum - part)) + (b - part);
}
template <class T, bool flushes, Rounding rounding> inline T add_rounded(T a, T b) {
    static_assert(sizeof(T) == 4, "sums of float alone are rounded other ways");
    const double x = flushed<T, flushes>(a), y = flushed<T, flushes>(b), sum = x + y;
    return flushed<T, flushes>(rounded<rounding>(sum, rest_of_sum(x, y, sum)));
}
template <class T, bool flushes, Rounding rounding> inline T fused_rounded(T a, T b, T c) {
    static_assert(sizeof(T) == 4, "sums of float alone are rounded other ways");
    const double product = double(flushed<T, flushes>(a)) * double(flushed<T, flushes>(b));  // exact
    const double plus = flushed<T, flushes>(c), sum = product + plus;
    return flushed<T, flushes>(rounded<rounding>(sum, rest_of_sum(product, plus, sum)));
}

// Those that the manual gives a bound of the error for are as exact as the C library has them.
GPUCNN_NUMBER_1(reciprocal, T(1) / a)
GPUCNN_NUMBER_1(square_root, T(__builtin_sqrt(a)))
GPUCNN_NUMBER_1(reciprocal_square_root, T(1.0 / __builtin_sqrt(double(a))))
GPUCNN_NUMBER_1(power_of_two, T(__builtin_exp2(double(a))))
GPUCNN_NUMBER_1(binary_logarithm, T(__builtin_log2(double(a))))
GPUCNN_NUMBER_1(sine, T(__builtin_sin(double(a))))
GPUCNN_NUMBER_1(cosine, T(__builtin_cos(double(a))))
GPUCNN_NUMBER_1(hyperbolic_tangent, T(__builtin_tanh(double(a))))
// rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 look at the upper half of the bits, and give such a half.
template <class T> inline T upper_half(T value) { return as<T>(as<unsigned long>(value) & 0xffffffff00000000ul); }
template <class T, bool flushes> inline T reciprocal_rough(T a) { return upper_half(1.0 / upper_half(a)); }
template <class T, bool flushes> inline T reciprocal_square_root_rough(T a) {
    return upper_half(1.0 / __builtin_sqrt(upper_half(a)));
}

#define GPUCNN_COMPARE(NAME, EXPRESSION) \
    template <class T, bool flushes> inline __attribute__((always_inline)) bool compare_##NAME(T a, T b) { \
        a = flushed<T, flushes>(a), b = flushed<T, flushes>(b); \
        return EXPRESSION; \
    }
GPUCNN_COMPARE(eq, a == b)
GPUCNN_COMPARE(ne, a < b || a > b)
GPUCNN_COMPARE(lt, a < b)
GPUCNN_COMPARE(le, a <= b)
GPUCNN_COMPARE(gt, a > b)
GPUCNN_COMPARE(ge, a >= b)
GPUCNN_COMPARE(equ, !(a < b || a > b))
GPUCNN_COMPARE(neu, a != b)
GPUCNN_COMPARE(ltu, !(a >= b))
GPUCNN_COMPARE(leu, !(a > b))
GPUCNN_COMPARE(gtu, !(a <= b))
GPUCNN_COMPARE(geu, !(a < b))
GPUCNN_COMPARE(num, a == a && b == b)
GPUCNN_COMPARE(nan, a != a || b != b)

// ---- conversions ----

inline float whole_rni(float a) { return __builtin_rintf(a); }
inline float whole_rzi(float a) { return __builtin_truncf(a); }
inline float whole_rmi(float a) { return __builtin_floorf(a); }
inline float whole_rpi(float a) { return __builtin_ceilf(a); }
inline double whole_rni(double a) { return __builtin_rint(a); }
inline double whole_rzi(double a) { return __builtin_trunc(a); }
inline double whole_rmi(double a) { return __builtin_floor(a); }
inline double whole_rpi(double a) { return __builtin_ceil(a); }

template <class To, class From, bool flushes> inline To to_number(From value) {
    return flushed<To, flushes>(static_cast<To>(flushed<From, flushes>(value)));
}
// A NaN becomes zero, what is too large the largest.
template <class To, class From, bool flushes> inline To to_integer(From value) {
    constexpr bool SIGNED = To(-1) < To(0);
    constexpr int BITS = 8 * int(sizeof(To)) - (SIGNED ? 1 : 0);
    if (value != value) return 0;
    const double limit = __builtin_ldexp(1.0, BITS);
    if (double(value) >= limit) return To(~0ul >> (64 - BITS));
    if (double(value) < (SIGNED ? -limit : 0.0)) return SIGNED ? To(1ul << BITS) : To(0);
    return static_cast<To>(value);
}
// Ten fraction bits: ties away from zero (rna), or to even (rn).
inline unsigned to_tf32_rna(float value) {
    const unsigned bits = as<unsigned>(value);
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits & 0x007fffffu ? 0x7fffffffu : bits;
    return (bits + 0x1000u) & 0xffffe000u;
}
inline unsigned to_tf32_rn(float value) {
    const unsigned bits = as<unsigned>(value);
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits & 0x007fffffu ? 0x7fffffffu : bits;
    return (bits + 0xfffu + (bits >> 13 & 1)) & 0xffffe000u;
}
template <int EXPONENT_BITS> inline unsigned narrow_pair(float high, float low) {
    typedef gpucnn_host::Format<EXPONENT_BITS> Format;
    return unsigned(Format::narrow(high)) << 16 | Format::narrow(low);
}

template <int EXPONENT_BITS> inline unsigned short add_atomically(unsigned char *place, unsigned short value, int line) {
    typedef gpucnn_host::Format<EXPONENT_BITS> Format;
    check_aligned(place, 2, line);
    gpucnn_host::AtomicAccess atomic;
    unsigned short *number = reinterpret_cast<unsigned short *>(place);
    const unsigned short old = *number;
    *number = Format::narrow(Format::widen(old) + Format::widen(value));
    return old;
}

// ---- a warp together ----

inline void warp_barrier(unsigned mask, int line) {
    char nothing;
    gpucnn_host::warp_operation("bar.warp.sync", mask, line, &nothing, gpucnn_host::resolve_nothing);
}

inline unsigned ballot(bool predicate, unsigned mask, int line) {
    return unsigned(gpucnn_host::vote<gpucnn_host::Ballot>("vote.sync", mask, line, predicate));
}

// shfl.sync: ``clamp`` holds the last lane of a segment in bits 0 to 4 and the segment's mask in bits 8 to 12. A
// lane whose source lies outside of its segment reads itself.
inline unsigned shuffled(
    const char *name, unsigned value, unsigned source, bool inside, unsigned mask, int line
) {
    return gpucnn_host::exchange(name, mask, line, value, inside ? source : gpucnn_host::lane());
}
#define GPUCNN_SHUFFLE(NAME, SOURCE, INSIDE) \
    inline unsigned shuffle_##NAME( \
        unsigned value, unsigned by, unsigned clamp, unsigned mask, bool &inside, int line \
    ) { \
        const unsigned lane = gpucnn_host::lane(), segment = clamp >> 8 & 31; \
        const unsigned first = lane & segment, last = first | (clamp & 31 & ~segment); \
        by &= 31; \
        const unsigned source = SOURCE; \
        (void)first, (void)last; \
        inside = INSIDE; \
        return shuffled("shfl.sync." #NAME, value, source, inside, mask, line); \
    }
GPUCNN_SHUFFLE(up, lane - by, int(source) >= int(last))
GPUCNN_SHUFFLE(down, lane + by, source <= last)
GPUCNN_SHUFFLE(bfly, lane ^ by, source <= last)
GPUCNN_SHUFFLE(idx, first | (by & ~segment), source <= last)

}  // namespace
