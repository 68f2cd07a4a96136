// The transforms along one axis, for polynomials evaluated at 0, +-P, +-Q and infinity with P * Q = 1: the two
// points of a pair share their even and their odd part.
//
// With N(z) = z (z^2 - P^2) (z^2 - Q^2): B's rows are the coefficients of N(z) / (z - point), G's the powers of a
// point over N'(point), A's columns its powers (Lagrange's interpolation, transposed).
#pragma once

#include "winograd.h"

namespace gpucnn {
namespace winograd {

constexpr double POINT_P = 2.0 / 3, POINT_Q = 3.0 / 2;
constexpr float P1 = POINT_P, Q1 = POINT_Q;
constexpr float P2 = POINT_P * POINT_P, Q2 = POINT_Q *POINT_Q, BOTH = POINT_P * POINT_P + POINT_Q * POINT_Q;
constexpr float P3 = POINT_P * POINT_P *POINT_P, Q3 = POINT_Q *POINT_Q *POINT_Q;
// 1 / N'(P), 1 / N'(Q); those of 0 and infinity are 1.
constexpr double SCALE_P = 1 / (2 * POINT_P * POINT_P * (POINT_P * POINT_P - POINT_Q * POINT_Q));
constexpr double SCALE_Q = 1 / (2 * POINT_Q * POINT_Q * (POINT_Q * POINT_Q - POINT_P * POINT_P));

// B d
GPUCNN_INLINE void of_input(const Vector (&d)[TILE], Vector (&to)[TILE]) {
    Vector even = d[4] - Q2 * d[2], odd = P1 * (d[3] - Q2 * d[1]);
    to[0] = (d[0] + d[4]) - BOTH * d[2];
    to[1] = even + odd;
    to[2] = even - odd;
    even = d[4] - P2 * d[2], odd = Q1 * (d[3] - P2 * d[1]);
    to[3] = even + odd;
    to[4] = even - odd;
    to[5] = (d[5] + d[1]) - BOTH * d[3];
}

// A m: OUT = 4 outputs of a tile of a 3x3 kernel, or 2 of a 5x5 one.
GPUCNN_INLINE void of_output(const Vector (&m)[TILE], Vector (&to)[4]) {
    Vector even_p = m[1] + m[2], odd_p = m[1] - m[2], even_q = m[3] + m[4], odd_q = m[3] - m[4];
    to[0] = m[0] + (even_p + even_q);
    to[1] = P1 * odd_p + Q1 * odd_q;
    to[2] = P2 * even_p + Q2 * even_q;
    to[3] = m[5] + (P3 * odd_p + Q3 * odd_q);
}

GPUCNN_INLINE void of_output(const Vector (&m)[TILE], Vector (&to)[2]) {
    to[0] = m[0] + ((m[1] + m[2]) + (m[3] + m[4]));
    to[1] = m[5] + (P1 * (m[1] - m[2]) + Q1 * (m[3] - m[4]));
}

// A^T y, for the filter gradient
GPUCNN_INLINE void of_gradient(const Vector (&y)[4], Vector (&to)[TILE]) {
    Vector even = y[0] + P2 * y[2], odd = P1 * y[1] + P3 * y[3];
    to[0] = y[0];
    to[1] = even + odd;
    to[2] = even - odd;
    even = y[0] + Q2 * y[2], odd = Q1 * y[1] + Q3 * y[3];
    to[3] = even + odd;
    to[4] = even - odd;
    to[5] = y[3];
}

GPUCNN_INLINE void of_gradient(const Vector (&y)[2], Vector (&to)[TILE]) {
    Vector odd_p = P1 * y[1], odd_q = Q1 * y[1];
    to[0] = y[0];
    to[1] = y[0] + odd_p;
    to[2] = y[0] - odd_p;
    to[3] = y[0] + odd_q;
    to[4] = y[0] - odd_q;
    to[5] = y[1];
}

// G w: K = 3 or 5 numbers of a kernel's row
template <int K>
GPUCNN_INLINE void of_filter(const Vector (&w)[K], Vector (&to)[TILE]) {
    constexpr float P[] = {SCALE_P, SCALE_P *POINT_P, SCALE_P *POINT_P *POINT_P,
                           SCALE_P *POINT_P *POINT_P *POINT_P, SCALE_P *POINT_P *POINT_P *POINT_P *POINT_P};
    constexpr float Q[] = {SCALE_Q, SCALE_Q *POINT_Q, SCALE_Q *POINT_Q *POINT_Q,
                           SCALE_Q *POINT_Q *POINT_Q *POINT_Q, SCALE_Q *POINT_Q *POINT_Q *POINT_Q *POINT_Q};
    Vector even_p = P[0] * w[0] + P[2] * w[2], odd_p = P[1] * w[1];
    Vector even_q = Q[0] * w[0] + Q[2] * w[2], odd_q = Q[1] * w[1];
    if constexpr (K == 5) {
        even_p += P[4] * w[4], odd_p += P[3] * w[3];
        even_q += Q[4] * w[4], odd_q += Q[3] * w[3];
    }
    to[0] = w[0];
    to[1] = even_p + odd_p;
    to[2] = even_p - odd_p;
    to[3] = even_q + odd_q;
    to[4] = even_q - odd_q;
    to[5] = w[K - 1];
}

// G^T u, for the filter gradient
template <int K>
GPUCNN_INLINE void of_sums(const Vector (&u)[TILE], Vector (&to)[K]) {
    constexpr float SP = SCALE_P, SQ = SCALE_Q;
    Vector even_p = SP * (u[1] + u[2]), odd_p = SP * (u[1] - u[2]);
    Vector even_q = SQ * (u[3] + u[4]), odd_q = SQ * (u[3] - u[4]);
    to[0] = u[0] + (even_p + even_q);
    to[1] = P1 * odd_p + Q1 * odd_q;
    to[2] = P2 * even_p + Q2 * even_q;
    if constexpr (K == 5) {
        to[3] = P3 * odd_p + Q3 * odd_q;
        to[4] = (P2 * P2) * even_p + (Q2 * Q2) * even_q;
    }
    to[K - 1] += u[5];
}

}  // namespace winograd
}  // namespace gpucnn
