// CUDA's mathematical functions, conversions and bit operations. The fast forms (__expf and the like) are the
// accurate ones here: hardware's errors are not imitated. The forms with _rn round once and are never fused.
#pragma once

#define GPUCNN_HOST_MATH1(NAME) \
    inline float NAME##f(float x) { return __builtin_##NAME##f(x); } \
    inline float NAME(float x) { return __builtin_##NAME##f(x); } \
    inline double NAME(double x) { return __builtin_##NAME(x); } \
    inline double NAME(int x) { return __builtin_##NAME(double(x)); }
#define GPUCNN_HOST_MATH2(NAME) \
    inline float NAME##f(float x, float y) { return __builtin_##NAME##f(x, y); } \
    inline float NAME(float x, float y) { return __builtin_##NAME##f(x, y); } \
    inline double NAME(double x, double y) { return __builtin_##NAME(x, y); } \
    inline double NAME(float x, double y) { return __builtin_##NAME(double(x), y); } \
    inline double NAME(double x, float y) { return __builtin_##NAME(x, double(y)); } \
    inline double NAME(double x, int y) { return __builtin_##NAME(x, double(y)); } \
    inline float NAME(float x, int y) { return __builtin_##NAME##f(x, float(y)); }

#if defined(__clang__)  // which has no __builtin_exp10; the C library has the function, by other names for us
double gpucnn_host_exp10(double) __asm__("exp10");
float gpucnn_host_exp10f(float) __asm__("exp10f");
#define __builtin_exp10 gpucnn_host_exp10
#define __builtin_exp10f gpucnn_host_exp10f
#endif

namespace {

GPUCNN_HOST_MATH1(exp10)
GPUCNN_HOST_MATH1(exp)
GPUCNN_HOST_MATH1(exp2)
GPUCNN_HOST_MATH1(expm1)
GPUCNN_HOST_MATH1(log)
GPUCNN_HOST_MATH1(log2)
GPUCNN_HOST_MATH1(log10)
GPUCNN_HOST_MATH1(log1p)
GPUCNN_HOST_MATH1(logb)
GPUCNN_HOST_MATH1(sqrt)
GPUCNN_HOST_MATH1(cbrt)
GPUCNN_HOST_MATH1(sin)
GPUCNN_HOST_MATH1(cos)
GPUCNN_HOST_MATH1(tan)
GPUCNN_HOST_MATH1(asin)
GPUCNN_HOST_MATH1(acos)
GPUCNN_HOST_MATH1(atan)
GPUCNN_HOST_MATH1(sinh)
GPUCNN_HOST_MATH1(cosh)
GPUCNN_HOST_MATH1(tanh)
GPUCNN_HOST_MATH1(asinh)
GPUCNN_HOST_MATH1(acosh)
GPUCNN_HOST_MATH1(atanh)
GPUCNN_HOST_MATH1(erf)
GPUCNN_HOST_MATH1(erfc)
GPUCNN_HOST_MATH1(tgamma)
GPUCNN_HOST_MATH1(lgamma)
GPUCNN_HOST_MATH1(floor)
GPUCNN_HOST_MATH1(ceil)
GPUCNN_HOST_MATH1(trunc)
GPUCNN_HOST_MATH1(round)
GPUCNN_HOST_MATH1(rint)
GPUCNN_HOST_MATH1(nearbyint)
GPUCNN_HOST_MATH1(fabs)
GPUCNN_HOST_MATH2(pow)
GPUCNN_HOST_MATH2(atan2)
GPUCNN_HOST_MATH2(hypot)
GPUCNN_HOST_MATH2(fmod)
GPUCNN_HOST_MATH2(remainder)
GPUCNN_HOST_MATH2(fdim)
GPUCNN_HOST_MATH2(fmax)
GPUCNN_HOST_MATH2(fmin)
GPUCNN_HOST_MATH2(copysign)
GPUCNN_HOST_MATH2(nextafter)

inline float rsqrtf(float x) { return float(1.0 / __builtin_sqrt(double(x))); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }
inline float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
inline float ldexpf(float x, int exponent) { return __builtin_ldexpf(x, exponent); }
inline float ldexp(float x, int exponent) { return __builtin_ldexpf(x, exponent); }
inline double ldexp(double x, int exponent) { return __builtin_ldexp(x, exponent); }
inline float scalbnf(float x, int exponent) { return __builtin_ldexpf(x, exponent); }
inline double scalbn(double x, int exponent) { return __builtin_ldexp(x, exponent); }
inline float frexpf(float x, int *exponent) { return __builtin_frexpf(x, exponent); }
inline double frexp(double x, int *exponent) { return __builtin_frexp(x, exponent); }
inline float modff(float x, float *whole) { return __builtin_modff(x, whole); }
inline double modf(double x, double *whole) { return __builtin_modf(x, whole); }
inline long lrintf(float x) { return __builtin_lrintf(x); }
inline long lrint(double x) { return __builtin_lrint(x); }
inline long lroundf(float x) { return __builtin_lroundf(x); }
inline long lround(double x) { return __builtin_lround(x); }
inline long long llrintf(float x) { return __builtin_llrintf(x); }
inline long long llrint(double x) { return __builtin_llrint(x); }
inline void sincosf(float x, float *sine, float *cosine) { *sine = sinf(x), *cosine = cosf(x); }
inline void sincos(double x, double *sine, double *cosine) { *sine = sin(x), *cosine = cos(x); }
inline double sinpi(double x) { return sin(3.14159265358979323846 * __builtin_fmod(x, 2.0)); }
inline double cospi(double x) { return cos(3.14159265358979323846 * __builtin_fmod(x, 2.0)); }
inline float sinpif(float x) { return float(sinpi(double(x))); }
inline float cospif(float x) { return float(cospi(double(x))); }
inline double normcdf(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }
inline float normcdff(float x) { return float(normcdf(double(x))); }

template <class T> bool isnan(T x) { return __builtin_isnan(x); }
template <class T> bool isinf(T x) { return __builtin_isinf(x); }
template <class T> bool isfinite(T x) { return __builtin_isfinite(x); }
template <class T> bool signbit(T x) { return __builtin_signbit(x); }

inline int abs(int x) { return x < 0 ? -x : x; }
inline long abs(long x) { return x < 0 ? -x : x; }
inline long long abs(long long x) { return x < 0 ? -x : x; }
inline long long llabs(long long x) { return x < 0 ? -x : x; }
inline float abs(float x) { return __builtin_fabsf(x); }
inline double abs(double x) { return __builtin_fabs(x); }

// min and max of mixed types give CUDA's result type; of floating-point numbers they skip a NaN, as fmin and fmax.
#define GPUCNN_HOST_EXTREMES(RESULT, LEFT, RIGHT) \
    inline RESULT min(LEFT x, RIGHT y) { return (RESULT)x < (RESULT)y ? (RESULT)x : (RESULT)y; } \
    inline RESULT max(LEFT x, RIGHT y) { return (RESULT)x > (RESULT)y ? (RESULT)x : (RESULT)y; }
GPUCNN_HOST_EXTREMES(int, int, int)
GPUCNN_HOST_EXTREMES(unsigned int, unsigned int, unsigned int)
GPUCNN_HOST_EXTREMES(unsigned int, int, unsigned int)
GPUCNN_HOST_EXTREMES(unsigned int, unsigned int, int)
GPUCNN_HOST_EXTREMES(long, long, long)
GPUCNN_HOST_EXTREMES(unsigned long, unsigned long, unsigned long)
GPUCNN_HOST_EXTREMES(unsigned long, long, unsigned long)
GPUCNN_HOST_EXTREMES(unsigned long, unsigned long, long)
GPUCNN_HOST_EXTREMES(long long, long long, long long)
GPUCNN_HOST_EXTREMES(unsigned long long, unsigned long long, unsigned long long)
GPUCNN_HOST_EXTREMES(unsigned long long, long long, unsigned long long)
GPUCNN_HOST_EXTREMES(unsigned long long, unsigned long long, long long)
#undef GPUCNN_HOST_EXTREMES
inline float min(float x, float y) { return __builtin_fminf(x, y); }
inline float max(float x, float y) { return __builtin_fmaxf(x, y); }
inline double min(double x, double y) { return __builtin_fmin(x, y); }
inline double max(double x, double y) { return __builtin_fmax(x, y); }
inline double min(float x, double y) { return __builtin_fmin(double(x), y); }
inline double max(float x, double y) { return __builtin_fmax(double(x), y); }
inline double min(double x, float y) { return __builtin_fmin(x, double(y)); }
inline double max(double x, float y) { return __builtin_fmax(x, double(y)); }

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return exp10f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline void __sincosf(float x, float *sine, float *cosine) { sincosf(x, sine, cosine); }
inline float __fdividef(float x, float y) { return x / y; }
inline float fdividef(float x, float y) { return x / y; }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __drcp_rn(double x) { return 1.0 / x; }
inline double __dsqrt_rn(double x) { return __builtin_sqrt(x); }
inline double __fma_rn(double x, double y, double z) { return __builtin_fma(x, y, z); }

// Conversions to integers saturate, and give 0 for NaN (for 64 bits: the lowest number), as cvt does.
template <class Integer>
Integer gpucnn_host_saturated(double rounded, Integer lowest, Integer highest, Integer nan) {
    if (rounded != rounded) return nan;
    if (rounded <= double(lowest)) return lowest;
    if (rounded >= double(highest)) return highest;
    return Integer(rounded);
}
#define GPUCNN_HOST_ROUNDED(FROM, PREFIX, SUFFIX, ROUND) \
    inline int PREFIX##2int_##SUFFIX(FROM x) { \
        return gpucnn_host_saturated<int>(ROUND(double(x)), -2147483647 - 1, 2147483647, 0); \
    } \
    inline unsigned PREFIX##2uint_##SUFFIX(FROM x) { \
        return gpucnn_host_saturated<unsigned>(ROUND(double(x)), 0u, 4294967295u, 0u); \
    } \
    inline long long PREFIX##2ll_##SUFFIX(FROM x) { \
        return gpucnn_host_saturated<long long>( \
            ROUND(double(x)), -9223372036854775807LL - 1, 9223372036854775807LL, -9223372036854775807LL - 1 \
        ); \
    }
#define GPUCNN_HOST_ALL_ROUNDINGS(FROM, PREFIX) \
    GPUCNN_HOST_ROUNDED(FROM, PREFIX, rn, __builtin_rint) \
    GPUCNN_HOST_ROUNDED(FROM, PREFIX, rz, __builtin_trunc) \
    GPUCNN_HOST_ROUNDED(FROM, PREFIX, ru, __builtin_ceil) \
    GPUCNN_HOST_ROUNDED(FROM, PREFIX, rd, __builtin_floor)
GPUCNN_HOST_ALL_ROUNDINGS(float, __float)
GPUCNN_HOST_ALL_ROUNDINGS(double, __double)
#undef GPUCNN_HOST_ALL_ROUNDINGS
#undef GPUCNN_HOST_ROUNDED
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline double __int2double_rn(int x) { return double(x); }
inline double __uint2double_rn(unsigned x) { return double(x); }
inline double __ll2double_rn(long long x) { return double(x); }
inline float __double2float_rn(double x) { return float(x); }

template <class To, class From> To gpucnn_host_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "both have as many bits");
    To bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline int __float_as_int(float x) { return gpucnn_host_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return gpucnn_host_bits<unsigned>(x); }
inline float __int_as_float(int x) { return gpucnn_host_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return gpucnn_host_bits<float>(x); }
inline long long __double_as_longlong(double x) { return gpucnn_host_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return gpucnn_host_bits<double>(x); }
inline int __double2hiint(double x) { return int(__double_as_longlong(x) >> 32); }
inline int __double2loint(double x) { return int(__double_as_longlong(x)); }
inline double __hiloint2double(int high, int low) {
    return __longlong_as_double((long long)((unsigned long long)unsigned(high) << 32 | unsigned(low)));
}

inline int __mulhi(int x, int y) { return int(((long long)x * y) >> 32); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(((unsigned long long)x * y) >> 32); }
inline long long __mul64hi(long long x, long long y) { return (long long)(((__int128)x * y) >> 64); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)(((unsigned __int128)x * y) >> 64);
}
inline int __mul24(int x, int y) { return int(unsigned(x << 8 >> 8) * unsigned(y << 8 >> 8)); }
inline unsigned __umul24(unsigned x, unsigned y) { return (x & 0xffffffu) * (y & 0xffffffu); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
    return reversed;
}
inline unsigned long long __brevll(unsigned long long x) {
    return (unsigned long long)__brev(unsigned(x)) << 32 | __brev(unsigned(x >> 32));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int index = 0; index < 4; ++index) {
        const unsigned choice = selector >> (4 * index) & 0xf;
        unsigned byte = unsigned(bytes >> (8 * (choice & 7))) & 0xff;
        if (choice & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign of that byte
        result |= byte << (8 * index);
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) >> (shift & 31));
}
inline unsigned __sad(int x, int y, unsigned sum) { return (x > y ? unsigned(x) - y : unsigned(y) - x) + sum; }
inline int __dp4a(int x, int y, int sum) {
    for (int shift = 0; shift < 32; shift += 8) {
        sum += int((signed char)(unsigned(x) >> shift)) * int((signed char)(unsigned(y) >> shift));
    }
    return sum;
}

}  // namespace

#undef GPUCNN_HOST_MATH1
#undef GPUCNN_HOST_MATH2
