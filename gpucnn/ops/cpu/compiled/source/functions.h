// exp, tanh, log1p and reciprocals of vectors, to one or two units in the last place at any argument; a NaN stays one.
#pragma once

#include "vector.h"

namespace gpucnn {

GPUCNN_INLINE IntVector bits_of(Vector value) { return (IntVector)value; }
GPUCNN_INLINE Vector from_bits(IntVector bits) { return (Vector)bits; }
GPUCNN_INLINE IntVector broadcast_bits(int32_t bits) { return bits - IntVector{}; }

constexpr int32_t SIGN = INT32_MIN;

GPUCNN_INLINE Vector absolute(Vector v) { return from_bits(bits_of(v) & ~broadcast_bits(SIGN)); }

// The numbers of `size`, which are not negative, with the signs of `v`.
GPUCNN_INLINE Vector with_sign_of(Vector v, Vector size) {
    return from_bits(bits_of(size) | (bits_of(v) & broadcast_bits(SIGN)));
}

// Cut below or above; a NaN passes, as the comparison fails and as minps and maxps give their second operand.
GPUCNN_INLINE Vector at_least(Vector v, float bound) {
#if defined(__AVX512F__)
    return _mm512_maskz_max_ps((__mmask16)-1, broadcast(bound), v);
#else
    return v < broadcast(bound) ? broadcast(bound) : v;
#endif
}
GPUCNN_INLINE Vector at_most(Vector v, float bound) {
#if defined(__AVX512F__)
    return _mm512_maskz_min_ps((__mmask16)-1, broadcast(bound), v);
#else
    return v > broadcast(bound) ? broadcast(bound) : v;
#endif
}

// Horner's rule, from the highest power down.
GPUCNN_INLINE Vector polynomial(Vector, Vector value) { return value; }
template <class... Rest>
GPUCNN_INLINE Vector polynomial(Vector x, Vector value, float coefficient, Rest... rest) {
    return polynomial(x, value * x + coefficient, rest...);
}

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: v + ROUND is v rounded to a whole number, held in its low bits
constexpr float LOG2_E = 1.44269504088896341f;

// value * 2^n for a whole -252 <= n <= 254: in two steps, each by a number, so that a denormal result is rounded once.
GPUCNN_INLINE Vector times_power_of_two(Vector value, Vector n) {
#if defined(__AVX512F__)
    return _mm512_maskz_scalef_ps((__mmask16)-1, value, n);  // unmasked, GCC's own header warns
#else
    IntVector whole = bits_of(n + ROUND) - bits_of(broadcast(ROUND)), half = whole >> 1;
    return value * from_bits((half + 127) << 23) * from_bits((whole - half + 127) << 23);
#endif
}

// 2^t at any t, to one rounding: the whole number below t scales a polynomial in the rest f, 0 <= f <= 1, a minimax
// fit of ours that is exactly 1 at 0 and elsewhere off by a relative 4e-9. exp(x) as 2^(x log2 e) moves the power by
// |x| roundings, as does a rounding of x.
GPUCNN_INLINE Vector exp2(Vector t) {
#if defined(__AVX512DQ__)
    Vector n = t;  // scalef takes the whole number below it, reduce the rest; infinities have the rest 0
    Vector f = _mm512_maskz_reduce_ps((__mmask16)-1, t, 1);
#else
    t = at_most(at_least(t, -152.0f), 129.0f);
    Vector n = ((t - 0.5f) + ROUND) - ROUND, f = t - n;
#endif
    Vector power = polynomial(f, broadcast(2.1877504764e-4f), 1.2401353808e-3f, 9.6812046952e-3f, 5.5483371908e-2f,
                              2.4022945394e-1f, 6.9314705903e-1f, 1.0f);
    return times_power_of_two(power, n);
}

GPUCNN_INLINE Vector exp_of_minus(Vector x) { return exp2(x * -LOG2_E); }

// exp(x), to one unit in the last place: ln 2 is taken in two parts, so that x - n ln 2 keeps its digits; the
// polynomial is that of Cephes' expf (Moshier).
GPUCNN_INLINE Vector exp(Vector x) {
    x = at_most(at_least(x, -104.5f), 89.0f);
    Vector n = (x * LOG2_E + ROUND) - ROUND;
    Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector rest = polynomial(r, broadcast(1.9875691500e-4f), 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                             1.6666665459e-1f, 5.0000001201e-1f);
    return times_power_of_two(rest * (r * r) + r + 1.0f, n);
}

// tanh(x) = e / (e + 2) with e = exp(2 |x|) - 1, which 2^n (2^f - 1) + (2^n - 1) gives without cancellation; 2^f - 1
// is f times a polynomial, for |f| <= 1/2.
GPUCNN_INLINE Vector tanh(Vector x) {
    Vector t = at_most(absolute(x), 10.0f) * (2 * LOG2_E);  // from 9.1 on it is 1 to rounding
    Vector shifted = t + ROUND, f = t - (shifted - ROUND);
    Vector scale = from_bits((bits_of(shifted) << 23) + 0x3f800000);  // 2^n: n is in the low bits
    Vector power = f * polynomial(f, broadcast(1.5469731972e-4f), 1.3410000966e-3f, 9.6180307825e-3f,
                                  5.5502973142e-2f, 2.4022651084e-1f, 6.9314722540e-1f);
    Vector e = power * scale + (scale - 1.0f);
    return with_sign_of(x, e / (e + 2.0f));
}

// 1 / (1 + exp(-x)): where exp is infinite, the reciprocal is the right 0.
GPUCNN_INLINE Vector sigmoid(Vector x) { return 1.0f / (1.0f + exp_of_minus(x)); }

// log(1 + x) for 0 <= x <= 1: log(u) of the rounded sum u, and what its rounding lost, (x - (u - 1)) / u (Kahan).
// u in 1 .. 2 is brought to 1/sqrt 2 .. sqrt 2; the polynomial is that of Cephes' logf.
GPUCNN_INLINE Vector log_of_one_plus(Vector x) {
    Vector u = x + 1.0f, lost = (x - (u - 1.0f)) / u;
    IntVector above = u > broadcast(1.41421356f);
    Vector f = (above ? u * 0.5f : u) - 1.0f, n = above ? broadcast(1.0f) : Vector{};
    Vector square = f * f;
    Vector rest = polynomial(f, broadcast(7.0376836292e-2f), -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f,
                             1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f,
                             3.3333331174e-1f) * f * square;
    rest += lost - n * 2.12194440e-4f - square * 0.5f;
    return f + rest + n * 0.693359375f;
}

// Phi(-a) and exp(-a^2 / 2) for 0 <= a <= 15, Phi the normal distribution function: exp(-a^2 / 2) P(a) / Q(a), the
// fit of gelu.py, to a relative 1.8e-7 near 0.
struct NormalTail {
    Vector tail, power;
};
GPUCNN_INLINE NormalTail normal_tail(Vector a) {
    Vector above = polynomial(a, broadcast(0.39888241616292464f), 2.865660499875126f, 8.804452969258875f,
                              12.376707439035055f);
    Vector below = polynomial(a, a + 7.177214634658324f, 23.164953015776888f, 37.35903440293407f,
                              24.753419265699254f);
    Vector power = exp2(a * a * (-0.5f * LOG2_E));
    return {above * power / below, power};
}

}  // namespace gpucnn
