// 16-bit floating-point formats, bit by bit: what a number means, and how a double is rounded to one.
#pragma once

namespace gpucnn_host {

// A 16-bit format by its number of exponent bits: 5 for half, 8 for bfloat16.
template <int EXPONENT_BITS> struct Format {
    static constexpr int MANTISSA_BITS = 15 - EXPONENT_BITS;
    static constexpr int BIAS = (1 << (EXPONENT_BITS - 1)) - 1;
    static constexpr unsigned INFINITE = ((1u << EXPONENT_BITS) - 1) << MANTISSA_BITS;
    static constexpr unsigned QUIET_NAN = 0x7fffu;  // what CUDA's conversions give for any NaN

    static double widen(unsigned short bits) {
        const unsigned magnitude = bits & 0x7fffu;
        const int exponent = int(magnitude >> MANTISSA_BITS);
        const int fraction = int(magnitude & ((1u << MANTISSA_BITS) - 1));
        double value;
        if (magnitude >= INFINITE) {
            value = fraction ? __builtin_nan("") : __builtin_inf();
        } else if (exponent == 0) {
            value = power(1 - BIAS - MANTISSA_BITS) * fraction;
        } else {
            value = power(exponent - BIAS - MANTISSA_BITS) * (fraction + (1 << MANTISSA_BITS));
        }
        return bits & 0x8000u ? -value : value;
    }

    enum Direction { NEAREST_EVEN, TOWARD_ZERO, UP, DOWN };

    // From the bits of a double, rounded once.
    static unsigned short narrow(double value, Direction direction = NEAREST_EVEN) {
        unsigned long long bits;
        __builtin_memcpy(&bits, &value, sizeof bits);
        const unsigned sign = unsigned(bits >> 63) << 15;
        const int exponent = int(bits >> 52 & 0x7ff) - 1023;
        unsigned long long significand = bits & 0xfffffffffffffull;
        if (exponent == 1024) return (unsigned short)(significand ? QUIET_NAN : sign | INFINITE);
        if (exponent == -1023) return round(sign, 0, significand != 0, direction);  // far below every subnormal
        significand |= 1ull << 52;
        int shift = 52 - MANTISSA_BITS;
        int stored = exponent + BIAS;
        if (stored < 1) {  // a subnormal of the format: no leading one
            shift += 1 - stored;
            stored = 1;
        }
        if (shift > 63) return round(sign, 0, true, direction);
        // The leading one of ``kept`` counts the exponent up by one, and so does a carry out of the fraction.
        const unsigned long long kept = significand >> shift;
        const unsigned long long rest = significand & ((1ull << shift) - 1), half = 1ull << (shift - 1);
        const int below = rest == 0 ? 0 : rest < half ? 1 : rest == half ? 2 : 3;
        if (stored > 2 * BIAS) return overflow(sign, direction);
        return round(sign, (unsigned(stored - 1) << MANTISSA_BITS) + unsigned(kept), below, direction);
    }

private:
    static double power(int exponent) {
        const unsigned long long bits = (unsigned long long)(exponent + 1023) << 52;
        double value;
        __builtin_memcpy(&value, &bits, sizeof value);
        return value;
    }
    // ``below``: the discarded part is 0 nothing, 1 less than half a unit, 2 half, 3 more.
    static unsigned short round(unsigned sign, unsigned magnitude, int below, Direction direction) {
        bool away = false;
        switch (direction) {
            case NEAREST_EVEN: away = below == 3 || (below == 2 && (magnitude & 1)); break;
            case TOWARD_ZERO: break;
            case UP: away = below && !sign; break;
            case DOWN: away = below && sign; break;
        }
        return (unsigned short)(sign | (magnitude + away));
    }
    static unsigned short overflow(unsigned sign, Direction direction) {
        const bool away = direction == NEAREST_EVEN || (direction == UP && !sign) || (direction == DOWN && sign);
        return (unsigned short)(sign | (away ? INFINITE : INFINITE - 1));
    }
};

}  // namespace gpucnn_host
