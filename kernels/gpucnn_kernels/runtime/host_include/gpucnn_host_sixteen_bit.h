// What __half and __nv_bfloat16 have in common: a 16-bit number is stored, arithmetic is done in float and rounded
// once, to nearest even. (float has more than twice their digits and two more, so rounding first to float and then
// to 16 bits gives the correctly rounded sum, difference, product, quotient and root; fma takes more care.)
#pragma once

#include "gpucnn_host_sixteen_bit_format.h"

namespace gpucnn_host {

template <int EXPONENT_BITS> float to_float(unsigned short bits) {
    return float(Format<EXPONENT_BITS>::widen(bits));  // exact
}
template <int EXPONENT_BITS> unsigned short from_float(float value) {
    return Format<EXPONENT_BITS>::narrow(double(value));
}

// The same for bfloat16 in fewer steps: it is the upper half of a float.
template <> inline float to_float<8>(unsigned short bits) {
    const unsigned word = unsigned(bits) << 16;
    float value;
    __builtin_memcpy(&value, &word, sizeof value);
    return value;
}
template <> inline unsigned short from_float<8>(float value) {
    unsigned word;
    __builtin_memcpy(&word, &value, sizeof word);
    if (value != value) return Format<8>::QUIET_NAN;
    return (unsigned short)((word + 0x7fffu + (word >> 16 & 1)) >> 16);
}
#if defined(__F16C__) && defined(__FLT16_MAX__)  // the machine converts halves itself
template <> inline float to_float<5>(unsigned short bits) {
    _Float16 value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return float(value);
}
template <> inline unsigned short from_float<5>(float value) {
    if (value != value) return Format<5>::QUIET_NAN;
    const _Float16 narrowed = _Float16(value);
    unsigned short bits;
    __builtin_memcpy(&bits, &narrowed, sizeof bits);
    return bits;
}
#endif

// x y + z in double, inexact results to the neighbour with an odd last bit, so that rounding again to fewer digits
// rounds correctly (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008). The product of two
// numbers of 16 bits is exact, and what the addition loses is found by Knuth's two-sum.
inline double multiply_add_to_odd(double x, double y, double z) {
    const double product = x * y, sum = product + z, added = sum - product;
    const double lost = (product - (sum - added)) + (z - added);
    if (!(lost > 0 || lost < 0) || sum - sum != 0) return sum;  // exact, infinite or NaN
    unsigned long long bits;
    __builtin_memcpy(&bits, &sum, sizeof bits);
    if (bits % 2 == 0) bits += (lost > 0) == (sum > 0) ? 1 : -1;
    double odd;
    __builtin_memcpy(&odd, &bits, sizeof odd);
    return odd;
}

// The types themselves: __half is SixteenBit<5>, __nv_bfloat16 is SixteenBit<8>.
template <int E> struct SixteenBit {
    unsigned short bits;

    SixteenBit() = default;
    SixteenBit(float value) : bits(from_float<E>(value)) {}
    SixteenBit(double value) : bits(Format<E>::narrow(value)) {}
    SixteenBit(int value) : bits(Format<E>::narrow(double(value))) {}
    SixteenBit(unsigned value) : bits(Format<E>::narrow(double(value))) {}
    SixteenBit(short value) : bits(Format<E>::narrow(double(value))) {}
    SixteenBit(unsigned short value) : bits(Format<E>::narrow(double(value))) {}
    operator float() const { return to_float<E>(bits); }

    SixteenBit &operator+=(SixteenBit other) { return *this = *this + other; }
    SixteenBit &operator-=(SixteenBit other) { return *this = *this - other; }
    SixteenBit &operator*=(SixteenBit other) { return *this = *this * other; }
    SixteenBit &operator/=(SixteenBit other) { return *this = *this / other; }
    friend SixteenBit operator+(SixteenBit x) { return x; }
    friend SixteenBit operator-(SixteenBit x) { return from_bits((unsigned short)(x.bits ^ 0x8000u)); }
    friend SixteenBit operator+(SixteenBit x, SixteenBit y) { return SixteenBit(float(x) + float(y)); }
    friend SixteenBit operator-(SixteenBit x, SixteenBit y) { return SixteenBit(float(x) - float(y)); }
    friend SixteenBit operator*(SixteenBit x, SixteenBit y) { return SixteenBit(float(x) * float(y)); }
    friend SixteenBit operator/(SixteenBit x, SixteenBit y) { return SixteenBit(float(x) / float(y)); }
    friend bool operator==(SixteenBit x, SixteenBit y) { return float(x) == float(y); }
    friend bool operator!=(SixteenBit x, SixteenBit y) { return float(x) != float(y); }
    friend bool operator<(SixteenBit x, SixteenBit y) { return float(x) < float(y); }
    friend bool operator<=(SixteenBit x, SixteenBit y) { return float(x) <= float(y); }
    friend bool operator>(SixteenBit x, SixteenBit y) { return float(x) > float(y); }
    friend bool operator>=(SixteenBit x, SixteenBit y) { return float(x) >= float(y); }

    static SixteenBit from_bits(unsigned short bits) {
        SixteenBit value;
        value.bits = bits;
        return value;
    }
};

template <int E> struct alignas(4) SixteenBitPair {
    SixteenBit<E> x, y;
    friend SixteenBitPair operator+(SixteenBitPair a, SixteenBitPair b) { return {a.x + b.x, a.y + b.y}; }
    friend SixteenBitPair operator-(SixteenBitPair a, SixteenBitPair b) { return {a.x - b.x, a.y - b.y}; }
    friend SixteenBitPair operator*(SixteenBitPair a, SixteenBitPair b) { return {a.x * b.x, a.y * b.y}; }
    friend SixteenBitPair operator/(SixteenBitPair a, SixteenBitPair b) { return {a.x / b.x, a.y / b.y}; }
};

}  // namespace gpucnn_host

// The intrinsics that have one name for both types.
namespace {

#define GPUCNN_HOST_NUMBER gpucnn_host::SixteenBit<E>
#define GPUCNN_HOST_PAIR gpucnn_host::SixteenBitPair<E>
#define GPUCNN_HOST_BINARY(NAME, EXPRESSION) \
    template <int E> GPUCNN_HOST_NUMBER NAME(GPUCNN_HOST_NUMBER x, GPUCNN_HOST_NUMBER y) { return EXPRESSION; } \
    template <int E> GPUCNN_HOST_PAIR NAME##2(GPUCNN_HOST_PAIR x, GPUCNN_HOST_PAIR y) { \
        return {NAME(x.x, y.x), NAME(x.y, y.y)}; \
    }
#define GPUCNN_HOST_UNARY(NAME, EXPRESSION) \
    template <int E> GPUCNN_HOST_NUMBER NAME(GPUCNN_HOST_NUMBER x) { return EXPRESSION; }
#define GPUCNN_HOST_COMPARISON(NAME, EXPRESSION) \
    template <int E> bool NAME(GPUCNN_HOST_NUMBER x, GPUCNN_HOST_NUMBER y) { return EXPRESSION; }

GPUCNN_HOST_BINARY(__hadd, x + y)
GPUCNN_HOST_BINARY(__hsub, x - y)
GPUCNN_HOST_BINARY(__hmul, x *y)
GPUCNN_HOST_BINARY(__hmax, x != x ? y : y != y ? x : x > y || (x == y && y.bits >> 15) ? x : y)  // +0 above -0
GPUCNN_HOST_BINARY(__hmin, x != x ? y : y != y ? x : x < y || (x == y && x.bits >> 15) ? x : y)
template <int E> GPUCNN_HOST_NUMBER __hdiv(GPUCNN_HOST_NUMBER x, GPUCNN_HOST_NUMBER y) { return x / y; }
template <int E> GPUCNN_HOST_PAIR __h2div(GPUCNN_HOST_PAIR x, GPUCNN_HOST_PAIR y) { return x / y; }
template <int E>
GPUCNN_HOST_NUMBER __hfma(GPUCNN_HOST_NUMBER x, GPUCNN_HOST_NUMBER y, GPUCNN_HOST_NUMBER z) {
    return GPUCNN_HOST_NUMBER::from_bits(
        gpucnn_host::Format<E>::narrow(gpucnn_host::multiply_add_to_odd(float(x), float(y), float(z)))
    );
}
template <int E> GPUCNN_HOST_PAIR __hfma2(GPUCNN_HOST_PAIR x, GPUCNN_HOST_PAIR y, GPUCNN_HOST_PAIR z) {
    return {__hfma(x.x, y.x, z.x), __hfma(x.y, y.y, z.y)};
}
GPUCNN_HOST_UNARY(__hneg, -x)
GPUCNN_HOST_UNARY(__habs, GPUCNN_HOST_NUMBER::from_bits((unsigned short)(x.bits & 0x7fffu)))
template <int E> GPUCNN_HOST_PAIR __hneg2(GPUCNN_HOST_PAIR x) { return {-x.x, -x.y}; }
template <int E> GPUCNN_HOST_PAIR __habs2(GPUCNN_HOST_PAIR x) { return {__habs(x.x), __habs(x.y)}; }
GPUCNN_HOST_COMPARISON(__heq, x == y)
GPUCNN_HOST_COMPARISON(__hne, x == x && y == y && x != y)
GPUCNN_HOST_COMPARISON(__hlt, x < y)
GPUCNN_HOST_COMPARISON(__hle, x <= y)
GPUCNN_HOST_COMPARISON(__hgt, x > y)
GPUCNN_HOST_COMPARISON(__hge, x >= y)
template <int E> bool __hisnan(GPUCNN_HOST_NUMBER x) { return x != x; }
template <int E> int __hisinf(GPUCNN_HOST_NUMBER x) {
    return (x.bits & 0x7fffu) != gpucnn_host::Format<E>::INFINITE ? 0 : x.bits >> 15 ? -1 : 1;
}
GPUCNN_HOST_UNARY(hexp, GPUCNN_HOST_NUMBER(exp(double(float(x)))))
GPUCNN_HOST_UNARY(hexp2, GPUCNN_HOST_NUMBER(exp2(double(float(x)))))
GPUCNN_HOST_UNARY(hlog, GPUCNN_HOST_NUMBER(log(double(float(x)))))
GPUCNN_HOST_UNARY(hlog2, GPUCNN_HOST_NUMBER(log2(double(float(x)))))
GPUCNN_HOST_UNARY(hsqrt, GPUCNN_HOST_NUMBER(sqrt(double(float(x)))))
GPUCNN_HOST_UNARY(hrsqrt, GPUCNN_HOST_NUMBER(rsqrt(double(float(x)))))
GPUCNN_HOST_UNARY(hrcp, GPUCNN_HOST_NUMBER(1.0 / double(float(x))))
GPUCNN_HOST_UNARY(hsin, GPUCNN_HOST_NUMBER(sin(double(float(x)))))
GPUCNN_HOST_UNARY(hcos, GPUCNN_HOST_NUMBER(cos(double(float(x)))))
GPUCNN_HOST_UNARY(htanh, GPUCNN_HOST_NUMBER(tanh(double(float(x)))))
GPUCNN_HOST_UNARY(hfloor, GPUCNN_HOST_NUMBER(floorf(float(x))))
GPUCNN_HOST_UNARY(hceil, GPUCNN_HOST_NUMBER(ceilf(float(x))))
GPUCNN_HOST_UNARY(htrunc, GPUCNN_HOST_NUMBER(truncf(float(x))))
GPUCNN_HOST_UNARY(hrint, GPUCNN_HOST_NUMBER(rintf(float(x))))

template <int E> float __low2float(GPUCNN_HOST_PAIR x) { return float(x.x); }
template <int E> float __high2float(GPUCNN_HOST_PAIR x) { return float(x.y); }
template <int E> GPUCNN_HOST_PAIR __lowhigh2highlow(GPUCNN_HOST_PAIR x) { return {x.y, x.x}; }

// Added with the rounding of one addition, as the hardware's instruction.
template <int E> GPUCNN_HOST_NUMBER atomicAdd(GPUCNN_HOST_NUMBER *address, GPUCNN_HOST_NUMBER value) {
    gpucnn_host::AtomicAccess atomic;
    const GPUCNN_HOST_NUMBER old = *address;
    *address = old + value;
    return old;
}
template <int E> GPUCNN_HOST_PAIR atomicAdd(GPUCNN_HOST_PAIR *address, GPUCNN_HOST_PAIR value) {
    gpucnn_host::AtomicAccess atomic;
    const GPUCNN_HOST_PAIR old = *address;
    *address = old + value;
    return old;
}

}  // namespace

#undef GPUCNN_HOST_NUMBER
#undef GPUCNN_HOST_PAIR
#undef GPUCNN_HOST_BINARY
#undef GPUCNN_HOST_UNARY
#undef GPUCNN_HOST_COMPARISON

// The conversions, whose names differ by type only: NUMBER and PAIR are the types, WORD how names spell the type.
#define GPUCNN_HOST_CONVERSIONS(NUMBER, PAIR, WORD, E) \
    inline float __##WORD##2float(NUMBER x) { return float(x); } \
    inline NUMBER __float2##WORD(float x) { return NUMBER(x); } \
    inline NUMBER __float2##WORD##_rn(float x) { return NUMBER(x); } \
    GPUCNN_HOST_NARROW(NUMBER, __float2##WORD##_rz, float, E, TOWARD_ZERO) \
    GPUCNN_HOST_NARROW(NUMBER, __float2##WORD##_ru, float, E, UP) \
    GPUCNN_HOST_NARROW(NUMBER, __float2##WORD##_rd, float, E, DOWN) \
    GPUCNN_HOST_NARROW(NUMBER, __double2##WORD, double, E, NEAREST_EVEN) \
    GPUCNN_HOST_NARROW(NUMBER, __int2##WORD##_rn, int, E, NEAREST_EVEN) \
    GPUCNN_HOST_NARROW(NUMBER, __uint2##WORD##_rn, unsigned, E, NEAREST_EVEN) \
    GPUCNN_HOST_NARROW(NUMBER, __short2##WORD##_rn, short, E, NEAREST_EVEN) \
    GPUCNN_HOST_NARROW(NUMBER, __ushort2##WORD##_rn, unsigned short, E, NEAREST_EVEN) \
    inline int __##WORD##2int_rn(NUMBER x) { return __float2int_rn(float(x)); } \
    inline int __##WORD##2int_rz(NUMBER x) { return __float2int_rz(float(x)); } \
    inline int __##WORD##2int_rd(NUMBER x) { return __float2int_rd(float(x)); } \
    inline int __##WORD##2int_ru(NUMBER x) { return __float2int_ru(float(x)); } \
    inline unsigned __##WORD##2uint_rn(NUMBER x) { return __float2uint_rn(float(x)); } \
    inline unsigned __##WORD##2uint_rz(NUMBER x) { return __float2uint_rz(float(x)); } \
    inline unsigned short __##WORD##_as_ushort(NUMBER x) { return x.bits; } \
    inline short __##WORD##_as_short(NUMBER x) { return short(x.bits); } \
    inline NUMBER __ushort_as_##WORD(unsigned short bits) { return NUMBER::from_bits(bits); } \
    inline NUMBER __short_as_##WORD(short bits) { return NUMBER::from_bits((unsigned short)bits); } \
    inline PAIR __floats2##WORD##2_rn(float x, float y) { return {NUMBER(x), NUMBER(y)}; } \
    inline PAIR __float22##WORD##2_rn(float2 x) { return {NUMBER(x.x), NUMBER(x.y)}; } \
    inline PAIR __float2##WORD##2_rn(float x) { return {NUMBER(x), NUMBER(x)}; } \
    inline float2 __##WORD##22float2(PAIR x) { return float2{float(x.x), float(x.y)}; } \
    inline PAIR __##WORD##2##WORD##2(NUMBER x) { return {x, x}; } \
    inline NUMBER __low2##WORD(PAIR x) { return x.x; } \
    inline NUMBER __high2##WORD(PAIR x) { return x.y; } \
    inline PAIR __low2##WORD##2(PAIR x) { return {x.x, x.x}; } \
    inline PAIR __high2##WORD##2(PAIR x) { return {x.y, x.y}; } \
    inline PAIR __lows2##WORD##2(PAIR x, PAIR y) { return {x.x, y.x}; } \
    inline PAIR __highs2##WORD##2(PAIR x, PAIR y) { return {x.y, y.y}; }
#define GPUCNN_HOST_NARROW(NUMBER, NAME, FROM, E, DIRECTION) \
    inline NUMBER NAME(FROM x) { \
        return NUMBER::from_bits(gpucnn_host::Format<E>::narrow(double(x), gpucnn_host::Format<E>::DIRECTION)); \
    }
